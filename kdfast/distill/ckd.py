"""CKD: contrast of logits between samples (Zhu et al. 2024, 2404.14109)."""

from torch import Tensor

from .._core import checks
from ..functional import info_nce
from .base import same_shape, unit
from .pairs import PairLoss


class CKD(PairLoss):
    """InfoNCE between the teacher's and the student's logits of a batch: each teacher row finds its student row.

    `loss(student, teacher)` with logits [N, C], l2-normalised here:
        loss = mean_i -log softmax_j(t_i . s_j / temperature)[i].
    The sample-wise form of the paper; published weights 100 (CIFAR-100) and 10 (ImageNet): `Term(CKD(), weight=100)`.
    Lists and dicts: the mean over pairs.

    Args:
        temperature: > 0, default 1.

    Raises:
        ValueError, TypeError: shapes that differ or are not [N, C].
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        checks.positive_number("temperature", temperature)
        self.temperature = temperature

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        same_shape(student, teacher)
        student = unit(student)
        return info_nce(unit(teacher).to(student.dtype), student, temperature=self.temperature)
