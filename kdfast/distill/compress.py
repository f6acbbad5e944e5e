"""CompRess: the student's similarities to its own queue follow the teacher's to its own (Koohpayegani et al. 2020, 2010.14713)."""

from torch import Tensor

from .._core import checks
from ..functional import similarity_distillation
from .base import DistillLoss, check_queue, like_bank, unit, vectors


class CompRess(DistillLoss):
    """KL between teacher's and student's softmax over the same past samples, each in its own queue.

    `loss(student, teacher)` with embeddings [N, D] of any two widths (maps are averaged), l2-normalised here:
        loss = mean KL(softmax(t . Q_t / teacher_temperature) || softmax(s . Q_s / student_temperature)).
    After scoring t is pushed to Q_t, and to Q_s the student's embedding or, where the teacher is a list [teacher, momentum
    copy of the student] (torch's AveragedModel at decay 0.999), the copy's. Without `student_bank` the student is scored in the
    teacher's queue (the paper's single-queue form; equal widths).

    Args:
        teacher_bank: a QueueBank of the teacher's width; published: 128,000 rows.
        student_bank: a QueueBank of the student's width and the same capacity, filled by this loss alone; or None.
        student_temperature, teacher_temperature: > 0, default 0.04.
        push: see DistillLoss; both queues.

    Raises:
        ValueError, TypeError: banks that are no queues or of two capacities, widths that do not fit.
    """

    def __init__(
        self,
        teacher_bank,
        student_bank=None,
        *,
        student_temperature: float = 0.04,
        teacher_temperature: float = 0.04,
        push: bool = True,
    ) -> None:
        super().__init__(push=push)
        check_queue("teacher_bank", teacher_bank)
        if student_bank is not None:
            check_queue("student_bank", student_bank)
            if student_bank.capacity != teacher_bank.capacity:
                raise ValueError(f"student_bank must have teacher_bank's capacity {teacher_bank.capacity}, got {student_bank.capacity}")
        checks.positive_number("student_temperature", student_temperature)
        checks.positive_number("teacher_temperature", teacher_temperature)
        self.teacher_bank, self.student_bank = teacher_bank, student_bank
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature

    def forward(self, student, teacher, *, index=None, labels=None) -> Tensor:
        teacher, *copy = teacher if isinstance(teacher, list) else [teacher]
        student, teacher = unit(vectors(student, "student")), unit(vectors(teacher, "teacher").detach())
        own = self.student_bank if self.student_bank is not None else self.teacher_bank
        loss = similarity_distillation(
            like_bank(student, own.storage),
            like_bank(teacher, self.teacher_bank.storage),
            own,
            self.teacher_bank if self.student_bank is not None else None,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            divergence="kl",
        )
        loss = self._report(compress=loss)
        self._update_bank(teacher, bank=self.teacher_bank)
        if self.student_bank is not None:
            self._update_bank(vectors(copy[0], "teacher[1]") if copy else student, bank=self.student_bank)
        return loss
