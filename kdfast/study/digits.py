"""scikit-learn's digits: teachers learn 1,200 images, a student 200 of these, all with labels."""

import torch
from torch import Generator, Tensor

from .network import Network
from .subject import Subject

NEEDS = {"sklearn": "scikit-learn"}  # module: package
TAUGHT, TRAIN = 1200, 200
NOISE = 0.05  # standard deviation, of pixels in [0, 1]


def load() -> Subject:
    """1,797 images of 8 x 8 pixels in a fixed order: 597 are for the test, the teachers' that no student sees for validation."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=Generator().manual_seed(0))
    return Subject(
        torch.tensor(found.images, dtype=torch.float32)[order, None] / 16,
        torch.tensor(found.target)[order],
        classes=10,
        taught=TAUGHT,
        train=TRAIN,
        labelled=TRAIN,
        validation=slice(TRAIN, TAUGHT),
        test=slice(TAUGHT, None),
        augment=augment,
        turn=lambda x, times: torch.rot90(x, times, (2, 3)),
        network=Network,
        student=8,
        teacher=48,
        second=32,
    )


def augment(x: Tensor, generator: Generator) -> Tensor:
    """Moved by at most one pixel, with noise."""
    rows, columns = (torch.randint(-1, 2, (), generator=generator).item() for _ in range(2))
    return x.roll((rows, columns), (2, 3)) + NOISE * torch.randn(x.shape, generator=generator)
