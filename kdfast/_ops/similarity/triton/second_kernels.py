"""The second derivative of the pooled output in Triton: moments of tiles, their merge, and weights of a slab of pairs, which
`weighted_sums` multiplies by rows.

Imported only where Triton is. README.md derives the sums; wide_kernels.py has probabilities of a tile. What is made of differences from a
mean vanishes where one candidate holds nearly all of its row, and only if the mean is, to more digits than a float has, one of the very
numbers it is taken off: means are pairs of floats, merged in float64.
"""

import triton
import triton.language as tl

from ...._core.triton_scores import row_scores
from .wide_kernels import probabilities

LEAST_MASS: tl.constexpr = tl.constexpr(2.0**-100)  # of a tile whose moments count: the inverse of less overflows


@triton.jit
def row_products(
    x, y, b, x_stride, y_stride, row_tile, column_tile, rows, columns, width, inside,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of x y^T of entry b, 0 in columns that are no candidates: their memory may hold anything."""
    entry = tl.full([], 1, tl.int64) * b
    score = row_scores(
        x + entry * x_stride, y + entry * y_stride, row_tile * ROWS, rows, column_tile * COLUMNS, columns, width,
        ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    return tl.where(inside[None, :], score, 0.0)


@triton.jit
def rates_of(
    query, keys, direction, keys_direction, bias_direction, s, b, row_tile, column_tile, column, inside,
    rows, columns, width, x_stride, y_stride, keys_direction_stride, bias_direction_stride,
    KEYS_MOVE: tl.constexpr, BIAS_MOVES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of the rates e_i.k_j + s_i q_i.kappa_j + beta_j that logits move at."""
    rate = row_products(
        direction, keys, b, x_stride, y_stride, row_tile, column_tile, rows, columns, width, inside,
        ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    if KEYS_MOVE:
        rate += s[:, None] * row_products(
            query, keys_direction, b, x_stride, keys_direction_stride, row_tile, column_tile, rows, columns, width, inside,
            ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
        )  # fmt: skip
    if BIAS_MOVES:
        entry = tl.full([], 1, tl.int64) * b
        rate += tl.load(bias_direction + entry * bias_direction_stride + column, mask=inside, other=0.0)[None, :]
    return rate


@triton.jit
def centred(p, x):
    """x less its mean under p, and that mean as two floats, the second what numbers less the first miss 0 by."""
    mean = tl.sum(p * x, 1)
    x -= mean[:, None]
    low = tl.sum(p * x, 1)
    return x - low[:, None], mean, low


@triton.jit
def tile_moments(
    query, keys, direction, keys_direction, h, values, values_direction, bias_direction, lse, lse_low,
    scale, bias, query_labels, key_labels, key_index, limit, valid, per_tile,
    rows, columns, width, x_stride, y_stride, entries, value_width, h_stride, values_stride, keys_direction_stride, values_direction_stride,
    bias_direction_stride, bias_stride, labels_stride, valid_stride, first_column, kind_stride,
    KEYS_MOVE: tl.constexpr, VALUES_MOVE: tl.constexpr, BIAS_MOVES: tl.constexpr, BIASED: tl.constexpr, LABELLED: tl.constexpr,
    INDICES: tl.constexpr, LIMITED: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, EVEN_VALUES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Of each row of a tile, [kinds, tiles of columns, entries, rows]: what it weighs, and under these weights the mean of the rates, of
    the slopes h.v, each in two floats, their covariance, and where the values move the mean of h.nu, in two.
    """
    b, row_tile, column_tile, row, row_exists, _, column, _, inside, s, p = probabilities(
        query, keys, lse, lse_low, scale, bias, query_labels, key_labels, key_index, limit, valid,
        rows, columns, width, x_stride, y_stride, bias_stride, labels_stride, valid_stride, first_column,
        BIASED, LABELLED, INDICES, LIMITED, COUNTED, ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    mass = tl.sum(p, 1)
    nothing = mass < LEAST_MASS
    p *= (1 / tl.where(nothing, 1.0, mass))[:, None]
    to = per_tile + (column_tile * entries + b) * rows + row
    tl.store(to, tl.where(nothing, 0.0, mass), mask=row_exists)
    rate = rates_of(
        query, keys, direction, keys_direction, bias_direction, s, b, row_tile, column_tile, column, inside,
        rows, columns, width, x_stride, y_stride, keys_direction_stride, bias_direction_stride,
        KEYS_MOVE, BIAS_MOVES, ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    rate, mean, low = centred(p, rate)
    tl.store(to + kind_stride, mean, mask=row_exists)
    tl.store(to + 2 * kind_stride, low, mask=row_exists)
    slope = row_products(
        h, values, b, h_stride, values_stride, row_tile, column_tile, rows, columns, value_width, inside,
        ROWS, COLUMNS, DEPTH, EVEN_VALUES, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    slope, mean, low = centred(p, slope)
    tl.store(to + 3 * kind_stride, mean, mask=row_exists)
    tl.store(to + 4 * kind_stride, low, mask=row_exists)
    tl.store(to + 5 * kind_stride, tl.sum(p * rate * slope, 1), mask=row_exists)
    if VALUES_MOVE:
        change = row_products(
            h, values_direction, b, h_stride, values_direction_stride, row_tile, column_tile, rows, columns, value_width, inside,
            ROWS, COLUMNS, DEPTH, EVEN_VALUES, DOT, PRECISION, STAGES, INTERPRETED,
        )  # fmt: skip
        _, mean, low = centred(p, change)
        tl.store(to + 6 * kind_stride, mean, mask=row_exists)
        tl.store(to + 7 * kind_stride, low, mask=row_exists)


@triton.jit
def loaded(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def merge_moments(
    per_tile, moments, count, parts, kind_stride, moments_stride,
    VALUES_MOVE: tl.constexpr, PARTS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Moments of tiles, `parts` for each of `count` rows, into running ones in float64, [mass rate slope change covariance, rows]."""
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    exists = at < count
    to = moments + at
    begun = loaded(to, exists)
    begun_rate, begun_slope, begun_change, begun_covariance = (
        loaded(to + moments_stride, exists),
        loaded(to + 2 * moments_stride, exists),
        loaded(to + 3 * moments_stride, exists),
        loaded(to + 4 * moments_stride, exists),
    )
    mass, rate, slope, change = begun, begun * begun_rate, begun * begun_slope, begun * begun_change
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & exists[None, :]
        index = per_tile + part[:, None] * count + at[None, :]
        weight = loaded(index, inside)
        mass += tl.sum(weight, 0)
        rate += tl.sum(weight * (loaded(index + kind_stride, inside) + loaded(index + 2 * kind_stride, inside)), 0)
        slope += tl.sum(weight * (loaded(index + 3 * kind_stride, inside) + loaded(index + 4 * kind_stride, inside)), 0)
        if VALUES_MOVE:
            change += tl.sum(weight * (loaded(index + 6 * kind_stride, inside) + loaded(index + 7 * kind_stride, inside)), 0)
    whole = tl.where(mass == 0, 1.0, mass)
    rate, slope, change = rate / whole, slope / whole, change / whole
    covariance = begun * (begun_covariance + (begun_rate - rate) * (begun_slope - slope))
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & exists[None, :]
        index = per_tile + part[:, None] * count + at[None, :]
        of_rate = loaded(index + kind_stride, inside) - rate[None, :] + loaded(index + 2 * kind_stride, inside)
        of_slope = loaded(index + 3 * kind_stride, inside) - slope[None, :] + loaded(index + 4 * kind_stride, inside)
        covariance += tl.sum(loaded(index, inside) * (loaded(index + 5 * kind_stride, inside) + of_rate * of_slope), 0)
    tl.store(to, mass, mask=exists)
    tl.store(to + moments_stride, rate, mask=exists)
    tl.store(to + 2 * moments_stride, slope, mask=exists)
    tl.store(to + 3 * moments_stride, change, mask=exists)
    tl.store(to + 4 * moments_stride, covariance / whole, mask=exists)


@triton.jit
def second_weights(
    g, query, keys, direction, keys_direction, h, values, values_direction, bias_direction, lse, lse_low, moments,
    scale, bias, query_labels, key_labels, key_index, limit, valid, weights, of_slopes, of_rates, of_values, bias_sum,
    rows, columns, width, x_stride, y_stride, entries, value_width, h_stride, values_stride, keys_direction_stride, values_direction_stride,
    bias_direction_stride, bias_stride, labels_stride, valid_stride, first_column, moments_stride, leading, weights_stride,
    WANT_SLOPES: tl.constexpr, WANT_RATES: tl.constexpr, WANT_VALUES: tl.constexpr, WANT_BIAS: tl.constexpr,
    KEYS_MOVE: tl.constexpr, VALUES_MOVE: tl.constexpr, BIAS_MOVES: tl.constexpr, BIASED: tl.constexpr, LABELLED: tl.constexpr,
    INDICES: tl.constexpr, LIMITED: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, EVEN_VALUES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Of a slab, with p brought to a sum of 1, rate' and change' less their means, c = g + slope less its mean: A = p (c rate' + change' -
    covariance) (`weights`), B = p c (`of_slopes`), p rate' (`of_rates`) and p (`of_values`); sums of A over a tile's rows (`bias_sum`).
    """
    b, row_tile, column_tile, row, row_exists, i, column, column_exists, inside, s, p = probabilities(
        query, keys, lse, lse_low, scale, bias, query_labels, key_labels, key_index, limit, valid,
        rows, columns, width, x_stride, y_stride, bias_stride, labels_stride, valid_stride, first_column,
        BIASED, LABELLED, INDICES, LIMITED, COUNTED, ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    mass = loaded(moments + i, row_exists)
    p *= tl.where(mass == 0, 0.0, 1 / tl.where(mass == 0, 1.0, mass)).to(tl.float32)[:, None]
    p = tl.where(inside[None, :], p, 0.0)
    at = b * weights_stride + row[:, None] * leading + column[None, :]
    if WANT_VALUES:
        tl.store(of_values + at, p.to(weights.dtype.element_ty))
    mean = loaded(moments + moments_stride + i, row_exists)
    high = mean.to(tl.float32)
    rate = rates_of(
        query, keys, direction, keys_direction, bias_direction, s, b, row_tile, column_tile, column, inside,
        rows, columns, width, x_stride, y_stride, keys_direction_stride, bias_direction_stride,
        KEYS_MOVE, BIAS_MOVES, ROWS, COLUMNS, DEPTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    rate = rate - high[:, None] - (mean - high).to(tl.float32)[:, None]
    if WANT_RATES:
        tl.store(of_rates + at, tl.where(inside[None, :], p * rate, 0.0).to(weights.dtype.element_ty))
    mean = loaded(moments + 2 * moments_stride + i, row_exists)
    high = mean.to(tl.float32)
    slope = row_products(
        h, values, b, h_stride, values_stride, row_tile, column_tile, rows, columns, value_width, inside,
        ROWS, COLUMNS, DEPTH, EVEN_VALUES, DOT, PRECISION, STAGES, INTERPRETED,
    )  # fmt: skip
    upstream = tl.load(g + i, mask=row_exists, other=0.0)
    slope = upstream[:, None] + (slope - high[:, None] - (mean - high).to(tl.float32)[:, None])
    if WANT_SLOPES:
        tl.store(of_slopes + at, tl.where(inside[None, :], p * slope, 0.0).to(weights.dtype.element_ty))
    mean = loaded(moments + 3 * moments_stride + i, row_exists)
    covariance = loaded(moments + 4 * moments_stride + i, row_exists)
    high = mean.to(tl.float32)
    inner = rate * slope
    if VALUES_MOVE:
        change = row_products(
            h, values_direction, b, h_stride, values_direction_stride, row_tile, column_tile, rows, columns, value_width, inside,
            ROWS, COLUMNS, DEPTH, EVEN_VALUES, DOT, PRECISION, STAGES, INTERPRETED,
        )  # fmt: skip
        inner += change - high[:, None] - (mean - high + covariance).to(tl.float32)[:, None]
    else:
        inner -= (mean + covariance).to(tl.float32)[:, None]
    weight = tl.where(inside[None, :], p * inner, 0.0)
    tl.store(weights + at, weight.to(weights.dtype.element_ty))
    if WANT_BIAS:
        part = row_tile * entries * columns + b * columns + column
        tl.store(bias_sum + part, tl.sum(tl.where(row_exists[:, None], weight, 0.0), 0), mask=column_exists)
