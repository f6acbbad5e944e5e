"""Scores of sampled bank rows, their weighted sums and the statistics of both in Triton, each sampled row read once.

Imported only where Triton is. What belongs to a sample is computed in float32. An index outside the bank makes its row NaN.
"""

import triton
import triton.language as tl

from ...._core.triton_functions import softplus


@triton.jit
def sampled_rows(bank, bank_stride, size, sample, there, d, width):
    """Rows `sample` of the bank, [SLOTS, DEPTH] float32, elements d of them; 0 where not `there`."""
    known = (sample >= 0) & (sample < size)
    at = bank + tl.where(known, sample, 0)[:, None] * bank_stride + d[None, :]
    rows = tl.load(at, mask=there[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
    return tl.where(known[:, None] | (there == 0)[:, None], rows, float("nan"))


@triton.jit
def scores(
    query, bank, index, out, bank_stride, size, slots, width, SLOTS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """q_n . k_{index_nk} of some samples of one query, out [rows, slots]."""
    blocks = tl.cdiv(slots, SLOTS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * SLOTS + tl.arange(0, SLOTS)
    there = k < slots
    sample = tl.load(index + n * slots + k, mask=there, other=0)
    total = tl.zeros([SLOTS, DEPTH], tl.float32)
    for start in range(0, width, DEPTH):
        d = start + tl.arange(0, DEPTH)
        q = tl.load(query + n * width + d, mask=d < width, other=0.0)
        total += sampled_rows(bank, bank_stride, size, sample, there, d, width) * q[None, :]
    tl.store(out + n * slots + k, tl.sum(total, 1), mask=there)


@triton.jit
def row_sums(
    query, weights, bank, index, offset, shift, value_part, top_part, sum_part, bank_stride, shift_stride, size, rows, slots, width,
    split_slots,
    STATISTIC: tl.constexpr, OFFSET: tl.constexpr, POOLED: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A share of one query's samples: sum_k w_nk k_{index_nk}, elements of it in the third dimension of the grid.

    STATISTIC 0: w are weights [rows, slots]. 1: w is exp(z - top), whose sum and top go to the parts of value and top, [splits, rows].
    2: w is the derivative of softplus(shift - z_0) + sum_k softplus(z_k - shift), and value its share. z = q . k + offset; -inf leaves a
    sample out. Every slot of a tile has sums of its own, which meet at the end.
    """
    split, n = tl.program_id(1), tl.program_id(0).to(tl.int64)
    d = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    q = tl.load(query + n * width + d, mask=d < width, other=0.0) if STATISTIC else d
    a = tl.load(shift + n * shift_stride) if STATISTIC == 2 else 0.0
    top = tl.full([SLOTS], float("-inf"), tl.float32)
    value = tl.zeros([SLOTS], tl.float32)
    total = tl.zeros([SLOTS, WIDTH], tl.float32)
    begin = split * split_slots
    end = tl.minimum(begin + split_slots, slots)
    for first in range(begin, end, SLOTS):
        k = first + tl.arange(0, SLOTS)
        there = k < end
        sample = tl.load(index + n * slots + k, mask=there, other=0)
        row = sampled_rows(bank, bank_stride, size, sample, there, d, width)
        if STATISTIC:
            z = tl.sum(row * q[None, :], 1)
            if OFFSET:
                plus = tl.load(offset + n * slots + k, mask=there, other=0.0)
                z = tl.where(plus == float("-inf"), plus, z + plus)
            if STATISTIC == 1:
                z = tl.where(there, z, float("-inf"))
                higher = tl.maximum(top, z)
                reached = tl.where(tl.abs(higher) == float("inf"), 0.0, higher)
                w, rescale = tl.exp(z - reached), tl.exp(top - reached)
                value = value * rescale + w
                if POOLED:
                    total = total * rescale[:, None]
                top = higher
            else:
                sign = tl.where(k == 0, -1.0, 1.0)
                loss, w = softplus(sign * (z - a))
                value += tl.where(there, loss, 0.0)
                w = tl.where(there, sign * w, 0.0)
        else:
            w = tl.load(weights + n * slots + k, mask=there, other=0.0)
        if POOLED:
            if STATISTIC:  # what is left out counts for nothing, be it NaN
                total += tl.where((w == 0)[:, None], 0.0, w[:, None] * row)
            else:
                total += w[:, None] * row

    part = split.to(tl.int64) * rows + n
    if STATISTIC == 1:
        highest = tl.max(top, 0)
        reached = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)
        scale = tl.exp(top - reached)
        value = value * scale
        total = total * scale[:, None]
        tl.store(top_part + part, highest)
    if STATISTIC:
        tl.store(value_part + part, tl.sum(value, 0))
    if POOLED:
        tl.store(sum_part + part * width + d, tl.sum(total, 0), mask=d < width)
