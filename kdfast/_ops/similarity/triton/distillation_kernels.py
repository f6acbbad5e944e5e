"""The losses of similarity distillation in Triton: both sides' scores in one program, sums of differences between them, a merge of parts.

Imported only where Triton is. distillation_values.py has the sums, which are here in base 2: with w the weights 2^(z - m) relative to a
running maximum m and l their sums, log l^S - E / l^T with E = sum_j w^T_j (z^S_j - m^S); KL: also less log l^T, and in E less z^T_j - m^T.
"""

import triton
import triton.language as tl

from ...._core.triton_scores import product, row_scores
from .kernels import LN2, LOG2E, begun, finite_or_zero, logits, share_of_columns, tile


@triton.jit
def both_scores(
    q, u, query, keys, teacher, teacher_keys, first_row, rows, first, end, width, teacher_width,
    EVEN: tl.constexpr, TEACHER_EVEN: tl.constexpr, WHOLE: tl.constexpr, RAGGED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, TEACHER_WIDTH: tl.constexpr, DOT: tl.constexpr, TEACHER_DOT: tl.constexpr, PRECISION: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of scores of each side; WHOLE: of rows q and u that are here, else by steps of the widths."""
    if WHOLE:
        k = tile(keys, first, end, width, COLUMNS, WIDTH, EVEN, RAGGED, DOT)
        v = tile(teacher_keys, first, end, teacher_width, COLUMNS, TEACHER_WIDTH, TEACHER_EVEN, RAGGED, TEACHER_DOT)
        z = product(q, tl.trans(k), tl.zeros([ROWS, COLUMNS], tl.float32), PRECISION, INTERPRETED)
        t = product(u, tl.trans(v), tl.zeros([ROWS, COLUMNS], tl.float32), TEACHER_PRECISION, INTERPRETED)
    else:
        z = row_scores(
            query, keys, first_row, rows, first, end, width, ROWS, COLUMNS, WIDTH, EVEN, DOT, PRECISION, STAGES, INTERPRETED
        )  # fmt: skip
        t = row_scores(
            teacher, teacher_keys, first_row, rows, first, end, teacher_width,
            ROWS, COLUMNS, TEACHER_WIDTH, TEACHER_EVEN, TEACHER_DOT, TEACHER_PRECISION, STAGES, INTERPRETED,
        )  # fmt: skip
    return z, t


@triton.jit
def raised(top, total, higher):
    """(shift, step): what exponents are relative to under a maximum that has risen, and what that adds to those of before."""
    shift = finite_or_zero(higher)
    return shift, tl.where(total == 0, 0.0, top - shift)


@triton.jit
def moved(excess, before, step, teacher_step, KL: tl.constexpr):
    """The excess of teacher's weights whose sum is `before`, under maxima that have risen. It may be -inf."""
    rescale = tl.exp2(teacher_step)
    step = step - teacher_step if KL else step
    return tl.where((rescale == 0) | (before == 0), 0.0, (excess + step * before) * rescale)


@triton.jit
def store_losses(loss, at, exists, total, teacher_total, excess, KL: tl.constexpr):
    """Losses in nats; the logarithms, whose difference may be small, in float64."""
    none = teacher_total == 0
    level = tl.log(total.to(tl.float64))
    if KL:
        level -= tl.log(tl.where(none, 1.0, teacher_total).to(tl.float64))
    mean = excess.to(tl.float64) / tl.where(none, 1.0, teacher_total).to(tl.float64)
    tl.store(loss + at, (level - LN2 * mean).to(tl.float32), mask=exists)


@triton.jit
def distillation(
    query, keys, teacher, teacher_keys, scale, teacher_scale, start_logit, teacher_start_logit, bias, key_index, valid, loss, part,
    rows, columns, width, teacher_width, split_columns,
    KL: tl.constexpr, STARTED: tl.constexpr, BIASED: tl.constexpr, INDICES: tl.constexpr, COUNTED: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TEACHER_WIDTH: tl.constexpr, EVEN: tl.constexpr,
    TEACHER_EVEN: tl.constexpr, DOT: tl.constexpr, TEACHER_DOT: tl.constexpr, PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Losses of a tile of rows over the columns of its split, or with SPLIT the parts [splits, 5, rows] that `merge_losses` joins.

    WHOLE: WIDTH and TEACHER_WIDTH are the sides' own, rows stay and columns stream by; else they are the steps of products.
    """
    row_tiles = tl.cdiv(rows, ROWS)
    split, first_row = tl.program_id(0) // row_tiles, tl.program_id(0) % row_tiles * ROWS
    at = first_row + tl.arange(0, ROWS).to(tl.int64)
    exists = at < rows
    factor = tl.load(scale + at, mask=exists, other=0.0) * LOG2E
    teacher_factor = tl.load(teacher_scale + at, mask=exists, other=0.0) * LOG2E
    begin, whole, end = share_of_columns(columns, valid, split, split_columns, COUNTED, COLUMNS)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    teacher_top, teacher_total, excess = top, total, total
    if STARTED:  # noqa: SIM102, one is known when the kernel is compiled, the other is not
        if split == 0:
            top, rest, total = begun(tl.load(start_logit + at, mask=exists, other=0.0))
            teacher_top, teacher_rest, teacher_total = begun(tl.load(teacher_start_logit + at, mask=exists, other=0.0))
            difference = rest - teacher_rest if KL else rest
            excess = tl.where(teacher_total == 0, 0.0, teacher_total * difference)
    q, u = top, top  # not read unless rows stay
    if WHOLE:
        q = tile(query, first_row, rows, width, ROWS, WIDTH, EVEN, True, DOT)
        u = tile(teacher, first_row, rows, teacher_width, ROWS, TEACHER_WIDTH, TEACHER_EVEN, True, TEACHER_DOT)

    index = (key_index + at * INDICES)[:, None]
    for ragged in tl.static_range(0 if WHOLE else 1, 2):  # where rows stay, whole tiles and then a ragged one
        for first in tl.range(whole if WHOLE and ragged else begin, end if ragged else whole, COLUMNS, num_stages=1 if ragged else STAGES):
            z, t = both_scores(
                q, u, query, keys, teacher, teacher_keys, first_row, rows, first, end, width, teacher_width,
                EVEN, TEACHER_EVEN, WHOLE, ragged == 1, ROWS, COLUMNS, WIDTH, TEACHER_WIDTH, DOT, TEACHER_DOT, PRECISION,
                TEACHER_PRECISION, STAGES, INTERPRETED,
            )  # fmt: skip
            column = first + tl.arange(0, COLUMNS)
            offset = (tl.load(bias + column, mask=column < end, other=0.0) if BIASED else column)[None, :]
            column = column[None, :]
            z = logits(
                z, factor[:, None], z, z, z, exists[:, None], index, offset, column, column, end,
                False, BIASED, False, INDICES, ragged == 1,
            )  # fmt: skip
            t = logits(
                t, teacher_factor[:, None], t, t, t, exists[:, None], index, offset, column, column, end,
                False, BIASED, False, INDICES, ragged == 1,
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(z, 1))
            shift, step = raised(top, total, higher)
            z -= shift[:, None]
            total = total * tl.exp2(step) + tl.sum(tl.exp2(z), 1)
            top = higher
            higher = tl.maximum(teacher_top, tl.max(t, 1))
            shift, teacher_step = raised(teacher_top, teacher_total, higher)
            t -= shift[:, None]
            weight = tl.exp2(t)
            difference = z - t if KL else z
            more = tl.sum(tl.where(weight == 0, 0.0, weight * difference), 1)
            excess = moved(excess, teacher_total, step, teacher_step, KL) + more
            teacher_total = teacher_total * tl.exp2(teacher_step) + tl.sum(weight, 1)
            teacher_top = higher

    if SPLIT:
        to = part + tl.full([], 5, tl.int64) * split * rows + at
        tl.store(to, top, mask=exists)
        tl.store(to + rows, total, mask=exists)
        tl.store(to + 2 * rows, teacher_top, mask=exists)
        tl.store(to + 3 * rows, teacher_total, mask=exists)
        tl.store(to + 4 * rows, excess, mask=exists)
    else:
        store_losses(loss, at, exists, total, teacher_total, excess, KL)


@triton.jit
def merge_losses(part, loss, rows, splits, KL: tl.constexpr, ROWS: tl.constexpr):
    """The losses from the parts of a split bank, always in the same order."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = at < rows
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    teacher_top, teacher_total, excess = top, total, total
    for _ in range(splits):
        other = tl.load(part + at, mask=exists, other=float("-inf"))
        other_total = tl.load(part + rows + at, mask=exists, other=0.0)
        teacher_other = tl.load(part + 2 * rows + at, mask=exists, other=float("-inf"))
        teacher_other_total = tl.load(part + 3 * rows + at, mask=exists, other=0.0)
        other_excess = tl.load(part + 4 * rows + at, mask=exists, other=0.0)
        higher, teacher_higher = tl.maximum(top, other), tl.maximum(teacher_top, teacher_other)
        _, step = raised(top, total, higher)
        _, other_step = raised(other, other_total, higher)
        _, teacher_step = raised(teacher_top, teacher_total, teacher_higher)
        _, teacher_other_step = raised(teacher_other, teacher_other_total, teacher_higher)
        excess = moved(excess, teacher_total, step, teacher_step, KL) + moved(
            other_excess, teacher_other_total, other_step, teacher_other_step, KL
        )
        total = total * tl.exp2(step) + other_total * tl.exp2(other_step)
        teacher_total = teacher_total * tl.exp2(teacher_step) + teacher_other_total * tl.exp2(teacher_other_step)
        top, teacher_top = higher, teacher_higher
        part += 5 * rows
    store_losses(loss, at, exists, total, teacher_total, excess, KL)
