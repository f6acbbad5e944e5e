"""MLKD: knowledge of single samples, of relations and of classes together (our reading of Multi-Level Knowledge Distillation)."""

from torch import Tensor

from .._core import checks
from ..functional import info_nce, rkd_distance
from .base import unit, vectors
from .kd import KD
from .pairs import PairLoss


class MLKD(PairLoss):
    """KL of softened logits + relation_weight * RKD's distance loss + contrast_weight * SupCon of student against teacher.

    `loss(student, teacher, labels=y)` with dicts of "logits" and "feat" ([N, D], or maps that are averaged), as from
    at={"logits": None, "feat": "avgpool"}. Features are compared after the projector; for the contrast both are
    l2-normalised here: a student's positives are the teacher's rows of its class (its own among them), its candidates all
    teacher rows of the batch. Several teachers, views: the mean. No code of the authors was read: terms and weights are our reading.

    Args:
        T: temperature of the logits, default 4 (with the factor T^2). temperature: of the contrast, default 0.1.
        relation_weight, contrast_weight: default 1.
        projector, student_dim, teacher_dim: as for MSE; default "linear".

    Raises:
        ValueError, TypeError: missing labels or values, widths that do not fit.
    """

    parts = ("logits", "feat")
    needs_labels = True

    def __init__(
        self,
        T: float = 4.0,
        *,
        relation_weight: float = 1.0,
        contrast_weight: float = 1.0,
        temperature: float = 0.1,
        projector="linear",
        student_dim: int | None = None,
        teacher_dim: int | None = None,
    ) -> None:
        super().__init__(projector, student_dim, teacher_dim)
        checks.positive_number("temperature", temperature)
        checks.weights(relation_weight=relation_weight, contrast_weight=contrast_weight)
        self.kd = KD(T)
        self.relation_weight, self.contrast_weight, self.temperature = relation_weight, contrast_weight, temperature

    def compare(self, student: dict, teacher: dict, labels: Tensor) -> dict[str, Tensor]:
        f_s, f_t = vectors(student["feat"], "student"), vectors(teacher["feat"], "teacher")
        query, rows = unit(f_s), unit(f_t)
        classes = {"query_labels": labels, "bank_labels": labels, "same_class": "positive"}
        return {
            "logits": self.kd.compare(student["logits"], teacher["logits"]),
            "relation": self.relation_weight * rkd_distance(f_s, f_t),
            "contrast": self.contrast_weight * info_nce(query, bank=rows.to(query.dtype), temperature=self.temperature, **classes),
        }
