"""Sums of scores over classes of a bank, without scores: in PyTorch's operations, differentiable twice and under every transform."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...._core import dtypes
from ..positives import per_row, sum_rows, take, take_rows

#: rows without a query's class that are added up one by one
_BLOCK = 256


class ScoreSums(NamedTuple):
    """Sums of z_ij = s_i q_i.k_j + b_j over bank rows, and how many rows they have; each [*B, N]."""

    same: Tensor  # rows of the query's class (0 without labels)
    same_count: Tensor
    other: Tensor  # all remaining rows
    other_count: Tensor


def score_sums(
    query: Tensor,
    rows: Tensor,
    scale: float | Tensor,
    *,
    valid: "int | Tensor | None" = None,
    bias: Tensor | None = None,
    query_labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    skip: Tensor | None = None,
) -> ScoreSums:
    """Sums of scores by class in O(M D) without a mask: sum_j z_ij = s q_i . (sum_j k_j) + sum_j b_j.

    Rows past the prefix `valid`, rows whose bias is -inf and, for each query, the columns in `skip` [*B, N, E] (-1: none) are
    left out. Bank rows are added up in bags: one for each query's class and, so that long sums keep their digits, one for each block
    of the other rows. The bank is read once; beside it nothing is larger than O((N + M / 256) D), but for a copy of the bank where rows
    are left out and there are no labels. On a GPU too their order is fixed.
    """
    wide = dtypes.accumulator(rows.dtype)
    query, rows = query.to(wide), rows.to(wide)
    column = torch.arange(rows.shape[-2], device=rows.device)
    admitted = torch.ones_like(column, dtype=torch.bool)
    if valid is not None:
        admitted = column < (valid[..., None] if isinstance(valid, Tensor) else valid)
    bias = torch.zeros((), dtype=wide, device=rows.device) if bias is None else bias.to(wide)
    admitted = admitted & (bias != -torch.inf)
    terms = torch.stack([torch.where(admitted, bias, 0.0), admitted.to(wide)], dim=-1)  # what a row adds beside its key: [*B, M, 2]

    if query_labels is not None and query_labels.numel() > 0:
        shared = bank_labels.dim() == rows.dim() - 1 == admitted.dim() == 1
        ordered = (query_labels.flatten() if shared else query_labels).sort(dim=-1).values  # a class is named by its place in here
        place = _place(ordered, bank_labels)
        bags = torch.where(take(ordered, place) == bank_labels, place, column // _BLOCK + ordered.shape[-1])
        last = ordered.shape[-1] + -(-len(column) // _BLOCK)  # the bag of what is left out
        sums = _bag_sums(torch.where(admitted, bags, last), last + 1, rows, terms)[..., :last, :]  # [*B, last, D + 2]
        same = take_rows(sums, _place(ordered, query_labels))
    else:
        every = valid is None and bias.dim() == 0
        sums = _block_sums(rows if every else torch.where(admitted[..., None], rows, 0.0), terms)
        same = torch.zeros((), dtype=wide, device=rows.device).expand(*query.shape[:-1], sums.shape[-1])
    other = sums.sum(-2, keepdim=True) - same
    for e in range(0 if skip is None else skip.shape[-1]):
        index = skip[..., e]
        fresh = index >= 0
        for earlier in range(e):
            fresh = fresh & (skip[..., earlier] != index)
        index = index.clamp(min=0)
        fresh = fresh & take(admitted, index)
        row = torch.where(fresh[..., None], torch.cat([take_rows(rows, index), take_rows(terms, index)], -1), 0.0)
        if query_labels is None:
            other = other - row
        else:
            alike = (take(bank_labels, index) == query_labels)[..., None]
            same, other = same - torch.where(alike, row, 0.0), other - torch.where(alike, 0.0, row)

    def scored(sums: Tensor) -> tuple[Tensor, Tensor]:
        keys, biases, counts = sums[..., :-2], sums[..., -2], sums[..., -1]
        return per_row(scale) * (query * keys).sum(-1) + biases, counts.expand(query.shape[:-1])

    return ScoreSums(*scored(same), *scored(other))


def _place(ordered: Tensor, labels: Tensor) -> Tensor:
    """The first place in `ordered` [*B, C] of each of `labels` [*B, K], or some place for a label that is not there."""
    if ordered.dim() > 1:
        labels = labels.expand(*ordered.shape[:-1], labels.shape[-1])
    return torch.searchsorted(ordered, labels.contiguous()).clamp(max=ordered.shape[-1] - 1)


def _bag_sums(bags: Tensor, count: int, *tables: Tensor) -> Tensor:
    """Rows of the tables [*B, M, W], side by side, summed by their bag: bags [*B, M] -> [*B, count, total of W]. Bags are read once."""
    *batch, size = torch.broadcast_shapes(bags.shape, *(x.shape[:-1] for x in tables))
    bags = bags.expand(*batch, size).reshape(-1, size)
    offset = count * torch.arange(len(bags), device=bags.device)[:, None]

    def summed(x: Tensor) -> Tensor:  # [entries of the batch, count, W]
        width = x.shape[-1]
        if x.dim() == 2:  # which the whole batch shares, and no entry copies
            found = [sum_rows(x, of, count) for of in bags.unbind()]
            return torch.stack(found) if len(found) != 1 else found[0][None]
        entries = x.expand(*batch, size, width).reshape(-1, width)
        return sum_rows(entries, (bags + offset).flatten(), len(bags) * count).unflatten(0, (len(bags), count))

    return torch.cat([summed(x) for x in tables], dim=-1).view(*batch, count, -1)


def _block_sums(*tables: Tensor) -> Tensor:
    """Rows of the tables [*B, M, W], side by side, summed in blocks of _BLOCK: [*B, blocks, total of W]."""
    shape = torch.broadcast_shapes(*(x.shape[:-1] for x in tables))
    whole = shape[-1] // _BLOCK * _BLOCK
    sums = []
    for x in tables:
        x = x.expand(*shape, x.shape[-1])
        blocks = x[..., :whole, :].unflatten(-2, (whole // _BLOCK, _BLOCK)).sum(-2)
        sums.append(blocks if whole == shape[-1] else torch.cat([blocks, x[..., whole:, :].sum(-2, keepdim=True)], dim=-2))
    return torch.cat(sums, dim=-1)
