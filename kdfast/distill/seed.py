"""SEED: self-supervised distillation (Fang et al. 2021, 2101.04731)."""

from torch import Tensor

from .._core import checks
from ..functional import similarity_distillation
from .base import DistillLoss, bank_rows, check_queue, unit, vectors
from .pairs import make_projector


class SEED(DistillLoss):
    """The student ranks a queue of teacher keys, and the teacher's own key, as the teacher does.

    `loss(student, teacher)` with embeddings [N, D] (maps are averaged). With t, s l2-normalised here and Q the queue,
        loss = mean -softmax([t.t, t.Q] / teacher_temperature) . log softmax([s.t, s.Q] / student_temperature);
    then t is pushed. At the default teacher temperature scores are formed in full float32, outside autocast.

    Args:
        bank: a QueueBank of the teacher's width; published: QueueBank(65536, 128).
        student_temperature: > 0, default 0.2. teacher_temperature: > 0, default 1e-4.
        projector, student_dim, teacher_dim: a map to the teacher's width, as for MSE; published: "mlp" (default). None
            when the student's head gives it.
        push: see DistillLoss.

    Raises:
        ValueError, TypeError: a bank that is no queue, widths that do not fit.
    """

    def __init__(
        self,
        bank,
        *,
        student_temperature: float = 0.2,
        teacher_temperature: float = 1e-4,
        projector="mlp",
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        push: bool = True,
    ) -> None:
        check_queue("bank", bank)
        super().__init__(bank, push)
        checks.positive_number("student_temperature", student_temperature)
        checks.positive_number("teacher_temperature", teacher_temperature)
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.projector = make_projector(projector, student_dim, teacher_dim)

    def materialize(self, student, teacher) -> None:
        if self.projector is not None:
            self.projector.materialize(vectors(student, "student"), vectors(teacher, "teacher"))

    def forward(self, student, teacher, *, index=None, labels=None) -> Tensor:
        student, teacher = vectors(student, "student"), vectors(teacher, "teacher").detach()
        if self.projector is not None:
            student, teacher = self.projector(student, teacher)
        dtype = bank_rows(self.bank).dtype
        student, teacher = unit(student).to(dtype), unit(teacher).to(dtype)
        temperatures = {"student_temperature": self.student_temperature, "teacher_temperature": self.teacher_temperature}
        loss = self._report(seed=similarity_distillation(student, teacher, self.bank, own=True, **temperatures))
        self._update_bank(teacher)
        return loss
