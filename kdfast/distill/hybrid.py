"""HybridDistill: two teachers, one for the relations of tokens and one for those of attention values (our reading of 2306.15876)."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from .._core import checks
from .._core.dtypes import full_precision
from .base import DistillLoss, first, same_shape, unit


class HybridDistill(DistillLoss):
    """token_weight * MSE of the token Gram matrices to the first teacher + value_weight * MSE of the values' to the second.

    `loss(student, [teacher, other])` with dicts of "tokens" and "values", each [N, L, D] with one L and any widths (or maps,
    whose positions are tokens), as from at={"tokens": "blocks.11", "values": "blocks.11.attn.v"}. Of the first teacher
    "tokens" is used, of the second "values"; one teacher that is not in a list serves for both. Rows are l2-normalised here:
    G = X X^T [N, L, L] holds the cosines between a sample's tokens. No code of the authors was read: this is our reading.

    Args:
        token_weight, value_weight: default 1.

    Raises:
        ValueError, TypeError: a missing value, more than two teachers, numbers of tokens that differ.
    """

    def __init__(self, token_weight: float = 1.0, value_weight: float = 1.0) -> None:
        super().__init__()
        checks.weights(token_weight=token_weight, value_weight=value_weight)
        self.weights = {"tokens": token_weight, "values": value_weight}

    def forward(self, student, teacher, *, index=None, labels=None) -> Tensor:
        teachers = teacher if isinstance(teacher, list) else [teacher, teacher]
        if len(teachers) != 2:
            raise ValueError(f"teacher must be one or a list of two, got {len(teachers)}")
        terms = {}
        for (name, weight), source in zip(self.weights.items(), teachers, strict=True):
            grams = [_gram(side, name, where) for side, where in ((student, "student"), (source, "teacher"))]
            same_shape(*grams)
            terms[name] = weight * F.mse_loss(grams[0], grams[1].detach())
        return self._report(**terms)


def _gram(values, name: str, side: str) -> Tensor:
    if not isinstance(values, Mapping) or name not in values:
        raise ValueError(f'{side} must be a dict with "{name}" [N, L, D]')
    x = checks.floating(f"{side}[{name!r}]", first(values[name]), min_ndim=3)
    x = unit(x.flatten(2).mT if x.dim() == 4 else x)  # [N, L, D]
    with full_precision(x):
        return x @ x.mT
