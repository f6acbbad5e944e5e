"""Who is a positive and who a negative of whom, without a mask of size N x M.

The references are sorted by label once, so that an anchor's positives are a run of that order. The k-th
positive of an anchor is then an address computation that skips its own row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..._core import checks

NO_LABEL = torch.iinfo(torch.int64).max


class Anchors(NamedTuple):
    """One entry an anchor; a row block is a slice of every field."""

    row: Tensor  # [N] its number
    label: Tensor  # [N]
    own: Tensor  # [N] its own reference, -1: none
    first: Tensor  # [N] where its class starts in References.order
    skip: Tensor  # [N] position of its own row within the class
    count: Tensor  # [N] number of its positives


class References(NamedTuple):
    label: Tensor  # [M], NO_LABEL where there is none
    order: Tensor  # [M] the references sorted by label, ties by index; those that do not exist last
    exists: Tensor  # [M] bool


def relate(labels: Tensor, ref_labels: Tensor, own: Tensor | None, exists: Tensor | None = None) -> tuple[Anchors, References]:
    """`own` [N] (-1: none) is excluded from the positives and the negatives, as is what does not exist [M] (default: all do)."""
    size = ref_labels.numel()
    column = torch.arange(size, device=labels.device)
    own = torch.full_like(labels, -1) if own is None else own
    if exists is None:
        exists = torch.ones_like(column, dtype=torch.bool)
        ordered, order = ref_labels.sort(stable=True)
    else:  # a label may be NO_LABEL itself, so what exists is sorted first
        ref_labels, before = torch.where(exists, ref_labels, NO_LABEL), (~exists).long().sort(stable=True).indices
        ordered, order = ref_labels[before].sort(stable=True)
        order = before[order]
    labels = labels.contiguous()  # or the search copies them, and warns
    first = torch.searchsorted(ordered, labels)
    last = torch.minimum(torch.searchsorted(ordered, labels, right=True), exists.sum()).clamp_min(first)
    position = torch.empty_like(order).scatter_(0, order, column)[own.clamp(0, max(size - 1, 0))]
    inside = (own >= 0) & (position >= first) & (position < last)
    skip = torch.where(inside, position - first, size)
    anchors = Anchors(torch.arange(labels.numel(), device=labels.device), labels, own, first, skip, last - first - inside.long())
    return anchors, References(ref_labels, order, exists)


def positives(anchors: Anchors, refs: References, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Columns of positives number start ... stop - 1 of each anchor, and which of them exist -> [R, stop - start] each."""
    k = torch.arange(start, stop, device=refs.order.device)
    at = anchors.first[:, None] + k + (k >= anchors.skip[:, None]).long()
    return refs.order[at.clamp(max=refs.order.numel() - 1)], k < anchors.count[:, None]


def same(anchors: Anchors, refs: References, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
    """Positives and negatives among the columns start ... stop - 1 -> bool [R, stop - start] each."""
    stop = refs.label.numel() if stop is None else stop
    column = torch.arange(start, stop, device=refs.label.device)
    admitted = (column != anchors.own[:, None]) & refs.exists[start:stop]
    equal = anchors.label[:, None] == refs.label[start:stop]
    return equal & admitted, ~equal & admitted


def largest(anchors: Anchors, size: int) -> int:
    """A bound on the positives of an anchor: the largest count where it can be read for nothing (eager CPU code), else `size`."""
    count = anchors.count
    if torch.compiler.is_compiling() or count.device.type != "cpu" or count.numel() == 0 or not checks.readable(count):
        return size
    return max(1, int(count.max()))
