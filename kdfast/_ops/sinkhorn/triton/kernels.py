"""A half iteration of Sinkhorn in Triton: logsumexp along the rows of a cost that is given, or made again from points.

Imported only where Triton is.
"""

import triton
import triton.language as tl

from ...._core.triton_scores import scores
from ..geometry import ALONE

_ALONE = tl.constexpr(ALONE)


@triton.jit
def point_costs(
    x, y, x_square, y_square, b, first_row, rows, first_column, columns, width,
    DIRECT: tl.constexpr, ROOT: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Costs of a tile of points [ROWS, COLUMNS]: |x - y|^2, its root or 1 - x.y.

    DIRECT: by differences of x [B, rows, width], exact where points nearly meet; else by products of parts [B, PARTS, rows, width].
    """
    i, j = tl.minimum(first_row + tl.arange(0, ROWS), rows - 1), tl.minimum(first_column + tl.arange(0, COLUMNS), columns - 1)
    if DIRECT:
        cost = tl.zeros([ROWS, COLUMNS], tl.float32)
        for d in range(width):
            apart = tl.load(x + (b * rows + i) * width + d)[:, None] - tl.load(y + (b * columns + j) * width + d)[None, :]
            cost += apart * apart
    else:
        x_base, y_base = x + b * PARTS * rows * width, y + b * PARTS * columns * width
        dot = scores(
            x_base, y_base, first_row, rows, first_column, columns, width, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED
        )  # fmt: skip
        if DOT:
            cost = 1 - dot
        else:
            cost = tl.load(x_square + b * rows + i)[:, None] + tl.load(y_square + b * columns + j)[None, :] - 2 * dot
            cost = tl.where(cost < 0, 0.0, cost)
    if ROOT:
        cost = tl.sqrt_rn(cost)
    return cost


@triton.jit
def costs(
    cost, x, y, x_square, y_square, b, first_row, rows, real_rows, first, columns, real_columns, width,
    batch_stride, row_stride, column_stride,
    GIVEN: tl.constexpr, DIRECT: tl.constexpr, ROOT: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of costs of problem `b`, given or of points; GIVEN, 0 beyond the real rows and columns."""
    if GIVEN:
        one = tl.full([], 1, tl.int64)  # the tile's address takes 64 bits, offsets in it 32
        base = cost + b * batch_stride + one * first_row * row_stride + one * first * column_stride
        at = base + (tl.arange(0, ROWS)[:, None] * row_stride + tl.arange(0, COLUMNS)[None, :] * column_stride)
        inside = (first_row + tl.arange(0, ROWS) < real_rows)[:, None] & (first + tl.arange(0, COLUMNS) < real_columns)[None, :]
        c = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        c = point_costs(
            x, y, x_square, y_square, b, first_row, rows, first, columns, width,
            DIRECT, ROOT, DOT, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
        )  # fmt: skip
    return c


@triton.jit
def real_sizes(row_count, column_count, b, rows, columns, PADDED: tl.constexpr):
    """Rows and columns of problem `b` that are not padding."""
    if PADDED:
        rows = tl.minimum(rows, tl.load(row_count + b).to(tl.int32))
        columns = tl.minimum(columns, tl.load(column_count + b).to(tl.int32))
    return rows, columns


@triton.jit
def half_step(
    cost, x, y, x_square, y_square, log_weight, potential, epsilon, row_count, column_count, out, lse, mean_cost, rho,
    batch_stride, row_stride, column_stride, rows, columns, width,
    GIVEN: tl.constexpr, DIRECT: tl.constexpr, ROOT: tl.constexpr, DOT: tl.constexpr, PADDED: tl.constexpr, RELAXED: tl.constexpr,
    WITH_COST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """LSE_i = log sum_j w_j exp((g_j - C_ij)/eps) [B, rows], and the potential -lambda eps LSE_i, 0 where nothing is summed.

    lambda is 1, or RELAXED rho / (rho + eps). WITH_COST: also the mean of C_ij under these weights. PADDED: costs beyond the counts of a
    problem's rows and columns are 0, whatever is there.
    """
    row_tiles = tl.cdiv(rows, ROWS)
    b, first_row = (tl.program_id(0) // row_tiles).to(tl.int64), tl.program_id(0) % row_tiles * ROWS
    row = first_row + tl.arange(0, ROWS)
    eps = tl.load(epsilon + b)
    inverse = 1 / eps
    real_rows, real_columns = real_sizes(row_count, column_count, b, rows, columns, PADDED)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    spent = tl.zeros([ROWS], tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        here = column < columns
        c = costs(
            cost, x, y, x_square, y_square, b, first_row, rows, real_rows, first, columns, real_columns, width,
            batch_stride, row_stride, column_stride, GIVEN, DIRECT, ROOT, DOT, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
        )  # fmt: skip
        start = tl.load(log_weight + b * columns + column, mask=here, other=float("-inf"))
        start += tl.load(potential + b * columns + column, mask=here, other=0.0) * inverse
        z = start[None, :] - c * inverse
        higher = tl.maximum(top, tl.max(z, 1))
        shift = tl.where(tl.abs(higher) == float("inf"), 0.0, higher)
        p = tl.exp(z - shift[:, None])
        rescale = tl.exp(top - shift)
        total = total * rescale + tl.sum(p, 1)
        if WITH_COST:
            spent = spent * rescale + tl.sum(tl.where(p == 0, 0.0, p * c), 1)  # a forbidden pair costs nothing
        top = higher
    level = tl.where(total == 0, float("-inf"), top + tl.log(total))
    scale, alone = eps, 0.0
    if RELAXED:
        scale = eps * (rho / (rho + eps))
        alone = _ALONE * rho
    there = row < rows
    to = b * rows + row
    tl.store(out + to, tl.where(total == 0, alone, -scale * level), mask=there)
    tl.store(lse + to, level, mask=there)
    if WITH_COST:
        tl.store(mean_cost + to, spent / tl.where(total == 0, 1.0, total), mask=there)


@triton.jit
def cost_rows(
    x, y, x_square, y_square, out, begin, end, rows, columns, width,
    DIRECT: tl.constexpr, ROOT: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Costs of rows `begin` ... `end` - 1 of each problem's points, out [B, end - begin, columns]."""
    row_tiles, column_tiles = tl.cdiv(end - begin, ROWS), tl.cdiv(columns, COLUMNS)
    program, tile = tl.program_id(0) // row_tiles, tl.program_id(0) % row_tiles
    b, first_row = (program // column_tiles).to(tl.int64), begin + tile * ROWS
    first = program % column_tiles * COLUMNS
    c = point_costs(
        x, y, x_square, y_square, b, first_row, rows, first, columns, width,
        DIRECT, ROOT, DOT, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
    )  # fmt: skip
    row, column = first_row + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    to = out + (b * (end - begin) + (row - begin))[:, None] * columns + column[None, :]
    tl.store(to, c, mask=(row < end)[:, None] & (column < columns)[None, :])
