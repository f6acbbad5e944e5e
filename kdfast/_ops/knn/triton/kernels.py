"""Nearest neighbours in Triton: the best score of each group of bank rows, then distances to the rows of the best groups.

Imported only where Triton is.
"""

import triton
import triton.language as tl

from ...._core.triton_scores import scores

LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def admitted(row_label, own, key_label, dropped, column, columns, LABELLED: tl.constexpr, ONLY: tl.constexpr, OWNED: tl.constexpr):
    """Which columns may be neighbours. What belongs to rows or to columns has the tile's two dimensions, one of them 1."""
    may = (column < columns) & (dropped == 0)
    if OWNED:
        may = may & (own != column)
    if LABELLED:
        same = row_label == key_label
        may = may & (same if ONLY else same == 0)
    return may


@triton.jit
def group_minima(
    query, keys, query_bad, factor, offset, query_label, key_label, own, dropped, minima, rows, columns, width, groups, split_columns,
    LABELLED: tl.constexpr, ONLY: tl.constexpr, OWNED: tl.constexpr, DROPPED: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The least of factor_j q_i.k_j + offset_j in each group of GROUP columns, minima [rows, groups]; inf where none is admitted.

    What is not finite ranks last, at the largest float; query_bad is NaN where a query is not finite, else 0.
    """
    split, first_row = tl.program_id(1), tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    there = row < rows
    bad = tl.load(query_bad + row, mask=there, other=0.0)
    row_label = tl.load(query_label + row, mask=there, other=0) if LABELLED else row
    mine = tl.load(own + row, mask=there, other=-1).to(tl.int32) if OWNED else row
    begin = split * split_columns
    for first in range(begin, tl.minimum(begin + split_columns, columns), COLUMNS):
        dot = scores(query, keys, first_row, rows, first, columns, width, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED)
        column = first + tl.arange(0, COLUMNS)
        here = column < columns
        times, plus = tl.load(factor + column, mask=here, other=0.0), tl.load(offset + column, mask=here, other=0.0)
        label = tl.load(key_label + column, mask=here, other=0) if LABELLED else column
        out = tl.load(dropped + column, mask=here, other=0) if DROPPED else column * 0
        score = dot * times[None, :] + (plus[None, :] + bad[:, None])
        score = tl.where(tl.abs(score) <= LARGEST, score, LARGEST)
        may = admitted(
            row_label[:, None], mine[:, None], label[None, :], out[None, :], column[None, :], columns, LABELLED, ONLY, OWNED
        )  # fmt: skip
        score = tl.where(may, score, float("inf"))
        least = tl.min(tl.reshape(score, [ROWS, COLUMNS // GROUP, GROUP]), 2)
        group = first // GROUP + tl.arange(0, COLUMNS // GROUP)
        to = minima + first_row.to(tl.int64) * groups + (tl.arange(0, ROWS)[:, None].to(tl.int64) * groups + group[None, :])
        tl.store(to, least, mask=there[:, None] & (group < groups)[None, :])


@triton.jit
def row_norms(x, norms, rows, width, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """|x_i| of x [rows, width]: the same bits for the same row, whichever matrix it is in."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DEPTH)
    total = tl.zeros([ROWS, DEPTH], tl.float32)
    for start in range(0, width, DEPTH):
        inside = (row < rows)[:, None] & (start + d < width)[None, :]
        value = tl.load(x + row[:, None].to(tl.int64) * width + (start + d)[None, :], mask=inside, other=0.0).to(tl.float32)
        total += value * value
    tl.store(norms + row, tl.sqrt_rn(tl.sum(total, 1)), mask=row < rows)


@triton.jit
def at_least_tiny(norm):
    """As torch.nn.functional.normalize divides by it; NaN stays."""
    return tl.where(norm < 1e-12, 1e-12, norm)


@triton.jit
def group_distances(
    query, keys, query_norm, key_norm, chosen, query_label, key_label, own, dropped, distance, columns, width, kept,
    METRIC: tl.constexpr, LABELLED: tl.constexpr, ONLY: tl.constexpr, OWNED: tl.constexpr, DROPPED: tl.constexpr,
    GROUP: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Distances of query i to the rows of its groups chosen [rows, kept], from the rows themselves: [rows, kept GROUP]; -1: not admitted.

    METRIC 0: half the squared difference of unit rows, which is 1 - cos without the cancellation; 1: Euclidean; 2: its square.
    """
    program = tl.program_id(0).to(tl.int64)
    i = program // kept
    group = tl.load(chosen + program)
    j = tl.arange(0, GROUP)
    column = group * GROUP + j
    here = column < columns
    d = tl.arange(0, DEPTH)
    total = tl.zeros([GROUP, DEPTH], tl.float32)
    q_norm = tl.full([DEPTH], 1.0, tl.float32)
    k_norm = tl.full([GROUP], 1.0, tl.float32)
    if METRIC == 0:
        q_norm = q_norm * tl.load(query_norm + i)
        k_norm = tl.load(key_norm + column, mask=here, other=1.0)
    for start in range(0, width, DEPTH):
        at = start + d
        q = tl.load(query + i * width + at, mask=at < width, other=0.0).to(tl.float32)
        inside = here[:, None] & (at < width)[None, :]
        y = tl.load(keys + column[:, None] * width + at[None, :], mask=inside, other=0.0).to(tl.float32)
        if METRIC == 0:
            q = tl.div_rn(q, at_least_tiny(q_norm))
            y = tl.div_rn(y, tl.broadcast_to(at_least_tiny(k_norm)[:, None], [GROUP, DEPTH]))
        apart = q[None, :] - y
        total += apart * apart
    value = tl.sum(total, 1)
    if METRIC == 0:
        zero = tl.where(tl.max(q_norm, 0) == 0, 0.0, k_norm) == 0
        value = tl.where(zero & (value == value), 1.0, 0.5 * value)
    if METRIC == 1:
        value = tl.sqrt_rn(value)
    row_label = tl.load(query_label + i) if LABELLED else i
    mine = tl.load(own + i) if OWNED else i
    label = tl.load(key_label + column, mask=here, other=0) if LABELLED else column
    out = tl.load(dropped + column, mask=here, other=0) if DROPPED else column * 0
    may = admitted(row_label, mine, label, out, column, columns, LABELLED, ONLY, OWNED)
    tl.store(distance + program * GROUP + j, tl.where(may, value, -1.0))
