"""Rows named by an index, row-wise inner products, and the logits of a query's positives."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import dtypes


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Row-wise inner products in the accumulator dtype: autocast rounds the operands of matrix products, and none of these."""
    wide = dtypes.accumulator(x.dtype)
    return (x.to(wide) * y.to(wide)).sum(-1)


def per_row(scale: float | Tensor, trailing: int = 0) -> float | Tensor:
    """`scale` (float, 0-d or [*B, N]) made to broadcast against [*B, N] followed by `trailing` dimensions."""
    if not isinstance(scale, Tensor) or scale.dim() == 0:
        return scale
    return scale[(..., *(None,) * trailing)]


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index] for shared rows [M, D] or batched rows [*B, M, D]; index [*B, N] -> [*B, N, D]."""
    if rows.dim() == 2:
        return rows[index]
    *_, count, width = rows.shape
    entry = torch.arange(rows.shape[:-2].numel(), device=rows.device).view(rows.shape[:-2])
    return F.embedding(index + count * entry[..., None], rows.reshape(-1, width))  # whose gradient is in a fixed order on a GPU


def sum_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """Rows [K, W] added up by their index [K], at least 0 and below `count`: [count, W].

    The gradient of an embedding, which has one itself: a sort and sums of runs on a GPU, where scatter_add's order is not fixed.
    """
    return torch.ops.aten.embedding_dense_backward(rows, index, count, -1, False)


def take(values: Tensor, index: Tensor) -> Tensor:
    """values[index] for shared values [M] or batched values [*B, M]; index [*B, N] -> [*B, N]."""
    return values[index] if values.dim() == 1 else take_rows(values[..., None], index)[..., 0]


def positive_rows(keys: Tensor, columns: Tensor) -> Tensor:
    """Row columns_ij of keys [M, D] or [*B, M, D], columns [*B, N, J] (-1: any row) -> [*B, N, J, D]."""
    return take_rows(keys, columns.clamp(min=0).flatten(-2)).unflatten(-2, columns.shape[-2:])


def positive_logits(
    query: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    positive: Tensor | None,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Inner products with the positives and their logits, both [*B, N, J].

    The positives are `positive` [*B, N, D] or [*B, N, J, D], whose logits have no bias, or the rows `columns` [*B, N, J] of the keys
    (-1: any). `scale` is a float, [] or [*B, N].
    """
    positive = positive_rows(keys, columns) if positive is None else positive
    if positive.dim() == query.dim():
        positive = positive.unsqueeze(-2)
    inner = dot(query.unsqueeze(-2), positive)
    logits = inner * per_row(scale, trailing=1)
    if columns is not None and bias is not None:
        logits = logits + take(bias, columns.clamp(min=0).flatten(-2)).unflatten(-1, columns.shape[-2:])
    return inner, logits
