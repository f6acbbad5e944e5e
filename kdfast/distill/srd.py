"""SRD: a simple recipe of projector, normalisation and a soft maximum distance (Miles, Mikolajczyk 2024, 2303.11098)."""

import torch.nn.functional as F
from torch import Tensor

from .._core import checks
from .._core.dtypes import wide
from .base import same_shape, times, vectors
from .kd import KD
from .pairs import PairLoss


class SRD(PairLoss):
    """feature_weight * log sum |f_s - f_t|^4 + logit_weight * KL(softmax(teacher) || softmax(student)).

    `loss(student, teacher)` with dicts of "logits" [N, C] and "feat" ([N, D], or maps that are averaged), as from
    at={"logits": None, "feat": "avgpool"}. The student's features pass a linear map to the teacher's width; then both are
    normalised here, each channel over the batch (eps 1e-4, no affine part). The sum runs over batch and channels. Several
    teachers, views: the mean. Published beside the task's cross-entropy with weight 1.

    Args:
        feature_weight, logit_weight: default 2 and 1; 0 leaves the logits out.
        projector, student_dim, teacher_dim: as for MSE; default "linear".

    Raises:
        ValueError, TypeError: a missing value, widths that do not fit.
    """

    parts = ("logits", "feat")

    def __init__(
        self,
        feature_weight: float = 2.0,
        logit_weight: float = 1.0,
        *,
        projector="linear",
        student_dim: int | None = None,
        teacher_dim: int | None = None,
    ) -> None:
        super().__init__(projector, student_dim, teacher_dim)
        checks.weights(feature_weight=feature_weight, logit_weight=logit_weight)
        self.feature_weight, self.logit_weight = feature_weight, logit_weight
        self.kd = KD(T=1)

    def compare(self, student: dict, teacher: dict) -> dict[str, Tensor]:
        f_s, f_t = (_standardized(vectors(side["feat"], name)) for side, name in ((student, "student"), (teacher, "teacher")))
        same_shape(f_s, f_t)
        terms = {"feature": times(self.feature_weight, (f_s - f_t).square().square().sum().log())}
        if self.logit_weight:
            terms["logits"] = times(self.logit_weight, self.kd.compare(student["logits"], teacher["logits"]))
        return terms


def _standardized(x: Tensor) -> Tensor:
    return F.batch_norm(wide(x), None, None, training=True, eps=1e-4)
