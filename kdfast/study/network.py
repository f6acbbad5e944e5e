"""The study's networks: two blocks of convolutions over images, or over one row of points or words."""

import torch
from torch import Tensor, nn


class Tokens(nn.Module):
    """Maps [N, C, H, W] as tokens [N, H W, C]."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.flatten(2).mT


class Words(nn.Module):
    """Word numbers [N, L] as maps [N, dim, 1, L]; word 0 is no word."""

    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, dim, padding_idx=0)

    def forward(self, words: Tensor) -> Tensor:
        return self.table(words).mT.unsqueeze(2)


class Network(nn.Module):
    """[N, 1, H, W] -> "early" [N, C, ...] -> "maps" [N, 2 C, ...] -> "tokens", "pool" [N, 2 C] -> logits [N, classes].

    Each block halves the map `pool` by `pool`; `depth` is the number of convolutions in the first. `front` maps the input first.
    """

    def __init__(
        self, width: int, classes: int, *, kernel=(3, 3), pool=(2, 2), depth: int = 1, front: nn.Module | None = None, channels: int = 1
    ) -> None:
        super().__init__()
        convolutions = [_convolution(channels if i == 0 else width, width, kernel) for i in range(depth)]
        self.early = nn.Sequential(*([] if front is None else [front]), *convolutions, nn.MaxPool2d(pool))
        self.maps = nn.Sequential(_convolution(width, 2 * width, kernel), nn.MaxPool2d(pool))
        self.tokens, self.pool = Tokens(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(2 * width, classes)

    def pooled(self, x: Tensor) -> Tensor:
        """The features [N, 2 C] under the classes."""
        maps = self.maps(self.early(x))
        self.tokens(maps)
        return self.pool(maps)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pooled(x))


def _convolution(before: int, after: int, kernel) -> nn.Sequential:
    padding = tuple(size // 2 for size in kernel)
    return nn.Sequential(nn.Conv2d(before, after, kernel, padding=padding), nn.BatchNorm2d(after), nn.ReLU())


class SelfSupervised(nn.Module):
    """A classifier (with `pooled` and `fc`) with a second head on its features: "head" [N, dim]; the output is the classifier's logits."""

    def __init__(self, classifier: nn.Module, dim: int) -> None:
        super().__init__()
        width = classifier.fc.in_features
        self.classifier, self.head = classifier, nn.Sequential(nn.Linear(width, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            pooled = self.classifier.pooled(x)
        self.head(pooled)
        return self.classifier.fc(pooled)
