"""A student under its task loss and one method: the same loop for every recipe, in `kdfast distill` and in the tests."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..distill import Distiller, DistillLoss, Term
from .recipes import Recipe, Setting

_UNLABELLED = -100
_DECAY = 0.9  # of the student's averages: a run has hundreds of steps, not a million


class Data(NamedTuple):
    """What a student learns from and is measured on."""

    x: Tensor
    y: Tensor  # the classes of the first `labelled` samples, a teacher's answers for the others
    labelled: int
    validation: tuple[Tensor, Tensor]  # samples and their classes, for choosing weights
    test: tuple[Tensor, Tensor]
    view: Callable[[str, Tensor, Generator], Tensor]  # (name, index [N], generator) -> that view of the samples
    student: Callable[[], nn.Module]
    teachers: Mapping[str, nn.Module | list[nn.Module]]  # by the names of Recipe.teachers
    setting: Setting


class Nothing(DistillLoss):
    """No method: the task alone."""

    def forward(self, student, teacher, *, index=None, labels=None) -> Tensor:
        return self._report(nothing=torch.zeros(()))


ALONE = Recipe(lambda setting: Nothing(), teachers="none")


class Trainer:
    """`step()` trains on a random batch and gives the method's part of the loss; all is drawn from `seed`."""

    def __init__(self, recipe: Recipe, data: Data, seed: int, *, batch_size: int, steps: int, learning_rate: float = 0.01) -> None:
        torch.manual_seed(seed)
        self.recipe, self.data, self.batch_size = recipe, data, batch_size
        self.generator = Generator().manual_seed(seed)
        self.student = data.student()
        self.averages = [AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(_DECAY)) for _ in range(2)]
        self.teachers = {**data.teachers, "average": self.averages[0], "averages": self.averages, "none": None}[recipe.teachers]
        terms = {"method": Term(recipe.make(data.setting), at=recipe.at, weight=recipe.weight)}
        self.distiller = Distiller(self.student, self.teachers, terms)
        x, teacher_input, _, _ = self.batch()
        self.distiller.build(x, teacher_input=teacher_input)
        self.optimizer = torch.optim.Adam(self.distiller.parameters(), learning_rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def batch(self) -> tuple:
        """(input, the teachers' input, classes [N], index [N]); half of it labelled where some samples are not."""
        labelled, rest = self.data.labelled, len(self.data.x) - self.data.labelled
        known = self.batch_size // 2 if rest else self.batch_size
        index = torch.randperm(labelled, generator=self.generator)[:known]
        if rest:
            others = torch.randperm(rest, generator=self.generator)[: self.batch_size - known]
            index = torch.cat([index, labelled + others])

        def seen(views: tuple[str, ...]) -> dict[str, Tensor]:
            return {name: self.data.view(name, index, self.generator) for name in views}

        x = seen(self.recipe.views) or self.data.view("a", index, self.generator)
        if self.recipe.stacked:
            x = torch.cat(list(x.values()))
        return x, seen(self.recipe.teacher_views) or None, self.data.y[index], index

    def forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        x, teacher_input, y, index = self.batch()
        targets = y.where(index < self.data.labelled, _UNLABELLED)
        options = {"labels": y, "task": _cross_entropy, "task_weight": self.recipe.task_weight}
        return self.distiller(x, targets, index=index, teacher_input=teacher_input, **options)

    def step(self) -> float:
        loss, parts = self.forward()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        for average in self.averages:
            average.update_parameters(self.student)
        return float(parts["method"])


def _cross_entropy(output: Tensor, targets: Tensor) -> Tensor:
    """Over the labelled samples; of stacked views the plain one, which is the first."""
    return F.cross_entropy(output[: len(targets)], targets, ignore_index=_UNLABELLED)


def accuracy(student: nn.Module, samples: tuple[Tensor, Tensor]) -> float:
    """The share of samples that the student's output classifies rightly."""
    training = student.training
    student.eval()
    x, y = samples
    with torch.no_grad():
        right = student(x).argmax(1) == y
    student.train(training)
    return float(right.float().mean())
