"""MSVQ: self-supervised learning with multiple sample views and queues (Peng et al. 2023, 2305.05370)."""

import torch
from torch import Tensor

from .._core import checks
from ..functional import similarity_distillation
from .base import DistillLoss, check_queue, like_bank, unit, vectors, views


class MSVQ(DistillLoss):
    """The student's similarities to two queues follow those that two moving averages of it have on other views.

    `loss({"a": s}, [teacher_1, teacher_2])`: the student sees view a, teacher 1 the views b and c, teacher 2 view d, each a
    dict of embeddings [N, D], l2-normalised here. With p_i the softmax of a teacher's scores in queue i / teacher_temperature and
    H the cross-entropy to the student's scores in that queue / student_temperature,
        loss = 1/3 [H(p_1(b)) + H(p_1(c)) + H(p_2(d))];
    then teacher_1(b) and teacher_2(d) are pushed. Teachers: torch's AveragedModel at decays 0.99 and 0.95, as
    `Distiller(student, [ema_1, ema_2], ...)` with `teacher_input={"b": x_b, "c": x_c, "d": x_d}`.

    Args:
        first_bank, second_bank: QueueBanks of width D; published: 4096 rows.
        student_temperature: > 0, default 0.1. teacher_temperature: > 0, default 0.04 (published 0.03 to 0.04).
        push: see DistillLoss; both queues.

    Raises:
        ValueError, TypeError: banks that are no queues, missing views, another number of teachers than two.
    """

    def __init__(
        self, first_bank, second_bank, *, student_temperature: float = 0.1, teacher_temperature: float = 0.04, push: bool = True
    ) -> None:
        super().__init__(push=push)
        check_queue("first_bank", first_bank)
        check_queue("second_bank", second_bank)
        checks.positive_number("student_temperature", student_temperature)
        checks.positive_number("teacher_temperature", teacher_temperature)
        self.first_bank, self.second_bank = first_bank, second_bank
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature

    def forward(self, student, teacher, *, index=None, labels=None) -> Tensor:
        if not isinstance(teacher, list) or len(teacher) != 2:
            raise ValueError("teacher must be a list of two, each a dict of views")
        (a,) = (unit(vectors(x, "student")) for x in views("student", student, ("a",)))
        b, c = (unit(vectors(x, "teacher").detach()) for x in views("teacher", teacher[0], ("b", "c")))
        (d,) = (unit(vectors(x, "teacher").detach()) for x in views("teacher", teacher[1], ("d",)))
        loss = self._report(
            first=2 / 3 * self._followed(a.repeat(2, 1), torch.cat([b, c]), self.first_bank),
            second=1 / 3 * self._followed(a, d, self.second_bank),
        )
        self._update_bank(b, bank=self.first_bank)
        self._update_bank(d, bank=self.second_bank)
        return loss

    def _followed(self, student: Tensor, teacher: Tensor, bank) -> Tensor:
        student, teacher = like_bank(student, bank.storage), like_bank(teacher, bank.storage)
        temperatures = {"student_temperature": self.student_temperature, "teacher_temperature": self.teacher_temperature}
        return similarity_distillation(student, teacher, bank, **temperatures)
