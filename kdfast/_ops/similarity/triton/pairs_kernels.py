"""Losses over all pairs of two sides in Triton: statistics of tiles of scores, weights of a slab of pairs, and sums that the weights make.

Imported only where Triton is. A program has one tile of scores, of rows of any width (`row_scores`). A slab is a part of the pairs whose
weights are stored for the two products they are needed for; its matrix has whole tiles, zeros where no pair is.
"""

import triton
import triton.language as tl

from ...._core.triton_functions import softplus
from ...._core.triton_scores import product, row_scores
from .kernels import LOG2E, exact_log_sum, finite_or_zero, level_of


@triton.jit
def pair_place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(batch entry, tile of rows, tile of columns) of this program: programs that follow one another share their columns."""
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    return program // (row_tiles * column_tiles), program % row_tiles, program // row_tiles % column_tiles


@triton.jit
def pair_scores(
    x, y, b, row_tile, column_tile, rows, columns, width, x_stride, y_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile's rows and columns, whether they exist, and their scores."""
    row, column = row_tile * ROWS + tl.arange(0, ROWS), column_tile * COLUMNS + tl.arange(0, COLUMNS)
    entry = tl.full([], 1, tl.int64) * b
    score = row_scores(
        x + entry * x_stride, y + entry * y_stride, row_tile * ROWS, rows, column_tile * COLUMNS, columns, width,
        ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    return row, row < rows, column, column < columns, score


@triton.jit
def admitted_pairs(
    x_labels, y_labels, i, j, row, column, row_exists, column_exists, LABELLED: tl.constexpr, CLASSES: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Which pairs of a tile count: those of unequal labels, with CLASSES of different rows; HALF: above the diagonal."""
    admitted = row_exists[:, None] & column_exists[None, :]
    if LABELLED:
        own = tl.load(x_labels + i, mask=row_exists, other=0)
        admitted = admitted & (own[:, None] != tl.load(y_labels + j, mask=column_exists, other=0)[None, :])
    if HALF:
        admitted = admitted & (row[:, None] < column[None, :])
    elif CLASSES:
        admitted = admitted & (row[:, None] != column[None, :])
    return admitted


@triton.jit
def same_class(classes, row, column, row_exists, column_exists, admitted):
    """Which of the admitted pairs of one matrix's rows are of one class."""
    own = tl.load(classes + row, mask=row_exists, other=0)
    return admitted & (own[:, None] == tl.load(classes + column, mask=column_exists, other=0)[None, :])


@triton.jit
def store_statistics(z, same, top, total, same_sum, same_count, at, exists, AXIS: tl.constexpr, CLASSES: tl.constexpr):
    """Of a tile of base-2 logits, of each row (AXIS 1) or column (AXIS 0): the largest, the sum of exponentials, and of its class.

    A class has the sum of its logits less the largest, whose rounding is that of the differences.
    """
    highest = tl.max(z, AXIS)
    z -= tl.expand_dims(finite_or_zero(highest), AXIS)
    tl.store(top + at, highest, mask=exists)
    tl.store(total + at, tl.sum(tl.exp2(z), AXIS), mask=exists)
    if CLASSES:
        tl.store(same_sum + at, tl.sum(tl.where(same, z, 0.0), AXIS), mask=exists)
        tl.store(same_count + at, tl.sum(tl.where(same, 1.0, 0.0), AXIS), mask=exists)


@triton.jit
def store_nothing(top, total, same_sum, same_count, at, exists, CLASSES: tl.constexpr):
    """The statistics of no pairs."""
    tl.store(top + at, float("-inf"), mask=exists)
    tl.store(total + at, 0.0, mask=exists)
    if CLASSES:
        tl.store(same_sum + at, 0.0, mask=exists)
        tl.store(same_count + at, 0.0, mask=exists)


@triton.jit
def symmetric_statistics(
    x, y, scale, x_labels, y_labels, classes, row_top, row_total, row_same, row_count, column_top, column_total, column_same, column_count,
    rows, columns, width, x_stride, y_stride, entries, first_row, first_column,
    LABELLED: tl.constexpr, CLASSES: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Largest logit and sum of exponentials of each row of a tile, [tiles of columns, entries, rows], and of each column likewise.

    HALF (one matrix on both sides, whose slab begins at first_row and first_column): of the pairs above the diagonal alone. CLASSES, with
    HALF: also the sum of a row's logits with others of its class less its largest one, and the number of these.
    """
    b, row_tile, column_tile = pair_place(rows, columns, ROWS, COLUMNS)
    row, column = row_tile * ROWS + tl.arange(0, ROWS), column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row_exists, column_exists = row < rows, column < columns
    i, j = b * rows + row, b * columns + column
    of_row, of_column = (column_tile * entries + b) * rows + row, row_tile * entries * columns + j
    if HALF:  # noqa: SIM102, one is known when the kernel is compiled, the other is not
        if first_column + column_tile * COLUMNS + COLUMNS <= first_row + row_tile * ROWS + 1:
            store_nothing(row_top, row_total, row_same, row_count, of_row, row_exists, CLASSES)
            store_nothing(column_top, column_total, column_same, column_count, of_column, column_exists, CLASSES)
            return
    row, row_exists, column, column_exists, score = pair_scores(
        x, y, b, row_tile, column_tile, rows, columns, width, x_stride, y_stride,
        ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    row, column = first_row + row, first_column + column
    admitted = admitted_pairs(x_labels, y_labels, i, j, row, column, row_exists, column_exists, LABELLED, CLASSES, HALF)
    same = admitted
    if CLASSES:
        same = same_class(classes, row, column, row_exists, column_exists, admitted)
    z = tl.where(admitted, score * (tl.load(scale + i, mask=row_exists, other=0.0) * LOG2E)[:, None], float("-inf"))
    store_statistics(z, same, row_top, row_total, row_same, row_count, of_row, row_exists, 1, CLASSES)
    store_statistics(z, same, column_top, column_total, column_same, column_count, of_column, column_exists, 0, CLASSES)


@triton.jit
def merge_statistics(
    part_top, part_total, part_same, part_count, top, total, lse, lse_low, same_sum, same_count, carry, count, parts,
    FACTORS: tl.constexpr, CLASSES: tl.constexpr, PARTS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Parts [parts, count] of sums of exponentials into running ones, in their order, and what the log-sum-exps are then.

    FACTORS: part_top becomes what each part, and carry what went before, is to be multiplied by. CLASSES: also sums of differences from
    the largest, and the numbers of their terms.
    """
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    exists = at < count
    begun = tl.load(top + at, mask=exists, other=float("-inf"))
    highest = begun
    sums = tl.load(total + at, mask=exists, other=0.0)
    differences = sums
    terms = sums
    if CLASSES:
        differences = tl.load(same_sum + at, mask=exists, other=0.0)
        terms = tl.load(same_count + at, mask=exists, other=0.0)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & exists[None, :]
        index = part[:, None] * count + at[None, :]
        of_part = tl.load(part_top + index, mask=inside, other=float("-inf"))
        before, highest = highest, tl.maximum(highest, tl.max(of_part, 0))
        shift = finite_or_zero(highest)
        more = tl.load(part_total + index, mask=inside, other=0.0) * tl.exp2(of_part - shift[None, :])
        sums = sums * tl.exp2(before - shift) + tl.sum(more, 0)
        if CLASSES:  # what has no terms has nothing to move, from wherever
            more_terms = tl.load(part_count + index, mask=inside, other=0.0)
            more = tl.load(part_same + index, mask=inside, other=0.0) + (finite_or_zero(of_part) - shift[None, :]) * more_terms
            differences += tl.where(terms == 0, 0.0, (finite_or_zero(before) - shift) * terms)
            differences += tl.sum(tl.where(more_terms == 0, 0.0, more), 0)
            terms += tl.sum(more_terms, 0)
    if FACTORS:
        shift = finite_or_zero(highest)
        tl.store(carry + at, tl.exp2(begun - shift), mask=exists)
        for first in range(0, parts, PARTS):
            part = first + tl.arange(0, PARTS)
            inside = (part < parts)[:, None] & exists[None, :]
            index = part[:, None] * count + at[None, :]
            tl.store(part_top + index, tl.exp2(tl.load(part_top + index, mask=inside, other=0.0) - shift[None, :]), mask=inside)
    level, low = exact_log_sum(highest, sums)
    tl.store(top + at, highest, mask=exists)
    tl.store(total + at, sums, mask=exists)
    tl.store(lse + at, level, mask=exists)
    tl.store(lse_low + at, low, mask=exists)
    if CLASSES:
        tl.store(same_sum + at, differences, mask=exists)
        tl.store(same_count + at, terms, mask=exists)


@triton.jit
def store_weights(
    weight, score, scale, weights, slope, moment, b, row, column, part, row_exists, leading, weights_stride, WANTED: tl.constexpr
):  # fmt: skip
    """A tile of weights into the slab, times the rows' scale, and the rows' sums of them and of them times the scores."""
    tl.store(slope + part, tl.sum(weight, 1), mask=row_exists)
    tl.store(moment + part, tl.sum(weight * score, 1), mask=row_exists)
    if WANTED:
        at = weights + b * weights_stride + row[:, None] * leading + column[None, :]
        tl.store(at, (weight * scale[:, None]).to(weights.dtype.element_ty))


@triton.jit
def symmetric_weights(
    x, y, scale, x_labels, y_labels, classes, same_share, row_g, row_lse, row_low, column_g, column_lse, column_low,
    weights, slope, moment,
    rows, columns, width, x_stride, y_stride, entries, first_row, first_column, leading, weights_stride,
    LABELLED: tl.constexpr, CLASSES: tl.constexpr, WANTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """w_ij = g_i exp(z_ij - lse_i) + g_j exp(z_ij - lse_j) of a slab; CLASSES: less share_i (g_i + g_j) in one class."""
    b, row_tile, column_tile = pair_place(rows, columns, ROWS, COLUMNS)
    row, row_exists, column, column_exists, score = pair_scores(
        x, y, b, row_tile, column_tile, rows, columns, width, x_stride, y_stride,
        ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    i, j = b * rows + row, b * columns + column
    s = tl.load(scale + i, mask=row_exists, other=0.0)
    of_row, of_column = tl.load(row_g + i, mask=row_exists, other=0.0), tl.load(column_g + j, mask=column_exists, other=0.0)
    level, factor = level_of(
        tl.load(row_lse + i, mask=row_exists, other=float("-inf")), tl.load(row_low + i, mask=row_exists, other=0.0)
    )  # fmt: skip
    weight = tl.exp2(score * (s * LOG2E)[:, None] - level[:, None]) * (of_row * factor)[:, None]
    level, factor = level_of(
        tl.load(column_lse + j, mask=column_exists, other=float("-inf")), tl.load(column_low + j, mask=column_exists, other=0.0)
    )  # fmt: skip
    weight += tl.exp2(score * (s * LOG2E)[:, None] - level[None, :]) * (of_column * factor)[None, :]
    in_row, in_column = first_row + row, first_column + column
    admitted = admitted_pairs(x_labels, y_labels, i, j, in_row, in_column, row_exists, column_exists, LABELLED, CLASSES, False)
    weight = tl.where(admitted, weight, 0.0)
    if CLASSES:
        share = tl.load(same_share + i, mask=row_exists, other=0.0)
        same = same_class(classes, in_row, in_column, row_exists, column_exists, admitted)
        weight -= tl.where(same, (of_row[:, None] + of_column[None, :]) * share[:, None], 0.0)
    part = (column_tile * entries + b) * rows + row
    store_weights(weight, score, s, weights, slope, moment, b, row, column, part, row_exists, leading, weights_stride, WANTED)


@triton.jit
def sigmoid_pairs(
    x, y, scale, shift, positive, g, loss, weights, slope, moment,
    rows, columns, width, x_stride, y_stride, entries, first_column, leading, weights_stride,
    GRADIENT: tl.constexpr, WANTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Sums of softplus(t) over the columns of a tile, [tiles of columns, entries, rows], t = scale_i x_i.y_j + shift_i, negated where j is
    row i's positive. GRADIENT: in their place the weights g_i dsoftplus / dz.
    """
    b, row_tile, column_tile = pair_place(rows, columns, ROWS, COLUMNS)
    row, row_exists, column, column_exists, score = pair_scores(
        x, y, b, row_tile, column_tile, rows, columns, width, x_stride, y_stride,
        ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    i = b * rows + row
    s = tl.load(scale + i, mask=row_exists, other=0.0)
    z = score * s[:, None] + tl.load(shift + i, mask=row_exists, other=0.0)[:, None]
    matched = (tl.load(positive + i, mask=row_exists, other=-1).to(tl.int32) - first_column)[:, None] == column[None, :]
    t = tl.where(matched, -z, z)
    here = row_exists[:, None] & column_exists[None, :]
    part = (column_tile * entries + b) * rows + row
    if GRADIENT:
        of_row = tl.load(g + i, mask=row_exists, other=0.0)[:, None]
        weight = tl.where(here, tl.where(matched, -of_row, of_row) / (1 + tl.exp(-t)), 0.0)
        store_weights(weight, score, s, weights, slope, moment, b, row, column, part, row_exists, leading, weights_stride, WANTED)
    else:
        value, _ = softplus(t)
        tl.store(loss + part, tl.sum(tl.where(here, value, 0.0), 1), mask=row_exists)


@triton.jit
def weighted_sums(
    weights, values, out, factors, valid, count, inner, width, leading, weights_stride, values_stride, valid_stride, first_inner, entries,
    split_inner,
    TRANSPOSED: tl.constexpr, ADD: tl.constexpr, FACTORS: tl.constexpr, COUNTED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sum_k w_ik v_k of a slab, [entries, count, width], over a split of k; TRANSPOSED: of w_ki. ADD: to what is there.

    FACTORS: of a row's weights of each tile of COLUMNS, [tiles, entries, count]. COUNTED: v is read where first_inner + k < valid.
    """
    width_tiles, row_tiles = tl.cdiv(width, WIDTH), tl.cdiv(count, ROWS)
    program = tl.program_id(0)
    group = program // (width_tiles * row_tiles)
    b, split = group % entries, group // entries
    i = program // width_tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    d = program % width_tiles * WIDTH + tl.arange(0, WIDTH)
    k = tl.arange(0, DEPTH)
    one = tl.full([], 1, tl.int64)
    w_base, v_base = weights + b * weights_stride, values + one * b * values_stride
    if COUNTED:
        inner = tl.minimum(inner, tl.load(valid + one * b * valid_stride).to(tl.int32) - first_inner)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in tl.range(split * split_inner, tl.minimum((split + 1) * split_inner, inner), DEPTH, num_stages=STAGES):
        if TRANSPOSED:
            w = tl.trans(tl.load(w_base + (first + k)[:, None] * leading + i[None, :]))
        else:
            w = tl.load(w_base + i[:, None] * leading + (first + k)[None, :])
        v_at = v_base + (one * tl.minimum(first + k, inner - 1)[:, None] * width + d[None, :])  # copies of the last, whose weights are 0
        v = tl.load(v_at) if EVEN else tl.load(v_at, mask=(d < width)[None, :], other=0.0)
        if FACTORS:
            factor = tl.load(factors + (first // COLUMNS * entries + b) * count + i, mask=i < count, other=0.0)
            acc += factor[:, None] * product(w.to(DOT), v.to(DOT), tl.zeros([ROWS, WIDTH], tl.float32), PRECISION, INTERPRETED)
        else:
            acc = product(w.to(DOT), v.to(DOT), acc, PRECISION, INTERPRETED)
    at = out + one * group * count * width + i[:, None] * width + d[None, :]
    inside = (i < count)[:, None] & (d < width)[None, :]
    if ADD:
        acc += tl.load(at, mask=inside, other=0.0)
    tl.store(at, acc, mask=inside)
