"""Losses that compare student and teacher in one learned space: CRD, WCoRD."""

from torch import Tensor

from .._core import checks
from ..projectors import Affine
from .base import DistillLoss, unit, vectors


class EmbeddedLoss(DistillLoss):
    """Each side's features ([N, C], or maps that are averaged) mapped linearly to `dim` and l2-normalised.

    student_dim, teacher_dim: None is read from the first batch. constraint: of both maps, as in Affine. bank, push: as in DistillLoss.
    """

    def __init__(
        self, dim: int, student_dim: int | None, teacher_dim: int | None, *, constraint: str | None = None, bank=None, push: bool = True
    ) -> None:
        super().__init__(bank, push)
        for name, width in (("dim", dim), ("student_dim", student_dim), ("teacher_dim", teacher_dim)):
            if width is not None or name == "dim":
                checks.count(name, width)
        self.student_embedding = Affine(student_dim, dim, constraint=constraint)
        self.teacher_embedding = Affine(teacher_dim, dim, constraint=constraint)

    def materialize(self, student, teacher) -> None:
        self.student_embedding.materialize(in_features=vectors(student, "student").shape[1])
        self.teacher_embedding.materialize(in_features=vectors(teacher, "teacher").shape[1])

    def _embedded(self, student, teacher) -> tuple[Tensor, Tensor]:
        """Unit rows [N, dim] of both; the teacher's map has a gradient, its features none."""
        self.materialize(student, teacher)
        return unit(self.student_embedding(vectors(student, "student"))), unit(self.teacher_embedding(vectors(teacher, "teacher").detach()))
