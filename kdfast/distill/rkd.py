"""RKD: relational knowledge distillation (Park et al. 2019, 1904.05068)."""

from torch import Tensor

from .._core import checks
from ..functional import rkd_angle, rkd_distance
from .base import vectors
from .pairs import PairLoss


class RKD(PairLoss):
    """distance_weight * smooth L1 of the pairwise distances + angle_weight * smooth L1 of the angles of all triples.

    `loss(student, teacher)` with embeddings [N, D] of any two widths (maps are averaged), taken as they are: each side's
    distances are divided by the mean of its nonzero ones, so that scale drops out and nothing is normalised here. Means over all
    N^2 and N^3 entries; see `kdfast.functional.rkd_distance` and `rkd_angle`. Lists and dicts: the mean over pairs.

    Args:
        distance_weight, angle_weight: >= 0, default 25 and 50; 0 leaves a term out.

    Raises:
        ValueError, TypeError: a negative weight, both 0, rows that differ in number.
    """

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__()
        checks.nonnegative_number("distance_weight", distance_weight)
        checks.nonnegative_number("angle_weight", angle_weight)
        if not distance_weight and not angle_weight:
            raise ValueError("distance_weight and angle_weight must not both be 0")
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def compare(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        student, teacher = vectors(student, "student"), vectors(teacher, "teacher")
        terms = {}
        if self.distance_weight:
            terms["distance"] = self.distance_weight * rkd_distance(student, teacher)
        if self.angle_weight:
            terms["angle"] = self.angle_weight * rkd_angle(student, teacher)
        return terms

    def extra_repr(self) -> str:
        return f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}"
