"""The second derivative of the sigmoid pair loss in Triton: weights of a slab of pairs, which `weighted_sums` multiplies by rows.

Imported only where Triton is.
"""

import triton
import triton.language as tl

from .pairs_kernels import pair_place
from .second_kernels import rates_of, row_products


@triton.jit
def sigmoid_second(
    query, keys, direction, keys_direction, scale, shift, shift_direction, positive, g, weights, of_slopes, rate_sum, weight_sum,
    rows, columns, width, x_stride, y_stride, entries, keys_direction_stride, first_column, leading, weights_stride,
    KEYS_MOVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A = g sigmoid(t) sigmoid(-t) rate and B = g slope of a slab, slope = dsoftplus(t) / dz, and [tiles of columns, entries, rows] sums of
    slope rate and of A. t as in `sigmoid_pairs`; rates with that of the shift.
    """
    b, row_tile, column_tile = pair_place(rows, columns, ROWS, COLUMNS)
    row, column = row_tile * ROWS + tl.arange(0, ROWS), column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row_exists, inside, i = row < rows, column < columns, b * rows + row
    s = tl.load(scale + i, mask=row_exists, other=0.0)
    rate = rates_of(
        query, keys, direction, keys_direction, query, s, b, row_tile, column_tile, column, inside,
        rows, columns, width, x_stride, y_stride, keys_direction_stride, 0,
        KEYS_MOVE, False, ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    rate += tl.load(shift_direction + i, mask=row_exists, other=0.0)[:, None]
    z = row_products(
        query, keys, b, x_stride, y_stride, row_tile, column_tile, rows, columns, width, inside,
        ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    ) * s[:, None]  # fmt: skip
    z += tl.load(shift + i, mask=row_exists, other=0.0)[:, None]
    matched = (tl.load(positive + i, mask=row_exists, other=-1).to(tl.int32) - first_column)[:, None] == column[None, :]
    here = row_exists[:, None] & inside[None, :]
    of_row = tl.load(g + i, mask=row_exists, other=0.0)[:, None]
    share = 1 / (1 + tl.exp(tl.where(matched, z, -z)))  # sigmoid(t)
    slope = tl.where(here, tl.where(matched, -share, share), 0.0)
    weight = tl.where(here, of_row * share * rate / (1 + tl.exp(tl.where(matched, -z, z))), 0.0)
    at = b * weights_stride + row[:, None] * leading + column[None, :]
    tl.store(weights + at, weight.to(weights.dtype.element_ty))
    tl.store(of_slopes + at, (of_row * slope).to(weights.dtype.element_ty))
    part = (column_tile * entries + b) * rows + row
    tl.store(weight_sum + part, tl.sum(weight, 1), mask=row_exists)
    tl.store(rate_sum + part, tl.sum(tl.where(here, slope * rate, 0.0), 1), mask=row_exists)
