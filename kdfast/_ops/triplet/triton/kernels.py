"""Extremes of the distances of each anchor in Triton. Imported only where Triton is."""

import triton
import triton.language as tl

from ...._core.triton_scores import scores

LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
EPSILON: tl.constexpr = tl.constexpr(1.1920928955078125e-07)
NOWHERE: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def apart(dot, x_square, y_square, EUCLIDEAN: tl.constexpr):
    """Squared distances of a tile, or 1 - cos, from its products. The squares have the tile's two dimensions (triton.parted)."""
    scale = x_square + y_square
    if EUCLIDEAN:
        d = scale - 2 * dot
        return tl.where(d < 4 * EPSILON * scale, 0.0, d)  # coinciding rows are at distance 0
    return scale - dot


@triton.jit
def leader(key, admitted, column, best, at):
    """The greatest key so far of each row [R] and its column, the lowest among equals, after more of them [R, C].

    What beats a row's best becomes rare, so most tiles end at the first maximum.
    """
    key = tl.where(admitted, key, float("-inf"))
    top = tl.max(key, 1)
    wins = top > best
    if tl.max(wins.to(tl.int32), 0) > 0:
        here = tl.min(tl.where(key == top[:, None], column[None, :], NOWHERE), 1)
        at = tl.where(wins, here, at)
        best = tl.where(wins, top, best)
    return best, at


@triton.jit
def extrema(
    x, y, x_square, y_square, label, own, beyond, key_label, exists, value, position, rows, columns, width, split_columns,
    FAR_POSITIVE: tl.constexpr, NEAR_POSITIVE: tl.constexpr, NEAR_NEGATIVE: tl.constexpr, FAR_NEGATIVE: tl.constexpr,
    BEYOND: tl.constexpr, EUCLIDEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Farthest and nearest positive, nearest and farthest negative of a tile of anchors in a share of the columns.

    value and position [splits, 4, rows], in this order; a farthest value is a distance (squared where EUCLIDEAN), a nearest one minus
    it; +inf is a NaN distance, -inf with column -1 none. With BEYOND negatives no farther than that do not compete.
    """
    split, first_row = tl.program_id(1), tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    there = row < rows
    mine = tl.load(label + row, mask=there, other=0)
    myself = tl.load(own + row, mask=there, other=-1).to(tl.int32)
    x_sq = tl.load(x_square + row, mask=there, other=0.0)
    limit = tl.load(beyond + row, mask=there, other=0.0) if BEYOND else x_sq

    nothing, nowhere = tl.full([ROWS], float("-inf"), tl.float32), tl.full([ROWS], -1, tl.int32)
    far_positive, far_positive_at = nothing, nowhere
    near_positive, near_positive_at = nothing, nowhere
    near_negative, near_negative_at = nothing, nowhere
    far_negative, far_negative_at = nothing, nowhere
    begin = split * split_columns
    for first in range(begin, tl.minimum(begin + split_columns, columns), COLUMNS):
        dot = scores(x, y, first_row, rows, first, columns, width, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED)
        column = first + tl.arange(0, COLUMNS)
        here = column < columns
        here = here & tl.load(exists + column, mask=here, other=False)
        y_sq = tl.load(y_square + column, mask=here, other=0.0)
        d = apart(dot, x_sq[:, None], y_sq[None, :], EUCLIDEAN)
        unordered = d != d
        same = mine[:, None] == tl.load(key_label + column, mask=here, other=0)[None, :]
        admitted = here[None, :] & (myself[:, None] != column[None, :])
        positive, negative = admitted & same, admitted & (same == 0)
        if BEYOND:
            negative = negative & ((d <= limit[:, None]) == 0)  # a NaN stays: it must reach the loss
        d = tl.minimum(d, LARGEST)  # what is admitted beats what is not
        if FAR_POSITIVE or FAR_NEGATIVE:
            far = tl.where(unordered, float("inf"), d)
            if FAR_POSITIVE:
                far_positive, far_positive_at = leader(far, positive, column, far_positive, far_positive_at)
            if FAR_NEGATIVE:
                far_negative, far_negative_at = leader(far, negative, column, far_negative, far_negative_at)
        if NEAR_POSITIVE or NEAR_NEGATIVE:
            near = tl.where(unordered, float("inf"), -d)
            if NEAR_POSITIVE:
                near_positive, near_positive_at = leader(near, positive, column, near_positive, near_positive_at)
            if NEAR_NEGATIVE:
                near_negative, near_negative_at = leader(near, negative, column, near_negative, near_negative_at)

    at = split.to(tl.int64) * 4 * rows + row
    if FAR_POSITIVE:
        tl.store(value + at, far_positive, mask=there)
        tl.store(position + at, far_positive_at, mask=there)
    if NEAR_POSITIVE:
        tl.store(value + at + rows, near_positive, mask=there)
        tl.store(position + at + rows, near_positive_at, mask=there)
    if NEAR_NEGATIVE:
        tl.store(value + at + 2 * rows, near_negative, mask=there)
        tl.store(position + at + 2 * rows, near_negative_at, mask=there)
    if FAR_NEGATIVE:
        tl.store(value + at + 3 * rows, far_negative, mask=there)
        tl.store(position + at + 3 * rows, far_negative_at, mask=there)
