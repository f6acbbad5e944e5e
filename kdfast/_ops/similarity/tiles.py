"""Tiles of the scores s_i q_i.k_j, and sums over rows or columns weighted by a function of the scores.

Everything of size N x M that the portable passes touch is one tile, of at most `_BUDGET` elements. A *tangent* is
the direction (u, kappa, sigma) in (query, keys, scale) that a second derivative asks about; along it a score moves at
the rate e_i.k_j + s_i q_i.kappa_j with e_i = s_i u_i + sigma_i q_i.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._core.dtypes import full_precision

#: elements of a tile: about what a core's L2 holds on a CPU; enough to fill an accelerator elsewhere
_BUDGET = {"cpu": 1 << 18}
_BUDGET_ELSEWHERE = 1 << 23
_MAX_ROWS = 256
_MAX_COLUMNS = 4096


class Scores(NamedTuple):
    """s_i q_i.k_j with operands rounded to `compute` and multiplied in the dtype of `scale` (fp32, or fp64 for fp64)."""

    query: Tensor  # [B, N, D]
    keys: Tensor  # [B, M, D], batch stride 0 allowed
    scale: Tensor  # [B, N]
    compute: torch.dtype
    valid: Tensor | None = None  # [B] int64: rows beyond it are not read, so that NaN there is harmless

    def blocks(self) -> tuple[list[slice], list[slice], list[slice]]:
        """Slices of the batch, the rows and the columns."""
        (batch, rows, width), columns = self.query.shape, self.keys.shape[1]
        budget = _BUDGET.get(self.query.device.type, _BUDGET_ELSEWHERE)
        r = max(1, min(rows, _MAX_ROWS * (budget >> 18)))
        c = max(1, min(columns, _MAX_COLUMNS, max(1024, budget // r)))
        b = max(1, budget // (c * max(r, width)))
        return list(_slices(batch, b)), list(_slices(rows, r)), list(_slices(columns, c))

    def rounded_query(self) -> Tensor:  # [B, N, D]
        return self.query.to(self.compute).to(self.scale.dtype)

    def query_tile(self, b: slice, r: slice) -> Tensor:  # s q: [b, r, D]
        return self.query[b, r].to(self.compute).to(self.scale.dtype) * self.scale[b, r, None]

    def column_tile(self, x: Tensor, b: slice, c: slice) -> Tensor:  # [b, c, D] of x = keys or values
        tile = x[b, c].to(self.compute).to(self.scale.dtype)
        if self.valid is None:
            return tile
        beyond = torch.arange(c.start, c.stop, device=x.device) >= self.valid[b, None]
        return tile.masked_fill(beyond[..., None], 0.0)


def no_autocast(function):
    """`function`, whose first argument is a tensor, with autocast off: it would lower the products of tiles."""

    @functools.wraps(function)
    def run(first, *args, **kwargs):
        with full_precision(first):
            return function(first, *args, **kwargs)

    return run


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


class Contraction(NamedTuple):
    rows_a: Tensor | None  # [B, N, D] sum_j A_ij k_j + B_ij kappa_j
    rows_b: Tensor | None  # [B, N, D] sum_j B_ij k_j
    columns: Tensor | None  # [B, M, D] sum_i A_ij s_i q_i + B_ij e_i, in the keys' dtype


def contract(scores: Scores, weigh: Callable, *, want_rows: bool, want_columns: bool) -> Contraction:
    """Sums weighted by A = weigh(b, r, c, tile of scores). With every want false it only runs `weigh`, for its own sums."""
    return _contract(scores.query, scores, lambda b, r, c, score, _: (weigh(b, r, c, score), None), None, None, want_rows, want_columns)


def contract_tangent(
    scores: Scores, weigh: Callable, direction: Tensor, kappa: Tensor | None, *, want_rows: bool, want_columns: bool
) -> Contraction:
    """Sums weighted by A, B = weigh(b, r, c, tile of scores, tile of their rates) along e = `direction` [B, N, D] and `kappa` [B, M, D]."""
    return _contract(scores.query, scores, weigh, direction, kappa, want_rows, want_columns)


@no_autocast
def _contract(query, scores, weigh, direction, kappa, want_rows, want_columns) -> Contraction:
    keys, scale = scores.keys, scores.scale
    rows_a = scale.new_zeros(query.shape) if want_rows else None
    rows_b = scale.new_zeros(query.shape) if want_rows and direction is not None else None
    columns = torch.empty(keys.shape, dtype=keys.dtype, device=keys.device) if want_columns else None
    batches, row_blocks, column_blocks = scores.blocks()
    for b in batches:
        for c in column_blocks:
            k = scores.column_tile(keys, b, c)  # [b, c, D]
            kappa_tile = None if kappa is None else kappa[b, c].to(scale.dtype)
            column = torch.zeros_like(k) if want_columns else None
            for r in row_blocks:
                q = scores.query_tile(b, r)  # [b, r, D]
                score = torch.bmm(q, k.mT)  # [b, r, c]
                rate = None
                if direction is not None:
                    e = direction[b, r]
                    rate = torch.bmm(e, k.mT)
                    if kappa is not None:
                        rate.baddbmm_(q, kappa_tile.mT)
                weight_a, weight_b = weigh(b, r, c, score, rate)
                if want_rows:
                    rows_a[b, r].baddbmm_(weight_a, k)
                    if direction is not None:
                        rows_b[b, r].baddbmm_(weight_b, k)
                        if kappa is not None:
                            rows_a[b, r].baddbmm_(weight_b, kappa_tile)
                if want_columns:
                    column.baddbmm_(weight_a.mT, q)
                    if direction is not None:
                        column.baddbmm_(weight_b.mT, e)
            if want_columns:
                columns[b, c] = column
    return Contraction(rows_a, rows_b, columns)
