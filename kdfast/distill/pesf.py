"""PESFKD: the teacher's logits through a small adapter that learns with the student (our reading of Rao et al. 2022, 2205.15308)."""

import torch.nn.functional as F
from torch import Tensor

from .._core import checks
from .._core.dtypes import wide
from ..projectors import Affine
from .base import same_shape
from .kd import KD
from .pairs import PairLoss, pairs


class PESFKD(PairLoss):
    """T^2 KL(softmax(A(z_t) / T) || softmax(z_s / T)) + ce_weight * CE(A(z_t), y), with an adapter A that both terms train.

    `loss(student, teacher, labels=y)` with logits [N, C]; A(z) = z + W_2 relu(W_1 z + b_1) + b_2. The teacher itself stays
    as it is, so stored Features serve. Several teachers share A; the mean over pairs. No code of the authors was read: the form of
    A and the weights are our reading.

    Args:
        T: temperature, > 0, default 4. hidden: width inside A, default 64. ce_weight: default 1.
        num_classes: C; None reads it from the first batch.

    Raises:
        ValueError, TypeError: missing labels, shapes that differ.
    """

    needs_labels = True

    def __init__(self, T: float = 4.0, *, hidden: int = 64, ce_weight: float = 1.0, num_classes: int | None = None) -> None:
        super().__init__()
        checks.weights(ce_weight=ce_weight)
        checks.count("hidden", hidden)
        if num_classes is not None:
            checks.count("num_classes", num_classes)
        self.kd, self.ce_weight = KD(T), ce_weight
        self.down, self.up = Affine(num_classes, hidden), Affine(hidden, num_classes)

    def materialize(self, student, teacher) -> None:
        for _, _, logits in pairs(student, teacher):
            self.down.materialize(in_features=logits.shape[-1])
            self.up.materialize(out_features=logits.shape[-1])

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        same_shape(student, teacher)
        self.materialize(student, teacher)
        teacher = wide(teacher)
        adapted = teacher + self.up(self.down(teacher).relu())
        adapter = self.ce_weight * F.cross_entropy(adapted, checks.class_labels(labels, adapted))
        return {"logits": self.kd.compare(student, adapted), "adapter": adapter}
