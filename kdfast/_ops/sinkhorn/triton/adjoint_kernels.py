"""One iteration of Sinkhorn in reverse, in Triton: a launch for what sums over columns, one for what sums over rows; and the gradient in
the cost, of all iterations at once. From a cost that is given or made again from points. The equations are in README.md.

Vectors of all iterations are [B, T, size]: f, f_hat = f / lambda_a and the slopes x of rows, of columns g_hat = g / lambda_b, where the
iteration started from (`previous`) and the slopes y. E_ij(f, g) = exp((f_i + g_j - C_ij)/eps). An iteration's rows E(f_hat, previous) b and
columns a E(f, g_hat) sum to 1 but for rounding; slopes are divided by the sums. Imported only where Triton is.
"""

import triton
import triton.language as tl

from ...._core.triton_scores import weighted
from ..portable import TINY
from .kernels import costs, real_sizes
from .plan_kernels import add_differences, exponents

_TINY = tl.constexpr(TINY)


@triton.jit
def exponential_sums(
    cost, x, y, x_square, y_square, b, f, g, v, inverse, f_too, g_too, v_too, inverse_too, row_count, column_count,
    batch_stride, row_stride, column_stride, first_row, rows, columns, width,
    FIRST: tl.constexpr, SECOND: tl.constexpr, STEEP: tl.constexpr,
    GIVEN: tl.constexpr, DIRECT: tl.constexpr, ROOT: tl.constexpr, DOT: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sum_j v_j E_ij and, STEEP, sum_j v_j E_ij log E_ij [ROWS] of problem `b`, for its f [rows], g and v [columns] (FIRST), and for f_too,
    g_too and v_too (SECOND)."""
    row = first_row + tl.arange(0, ROWS)
    real_rows, real_columns = real_sizes(row_count, column_count, b, rows, columns, PADDED)
    # tiles are added up entry by entry: lanes meet once, after the loop
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    total_too = tl.zeros([ROWS, COLUMNS], tl.float32)
    steep = tl.zeros([ROWS, COLUMNS], tl.float32)
    steep_too = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        here = column < columns
        c = costs(
            cost, x, y, x_square, y_square, b, first_row, rows, real_rows, first, columns, real_columns, width,
            batch_stride, row_stride, column_stride, GIVEN, DIRECT, ROOT, DOT, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
        )  # fmt: skip
        if FIRST:
            z = exponents(c, f, g, 0, row, rows, column, columns, inverse)
            e = tl.exp(z) * tl.load(v + column, mask=here, other=0.0)[None, :]
            total += e
            if STEEP:
                steep += tl.where(e == 0, 0.0, e * z)
        if SECOND:
            z = exponents(c, f_too, g_too, 0, row, rows, column, columns, inverse_too)
            e = tl.exp(z) * tl.load(v_too + column, mask=here, other=0.0)[None, :]
            total_too += e
            if STEEP:
                steep_too += tl.where(e == 0, 0.0, e * z)
    return tl.sum(total, 1), tl.sum(total_too, 1), tl.sum(steep, 1), tl.sum(steep_too, 1)


@triton.jit
def plan_sums(
    cost, x, y, x_square, y_square, weight, f, g, v, epsilon, row_count, column_count, needed, out,
    batch_stride, row_stride, column_stride, rows, columns, width,
    GIVEN: tl.constexpr, DIRECT: tl.constexpr, ROOT: tl.constexpr, DOT: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """weight_i sum_j v_j E_ij, out [B, rows], for weight [B, rows] and v [B, columns]; 0 of problems that are not `needed` [B]."""
    row_tiles = tl.cdiv(rows, ROWS)
    b, first_row = (tl.program_id(0) // row_tiles).to(tl.int64), tl.program_id(0) % row_tiles * ROWS
    row = first_row + tl.arange(0, ROWS)
    if not tl.load(needed + b):
        tl.store(out + b * rows + row, 0.0, mask=row < rows)
        return
    f, g, v = f + b * rows, g + b * columns, v + b * columns
    inverse = 1 / tl.load(epsilon + b)
    total, _, _, _ = exponential_sums(
        cost, x, y, x_square, y_square, b, f, g, v, inverse, f, g, v, inverse, row_count, column_count,
        batch_stride, row_stride, column_stride, first_row, rows, columns, width, True, False, False,
        GIVEN, DIRECT, ROOT, DOT, PADDED, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
    )  # fmt: skip
    total *= tl.load(weight + b * rows + row, mask=row < rows, other=0.0)
    tl.store(out + b * rows + row, total, mask=row < rows)


@triton.jit(do_not_specialize=["step"])
def pull_rows(
    cost, x, y, x_square, y_square, row_weight, column_weight, epsilon, share, row_count, column_count,
    f, f_hat, previous, g_hat, row_slope, column_slope, done, cotangent, weight_gradient, epsilon_gradient, rho,
    batch_stride, row_stride, column_stride, rows, columns, width, step, steps,
    GIVEN: tl.constexpr, DIRECT: tl.constexpr, ROOT: tl.constexpr, DOT: tl.constexpr, PADDED: tl.constexpr, RELAXED: tl.constexpr,
    STEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Iteration `step` of a problem, from the last (`done` - 1) to 0: the slopes of its rows, from those of its columns.

    h_i = sum_j E_ij(f, g_hat) y_j,  x_i = lambda (F_i - a_i h_i) / sum_j b_j E_ij(f_hat, previous),  weight_gradient_i -= eps h_i

    F, the `cotangent` [B, rows], reaches the last iteration alone. STEEP: epsilon_gradient [B, rows] += share (what rows add to d / d eps).
    """
    row_tiles = tl.cdiv(rows, ROWS)
    b, first_row = (tl.program_id(0) // row_tiles).to(tl.int64), tl.program_id(0) % row_tiles * ROWS
    at = b * steps + step
    eps = tl.load(epsilon + at)
    h, total, steep, steep_too = exponential_sums(
        cost, x, y, x_square, y_square, b, f + at * rows, g_hat + at * columns, column_slope + at * columns, 1 / eps,
        f_hat + at * rows, previous + at * columns, column_weight + b * columns, 1 / eps, row_count, column_count,
        batch_stride, row_stride, column_stride, first_row, rows, columns, width, True, True, STEEP,
        GIVEN, DIRECT, ROOT, DOT, PADDED, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
    )  # fmt: skip
    row = first_row + tl.arange(0, ROWS)
    there = row < rows
    of = b * rows + row
    weight = tl.load(row_weight + of, mask=there, other=0.0)
    sent = tl.where(step + 1 == tl.load(done + b), tl.load(cotangent + of, mask=there, other=0.0), 0.0)
    pulled = tl.where(total == 0, 0.0, sent - weight * h)
    sum_i = tl.where(total < _TINY, _TINY, total)
    scale = 1.0
    if RELAXED:
        scale = rho / (rho + eps)
    slope = scale * pulled / sum_i
    tl.store(row_slope + at * rows + row, slope, mask=there)
    tl.store(weight_gradient + of, tl.load(weight_gradient + of, mask=there) - eps * h, mask=there)
    if STEEP:
        added = weight * steep + slope * (steep_too - total * tl.log(sum_i))
        if RELAXED:
            added -= pulled * tl.load(f + at * rows + row, mask=there, other=0.0) / (rho + eps)
        added *= tl.load(share + at)
        tl.store(epsilon_gradient + of, tl.load(epsilon_gradient + of, mask=there) + added, mask=there)


@triton.jit(do_not_specialize=["step", "now", "before"])
def pull_columns(
    cost, x, y, x_square, y_square, row_weight, column_weight, epsilon, share, row_count, column_count,
    g, g_hat, previous, f, f_hat, row_slope, column_slope, done, cotangent, older, weight_gradient, epsilon_gradient, rho, now, before,
    batch_stride, row_stride, column_stride, rows, columns, width, step, steps,
    GIVEN: tl.constexpr, DIRECT: tl.constexpr, ROOT: tl.constexpr, DOT: tl.constexpr, PADDED: tl.constexpr, RELAXED: tl.constexpr,
    STEEP: tl.constexpr, THROUGH: tl.constexpr, NEXT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Through iteration `step` to where it started (THROUGH), and the slopes of the columns of the one before it (NEXT), in one pass. Rows
    here are the problem's columns.

    k_j = sum_i x_i E_ij(f_hat, previous),  G_j = older_j - now b_j k_j,  older_j = -before b_j k_j,  weight_gradient_j -= eps k_j
    y_j = lambda G_j / sum_i a_i E_ij(f, g_hat), of the iteration before

    G is the `cotangent` [B, rows], which waits until the iteration before is the problem's last; now and before are the weights of
    g_{t-1} and g_{t-2} in `previous`. STEEP: epsilon_gradient [B, rows] += share (what columns add to d / d eps).
    """
    row_tiles = tl.cdiv(rows, ROWS)
    b, first_row = (tl.program_id(0) // row_tiles).to(tl.int64), tl.program_id(0) % row_tiles * ROWS
    at = b * steps + (step if THROUGH else step - 1)
    to = b * steps + (step - 1 if NEXT else step)
    eps = tl.load(epsilon + at)
    eps_next = tl.load(epsilon + to)
    through, total, _, _ = exponential_sums(
        cost, x, y, x_square, y_square, b, previous + at * rows, f_hat + at * columns, column_slope + at * columns, 1 / eps,
        g_hat + to * rows, f + to * columns, column_weight + b * columns, 1 / eps_next, row_count, column_count,
        batch_stride, row_stride, column_stride, first_row, rows, columns, width, THROUGH, NEXT, False,
        GIVEN, DIRECT, ROOT, DOT, PADDED, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
    )  # fmt: skip
    row = first_row + tl.arange(0, ROWS)
    there = row < rows
    of = b * rows + row
    last = tl.load(done + b)
    sent = tl.load(cotangent + of, mask=there, other=0.0)
    if THROUGH:
        tl.store(weight_gradient + of, tl.load(weight_gradient + of, mask=there) - eps * through, mask=there)
        weight = tl.load(row_weight + of, mask=there, other=0.0)
        back = tl.where(weight == 0, 0.0, -weight * through)
        active = step + 1 <= last
        sent = tl.where(active, tl.load(older + of, mask=there, other=0.0) + now * back, sent)
        tl.store(cotangent + of, sent, mask=there)
        tl.store(older + of, tl.where(active, before * back, 0.0), mask=there)
    if NEXT:
        sent = tl.where((step <= last) & (total != 0), sent, 0.0)
        sum_i = tl.where(total < _TINY, _TINY, total)
        scale = 1.0
        if RELAXED:
            scale = rho / (rho + eps_next)
        tl.store(row_slope + to * rows + row, scale * sent / sum_i, mask=there)
        if STEEP:
            added = -scale * sent * tl.log(sum_i)
            if RELAXED:
                added -= sent * tl.load(g + to * rows + row, mask=there, other=0.0) / (rho + eps_next)
            added *= tl.load(share + to)
            tl.store(epsilon_gradient + of, tl.load(epsilon_gradient + of, mask=there) + added, mask=there)


@triton.jit
def adjoint_entries(
    cost, x, y, x_square, y_square, row_weight, column_weight, epsilon, row_count, column_count,
    f, f_hat, previous, g_hat, row_slope, column_slope, out,
    batch_stride, row_stride, column_stride, rows, columns, width, begin, end, batch, steps,
    GIVEN: tl.constexpr, DIRECT: tl.constexpr, ROOT: tl.constexpr, DOT: tl.constexpr, PADDED: tl.constexpr, TOTAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """W_ij = sum_t x_ti b_j E_tij(f_hat, previous) + a_i y_tj E_tij(f, g_hat) of rows `begin` ... `end` - 1, out [B, end - begin, columns];
    TOTAL: the sum over the problems, [end - begin, columns]. ROOT: over the cost, and 0 where that is 0.

    The cost is read, or made, once, and two exponentials an iteration are taken of it.
    """
    row_tiles, column_tiles = tl.cdiv(end - begin, ROWS), tl.cdiv(columns, COLUMNS)
    program, first_row = tl.program_id(0) // row_tiles, begin + tl.program_id(0) % row_tiles * ROWS
    entry, first = (program // column_tiles).to(tl.int64), program % column_tiles * COLUMNS
    row, column = first_row + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(batch if TOTAL else 1):
        b = entry + k
        real_rows, real_columns = real_sizes(row_count, column_count, b, rows, columns, PADDED)
        c = costs(
            cost, x, y, x_square, y_square, b, first_row, rows, real_rows, first, columns, real_columns, width,
            batch_stride, row_stride, column_stride, GIVEN, DIRECT, ROOT, DOT, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
        )  # fmt: skip
        a_i = tl.load(row_weight + b * rows + row, mask=row < rows, other=0.0)
        b_j = tl.load(column_weight + b * columns + column, mask=column < columns, other=0.0)
        for t in range(steps):
            at = b * steps + t
            of_row, of_column = at * rows, at * columns
            inverse = 1 / tl.load(epsilon + at)
            x_i = tl.load(row_slope + of_row + row, mask=row < rows, other=0.0)
            y_j = tl.load(column_slope + of_column + column, mask=column < columns, other=0.0)
            e = tl.exp(exponents(c, f_hat + of_row, previous + of_column, 0, row, rows, column, columns, inverse))
            acc += e * x_i[:, None] * b_j[None, :]
            e = tl.exp(exponents(c, f + of_row, g_hat + of_column, 0, row, rows, column, columns, inverse))
            acc += e * a_i[:, None] * y_j[None, :]
        if ROOT:
            acc = tl.where(c > 0, acc / tl.where(c > 0, c, 1.0), 0.0)
    to = out + (entry * (end - begin) + (row - begin))[:, None] * columns + column[None, :]
    tl.store(to, acc, mask=(row < end)[:, None] & (column < columns)[None, :])


@triton.jit
def matrix_products(
    matrix, points, values, out, mass, batch_stride, row_stride, column_stride, rows, columns, value_width,
    APART: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sum_j W_ij v_j for v [B, 3, columns, value_width] in parts, out [B, rows, value_width], and sum_j W_ij, [B, rows], with W stored.

    APART: sum_j W_ij (x_i - v_j), of points x [B, rows, value_width], and v not in parts.
    """
    row_tiles, chunks = tl.cdiv(rows, ROWS), tl.cdiv(value_width, CHUNK)
    program, first_row = tl.program_id(0) // row_tiles, tl.program_id(0) % row_tiles * ROWS
    b, first_width = (program // chunks).to(tl.int64), program % chunks * CHUNK
    row = first_row + tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, CHUNK], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    one = tl.full([], 1, tl.int64)
    for first in range(0, columns, COLUMNS):
        base = matrix + b * batch_stride + one * first_row * row_stride + one * first * column_stride
        at = base + (tl.arange(0, ROWS)[:, None] * row_stride + tl.arange(0, COLUMNS)[None, :] * column_stride)
        inside = (row < rows)[:, None] & (first + tl.arange(0, COLUMNS) < columns)[None, :]
        w = tl.load(at, mask=inside, other=0.0)
        total += tl.sum(w, 1)
        if APART:
            x, y, column = points + b * rows * value_width, values + b * columns * value_width, first + tl.arange(0, COLUMNS)
            acc = add_differences(w, x, y, row, rows, column, columns, value_width, first_width, acc, CHUNK)
        else:
            v = values + b * 3 * columns * value_width
            acc = weighted(w, v, first, columns, value_width, first_width, acc, COLUMNS, CHUNK, INTERPRETED)
    d = first_width + tl.arange(0, CHUNK)
    to = out + (b * rows + row)[:, None] * value_width + d[None, :]
    tl.store(to, acc, mask=(row < rows)[:, None] & (d < value_width)[None, :])
    if first_width == 0:
        tl.store(mass + b * rows + row, total, mask=row < rows)
