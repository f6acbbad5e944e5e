"""scikit-learn's digits: teachers that learnt 1,200 of them, and a student of a thirtieth of their size that sees 200 of these."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..distill import make_bags
from .recipes import Setting
from .training import Data

TAUGHT, TRAIN, CLASSES = 1200, 200, 10  # images of the teachers, of the student; classes
STUDENT, TEACHER, SECOND = 8, 48, 32  # widths
NOISE = 0.05  # standard deviation, of pixels in [0, 1]
_TEACHER_STEPS, _BATCH = 400, 64


class Tokens(nn.Module):
    """Maps [N, C, H, W] as tokens [N, H W, C]."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.flatten(2).mT


class Network(nn.Module):
    """Images [N, 1, 8, 8] -> "early" [N, C, 4, 4] -> "maps" [N, 2 C, 2, 2] -> "tokens", "pool" [N, 2 C] -> logits."""

    def __init__(self, width: int, classes: int = CLASSES) -> None:
        super().__init__()
        self.early, self.maps = _block(1, width), _block(width, 2 * width)
        self.tokens, self.pool = Tokens(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.maps(self.early(x))
        self.tokens(maps)
        return self.fc(self.pool(maps))


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2))


def load() -> Data:
    """The teachers are trained here, in seconds; 597 images are for the test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16  # [1797, 1, 8, 8]
    labels = torch.tensor(found.target)[order]
    x, y = images[:TAUGHT], labels[:TAUGHT]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one, two = (_taught(Network(width), x, y) for width in (TEACHER, SECOND))
        halves = [
            _taught(Network(width, CLASSES // 2), x[mine], y[mine] - start)
            for width, start in ((TEACHER, 0), (SECOND, CLASSES // 2))
            for mine in [(y >= start) & (y < start + CLASSES // 2)]
        ]
        random = Network(TEACHER).eval()
    teachers = {"one": one, "two": [one, two], "halves": halves, "random": random}
    x, y = x[:TRAIN], y[:TRAIN]
    with torch.no_grad():
        bags = make_bags(one.pool(one.maps(one.early(x))), k=5)

    def view(name: str, index: Tensor, generator: Generator) -> Tensor:
        if name == "p":  # a member of the sample's bag
            index = bags[index, torch.randint(bags.shape[1], index.shape, generator=generator)]
        turns = int(name.removeprefix("rotated")) if name.startswith("rotated") else 0
        return torch.rot90(augment(x[index], generator), turns, (2, 3))

    setting = Setting(y, CLASSES, student_dim=2 * STUDENT, teacher_dim=2 * TEACHER, queue=128, negatives=64, dim=32)
    return Data(x, y, images[TAUGHT:], labels[TAUGHT:], view, lambda: Network(STUDENT), teachers, setting)


def augment(x: Tensor, generator: Generator) -> Tensor:
    """Moved by at most one pixel, with noise."""
    rows, columns = (torch.randint(-1, 2, (), generator=generator).item() for _ in range(2))
    return x.roll((rows, columns), (2, 3)) + NOISE * torch.randn(x.shape, generator=generator)


def _taught(network: Network, x: Tensor, y: Tensor) -> Network:
    optimizer, generator = torch.optim.Adam(network.parameters(), 3e-3), Generator().manual_seed(0)
    for _ in range(_TEACHER_STEPS):
        index = torch.randint(len(x), (_BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(network(augment(x[index], generator)), y[index]).backward()
        optimizer.step()
    return network.eval()
