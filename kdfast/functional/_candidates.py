"""Shared pieces of the contrastive losses: logits of explicit positives, and score sums over classes of a bank."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import checks, dtypes
from .._ops.similarity.positives import take, take_rows


def normalized(x: Tensor | None) -> Tensor | None:
    """Rows of unit length, the norm taken in float32 (float64 for float64)."""
    return None if x is None else F.normalize(x.to(dtypes.accumulator(x.dtype)), dim=-1).to(x.dtype)


def inverse(name: str, temperature: float | Tensor, query: Tensor) -> Tensor | float:
    """1 / temperature, after its checks; a tensor in the accumulator dtype of `query`, never cast by autocast."""
    checks.positive_number(name, temperature)
    if not isinstance(temperature, Tensor):
        return 1.0 / temperature
    rows = tuple(query.shape[:-1])
    if temperature.dim() and tuple(temperature.shape) != rows:
        raise ValueError(f"{name} must be a float, 0-d or have shape {rows}, got {tuple(temperature.shape)}")
    return temperature.to(device=query.device, dtype=dtypes.accumulator(query.dtype)).reciprocal()


def per_row(scale: float | Tensor, trailing: int = 0) -> float | Tensor:
    """`scale` (float, 0-d or [*B, N]) made to broadcast against [*B, N] followed by `trailing` dimensions."""
    if not isinstance(scale, Tensor) or scale.dim() == 0:
        return scale
    return scale[(..., *(None,) * trailing)]


def own_columns(own_index: "bool | Tensor | None", query: Tensor, count: int) -> Tensor | None:
    """`own_index` as integers [*B, N] (-1: none) into `count` bank rows."""
    return checks.own_rows(own_index, tuple(query.shape[:-1]), count, query.device)


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

    Rows past the prefix `valid`, rows whose bias is -inf and, for each query, the columns in `skip` [*B, N, E]
    (-1: none) are left out.
    """
    wide = dtypes.accumulator(rows.dtype)
    query, rows = query.to(wide), rows.to(wide)
    count = rows.shape[-2]
    admitted = torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)
    if valid is not None:
        limit = valid[..., None] if isinstance(valid, Tensor) else valid
        admitted = torch.arange(count, device=rows.device) < limit
    bias = torch.zeros((), dtype=wide, device=rows.device) if bias is None else bias.to(wide)
    admitted = admitted & (bias != -torch.inf)
    # One table of [sum of keys | sum of biases | count], so that classes, totals and single rows are handled alike.
    rows = rows.expand(*admitted.shape, rows.shape[-1]) if rows.dim() - 1 < admitted.dim() else rows
    extra = torch.stack([torch.where(admitted, bias, 0.0).expand(admitted.shape), admitted.to(wide)], dim=-1)
    table = torch.cat([torch.where(admitted[..., None], rows, 0.0), extra.expand(*rows.shape[:-1], 2)], dim=-1)  # [*B, M, D + 2]

    total = table.sum(-2, keepdim=True)  # [*B, 1, D + 2]
    same = torch.zeros((), dtype=wide, device=rows.device).expand(*query.shape[:-1], table.shape[-1])
    if query_labels is not None:
        same = _class_rows(table, bank_labels, query_labels)
    other = total - same
    for e in range(0 if skip is None else skip.shape[-1]):
        index = skip[..., e]
        fresh = index >= 0
        for earlier in range(e):
            fresh = fresh & (skip[..., earlier] != index)
        index = index.clamp(min=0)
        row = torch.where(fresh[..., None], take_rows(table, index), 0.0)
        if query_labels is None:
            other = other - row
        else:
            alike = (take(bank_labels, index) == query_labels)[..., None]
            same, other = same - torch.where(alike, row, 0.0), other - torch.where(alike, 0.0, row)

    def scored(sums: Tensor) -> tuple[Tensor, Tensor]:
        keys, biases, counts = sums[..., :-2], sums[..., -2], sums[..., -1]
        return per_row(scale) * (query * keys).sum(-1) + biases, counts.expand(query.shape[:-1])

    return ScoreSums(*scored(same), *scored(other))


def _class_rows(table: Tensor, labels: Tensor, query_labels: Tensor) -> Tensor:
    """For each query the sum of the table's rows that bear its label: [*B, N, W]; zeros where none does.

    A class is named by the first position of its label in sorted order: any integers serve, and shapes stay static.
    """
    labels = labels.expand(table.shape[:-1]).contiguous()
    ordered = labels.sort(dim=-1).values
    slots = torch.searchsorted(ordered, labels)
    sums = torch.zeros_like(table).scatter_add(-2, slots[..., None].expand_as(table), table)
    if table.dim() > 2:
        query_labels = query_labels.expand(*table.shape[:-2], query_labels.shape[-1])
    place = torch.searchsorted(ordered, query_labels.contiguous())
    place = place.clamp(max=labels.shape[-1] - 1)
    found = take(ordered, place) == query_labels
    return torch.where(found[..., None], take_rows(sums, place), 0.0)
