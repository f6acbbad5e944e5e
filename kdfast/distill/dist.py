"""DIST: distillation by correlation from a stronger teacher (Huang et al. 2022, 2205.10536)."""

from torch import Tensor

from .._core import checks
from .._core.dtypes import accumulator
from .base import same_shape
from .pairs import PairLoss


class DIST(PairLoss):
    """beta (1 - mean row correlation) + gamma (1 - mean column correlation) of the class probabilities, times temperature^2.

    `loss(student, teacher)` with logits [N, C], or [N, C, H, W] of which every position is a sample. With y = softmax(z /
    temperature), rows of y_s and y_t [N, C] are compared by Pearson correlation (inter-class relation), and so are columns
    (intra-class relation). Lists and dicts: the mean over pairs.

    Args:
        beta, gamma: weights, >= 0, default 1. temperature: > 0, default 1; published 4 on CIFAR-100.

    Raises:
        ValueError, TypeError: shapes that differ, temperature <= 0, a negative weight.
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        checks.nonnegative_number("beta", beta)
        checks.nonnegative_number("gamma", gamma)
        checks.positive_number("temperature", temperature)
        checks.scalar("temperature", temperature)
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def compare(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        same_shape(student, teacher)
        y_s, y_t = (self._probabilities(x) for x in (student, teacher))  # [N, C]
        square = self.temperature**2
        return {
            "inter": self.beta * square * (1 - _pearson(y_s, y_t).mean()),
            "intra": self.gamma * square * (1 - _pearson(y_s.t(), y_t.t()).mean()),
        }

    def _probabilities(self, logits: Tensor) -> Tensor:
        if logits.dim() == 4:
            logits = logits.movedim(1, -1)
        return (logits.flatten(0, -2).to(accumulator(logits.dtype)) / self.temperature).softmax(-1)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, gamma={self.gamma}, temperature={self.temperature}"


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    """Correlation of each row of x with that of y; 1e-8 is added to the product of the norms, as in the released code."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)
