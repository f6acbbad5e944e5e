"""A student under its task loss and one method: the same loop for every recipe, in `kdfast distill` and in the tests."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..distill import Distiller, DistillLoss, Term
from .recipes import Recipe, Setting

_DECAY = 0.9  # of the student's averages: a run has hundreds of steps, not a million


class Data(NamedTuple):
    """What a student learns from and is measured on."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
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
        """(input, the teachers' input, targets [N], index [N])."""
        index = torch.randperm(len(self.data.x), generator=self.generator)[: self.batch_size]

        def seen(views: tuple[str, ...]) -> dict[str, Tensor]:
            return {name: self.data.view(name, index, self.generator) for name in views}

        x = seen(self.recipe.views) or self.data.view("a", index, self.generator)
        return x, seen(self.recipe.teacher_views) or None, self.data.y[index], index

    def forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        x, teacher_input, y, index = self.batch()
        options = {"labels": y, "task": F.cross_entropy, "task_weight": self.recipe.task_weight}
        return self.distiller(x, y, index=index, teacher_input=teacher_input, **options)

    def step(self) -> float:
        loss, parts = self.forward()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        for average in self.averages:
            average.update_parameters(self.student)
        return float(parts["method"])


def accuracy(student: nn.Module, data: Data) -> float:
    """The share of test samples that the student's output classifies rightly."""
    training = student.training
    student.eval()
    with torch.no_grad():
        right = student(data.test_x).argmax(1) == data.test_y
    student.train(training)
    return float(right.float().mean())
