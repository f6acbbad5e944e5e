"""ICKD: inter-channel correlation (Liu et al. 2021, 2202.03680)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .._core import checks
from .._core.dtypes import full_precision, wide
from ..projectors import Projector
from .base import same_shape
from .pairs import PairLoss, pairs, pick_projector


class ICKD(PairLoss):
    """weight * mean over samples and channels of the squared difference of the channels' Gram matrices, rows normalised.

    `loss(student, teacher)` with maps [N, C, H, W]; the larger is average-pooled to the smaller. The student passes a 1 x 1
    convolution and BatchNorm (batch statistics; none are kept) to the teacher's channels C:
        G = l2-normalised rows of F F^T [C, C],  F [C, H W] the map of a sample;   loss = weight sum (G_s - G_t)^2 / (C N).
    Lists and dicts: the mean over pairs.

    Args:
        projector: a Projector in place of the convolution, or a list with one a layer; BatchNorm follows on the side it maps.
        student_dim, teacher_dim: channels; None reads them from the first maps. weight: default 2.5.

    Raises:
        ValueError, TypeError: values that are no maps, channels that do not fit.
    """

    def __init__(self, projector=None, student_dim: int | None = None, teacher_dim: int | None = None, *, weight: float = 2.5) -> None:
        default = projector is None
        super().__init__(
            Projector(student_dim, teacher_dim, bias=False) if default else projector,
            None if default else student_dim,
            None if default else teacher_dim,
        )
        self.norms = nn.ModuleList(nn.LazyBatchNorm1d(track_running_stats=False) for _ in self.projectors)
        checks.nonnegative_number("weight", weight)
        self.weight = weight

    def materialize(self, student, teacher) -> None:
        super().materialize(student, teacher)
        for slot, _, _ in pairs(student, teacher):
            self._norm(slot)

    def _norm(self, slot: int) -> nn.Module:
        """The layer's BatchNorm, its width taken from the projector, which has one by now."""
        norm = pick_projector(self.norms, slot)
        if isinstance(norm.weight, UninitializedParameter):
            channels = pick_projector(self.projectors, slot).target_dim
            norm(torch.zeros(2, channels, 1, device=norm.weight.device, dtype=norm.weight.dtype))
        return norm

    def _projected(self, slot: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        for name, x in (("student", student), ("teacher", teacher)):
            if x.dim() != 4:
                raise ValueError(f"{name} must be [N, C, H, W], got shape {tuple(x.shape)}")
        student, teacher = super()._projected(slot, student, teacher)
        norm = self._norm(slot)
        if pick_projector(self.projectors, slot).invert:
            return student, norm(teacher.flatten(2)).view_as(teacher)
        return norm(student.flatten(2)).view_as(student), teacher

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        same_shape(student, teacher)
        return self.weight * (_correlation(student) - _correlation(teacher)).square().sum((1, 2)).mean() / student.shape[1]


def _correlation(x: Tensor) -> Tensor:
    x = wide(x.flatten(2))  # [N, C, HW]
    with full_precision(x):
        return F.normalize(x @ x.mT, dim=2)
