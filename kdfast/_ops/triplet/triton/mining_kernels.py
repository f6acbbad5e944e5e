"""Minings of a negative for each positive pair in Triton: the nearest beyond it, and weighted draws. Imported only where Triton is."""

import triton
import triton.language as tl

from .dense_kernels import COSINE, EUCLIDEAN, class_of, distances, positives_of, sides
from .kernels import LARGEST, NOWHERE


@triton.jit
def packed(key, index):
    """A number that orders by the float first, then by the index: its least, over any order of programs, is the first of the least."""
    bits = key.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def offer(best, at, key, admitted, index, asked):
    """best[at] [R] becomes the least of itself and packed(key, index) of what is admitted [R, C]. What is read of it may be outdated, and
    is then too large."""
    key = tl.where(admitted, key, float("inf"))
    least = tl.min(key, 1)
    wins = asked & (least < float("inf"))
    wins = wins & (packed(least, tl.zeros_like(at)) < tl.load(best + at, mask=asked, other=0))
    if tl.max(wins.to(tl.int32), 0) > 0:
        first = tl.min(tl.where(key == least[:, None], index[None, :], NOWHERE), 1)
        tl.atomic_min(best + at, packed(least, first), mask=wins, sem="relaxed")


@triton.jit
def nearest_beyond(
    x, y, x_square, y_square, first, last, own, exist, order, table, nearest, farthest, unordered,
    rows, columns, width, split_columns, taken,
    METRIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The nearest negative farther than each positive, nearest [taken, rows], and the farthest of all, farthest [rows], packed with its
    place in the order before sorting; unordered [rows] becomes 1 where a distance is NaN.

    Anchors and references are sorted by label; table [taken, rows] are the positives' distances (dense_kernels.positive_distances).
    """
    split, first_row = tl.program_id(1), tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    there = row < rows
    class_first, class_last, myself = class_of(first, last, own, row, there)
    existing = tl.load(exist).to(tl.int32)
    count = tl.minimum(positives_of(class_first, class_last, myself), taken)
    most = tl.max(count, 0)
    begin = split * split_columns
    for first_column in range(begin, tl.where(most > 0, tl.minimum(begin + split_columns, columns), begin), COLUMNS):
        d = distances(
            x, y, x_square, y_square, first_row, rows, first_column, columns, width,
            METRIC, False, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
        )  # fmt: skip
        column = first_column + tl.arange(0, COLUMNS)
        index = tl.load(order + column, mask=column < columns, other=0).to(tl.int32)
        positive, negative = sides(class_first[:, None], class_last[:, None], myself[:, None], column[None, :], existing)
        bad = tl.max(((positive | negative) & (d != d)).to(tl.int32), 1)
        tl.store(unordered + row, bad, mask=there & (bad > 0))
        d = tl.minimum(d, LARGEST)  # what is admitted is before what is not
        offer(farthest, row, -d, negative, index, there)
        for k in tl.range(0, most, num_stages=1):
            asked = there & (k < count)
            beyond = tl.load(table + k * rows + row, mask=asked, other=float("inf"))
            offer(nearest, k * rows + row, d, negative & (d > beyond[:, None]), index, asked)


@triton.jit
def log_weights(d, low, high, least, width):
    """log2 of (Wu et al. 2017, eq. 5)'s weights at Euclidean distances d of unit rows, and which of them are in range."""
    eligible = (d > low) & (d < high)
    clamped = tl.where(eligible, tl.maximum(d, least), 1.0)
    weight = (2 - width) * tl.log2(clamped) - 0.5 * (width - 3) * tl.log2(1 - 0.25 * clamped * clamped)
    return weight, eligible


@triton.jit
def weight_blocks(
    x, y, x_square, y_square, label, own, key_label, exists, top, mass, number, unordered, rows, columns, width, split_columns,
    low, high, least, real_width,
    METRIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Of each COLUMNS references: the largest log2 weight of an anchor's negatives in range, the sum of weights relative to it, and
    the number of its negatives, each [column tiles, rows]."""
    split, first_row = tl.program_id(1), tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    there = row < rows
    mine = tl.load(label + row, mask=there, other=0)
    myself = tl.load(own + row, mask=there, other=-1).to(tl.int32)
    begin = split * split_columns
    for first_column in range(begin, tl.minimum(begin + split_columns, columns), COLUMNS):
        d = distances(
            x, y, x_square, y_square, first_row, rows, first_column, columns, width,
            METRIC, False, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
        )  # fmt: skip
        if METRIC == COSINE:
            d = 2 * d
        if METRIC != EUCLIDEAN:
            d = tl.sqrt_rn(tl.where(d < 0, 0.0, d))
        column = first_column + tl.arange(0, COLUMNS)
        here = column < columns
        here = here & tl.load(exists + column, mask=here, other=False)
        admitted = here[None, :] & (column[None, :] != myself[:, None])
        bad = tl.max((admitted & (d != d)).to(tl.int32), 1)
        tl.store(unordered + row, bad, mask=there & (bad > 0))
        negative = admitted & (mine[:, None] != tl.load(key_label + column, mask=here, other=0)[None, :])
        weight, eligible = log_weights(d, low, high, least, real_width)
        weight = tl.where(negative & eligible, weight, float("-inf"))
        highest = tl.max(weight, 1)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        to = (first_column // COLUMNS) * rows + row
        tl.store(top + to, highest, mask=there)
        tl.store(mass + to, tl.sum(tl.exp2(weight - shift[:, None]), 1), mask=there)
        tl.store(number + to, tl.sum(negative.to(tl.int32), 1), mask=there)


@triton.jit
def draw(
    x, y, label, own, key_label, exists, uniform_row, block, fraction, chosen, columns, width, slots, low, high, least, real_width,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The column at which the weights of block[i, k], summed, pass fraction[i, k] of their sum: chosen [rows, slots].

    uniform_row: every negative weighs the same. Distances are those of the rows themselves.
    """
    pair = tl.program_id(0).to(tl.int64)
    i = pair // slots
    column = tl.load(block + pair) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < columns
    e = tl.arange(0, DEPTH)
    square = tl.zeros([COLUMNS, DEPTH], tl.float32)
    for start in range(0, width, DEPTH):
        inside = start + e < width
        mine = tl.load(x + i * width + start + e, mask=inside, other=0.0)
        other = tl.load(y + column[:, None] * width + (start + e)[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        apart = mine[None, :] - other
        square += apart * apart
    here = here & tl.load(exists + column, mask=here, other=False)
    negative = here & (column != tl.load(own + i)) & (tl.load(key_label + column, mask=here, other=0) != tl.load(label + i))
    weight, eligible = log_weights(tl.sqrt_rn(tl.sum(square, 1)), low, high, least, real_width)
    weight = tl.where(negative & eligible, weight, float("-inf"))
    highest = tl.max(weight, 0)
    # a block whose only distances in range are so by rounding has none here: any of its negatives is as good
    same = tl.load(uniform_row + i) | (highest == float("-inf"))
    w = tl.where(same, negative.to(tl.float32), tl.exp2(weight - tl.where(same, 0.0, highest)))
    passed = tl.cumsum(w, 0) <= tl.load(fraction + pair) * tl.sum(w, 0)
    number = tl.minimum(tl.sum(passed.to(tl.int32), 0), tl.max(tl.where(w > 0, tl.arange(0, COLUMNS), 0), 0))
    tl.store(chosen + pair, tl.load(block + pair) * COLUMNS + number)
