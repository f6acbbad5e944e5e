"""Pairs and triplets as index lists: finding them by label, their distances, sums over the pairs of an anchor."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._ops.triplet import distances
from .arguments import Rows

_BLOCK = 1 << 22  # entries of a block of comparisons


def label_blocks(labels: Tensor, ref: Rows) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(a block of anchors, its positives, its negatives) with masks [R, M]; own rows and rows that do not exist are in neither."""
    column = torch.arange(len(ref.rows), device=labels.device)
    step = max(1, _BLOCK // max(1, len(column)))
    for start in range(0, len(labels), step):
        block = slice(start, min(start + step, len(labels)))
        same = labels[block, None] == ref.labels
        admitted = torch.ones_like(same) if ref.own is None else column != ref.own[block, None]
        if ref.valid is not None:
            admitted = admitted & (column < ref.valid)
        yield block, same & admitted, ~same & admitted


def positive_pairs(labels: Tensor, ref: Rows) -> tuple[Tensor, Tensor]:
    """(anchor, positive) [P], in order; their number is read from the device."""
    return joined([listed(block, positive) for block, positive, _ in label_blocks(labels, ref)], labels.device, 2)


def listed(block: slice, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The (anchor, column) where a block's mask is set."""
    a, b = mask.nonzero(as_tuple=True)
    return a + block.start, b


def joined(parts: list[tuple[Tensor, ...]], device, width: int) -> tuple[Tensor, ...]:
    """Lists put one after the other; `width` empty ones where there is none."""
    empty = torch.empty(0, dtype=torch.int64, device=device)
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True)) if parts else (empty,) * width


def as_pairs(indices: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Triplets as their positive and their negative pairs."""
    if len(indices) == 4:
        return indices
    a, p, n = indices
    return a, p, a, n


def as_triplets(indices: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Every positive pair with every negative pair of its anchor."""
    if len(indices) == 3:
        return indices
    a1, p, a2, n = (x.contiguous() for x in indices)
    ordered, order = a2.sort(stable=True)
    first = torch.searchsorted(ordered, a1)
    count = torch.searchsorted(ordered, a1, right=True) - first
    pair = torch.repeat_interleave(torch.arange(len(a1), device=a1.device), count)
    within = torch.arange(len(pair), device=a1.device) - (count.cumsum(0) - count)[pair]
    return a1[pair], p[pair], n[order[first[pair] + within]]


def unique_pairs(a: Tensor, b: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Each pair once, in order."""
    code = torch.unique(a * columns + b)
    return code // columns, code % columns


def pair_distances(x: Tensor, y: Tensor, a: Tensor, b: Tensor, metric: str) -> Tensor:
    """Distances [T] of rows x[a] and y[b]; taken from the whole matrix where that is smaller than the rows listed."""
    if _matrix_is_smaller(x, y, a):
        return distances.tile(*distances.centred(x, y, metric), metric)[a, b]
    return distances.between(distances.gather(x, a), distances.gather(y, b), metric)


def pair_similarities(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Inner products [T] of rows x[a] and y[b]."""
    if _matrix_is_smaller(x, y, a):
        return (x @ y.mT)[a, b]
    return (distances.gather(x, a) * distances.gather(y, b)).sum(-1)


def _matrix_is_smaller(x: Tensor, y: Tensor, a: Tensor) -> bool:
    return len(a) * x.shape[1] > len(x) * len(y)


def log_sum_exp(values: Tensor, anchor: Tensor, size: int) -> Tensor:
    """log sum exp of the values of each anchor [size]; -inf for an anchor without any."""
    top = values.new_full((size,), -torch.inf).scatter_reduce(0, anchor, values.detach(), "amax")
    top = torch.where(top.isfinite(), top, 0)
    total = values.new_zeros(size).index_add(0, anchor, (values - top[anchor]).exp())
    return total.log() + top


def softplus(z: Tensor) -> Tensor:
    """log(1 + exp z), exact for every z, -inf included."""
    return -F.logsigmoid(-z)
