"""The streaming softmax of wide rows in Triton: probabilities and weights of a slab of pairs, which `weighted_sums` multiplies by rows.

Imported only where Triton is. kernels.py has the terms of a logit, pairs_kernels.py tiles and slabs.
"""

import triton
import triton.language as tl

from ...._core.triton_scores import row_scores
from .kernels import LOG2E, finite_or_zero, level_of, logits
from .pairs_kernels import pair_place, pair_scores


@triton.jit
def slab_logits(
    score, scale, bias, query_labels, key_labels, key_index, limit, valid, b, i, row_exists, column, column_exists,
    columns, bias_stride, labels_stride, valid_stride, first_column,
    BIASED: tl.constexpr, LABELLED: tl.constexpr, INDICES: tl.constexpr, LIMITED: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of a tile of a slab that begins at first_column, the scale of its rows, and which columns there are."""
    entry = tl.full([], 1, tl.int64) * b
    end = first_column + columns
    if COUNTED:
        end = tl.minimum(end, tl.load(valid + entry * valid_stride).to(tl.int32))
    s = tl.load(scale + i, mask=row_exists, other=0.0)
    most = tl.load(limit + i, mask=row_exists, other=0.0) if LIMITED else s
    own = tl.load(query_labels + i, mask=row_exists, other=0) if LABELLED else i
    offset = tl.load(bias + entry * bias_stride + column, mask=column_exists, other=0.0) if BIASED else column
    label = tl.load(key_labels + entry * labels_stride + column, mask=column_exists, other=0) if LABELLED else column
    z = logits(
        score, (s * LOG2E)[:, None], s[:, None], most[:, None], own[:, None], row_exists[:, None], (key_index + i * INDICES)[:, None],
        offset[None, :], label[None, :], (first_column + column)[None, :], end, LIMITED, BIASED, LABELLED, INDICES, True,
    )  # fmt: skip
    return z, s, first_column + column < end


@triton.jit
def wide_probabilities(
    query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid, top, total, weights,
    rows, columns, width, x_stride, y_stride, entries, bias_stride, labels_stride, valid_stride, first_column, leading, weights_stride,
    POOLED: tl.constexpr, BIASED: tl.constexpr, LABELLED: tl.constexpr, INDICES: tl.constexpr, LIMITED: tl.constexpr,
    COUNTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """exp(z - top) of a tile, top its rows' largest logits, [tiles of columns, entries, rows], and their sums."""
    b, row_tile, column_tile = pair_place(rows, columns, ROWS, COLUMNS)
    row, row_exists, column, column_exists, score = pair_scores(
        query, keys, b, row_tile, column_tile, rows, columns, width, x_stride, y_stride,
        ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    z, _, _ = slab_logits(
        score, scale, bias, query_labels, key_labels, key_index, limit, valid, b, b * rows + row, row_exists, column, column_exists,
        columns, bias_stride, labels_stride, valid_stride, first_column, BIASED, LABELLED, INDICES, LIMITED, COUNTED,
    )  # fmt: skip
    highest = tl.max(z, 1)
    p = tl.exp2(z - finite_or_zero(highest)[:, None])
    part = (column_tile * entries + b) * rows + row
    tl.store(top + part, highest, mask=row_exists)
    tl.store(total + part, tl.sum(p, 1), mask=row_exists)
    if POOLED:
        tl.store(weights + b * weights_stride + row[:, None] * leading + column[None, :], p.to(weights.dtype.element_ty))


@triton.jit
def probabilities(
    query, keys, lse, lse_low, scale, bias, query_labels, key_labels, key_index, limit, valid,
    rows, columns, width, x_stride, y_stride, bias_stride, labels_stride, valid_stride, first_column,
    BIASED: tl.constexpr, LABELLED: tl.constexpr, INDICES: tl.constexpr, LIMITED: tl.constexpr, COUNTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """p of a tile of a slab under a given lse, 0 where no pair is. With the tile's place: entry, tile of rows, of columns, rows, whether
    they exist, where they are in what has one number a row, columns, whether they exist and whether they are candidates; rows' scale.
    """
    b, row_tile, column_tile = pair_place(rows, columns, ROWS, COLUMNS)
    row, row_exists, column, column_exists, score = pair_scores(
        query, keys, b, row_tile, column_tile, rows, columns, width, x_stride, y_stride,
        ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    i = b * rows + row
    z, s, inside = slab_logits(
        score, scale, bias, query_labels, key_labels, key_index, limit, valid, b, i, row_exists, column, column_exists,
        columns, bias_stride, labels_stride, valid_stride, first_column, BIASED, LABELLED, INDICES, LIMITED, COUNTED,
    )  # fmt: skip
    level, factor = level_of(
        tl.load(lse + i, mask=row_exists, other=float("-inf")), tl.load(lse_low + i, mask=row_exists, other=0.0)
    )  # fmt: skip
    p = tl.exp2(z - level[:, None]) * factor[:, None]
    return b, row_tile, column_tile, row, row_exists, i, column, column_exists, inside, s, p


@triton.jit
def wide_weights(
    slope, h, lse, lse_low, query, keys, values, scale, bias, query_labels, key_labels, key_index, limit, valid,
    weights, mass, total, bias_sum,
    rows, columns, width, x_stride, y_stride, entries, value_width, values_stride, bias_stride, labels_stride, valid_stride, first_column,
    leading, weights_stride,
    WITH_H: tl.constexpr, EVEN_VALUES: tl.constexpr, DOT_VALUES: tl.constexpr, BY_SCALE: tl.constexpr, PLAIN: tl.constexpr,
    WANT_BIAS: tl.constexpr, BIASED: tl.constexpr, LABELLED: tl.constexpr, INDICES: tl.constexpr, LIMITED: tl.constexpr,
    COUNTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dz_ij = p_ij (slope_i + h_i.v_j) of a slab, or (PLAIN) p_ij, and sums of them: rows of p and dz, or (WANT_BIAS) columns of dz.

    BY_SCALE: stored times the rows' scale.
    """
    b, row_tile, column_tile, row, row_exists, i, column, column_exists, inside, s, p = probabilities(
        query, keys, lse, lse_low, scale, bias, query_labels, key_labels, key_index, limit, valid,
        rows, columns, width, x_stride, y_stride, bias_stride, labels_stride, valid_stride, first_column,
        BIASED, LABELLED, INDICES, LIMITED, COUNTED, ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    weight = p
    if not PLAIN:
        g = tl.load(slope + i, mask=row_exists, other=0.0)[:, None]
        if WITH_H:
            entry = tl.full([], 1, tl.int64) * b
            g += row_scores(
                h + entry * rows * value_width, values + entry * values_stride, row_tile * ROWS, rows, column_tile * COLUMNS, columns,
                value_width, ROWS, COLUMNS, DEPTH, EVEN_VALUES, DOT_VALUES, PRECISION, STAGES, INTERPRETED,
            )  # fmt: skip
        weight = tl.where(inside[None, :], p * g, 0.0)  # v may be anything beyond `valid`
        if WANT_BIAS:
            part = row_tile * entries * columns + b * columns + column
            tl.store(bias_sum + part, tl.sum(tl.where(row_exists[:, None], weight, 0.0), 0), mask=column_exists)
        else:
            part = (column_tile * entries + b) * rows + row
            tl.store(mass + part, tl.sum(p, 1), mask=row_exists)
            tl.store(total + part, tl.sum(weight, 1), mask=row_exists)
    if BY_SCALE:
        weight *= s[:, None]
    tl.store(weights + b * weights_stride + row[:, None] * leading + column[None, :], weight.to(weights.dtype.element_ty))
