"""KD: the teacher's softened class probabilities (Hinton, Vinyals, Dean 2015)."""

import math

import torch.nn.functional as F
from torch import Tensor

from .._core import checks
from .._core.dtypes import wide
from .base import is_one, same_shape
from .pairs import PairLoss


class KD(PairLoss):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over samples (of none: 0).

    `loss(student, teacher)` with logits [*, C] of one shape (leading dimensions are samples); lists of teachers and
    dicts of views give the mean over pairs. Computed in float32 (float64 for float64). The usual mixture is
    `Distiller(..., terms={"kd": Term(KD(T=4), weight=0.9)})` with `task_weight=0.1`.

    Args:
        T: temperature, > 0, default 4.

    Raises:
        ValueError, TypeError: shapes that differ, T <= 0.
    """

    def __init__(self, T: float = 4.0) -> None:
        super().__init__()
        check_softening("T", T)
        self.T = T

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        same_shape(student, teacher)
        student, teacher = (wide(x).flatten(0, -2) for x in (student, teacher))
        if not is_one(self.T):
            student, teacher = student / self.T, teacher / self.T
        summed = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
        return summed * (self.T**2 / max(1, len(student)))

    def extra_repr(self) -> str:
        return f"T={self.T}"


def check_softening(name: str, T) -> None:
    """`T` is a temperature, the square of which multiplies the loss: a float or a 0-d tensor."""
    checks.positive_number(name, T)
    checks.scalar(name, T)
    if not isinstance(T, Tensor) and not math.isfinite(T * T):
        raise ValueError(f"{name} must have a finite square, got {T}")
