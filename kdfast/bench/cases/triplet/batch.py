"""What the cases of labelled rows share: the batch, its distances, and who is whose positive."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Of a class about its centre, which is a row of length about sqrt D: wide enough that every anchor's hardest triplet is active.
SPREAD = 2.0


class Batch(NamedTuple):
    x: Tensor  # [N, D], of any length
    labels: Tensor  # [N], C rows of each or, of the last, more


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> Batch:
    n, d, size = shape
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(n) // size).clamp(max=n // size - 1)
    centres = torch.randn(int(labels.max()) + 1, d, generator=generator)
    return Batch((centres[labels] + SPREAD * torch.randn(n, d, generator=generator)).to(dtype), labels)


def exact(shape: tuple[int, int, int], dtype: torch.dtype) -> Batch:
    """Rows of 0 and +-1 whose number of +-1 is a power of 4: lengths, products and squared distances of the unit rows are exact in any
    order and dtype. Of millions of triplets some are otherwise so close to a threshold that each peer's rounding decides them."""
    n, d, _ = shape
    generator = torch.Generator().manual_seed(0)
    labels = inputs(shape, dtype).labels
    centres = torch.randn(int(labels.max()) + 1, d, generator=generator).sign()
    flips = torch.where(torch.rand(n, d, generator=generator) < 0.2, -1.0, 1.0)
    there = torch.rand(n, d, generator=generator).topk(4 ** int(math.log2(d) // 2), dim=-1).indices
    x = torch.zeros(n, d).scatter_(1, there, 1.0) * flips * centres[labels]
    return Batch(x.to(dtype), labels)


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, in float32 or wider."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """[N, M], from one product. The floor keeps the gradient finite at the diagonal, which no loss here uses."""
    sq = x.square().sum(-1, keepdim=True) - 2 * x @ y.T + y.square().sum(-1)
    return sq.clamp_min(1e-12).sqrt()


def sides(labels: Tensor, ref_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Positives and negatives as masks [N, M]; in batch no row is its own positive."""
    same = labels[:, None] == (labels if ref_labels is None else ref_labels)
    positive = same if ref_labels is not None else same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return positive, ~same
