"""What the tests of distillation methods share: comparison with a formula, and a small problem with its teachers."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from kdfast.study.network import SelfSupervised, Tokens
from kdfast.study.recipes import Recipe, Setting
from kdfast.study.training import Data, Trainer

D = torch.float64
CLASSES, TRAIN, BATCH, STEPS = 4, 384, 48, 60


def rows(*shape, grad=False):
    return torch.randn(*shape, dtype=D, requires_grad=grad)


def same_value_and_gradient(loss, expected, *inputs, rtol=1e-8, atol=1e-10):
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=atol)
    got, want = (torch.autograd.grad(value, inputs, retain_graph=True) for value in (loss, expected))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * rtol, atol=10 * atol)


class Net(nn.Module):
    """8 numbers -> maps [N, C, 2, 2] -> tokens, pooled features [N, C] -> logits; modules named as recipes name them."""

    def __init__(self, channels: int, classes: int = CLASSES) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Linear(8, 4 * channels), nn.ReLU(), nn.Unflatten(1, (channels, 2, 2)))
        self.maps = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.tokens, self.pool = Tokens(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(channels, classes)

    def pooled(self, x):
        maps = self.maps(self.early(x))
        self.tokens(maps)
        return self.pool(maps)

    def forward(self, x):
        return self.fc(self.pooled(x))


@functools.cache
def problem() -> Data:
    """Each class two clusters in 8 dimensions, and teachers that have learnt them."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        centres = 1.7 * torch.randn(2 * CLASSES, 8)
        cluster = torch.randint(0, 2 * CLASSES, (2 * TRAIN,))
        points, labels = centres[cluster] + 0.8 * torch.randn(len(cluster), 8), cluster % CLASSES
        x, y = points[:TRAIN], labels[:TRAIN]
        one, two = (_taught(Net(width), x, y) for width in (24, 20))
        halves = [_taught(Net(width, CLASSES // 2), x[y // 2 == i], y[y // 2 == i] - 2 * i) for i, width in enumerate((24, 20))]
        sides = _taught(Net(24, 2), x, (x[:, 0] > 0).long())
        teachers = {"one": one, "two": [one, two], "halves": halves, "other": sides, "random": Net(24).eval()}
        teachers["self-supervised"] = SelfSupervised(one, 16).eval()

    def view(name, index, generator):
        return x[index] + 0.2 * torch.randn(len(index), 8, generator=generator)

    setting = Setting(y, CLASSES, student_dim=12, teacher_dim=24, queue=96, negatives=32, dim=16)
    rest = points[TRAIN:], labels[TRAIN:]
    return Data(x, y, TRAIN, rest, rest, view, lambda: Net(12), teachers, setting)


def _taught(net: Net, x, y) -> Net:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def trainer(recipe: Recipe, seed: int = 0) -> Trainer:
    return Trainer(recipe, problem(), seed, batch_size=BATCH, steps=STEPS)
