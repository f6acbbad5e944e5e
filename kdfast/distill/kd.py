"""KD: the teacher's softened class probabilities (Hinton, Vinyals, Dean 2015)."""

import math

import torch.nn.functional as F
from torch import Tensor

from .._core import checks
from .._core.dtypes import accumulator
from .base import same_shape
from .pairs import PairLoss


class KD(PairLoss):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over samples.

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
        log_s, log_t = (F.log_softmax(x.to(accumulator(x.dtype)).flatten(0, -2) / self.T, dim=-1) for x in (student, teacher))
        return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * self.T**2

    def extra_repr(self) -> str:
        return f"T={self.T}"


def check_softening(name: str, T) -> None:
    """`T` is a temperature, the square of which multiplies the loss: a float or a 0-d tensor."""
    checks.positive_number(name, T)
    checks.scalar(name, T)
    if not isinstance(T, Tensor) and not math.isfinite(T * T):
        raise ValueError(f"{name} must have a finite square, got {T}")
