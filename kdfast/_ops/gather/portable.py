"""impl="torch": the contractions of T(w, q, k) = sum_nk w_nk q_n . k_{index_nk}, in linear memory on any device.

Bank rows may have any floating dtype; weights and queries come, and results leave, in the accumulator's dtype.
[N, K, D] never exists: scores come from tiles, the two sums from embedding_bag, which adds rows as it reads them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.dtypes import full_precision
from . import statistics

_TILE = 1 << 17  # elements of gathered rows at a time: half a megabyte of float32 stays in a core's L2 cache
_BLOCK = 1 << 20  # elements of a score block, and of a bank block converted to the accumulator's dtype
_BAG = 128  # rows added one after another; at least D of them, so that partial sums take no more room than `index`
_DENSE_ROWS = 16  # a GEMM over the whole bank beats gathering K rows while M <= 16 K (measured, D = 128)


def scores(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """query [N, D], bank [M, D], index [N, K] -> z_nk = q_n . k_{index_nk}, [N, K]."""
    out = query.new_empty(index.shape)
    with full_precision(query):
        if query.device.type == "cpu" and len(bank) <= _DENSE_ROWS * index.shape[1]:
            return _dense_scores(query, bank, index, out)
        for rows, slots in _tiles(index, query.shape[1]):
            gathered = _gathered(bank, index[rows, slots], query.dtype)  # [n, k, D]
            out[rows, slots] = torch.bmm(gathered, query[rows, :, None])[..., 0]
    return out


def _dense_scores(query: Tensor, bank: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """The same from GEMM tiles of a few rows against all of a bank that is small beside K."""
    step, block = max(1, _BLOCK // len(bank)), max(1, _BLOCK // max(1, bank.shape[1]))
    for start in range(0, len(query), step):
        rows = slice(start, start + step)
        dense = torch.cat([query[rows] @ keys.to(query.dtype).T for keys in bank.split(block)], dim=1)  # [n, M]
        out[rows] = dense.gather(1, index[rows])
    return out


def pool(weights: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """weights [N, K], bank [M, D], index [N, K] -> o_n = sum_k w_nk k_{index_nk}, [N, D]."""
    if index.numel() == 0:
        return weights.new_zeros(len(index), bank.shape[1])
    if bank.dtype == weights.dtype:
        # embedding_bag adds one after another: bags of limited length, added up after, keep the rounding error small
        n, k = index.shape
        starts = torch.arange(n, device=index.device)[:, None] * k + torch.arange(0, k, max(_BAG, bank.shape[1]), device=index.device)
        parts = F.embedding_bag(index.reshape(-1), bank, starts.reshape(-1), per_sample_weights=weights.reshape(-1), mode="sum")
        return parts.view(*starts.shape, bank.shape[1]).sum(dim=1)
    out = weights.new_zeros(len(index), bank.shape[1])
    with full_precision(weights):
        for rows, slots in _tiles(index, bank.shape[1]):
            gathered = _gathered(bank, index[rows, slots], weights.dtype)  # [n, k, D]
            out[rows] += torch.bmm(weights[rows, None, slots], gathered)[:, 0]
    return out


def statistic(
    query: Tensor, bank: Tensor, index: Tensor, offset: Tensor | None, shift: Tensor | None, pooled: bool
) -> tuple[Tensor, Tensor]:
    """The statistic of each row's scores (statistics.py), [N]; with `pooled` the sums weighted by its derivative, [N, D], else [0]."""
    value, weights = statistics.replace_scores(scores(query, bank, index), offset, shift)
    return value, pool(weights, bank, index) if pooled else query.new_empty(0)


def scatter(weights: Tensor, query: Tensor, index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """weights [N, K], query [N, D], index [N, K] -> h_m = sum over (n, k) with index_nk = m of w_nk q_n, [size, D] of `dtype`.

    Entries are sorted by bank row, in a stable order, so each row is one sequential sum: the same bits every time.
    """
    if index.numel() == 0:
        return query.new_zeros(size, query.shape[1], dtype=dtype)
    ascending, order = torch.sort(index.reshape(-1), stable=True)
    first = torch.searchsorted(ascending, torch.arange(size, device=index.device))  # where each bank row's entries begin
    return F.embedding_bag(order // index.shape[1], query, first, per_sample_weights=weights.reshape(-1)[order], mode="sum").to(dtype)


def _tiles(index: Tensor, width: int):
    """(rows, slots) slices that cover `index` [N, K] with at most _TILE gathered elements each."""
    n, k = index.shape
    slots = max(1, min(k, _TILE // max(1, width)))
    rows = max(1, _TILE // max(1, slots * width))
    for i in range(0, n, rows):
        for j in range(0, k, slots):
            yield slice(i, i + rows), slice(j, j + slots)


def _gathered(bank: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    return bank.index_select(0, index.reshape(-1)).to(dtype).view(*index.shape, bank.shape[1])
