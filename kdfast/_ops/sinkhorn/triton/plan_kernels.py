"""The plan in Triton: its entries, and sums over its rows of numbers and of vectors, from a cost that is given or made again from points.

P_ij = a_i b_j E_ij, E_ij = exp((f_i + g_j - C_ij)/eps). Columns' sums are those of the rows of the transposed problem. Imported only where
Triton is.
"""

import triton
import triton.language as tl

from ...._core.triton_scores import weighted
from ..geometry import MAX_EXPONENT
from .kernels import costs, real_sizes

_MOST = tl.constexpr(MAX_EXPONENT)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def exponents(c, f, g, b, row, rows, column, columns, inverse):
    """log E_ij, with potentials 0 past the end; at most _MOST, and NaN stays."""
    f_i = tl.load(f + b * rows + row, mask=row < rows, other=0.0)
    g_j = tl.load(g + b * columns + column, mask=column < columns, other=0.0)
    z = (g_j * inverse)[None, :] - c * inverse + (f_i * inverse)[:, None]
    return tl.where(z > _MOST, _MOST, z)


@triton.jit
def times_cost(e, c):
    """e c, 0 where e is 0 even if the cost is infinite: a forbidden pair."""
    return e * tl.where(c > _LARGEST, _LARGEST, c)


@triton.jit
def plan_entries(
    cost, x, y, x_square, y_square, f, g, row_weight, column_weight, epsilon, row_count, column_count, weight, slope, out,
    batch_stride, row_stride, column_stride, rows, columns, width, batch,
    GIVEN: tl.constexpr, DIRECT: tl.constexpr, ROOT: tl.constexpr, DOT: tl.constexpr, PADDED: tl.constexpr, SLOPED: tl.constexpr,
    TOTAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """weight P, or SLOPED (weight + slope C) P, out [B, rows, columns]; TOTAL: the sum over the problems, [rows, columns]."""
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    program, first_row = tl.program_id(0) // row_tiles, tl.program_id(0) % row_tiles * ROWS
    entry, first = (program // column_tiles).to(tl.int64), program % column_tiles * COLUMNS
    row, column = first_row + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(batch if TOTAL else 1):
        b = entry + k
        inverse = 1 / tl.load(epsilon + b)
        real_rows, real_columns = real_sizes(row_count, column_count, b, rows, columns, PADDED)
        c = costs(
            cost, x, y, x_square, y_square, b, first_row, rows, real_rows, first, columns, real_columns, width,
            batch_stride, row_stride, column_stride, GIVEN, DIRECT, ROOT, DOT, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
        )  # fmt: skip
        e = tl.exp(exponents(c, f, g, b, row, rows, column, columns, inverse))
        w = e * tl.load(weight + b)
        if SLOPED:
            w += times_cost(e, c) * tl.load(slope + b)
        a_i = tl.load(row_weight + b * rows + row, mask=row < rows, other=0.0)
        b_j = tl.load(column_weight + b * columns + column, mask=column < columns, other=0.0)
        acc += w * a_i[:, None] * b_j[None, :]
    to = out + (entry * rows + row)[:, None] * columns + column[None, :]
    tl.store(to, acc, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def row_moments(
    cost, x, y, x_square, y_square, f, g, column_weight, epsilon, row_count, column_count, moment, steepness,
    batch_stride, row_stride, column_stride, rows, columns, width,
    GIVEN: tl.constexpr, DIRECT: tl.constexpr, ROOT: tl.constexpr, DOT: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sum_j b_j E_ij C_ij and sum_j b_j E_ij C_ij log E_ij, each [B, rows]."""
    row_tiles = tl.cdiv(rows, ROWS)
    b, first_row = (tl.program_id(0) // row_tiles).to(tl.int64), tl.program_id(0) % row_tiles * ROWS
    row = first_row + tl.arange(0, ROWS)
    inverse = 1 / tl.load(epsilon + b)
    real_rows, real_columns = real_sizes(row_count, column_count, b, rows, columns, PADDED)
    first_sum = tl.zeros([ROWS], tl.float32)
    second_sum = tl.zeros([ROWS], tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        c = costs(
            cost, x, y, x_square, y_square, b, first_row, rows, real_rows, first, columns, real_columns, width,
            batch_stride, row_stride, column_stride, GIVEN, DIRECT, ROOT, DOT, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
        )  # fmt: skip
        z = exponents(c, f, g, b, row, rows, column, columns, inverse)
        e = tl.exp(z)
        b_j = tl.load(column_weight + b * columns + column, mask=column < columns, other=0.0)
        spent = times_cost(e, c) * b_j[None, :]
        first_sum += tl.sum(spent, 1)
        second_sum += tl.sum(tl.where(e == 0, 0.0, spent * z), 1)
    tl.store(moment + b * rows + row, first_sum, mask=row < rows)
    tl.store(steepness + b * rows + row, second_sum, mask=row < rows)


@triton.jit
def add_differences(w, x, y, row, rows, column, columns, width, first_width, acc, CHUNK: tl.constexpr):
    """acc [ROWS, CHUNK] + sum_j W_ij (x_i - y_j) in the coordinates from first_width on, of x [rows, width] and y [columns, width]."""
    i, j = tl.minimum(row, rows - 1).to(tl.int64), tl.minimum(column, columns - 1).to(tl.int64)
    for k in range(tl.minimum(CHUNK, width - first_width)):
        d = first_width + k
        apart = tl.load(x + i * width + d)[:, None] - tl.load(y + j * width + d)[None, :]
        acc += tl.where((tl.arange(0, CHUNK) == k)[None, :], tl.sum(w * apart, 1)[:, None], 0.0)
    return acc


@triton.jit
def plan_products(
    cost, x, y, x_square, y_square, f, g, row_weight, column_weight, epsilon, row_count, column_count, weight, slope, values, out, mass,
    batch_stride, row_stride, column_stride, rows, columns, width, value_width,
    GIVEN: tl.constexpr, DIRECT: tl.constexpr, ROOT: tl.constexpr, DOT: tl.constexpr, PADDED: tl.constexpr, SLOPED: tl.constexpr,
    OVER_COST: tl.constexpr, APART: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sum_j W_ij v_j for v [B, 3, columns, value_width] in parts, out [B, rows, value_width], and sum_j W_ij, [B, rows].

    W = weight P, or SLOPED (weight + slope C) P; OVER_COST: over C, and 0 where that is 0. APART, which costs are made DIRECT for:
    sum_j W_ij (x_i - y_j).
    """
    row_tiles, chunks = tl.cdiv(rows, ROWS), tl.cdiv(value_width, CHUNK)
    program, first_row = tl.program_id(0) // row_tiles, tl.program_id(0) % row_tiles * ROWS
    b, first_width = (program // chunks).to(tl.int64), program % chunks * CHUNK
    row = first_row + tl.arange(0, ROWS)
    inverse = 1 / tl.load(epsilon + b)
    real_rows, real_columns = real_sizes(row_count, column_count, b, rows, columns, PADDED)
    acc = tl.zeros([ROWS, CHUNK], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        c = costs(
            cost, x, y, x_square, y_square, b, first_row, rows, real_rows, first, columns, real_columns, width,
            batch_stride, row_stride, column_stride, GIVEN, DIRECT, ROOT, DOT, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
        )  # fmt: skip
        e = tl.exp(exponents(c, f, g, b, row, rows, column, columns, inverse))
        w = e * tl.load(weight + b)
        if SLOPED:
            w += times_cost(e, c) * tl.load(slope + b)
        if OVER_COST:
            w = tl.where(c > 0, w / tl.where(c > 0, c, 1.0), 0.0)
        w = w * tl.load(column_weight + b * columns + column, mask=column < columns, other=0.0)[None, :]
        total += tl.sum(w, 1)
        if APART:
            acc = add_differences(
                w, x + b * rows * width, y + b * columns * width, row, rows, column, columns, width, first_width, acc, CHUNK
            )  # fmt: skip
        else:
            v = values + b * 3 * columns * value_width
            acc = weighted(w, v, first, columns, value_width, first_width, acc, COLUMNS, CHUNK, INTERPRETED)
    a_i = tl.load(row_weight + b * rows + row, mask=row < rows, other=0.0)
    d = first_width + tl.arange(0, CHUNK)
    to = out + (b * rows + row)[:, None] * value_width + d[None, :]
    tl.store(to, acc * a_i[:, None], mask=(row < rows)[:, None] & (d < value_width)[None, :])
    if first_width == 0:
        tl.store(mass + b * rows + row, total * a_i, mask=row < rows)
