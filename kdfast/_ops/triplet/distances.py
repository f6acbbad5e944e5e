"""Distances of a tile of rows, and of chosen pairs. Everything here is differentiable twice, with derivative 0 at distance 0."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import dtypes
from ..._core.centre import middle

METRICS = ("euclidean", "sqeuclidean", "cosine")


def prepare(x: Tensor, metric: str, normalize: bool) -> Tensor:
    """Rows in the accumulation dtype, of unit length where asked for or where the metric is the cosine's.

    Contiguous, for a norm's last bit depends on the layout, and equal rows of two tensors must stay at distance 0.
    """
    x = x.to(dtypes.accumulator(x.dtype)).contiguous()
    return F.normalize(x, dim=-1) if normalize or metric == "cosine" else x


def centred(x: Tensor, y: Tensor, metric: str = "euclidean") -> tuple[Tensor, Tensor]:
    """Both moved by the middle of y (not for the cosine): the same differences, but |x|^2 + |y|^2 - 2 x.y then cancels little."""
    if metric == "cosine" or y.shape[0] == 0:
        return x, y
    centre = middle(y)
    moved = y - centre
    return moved if x is y else x - centre, moved


def root(sq: Tensor) -> Tensor:
    zero = sq == 0
    return torch.where(zero, torch.zeros_like(sq), torch.where(zero, torch.ones_like(sq), sq).sqrt())


def squared(dot: Tensor, x_sq: Tensor, y_sq: Tensor) -> Tensor:
    """|x|^2 + |y|^2 - 2 x.y, exactly 0 where it is no more than its own rounding error: coinciding rows stay at distance 0."""
    scale = x_sq + y_sq
    sq = scale - 2 * dot
    return torch.where(sq < 4 * torch.finfo(sq.dtype).eps * scale.detach(), torch.zeros_like(sq), sq)


def tile(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """All distances of x [..., D] to y [M, D], from one product -> [..., M]."""
    dot = x @ y.mT
    if metric == "cosine":
        return 1 - dot
    sq = squared(dot, x.square().sum(-1, keepdim=True), y.square().sum(-1))
    return sq if metric == "sqeuclidean" else root(sq)


def between(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Distances of x [..., D] to the row of y [..., D] facing it, from their difference -> [...]."""
    if metric == "cosine":
        return 1 - (x * y).sum(-1)
    sq = (x - y).square().sum(-1)
    return sq if metric == "sqeuclidean" else root(sq)


def euclidean(d: Tensor, metric: str) -> Tensor:
    """The Euclidean distance of unit rows whose distance in `metric` is d."""
    if metric == "euclidean":
        return d
    return root((2 * d if metric == "cosine" else d).clamp_min(0))


def gather(y: Tensor, index: Tensor) -> Tensor:
    """y[index]. The gradient of an embedding is summed in a fixed order on every device; that of indexing is not."""
    return F.embedding(index, y)


def nan_where(mask: Tensor, like: Tensor) -> Tensor:
    """NaN where mask, else 0: added to losses of anchors with a NaN among their distances, which no comparison sees."""
    return torch.where(mask, torch.full_like(like, torch.nan), torch.zeros_like(like))


def wide(x: Tensor) -> torch.dtype:
    """The dtype for sums that cancel: float64 where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64
