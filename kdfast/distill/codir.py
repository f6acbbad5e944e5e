"""CoDIR: contrastive distillation on intermediate representations (Sun et al. 2020, 2009.14167)."""

import torch
from torch import Tensor

from .._core import checks
from .base import first
from .crd import CRD


class CoDIR(CRD):
    """CRD on layers of a language model: each mean-pooled over tokens, all concatenated, half of CRD's loss.

    `loss(student, teacher, index=i)` with lists of layers [N, L, D] (or [N, D]; a single tensor is one layer); the two lists may
    differ in length. Everything else as in CRD, whose arguments these are; 100 negatives by default, of other classes
    where `labels` are given. Padding counts in the mean unless `mask=` [N, L] (1 at tokens) comes with the call:
    `extra={"codir": {"mask": attention_mask}}`.

    Raises: as CRD.
    """

    def __init__(self, num_data: int, *, num_negatives: int = 100, **options) -> None:
        super().__init__(num_data, num_negatives=num_negatives, **options)

    def materialize(self, student, teacher) -> None:
        super().materialize(_pooled(student, "student", None), _pooled(teacher, "teacher", None))

    def forward(self, student, teacher, *, index=None, labels=None, mask=None) -> Tensor:
        loss = super().forward(_pooled(student, "student", mask), _pooled(teacher, "teacher", mask), index=index) / 2
        self.last = {name: value / 2 for name, value in self.last.items()}
        return loss


def _pooled(layers, name: str, mask: Tensor | None) -> Tensor:
    """Mean-pooled layers side by side, [N, C]."""
    layers = layers if isinstance(layers, list) else [layers]
    return torch.cat([_mean_of_tokens(checks.floating(name, first(layer)), name, mask) for layer in layers], dim=1)


def _mean_of_tokens(layer: Tensor, name: str, mask: Tensor | None) -> Tensor:
    if layer.dim() == 2:
        return layer
    if layer.dim() != 3:
        raise ValueError(f"{name} must hold layers [N, L, D] or [N, D], got shape {tuple(layer.shape)}")
    if mask is None:
        return layer.mean(1)
    weight = mask.to(layer)[..., None]  # [N, L, 1]
    return (layer * weight).sum(1) / weight.sum(1).clamp(min=1)
