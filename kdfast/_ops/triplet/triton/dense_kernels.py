"""Losses over all pairs and all triplets in Triton: sums of rows, and their gradients from tiles made again. Imported only where Triton is.

Anchors and references are sorted by label (dense.by_label), so the references of an anchor's class are one run of columns. A distance has
the same bits in every kernel, whichever side the rows are: what counts in the loss counts in both gradients.
"""

import triton
import triton.language as tl

from ...._core.triton_scores import scores, weighted
from .kernels import apart

#: what is summed: the two extremes; hinges of pairs; the exponentials of the multi-similarity loss; hinges of mined triplets
EXTREMES: tl.constexpr = tl.constexpr(0)
PAIRS: tl.constexpr = tl.constexpr(1)
SIMILARITY: tl.constexpr = tl.constexpr(2)
TRIPLETS: tl.constexpr = tl.constexpr(3)
#: mining of triplets, in the order of mining.SETS
BATCH_ALL: tl.constexpr = tl.constexpr(0)
SEMI_HARD: tl.constexpr = tl.constexpr(1)
MULTI_SIMILARITY: tl.constexpr = tl.constexpr(2)
#: metrics, as chosen.METRICS
EUCLIDEAN: tl.constexpr = tl.constexpr(0)
SQUARED: tl.constexpr = tl.constexpr(1)
COSINE: tl.constexpr = tl.constexpr(2)


@triton.jit
def distances(
    x, y, x_square, y_square, first_row, rows, first_column, columns, width, METRIC: tl.constexpr, SWAPPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Distances of a tile in the metric; past the ends, those of the last row or column."""
    dot = scores(x, y, first_row, rows, first_column, columns, width, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED, SWAPPED)
    i, j = tl.minimum(first_row + tl.arange(0, ROWS), rows - 1), tl.minimum(first_column + tl.arange(0, COLUMNS), columns - 1)
    d = apart(dot, tl.load(x_square + i)[:, None], tl.load(y_square + j)[None, :], METRIC != COSINE)
    if METRIC == EUCLIDEAN:
        d = tl.sqrt_rn(d)
    return d


@triton.jit
def class_of(first, last, own, anchor, there):
    """The run of references of an anchor's class, and the anchor's own reference (-1: none)."""
    class_first = tl.load(first + anchor, mask=there, other=1 << 30).to(tl.int32)
    class_last = tl.load(last + anchor, mask=there, other=0).to(tl.int32)
    return class_first, class_last, tl.load(own + anchor, mask=there, other=-1).to(tl.int32)


@triton.jit
def positives_of(class_first, class_last, myself):
    """How many positives an anchor has."""
    return class_last - class_first - ((myself >= class_first) & (myself < class_last)).to(tl.int32)


@triton.jit
def number_of(class_first, class_last, myself, ref):
    """The number of a positive among its anchor's."""
    return ref - class_first - ((myself >= class_first) & (myself < class_last) & (ref > myself)).to(tl.int32)


@triton.jit
def sides(class_first, class_last, myself, ref, existing):
    """Positives and negatives of a tile."""
    admitted = (ref < existing) & (ref != myself)
    inside = (ref >= class_first) & (ref < class_last)
    return admitted & inside, admitted & (inside == 0)


@triton.jit
def hinge(d, d_positive, negative, margin, sign, MINING: tl.constexpr):
    """Which negatives are mined with a positive at d_positive (NaN: none), and sign (d_positive - d) + margin."""
    mined = negative & (d_positive == d_positive)
    if MINING == SEMI_HARD:
        mined = mined & (d > d_positive) & (d <= d_positive + margin)
    return mined, (sign * d_positive + margin) - sign * d


@triton.jit
def positive_distances(
    x, y, x_square, y_square, first, last, own, near, table, rows, columns, width, start, taken, tolerance,
    MINING: tl.constexpr, METRIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Distances of positives number `start` ... of each anchor, table [taken, rows]; NaN where the mining does not take one."""
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    there = row < rows
    class_first, class_last, myself = class_of(first, last, own, row, there)
    begin = tl.min(class_first, 0) // COLUMNS * COLUMNS
    for first_column in range(begin, tl.max(class_last, 0), COLUMNS):
        d = distances(
            x, y, x_square, y_square, first_row, rows, first_column, columns, width,
            METRIC, False, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
        )  # fmt: skip
        column = first_column + tl.arange(0, COLUMNS)
        positive, _ = sides(class_first[:, None], class_last[:, None], myself[:, None], column[None, :], columns)
        number = number_of(class_first[:, None], class_last[:, None], myself[:, None], column[None, :]) - start
        if MINING == MULTI_SIMILARITY:
            nearest = tl.load(near + row, mask=there, other=0.0)[:, None]
            d = tl.where(d + tolerance > nearest, d, float("nan"))
        tl.store(table + (number * rows + row[:, None]), d, mask=positive & there[:, None] & (number >= 0) & (number < taken))


@triton.jit
def row_sums(
    x, y, x_square, y_square, first, last, own, exist, a, b, near, far, table, active, marks, sums, found,
    rows, columns, width, split_columns, mark_columns, start, taken, alpha, beta, tolerance, margin, sign,
    RULE: tl.constexpr, MINING: tl.constexpr, METRIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Two sums and two counts of a tile of anchors over a share of the columns, sums [splits, 2, rows] and found [splits, 2, rows].

    EXTREMES    farthest positive, minus the nearest negative;                          NaNs, 0
    PAIRS       sum relu(d_p - a), sum relu(b - d_n);                                   how many of either are > 0
    SIMILARITY  sum exp(alpha (d_p - far)), sum exp(beta (near - d_n)) of what is kept;  0, 0
    TRIPLETS    sum of hinges with positives number `start` ..., 0 or NaN;              mined triplets (BATCH_ALL: 0), those active

    marks [row tiles, mark_columns] becomes 1 where a tile has a gradient. TRIPLETS adds the active negatives of each positive to
    active [taken, rows]: sums of integers, the same in any order.
    """
    split, first_row = tl.program_id(1), tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    there = row < rows
    class_first, class_last, myself = class_of(first, last, own, row, there)
    existing = tl.load(exist).to(tl.int32)
    a_row, b_row = tl.load(a + row, mask=there, other=0.0)[:, None], tl.load(b + row, mask=there, other=0.0)[:, None]
    nearest, farthest = tl.load(near + row, mask=there, other=0.0)[:, None], tl.load(far + row, mask=there, other=0.0)[:, None]
    count = tl.minimum(positives_of(class_first, class_last, myself) - start, taken)
    most = tl.max(count, 0)
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, columns)
    if RULE == TRIPLETS:
        end = tl.where(most > 0, end, begin)
    of_positives = tl.full([ROWS], float("-inf") if RULE == EXTREMES else 0.0, tl.float32)
    of_negatives = of_positives
    positives = tl.zeros([ROWS], tl.int64)
    negatives = positives
    for first_column in range(begin, end, COLUMNS):
        d = distances(
            x, y, x_square, y_square, first_row, rows, first_column, columns, width,
            METRIC, False, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
        )  # fmt: skip
        column = first_column + tl.arange(0, COLUMNS)
        positive, negative = sides(class_first[:, None], class_last[:, None], myself[:, None], column[None, :], existing)
        unordered = (positive | negative) & (d != d)
        marked = (tl.max(class_last, 0) > first_column) & (tl.min(class_first, 0) < first_column + COLUMNS)
        if RULE == EXTREMES:
            of_positives = tl.maximum(of_positives, tl.max(tl.where(positive, d, float("-inf")), 1))
            of_negatives = tl.maximum(of_negatives, tl.max(tl.where(negative, -d, float("-inf")), 1))
            positives += tl.sum(unordered.to(tl.int32), 1)
        if RULE == PAIRS:
            pull, push = d - a_row, b_row - d
            of_positives += tl.sum(tl.where(positive & ((pull <= 0) == 0), pull, 0.0), 1)  # a NaN stays
            of_negatives += tl.sum(tl.where(negative & ((push <= 0) == 0), push, 0.0), 1)
            positives += tl.sum((positive & (pull > 0)).to(tl.int32), 1)
            here = tl.sum((negative & (push > 0)).to(tl.int32), 1)
            negatives += here
            marked = marked | (tl.max(here, 0) > 0)
        if RULE == SIMILARITY:
            positive, negative = positive & (d + tolerance > nearest), negative & (d - tolerance < farthest)
            of_positives += tl.sum(tl.where(positive, tl.exp(alpha * (d - farthest)), 0.0), 1)
            here = tl.sum(tl.where(negative, tl.exp(beta * (nearest - d)), 0.0), 1)
            of_negatives += here
            marked = marked | (tl.max(here, 0) > 0)
        if RULE == TRIPLETS:
            of_negatives += tl.sum(tl.where(unordered, d, 0.0), 1)
            if MINING == MULTI_SIMILARITY:
                negative = negative & (d - tolerance < farthest)
            for k in tl.range(0, most, num_stages=1):
                asked = there & (k < count)
                d_positive = tl.load(table + k * rows + row, mask=asked, other=float("nan"))[:, None]
                mined, z = hinge(d, d_positive, negative, margin, sign, MINING)
                if MINING != BATCH_ALL:
                    positives += tl.sum(mined.to(tl.int32), 1)
                mined = mined & (z > 0)
                here = tl.sum(mined.to(tl.int32), 1)
                of_positives += tl.sum(tl.where(mined, z, 0.0), 1)
                negatives += here
                tl.atomic_add(active + k * rows + row, here, mask=asked & (here > 0), sem="relaxed")
                marked = marked | (tl.max(here, 0) > 0)
        if RULE != EXTREMES:
            tl.store(marks + (first_row // ROWS) * mark_columns + first_column // COLUMNS, 1, mask=marked)
    to = split.to(tl.int64) * 2 * rows + row
    tl.store(sums + to, of_positives, mask=there)
    tl.store(sums + to + rows, of_negatives, mask=there)
    tl.store(found + to, positives, mask=there)
    tl.store(found + to + rows, negatives, mask=there)


@triton.jit
def facing(t, TRANSPOSED: tl.constexpr):
    """What belongs to anchors, with the two dimensions of a tile."""
    return t[None, :] if TRANSPOSED else t[:, None]


@triton.jit
def gradient(
    x, y, x_square, y_square, first, last, own, exist, up, up_negative, a, b, near, far, table, active, marks, out, weight_sum,
    rows, columns, width, split_columns, mark_columns, start, taken, alpha, beta, tolerance, margin, sign,
    RULE: tl.constexpr, MINING: tl.constexpr, METRIC: tl.constexpr, TRANSPOSED: tl.constexpr, CHUNK: tl.constexpr,
    MARK_ROWS: tl.constexpr, MARK_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sum_j w_ij y_j, out [splits, rows, width], and sum_j w_ij, weight_sum [splits, rows]; w = (dl/dd) / d of `row_sums`' losses.

    Rows are the anchors, or TRANSPOSED the references and the columns the anchors: nobody else writes these rows. a, b here: of
    SIMILARITY the levels with which exp(alpha (d - a)), exp(beta (b - d)) are the slopes. A mark covers MARK_ROWS anchors and
    MARK_COLUMNS references.
    """
    first_row, split, first_width = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2) * CHUNK
    row = first_row + tl.arange(0, ROWS)
    existing = tl.load(exist).to(tl.int32)
    anchors = rows
    if TRANSPOSED:
        anchors = columns
    acc = tl.zeros([ROWS, CHUNK], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    begin = split * split_columns
    for first_column in range(begin, tl.minimum(begin + split_columns, columns), COLUMNS):
        column = first_column + tl.arange(0, COLUMNS)
        anchor, ref = row, column
        if TRANSPOSED:
            anchor, ref = column, row
        there = anchor < anchors
        class_first, class_last, myself = class_of(first, last, own, anchor, there)
        count = tl.minimum(positives_of(class_first, class_last, myself) - start, taken)
        most = tl.max(count, 0)
        if TRANSPOSED:
            mark = first_row // MARK_COLUMNS + tl.arange(0, (ROWS + MARK_COLUMNS - 1) // MARK_COLUMNS)
            marked = tl.load(marks + (first_column // MARK_ROWS) * mark_columns + mark, mask=mark < mark_columns, other=0)
            marked = tl.max(marked.to(tl.int32), 0)
        else:
            marked = tl.load(marks + (first_row // MARK_ROWS) * mark_columns + first_column // MARK_COLUMNS).to(tl.int32)
        if RULE == TRIPLETS:
            marked = tl.where(most > 0, marked, 0)
        if marked > 0:
            d = distances(
                x, y, x_square, y_square, first_row, rows, first_column, columns, width,
                METRIC, TRANSPOSED, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
            )  # fmt: skip
            own_first, own_last = facing(class_first, TRANSPOSED), facing(class_last, TRANSPOSED)
            mine, other = facing(myself, TRANSPOSED), facing(ref, TRANSPOSED == 0)
            positive, negative = sides(own_first, own_last, mine, other, existing)
            g = facing(tl.load(up + anchor, mask=there, other=0.0), TRANSPOSED)
            if RULE == PAIRS:
                level_a = facing(tl.load(a + anchor, mask=there, other=0.0), TRANSPOSED)
                level_b = facing(tl.load(b + anchor, mask=there, other=0.0), TRANSPOSED)
                of_negatives = facing(tl.load(up_negative + anchor, mask=there, other=0.0), TRANSPOSED)
                slope = tl.where(positive & (d > level_a), g, 0.0) - tl.where(negative & (d < level_b), of_negatives, 0.0)
            if RULE == SIMILARITY:
                level_a = facing(tl.load(a + anchor, mask=there, other=0.0), TRANSPOSED)
                level_b = facing(tl.load(b + anchor, mask=there, other=float("-inf")), TRANSPOSED)
                nearest = facing(tl.load(near + anchor, mask=there, other=0.0), TRANSPOSED)
                farthest = facing(tl.load(far + anchor, mask=there, other=0.0), TRANSPOSED)
                slope = tl.where(positive & (d + tolerance > nearest), tl.exp(alpha * (d - level_a)), 0.0)
                slope = g * tl.where(negative & (d - tolerance < farthest), -tl.exp(beta * (level_b - d)), slope)
            if RULE == TRIPLETS:
                if MINING == MULTI_SIMILARITY:
                    farthest = facing(tl.load(far + anchor, mask=there, other=0.0), TRANSPOSED)
                    negative = negative & (d - tolerance < farthest)
                times = tl.zeros([ROWS, COLUMNS], tl.float32)
                for k in tl.range(0, most, num_stages=1):
                    d_positive = tl.load(table + k * anchors + anchor, mask=there & (k < count), other=float("nan"))
                    mined, z = hinge(d, facing(d_positive, TRANSPOSED), negative, margin, sign, MINING)
                    times -= tl.where(mined & (z > 0), 1.0, 0.0)
                if (tl.max(class_last, 0) > tl.min(ref, 0)) & (tl.min(class_first, 0) <= tl.max(ref, 0)):  # positives are few tiles'
                    number = number_of(own_first, own_last, mine, other) - start
                    asked = positive & facing(there, TRANSPOSED) & (number >= 0) & (number < taken)
                    times += tl.load(active + (number * anchors + facing(anchor, TRANSPOSED)), mask=asked, other=0).to(tl.float32)
                slope = sign * g * times
            if METRIC == EUCLIDEAN:
                slope = tl.where(d > 0, slope / tl.where(d > 0, d, 1.0), 0.0)
            if METRIC == SQUARED:
                slope = 2 * slope
            total += tl.sum(slope, 1)
            acc = weighted(slope, y, first_column, columns, width, first_width, acc, COLUMNS, CHUNK, INTERPRETED)
    there = row < rows
    e = first_width + tl.arange(0, CHUNK)
    to = split.to(tl.int64) * rows + row
    tl.store(out + to[:, None] * width + e[None, :], acc, mask=there[:, None] & (e < width)[None, :])
    if first_width == 0:
        tl.store(weight_sum + to, total, mask=there)
