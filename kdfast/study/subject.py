"""From samples to a study: who sees which, and the teachers, trained here in seconds."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..distill import make_bags
from .network import Network, SelfSupervised
from .recipes import VIEWS, Setting
from .training import Data

_STEPS, _BATCH, _SCORE_TEMPERATURE = 600, 64, 0.5


class Subject(NamedTuple):
    """Samples and what may be done with them. Teachers learn the first `taught`, students the first `train`."""

    x: Tensor
    y: Tensor
    classes: int
    taught: int
    train: int
    labelled: int  # of the student's samples; for the others it has the teacher's answer
    validation: slice
    test: slice
    augment: Callable[[Tensor, Generator], Tensor]
    turn: Callable[[Tensor, int], Tensor]  # (samples, 0 ... 3): the same seen otherwise; 0 leaves them
    network: Callable[..., Network]  # (width, classes, depth=1)
    student: int  # widths
    teacher: int
    second: int


def prepare(subject: Subject, *, taught: bool = True) -> Data:
    """The study of `subject`. Its teachers:

    - "one"; "two": it and a narrower, deeper one; "halves": a wide and a narrow, deep one that know half of the classes each;
    - "other": one that learnt to tell the four turned views apart and has never met a class; "random": one that learnt nothing;
    - "self-supervised": "one" with a second head that finds the plain sample of a turned one (SSKD's teacher).

    `taught=False` leaves them all untrained.
    """
    x, y, classes = subject.x, subject.y, subject.classes
    known, answers = x[: subject.taught], y[: subject.taught]
    steps = _STEPS if taught else 0
    widths = ((subject.teacher, 1), (subject.second, 2))

    def learnt(width: int, depth: int, mine: Tensor | slice, start: int, count: int) -> Network:
        return _classifier(subject.network(width, count, depth=depth), known[mine], answers[mine] - start, subject.augment, steps)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one, two = (learnt(width, depth, slice(None), 0, classes) for width, depth in widths)
        half = classes // 2
        halves = [
            learnt(width, depth, (answers >= start) & (answers < start + half), start, half)
            for (width, depth), start in zip(widths, (0, half), strict=True)
        ]
        turned = torch.cat([subject.turn(known, i) for i in range(len(VIEWS))])
        which = torch.arange(len(VIEWS)).repeat_interleave(len(known))
        other = _classifier(subject.network(subject.teacher, len(VIEWS)), turned, which, subject.augment, steps)
        teachers = {
            "one": one,
            "two": [one, two],
            "halves": halves,
            "other": other,
            "random": subject.network(subject.teacher, classes).eval(),
            "self-supervised": _self_supervised(one, known, subject, steps),
        }
    seen = x[: subject.train]
    with torch.no_grad():
        bags = make_bags(one.pooled(seen), k=5)
        labels = torch.cat([y[: subject.labelled], one(seen[subject.labelled :]).argmax(1)])

    def view(name: str, index: Tensor, generator: Generator) -> Tensor:
        if name == "p":  # a member of the sample's bag
            index = bags[index, torch.randint(bags.shape[1], index.shape, generator=generator)]
        return subject.turn(subject.augment(seen[index], generator), VIEWS.index(name) if name in VIEWS else 0)

    setting = Setting(labels, classes, 2 * subject.student, 2 * subject.teacher, queue=128, negatives=64, dim=32)
    return Data(
        seen,
        labels,
        subject.labelled,
        (x[subject.validation], y[subject.validation]),
        (x[subject.test], y[subject.test]),
        view,
        lambda: subject.network(subject.student, classes),
        teachers,
        setting,
    )


def _classifier(network: Network, x: Tensor, y: Tensor, augment: Callable, steps: int) -> Network:
    return _trained(network, network.parameters(), len(x), steps, lambda i, g: F.cross_entropy(network(augment(x[i], g)), y[i]))


def _self_supervised(classifier: Network, x: Tensor, subject: Subject, steps: int) -> SelfSupervised:
    """Each turned sample finds its plain one among the batch's, by the cosine of "head"; the classifier stays as it is."""
    model = SelfSupervised(classifier.eval(), subject.teacher)

    def loss(index: Tensor, generator: Generator) -> Tensor:
        plain = subject.augment(x[index], generator)
        heads = [F.normalize(model.head(classifier.pooled(subject.turn(plain, i))), dim=1) for i in range(len(VIEWS))]
        scores = torch.cat(heads[1:]) @ heads[0].T / _SCORE_TEMPERATURE  # [3 N, N]
        return F.cross_entropy(scores, torch.arange(len(index)).repeat(len(VIEWS) - 1))

    return _trained(model, model.head.parameters(), len(x), steps, loss, modules=model.head)


def _trained(model: nn.Module, parameters, count: int, steps: int, loss: Callable, modules: nn.Module | None = None) -> nn.Module:
    """`steps` batches of `loss(index, generator)`, in training mode (`modules` alone, where given); then in eval mode."""
    optimizer, generator = torch.optim.Adam(parameters, 3e-3), Generator().manual_seed(0)
    (model if modules is None else modules).train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(count, (_BATCH,), generator=generator), generator).backward()
        optimizer.step()
    return model.eval()
