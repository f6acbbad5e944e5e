"""Rows that the keys of their class attract, in Triton: statistics of tiles of scores, and weights of a slab of pairs.

Imported only where Triton is. wide_kernels.py has the logits of a slab, pairs_kernels.py tiles, sums over them and slabs.
"""

import triton
import triton.language as tl

from .kernels import finite_or_zero, level_of
from .pairs_kernels import pair_place, pair_scores, store_weights
from .wide_kernels import slab_logits


@triton.jit
def class_logits(
    query, keys, scale, bias, query_labels, key_labels, key_index, valid,
    rows, columns, width, x_stride, y_stride, bias_stride, labels_stride, valid_stride, first_column,
    INCLUDED: tl.constexpr, BIASED: tl.constexpr, INDICES: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Of a tile of a slab: its place; rows and columns; scores (0 of what is left out, which may be anything); base-2 logits, and those of
    what is in the denominator; the pairs of one class; the rows' scale."""
    b, row_tile, column_tile = pair_place(rows, columns, ROWS, COLUMNS)
    row, row_exists, column, column_exists, score = pair_scores(
        query, keys, b, row_tile, column_tile, rows, columns, width, x_stride, y_stride,
        ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    i = b * rows + row
    z, s, _ = slab_logits(
        score, scale, bias, scale, scale, key_index, scale, valid, b, i, row_exists, column, column_exists,
        columns, bias_stride, labels_stride, valid_stride, first_column, BIASED, False, INDICES, False, COUNTED,
    )  # fmt: skip
    own = tl.load(query_labels + i, mask=row_exists, other=0)
    label = tl.load(key_labels + tl.full([], 1, tl.int64) * b * labels_stride + column, mask=column_exists, other=0)
    here = z != float("-inf")
    same = here & (own[:, None] == label[None, :])
    below = z if INCLUDED else tl.where(same, float("-inf"), z)
    return b, column_tile, row, row_exists, column, i, tl.where(here, score, 0.0), z, below, same, s


@triton.jit
def class_statistics(
    query, keys, scale, bias, query_labels, key_labels, key_index, valid, top, total, same_sum, same_count,
    rows, columns, width, x_stride, y_stride, entries, bias_stride, labels_stride, valid_stride, first_column,
    INCLUDED: tl.constexpr, BIASED: tl.constexpr, INDICES: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Largest logit and sum of exponentials of each row's denominator in a tile, [tiles of columns, entries, rows]; sum of the row's
    logits with its class less that largest, and the number of these."""
    b, column_tile, row, row_exists, _, _, _, z, below, same, _ = class_logits(
        query, keys, scale, bias, query_labels, key_labels, key_index, valid,
        rows, columns, width, x_stride, y_stride, bias_stride, labels_stride, valid_stride, first_column,
        INCLUDED, BIASED, INDICES, COUNTED, ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    highest = tl.max(below, 1)
    shift = finite_or_zero(highest)[:, None]
    part = (column_tile * entries + b) * rows + row
    tl.store(top + part, highest, mask=row_exists)
    tl.store(total + part, tl.sum(tl.exp2(below - shift), 1), mask=row_exists)
    tl.store(same_sum + part, tl.sum(tl.where(same, z - shift, 0.0), 1), mask=row_exists)
    tl.store(same_count + part, tl.sum(tl.where(same, 1.0, 0.0), 1), mask=row_exists)


@triton.jit
def class_weights(
    g, share, lse, lse_low, query, keys, scale, bias, query_labels, key_labels, key_index, valid, weights, slope, moment,
    rows, columns, width, x_stride, y_stride, entries, bias_stride, labels_stride, valid_stride, first_column, leading, weights_stride,
    WANTED: tl.constexpr, INCLUDED: tl.constexpr, BIASED: tl.constexpr, INDICES: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """w_ij = g_i (exp(z_ij - lse_i) - share_i [one class]) of a slab, stored times the rows' scale; rows' sums of w and of w x score."""
    b, column_tile, row, row_exists, column, i, score, _, below, same, s = class_logits(
        query, keys, scale, bias, query_labels, key_labels, key_index, valid,
        rows, columns, width, x_stride, y_stride, bias_stride, labels_stride, valid_stride, first_column,
        INCLUDED, BIASED, INDICES, COUNTED, ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    level, factor = level_of(
        tl.load(lse + i, mask=row_exists, other=float("-inf")), tl.load(lse_low + i, mask=row_exists, other=0.0)
    )  # fmt: skip
    attracted = tl.load(share + i, mask=row_exists, other=0.0)
    weight = tl.exp2(below - level[:, None]) * factor[:, None] - tl.where(same, attracted[:, None], 0.0)
    weight *= tl.load(g + i, mask=row_exists, other=0.0)[:, None]
    part = (column_tile * entries + b) * rows + row
    store_weights(weight, score, s, weights, slope, moment, b, row, column, part, row_exists, leading, weights_stride, WANTED)
