"""What the tests of distillation methods share: a small problem with its teacher, a training loop, and each method's use."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdfast import Distiller, Projector, QueueBank, Term, distill

D = torch.float64
CLASSES, TRAIN, BATCH = 4, 384, 48


def rows(*shape, grad=False):
    return torch.randn(*shape, dtype=D, requires_grad=grad)


def same_value_and_gradient(loss, expected, *inputs, rtol=1e-8, atol=1e-10):
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=atol)
    got, want = (torch.autograd.grad(value, inputs, retain_graph=True) for value in (loss, expected))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * rtol, atol=10 * atol)


class Tokens(nn.Module):
    def forward(self, maps):
        return maps.flatten(2).mT  # [N, HW, C]


class Net(nn.Module):
    """8 numbers -> maps [N, C, 2, 2] -> tokens, pooled features [N, C] -> logits."""

    def __init__(self, channels: int, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 4 * channels), nn.ReLU(), nn.Unflatten(1, (channels, 2, 2)))
        self.layer = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.tokens = Tokens()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        maps = self.layer(self.stem(x))
        self.tokens(maps)
        return self.fc(self.pool(maps))


class Problem(NamedTuple):
    x: torch.Tensor  # [TRAIN, 8]
    y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    teachers: tuple  # of different widths
    halves: tuple  # two teachers that know two classes each


@functools.cache
def problem() -> Problem:
    """Each class two clusters in 8 dimensions, and teachers that have learnt them."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        centres = 1.7 * torch.randn(2 * CLASSES, 8)
        cluster = torch.randint(0, 2 * CLASSES, (2 * TRAIN,))
        x, y = centres[cluster] + 0.8 * torch.randn(len(cluster), 8), cluster % CLASSES
        train = x[:TRAIN], y[:TRAIN]
        teachers = tuple(_taught(Net(width), *train) for width in (24, 20))
        halves = []
        for i, width in enumerate((24, 20)):
            mine = train[1] // 2 == i
            halves.append(_taught(Net(width, CLASSES // 2), train[0][mine], train[1][mine] - 2 * i))
    return Problem(*train, x[TRAIN:], y[TRAIN:], teachers, tuple(halves))


def _taught(net: Net, x, y) -> Net:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


class Nothing(distill.DistillLoss):
    """No method: the task alone."""

    def forward(self, student, teacher, *, index=None, labels=None):
        return self._report(nothing=torch.zeros(()))


class Case(NamedTuple):
    """How a method is used: `make` gives the loss; the rest are arguments of Term and Distiller."""

    make: Callable[[], nn.Module]
    at: Any = None
    weight: float = 1.0
    views: tuple = ()  # views of the student: noisy copies of the batch; () is the batch itself
    teacher_views: tuple = ()
    teachers: str = "one"  # "one", "two", "halves", "own" (its moving average), "ema" (two of these), "one+ema", "none"


ALONE = Case(Nothing)
FEATURES = {"logits": None, "feat": "pool"}


CASES = {
    "KD": Case(lambda: distill.KD(T=4)),
    "MSE": Case(lambda: distill.MSE("linear"), at="pool"),
    "MSE inverted": Case(lambda: distill.MSE(Projector(invert=True)), at="layer"),
    "Cosine": Case(lambda: distill.Cosine("linear"), at="pool"),
    "BINGO": Case(
        lambda: distill.BINGO(bank=QueueBank(96, 24), projector="linear"), at="pool", views=("a", "p"), teacher_views=("a",), weight=0.1
    ),
    "WCoRD": Case(lambda: distill.WCoRD(QueueBank(96, 16), dim=16), at="pool", weight=0.1),
    "CRD": Case(lambda: distill.CRD(TRAIN, dim=16, num_negatives=32, labels=problem().y), at="pool", weight=0.1),
    "CoDIR": Case(lambda: distill.CoDIR(TRAIN, dim=16, num_negatives=32, labels=problem().y), at=["tokens", "pool"], weight=0.1),
    "SEED": Case(lambda: distill.SEED(QueueBank(96, 24)), at="pool", weight=0.1),
    "CompRess": Case(lambda: distill.CompRess(QueueBank(96, 24), QueueBank(96, 12)), at="pool", weight=0.1),
    "RKD": Case(distill.RKD, at="pool", weight=0.05),
    "SpectralTail": Case(lambda: distill.SpectralTail(rank=4), at="pool", teachers="none"),
    "ICKD": Case(distill.ICKD, at="layer", weight=0.1),
    "DIST": Case(distill.DIST),
    "SRD": Case(distill.SRD, at=FEATURES, weight=0.1),
    "MLKD": Case(distill.MLKD, at=FEATURES),
    "MultiHeadKD": Case(lambda: distill.MultiHeadKD(num_heads=2, num_classes=CLASSES), at=(["layer", "pool"], None), weight=0.1),
    "PESFKD": Case(distill.PESFKD),
    "HybridDistill": Case(distill.HybridDistill, at={"tokens": "tokens", "values": "stem.2"}, teachers="two"),
    "TWIST": Case(distill.TWIST, views=("a", "b"), teachers="none", weight=0.2),
    "CKA": Case(lambda: distill.CKA([2, 2], common_dim=16), at=FEATURES, teachers="halves", weight=0.3),
    "CKA bank": Case(
        lambda: distill.CKA([2, 2], common_dim=16, bank=QueueBank(96, 16, labels=True), align="sinkhorn"),
        at=FEATURES,
        teachers="halves",
        weight=0.3,
    ),
    "RGAL": Case(lambda: distill.RGAL(2), at={"logits": None, "layers": ["layer", "pool"]}),
    "MSVQ": Case(
        lambda: distill.MSVQ(QueueBank(96, 12), QueueBank(96, 12)),
        at="pool",
        views=("a",),
        teacher_views=("b", "c", "d"),
        teachers="ema",
        weight=0.1,
    ),
    "SSKD": Case(distill.SSKD, at=FEATURES, views=("plain", "rotated1", "rotated2", "rotated3"), weight=0.2),
    "CoNe": Case(
        lambda: distill.CoNe(QueueBank(96, 12, labels=True), QueueBank(96, CLASSES, normalize=False), neighbors=48),
        at=FEATURES,
        teachers="own",
        weight=0.5,
    ),
    "WCL": Case(distill.WCL, at={"instance": "pool", "graph": "pool"}, views=("a", "b"), teachers="none", weight=0.1),
    "SwAV": Case(
        lambda: distill.SwAV(16, 12, banks=[QueueBank(96, 12), QueueBank(96, 12)]), at="pool", views=("a", "b"), teachers="none", weight=0.1
    ),
    "FacultyOT": Case(distill.FacultyOT),
    "REFILLED": Case(distill.REFILLED, at="pool", weight=0.1),
    "REFILLED stage 2": Case(lambda: distill.REFILLED(2), at=(None, "pool"), weight=0.02),
    "IAA": Case(lambda: distill.IAA(CLASSES, 12), at="pool", teachers="none", weight=0.1),
    "CKD": Case(distill.CKD, weight=5.0),
}


class Run:
    """A student under its task loss and one method (or none)."""

    def __init__(self, case: Case = ALONE, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.case, self.data = case, problem()
        self.student = Net(12)
        self.ema = [AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for _ in range(2)]
        self.distiller = Distiller(self.student, self._teachers(), {"method": Term(case.make(), at=case.at, weight=case.weight)})
        self.generator = torch.Generator().manual_seed(seed)
        x, teacher_input, _, _ = self.batch()
        self.distiller.build(x, teacher_input=teacher_input)
        self.optimizer = torch.optim.Adam(self.distiller.parameters(), lr=0.01)

    def _teachers(self):
        one, two = self.data.teachers
        known = {"one": one, "two": [one, two], "halves": list(self.data.halves), "ema": self.ema, "one+ema": [one, self.ema[0]]}
        return {**known, "own": self.ema[0], "none": None}[self.case.teachers]

    def batch(self):
        """(input, the teachers' input, targets, index)."""
        index = torch.randint(0, TRAIN, (BATCH,), generator=self.generator)
        x, y = self.data.x[index], self.data.y[index]

        def noisy(views):
            return {view: x + 0.2 * torch.randn(x.shape, generator=self.generator) for view in views}

        return noisy(self.case.views) or x, noisy(self.case.teacher_views) or None, y, index

    def forward(self) -> tuple[torch.Tensor, dict]:
        x, teacher_input, y, index = self.batch()
        return self.distiller(x, y, index=index, task=F.cross_entropy, teacher_input=teacher_input)

    def step(self) -> float:
        """One step; the method's own part of the loss."""
        loss, parts = self.forward()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for model in self.ema:
            model.update_parameters(self.student)
        return float(parts["method"])

    def accuracy(self) -> float:
        self.student.eval()
        with torch.no_grad():
            hit = self.student(self.data.test_x).argmax(1) == self.data.test_y
        self.student.train()
        return hit.float().mean().item()
