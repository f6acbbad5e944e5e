"""DIST: distillation by correlation from a stronger teacher (Huang et al. 2022, 2205.10536)."""

from torch import Tensor

from .._core import checks
from .._core.dtypes import wide
from .base import is_one, same_shape, times
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
        rows = (y - 1 / y.shape[1] for y in (y_s, y_t))  # whose mean that is
        columns = (y - y.mean(0) for y in (y_s, y_t))
        return {
            "inter": times(self.beta * square, 1 - _correlation(*rows, 1).mean()),
            "intra": times(self.gamma * square, 1 - _correlation(*columns, 0).mean()),
        }

    def _probabilities(self, logits: Tensor) -> Tensor:
        if logits.dim() == 4:
            logits = logits.movedim(1, -1)
        logits = wide(logits.flatten(0, -2))
        return (logits if is_one(self.temperature) else logits / self.temperature).softmax(-1)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, gamma={self.gamma}, temperature={self.temperature}"


def _correlation(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Along `dim`, of values less their means; 1e-8 is added to the product of the norms, as in the released code."""
    return (x * y).sum(dim) / (x.norm(dim=dim) * y.norm(dim=dim) + 1e-8)
