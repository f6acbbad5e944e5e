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
        self._mask = None

    def forward(self, student, teacher, *, index=None, labels=None, mask=None) -> Tensor:
        self._mask = mask
        loss = super().forward(student, teacher, index=index, labels=labels) / 2
        self._mask = None
        self.last = {name: value / 2 for name, value in self.last.items()}
        return loss

    def _features(self, value, name: str) -> Tensor:
        layers = value if isinstance(value, list) else [first(value)]
        return torch.cat([self._pooled(checks.floating(name, layer), name) for layer in layers], dim=1)

    def _pooled(self, layer: Tensor, name: str) -> Tensor:
        if layer.dim() == 2:
            return layer
        if layer.dim() != 3:
            raise ValueError(f"{name} must hold layers [N, L, D] or [N, D], got shape {tuple(layer.shape)}")
        if self._mask is None:
            return layer.mean(1)
        weight = self._mask.to(layer)[..., None]  # [N, L, 1]
        return (layer * weight).sum(1) / weight.sum(1).clamp(min=1)
