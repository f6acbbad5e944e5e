"""ImageGenerator and ImagePool: a small convolutional generator, and the data set its images are collected in."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .._core import checks


class ImageGenerator(nn.Module):
    """Latent vectors [N, latent_dim] to images [N, channels, image_size, image_size] in (0, 1).

    A linear map to image_size / 4 squared, then two doublings, each followed by a 3 x 3 convolution, BatchNorm and LeakyReLU.

    Args:
        latent_dim: default 256. width: channels of the last block, default 64.
        image_size: a multiple of 4, default 32. channels: default 3.
    """

    def __init__(self, latent_dim: int = 256, width: int = 64, image_size: int = 32, channels: int = 3) -> None:
        super().__init__()
        if checks.count("image_size", image_size) % 4:
            raise ValueError(f"image_size must be a multiple of 4, got {image_size}")
        self.latent_dim, start = checks.count("latent_dim", latent_dim), image_size // 4
        checks.count("width", width)
        checks.count("channels", channels)
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, 2 * width * start**2),
            nn.Unflatten(1, (2 * width, start, start)),
            nn.BatchNorm2d(2 * width),
            *_doubled(2 * width, 2 * width),
            *_doubled(2 * width, width),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(latent)


def _doubled(before: int, after: int) -> tuple[nn.Module, ...]:
    return nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)


class ImagePool(Dataset):
    """A growing data set of (image, label), kept on the CPU.

    Args:
        capacity: images kept, the newest; None keeps all.
        transform: applied to an image when it is read.
    """

    def __init__(self, capacity: int | None = None, transform: Callable | None = None) -> None:
        self.capacity = None if capacity is None else checks.count("capacity", capacity)
        self.transform = transform
        self.images, self.labels = torch.empty(0), torch.empty(0, dtype=torch.int64)

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Append images [n, C, H, W] and labels [n]."""
        newest = slice(None if self.capacity is None else -self.capacity, None)
        images, labels = images.detach().cpu(), labels.detach().cpu()
        self.images = (torch.cat([self.images, images]) if len(self) else images)[newest]
        self.labels = torch.cat([self.labels, labels])[newest]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        return image if self.transform is None else self.transform(image), self.labels[index]

    def state_dict(self) -> dict[str, Tensor]:
        return {"images": self.images, "labels": self.labels}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.images, self.labels = state["images"], state["labels"]
