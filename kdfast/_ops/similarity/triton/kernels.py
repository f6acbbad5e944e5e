"""The streaming softmax in Triton: forward, merge of a split bank, sums over the bank for rows, sums over rows for the bank.

Imported only where Triton is. Logits are in base 2, for exp2 is the instruction there is: z2 = log2(e) z. README.md derives the formulas.
What stays (queries here, keys in `grad_keys`) is multiplied as it was loaded: an operand made of it would be held in registers.
"""

import triton
import triton.language as tl

from ...._core.triton_scores import product

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LN2_LOW: tl.constexpr = tl.constexpr(-1.904654299957768e-09)  # ln 2 less its nearest float
LOG2E_LOW: tl.constexpr = tl.constexpr(1.9259629911266175e-08)  # log2(e) less its nearest float


@triton.jit
def tile(base, first, count, width, COUNT: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, RAGGED: tl.constexpr, DOT: tl.constexpr):
    """Rows `first` ... `first` + COUNT of a matrix [count, width], as DOT; zeros beyond it. EVEN: width is WIDTH. RAGGED: count may end.

    The first row's address takes 64 bits, offsets from it 32.
    """
    i, d = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    at = base + tl.full([], 1, tl.int64) * first * width + (i[:, None] * width + d[None, :])
    if EVEN and not RAGGED:
        return tl.load(at).to(DOT)
    inside = (d < width)[None, :] if not RAGGED else (i < count - first)[:, None]
    if RAGGED and not EVEN:
        inside = inside & (d < width)[None, :]
    return tl.load(at, mask=inside, other=0.0).to(DOT)


@triton.jit
def finite_or_zero(x):
    """A shift for exponents: x, or 0 where it is infinite (inf - inf would make NaN of it)."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def logits(
    score, factor, scale, limit, own, row_exists, index, bias, label, column, end,
    LIMITED: tl.constexpr, BIASED: tl.constexpr, LABELLED: tl.constexpr, INDICES: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of a tile of scores, -inf where the column is not admitted.

    Everything that belongs to rows or to columns has the tile's two dimensions, one of them 1: it serves tiles of either orientation.
    """
    z = score * factor
    if LIMITED:
        z = tl.where(score * scale > limit, float("-inf"), z)
    if BIASED:
        z += bias * LOG2E
    if LABELLED:
        z = tl.where(own == label, float("-inf"), z)
    for e in tl.static_range(INDICES):
        z = tl.where(tl.load(index + e, mask=row_exists, other=-1) == column, float("-inf"), z)
    if RAGGED:
        z = tl.where(column < end, z, float("-inf"))
    return z


@triton.jit
def exact_log_sum(top, total):
    """(lse, lse_low) in nats of 2^top total, the second what the first rounded off."""
    shift = finite_or_zero(top)
    rest = tl.log2(total)
    level = shift + rest
    of_rest = level - shift
    low = (shift - (level - of_rest)) + (rest - of_rest)  # Knuth's two-sum
    low = tl.where(tl.abs(level) < float("inf"), low, 0.0)  # also where it is NaN
    nats = level * LN2
    error = tl.fma(level, LN2, -nats) + (low * LN2 + level * LN2_LOW)
    error = tl.where(tl.abs(nats) < float("inf"), error, 0.0)
    lse = nats + error
    return lse, tl.where(tl.abs(lse) < float("inf"), error - (lse - nats), 0.0)


@triton.jit
def level_of(lse, lse_low):
    """(level, factor): 2^(z2 - level) factor = exp(z - lse - lse_low); 0 where nothing is admitted (lse -inf)."""
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    level = lse * LOG2E
    rest = tl.fma(lse, LOG2E, -level) + (lse * LOG2E_LOW + lse_low * LOG2E)
    return level, tl.exp2(tl.where(tl.abs(level) < float("inf"), -rest, 0.0))


@triton.jit
def begun(start):
    """(top, rest, total) of a start candidate, kept exactly: its logit in base 2 rounded, the rest, and 2^rest, its weight under top."""
    top = start * LOG2E
    rest = tl.where(tl.abs(top) < float("inf"), tl.fma(start, LOG2E, -top) + start * LOG2E_LOW, top)
    return top, rest, tl.where(start == float("-inf"), 0.0, tl.exp2(rest))


@triton.jit
def row_side(
    query, scale, limit, query_labels, key_index, b, first, rows, width,
    LIMITED: tl.constexpr, LABELLED: tl.constexpr, INDICES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """What a tile of rows brings to its logits, and `at`, where it is in what has one number a row."""
    row = first + tl.arange(0, ROWS)
    exists = row < rows
    at = b * rows + row
    q = tile(query + b * rows * width, first, rows, width, ROWS, WIDTH, EVEN, True, DOT)
    s = tl.load(scale + at, mask=exists, other=0.0)
    most = tl.load(limit + at, mask=exists, other=0.0) if LIMITED else s
    own = tl.load(query_labels + at, mask=exists, other=0) if LABELLED else row
    return at, exists, q, s, s * LOG2E, most, own, key_index + at * INDICES


@triton.jit
def place(tiles, batch):
    """(tile, batch entry, split, entry of a split) of this program, all on the grid's first axis: the others end at 65,535 programs."""
    program = tl.program_id(0)
    entry = program // tiles
    return program % tiles, (entry % batch).to(tl.int64), entry // batch, entry.to(tl.int64)


@triton.jit
def share_of_columns(columns, valid, split, split_columns, COUNTED: tl.constexpr, COLUMNS: tl.constexpr):
    """First column of a split, the last whole tile's end, and its end."""
    count = columns
    if COUNTED:
        count = tl.minimum(columns, tl.load(valid).to(tl.int32))
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, count)
    return begin, begin + tl.maximum(end - begin, 0) // COLUMNS * COLUMNS, end


@triton.jit
def column_logits(
    q, key_base, bias_base, label_base, first, end, width, factor, s, most, own, index, exists,
    BIASED: tl.constexpr, LABELLED: tl.constexpr, INDICES: tl.constexpr, LIMITED: tl.constexpr, EVEN: tl.constexpr,
    RAGGED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Columns `first` ... of the keys, and their logits for a tile of rows, [ROWS, COLUMNS]."""
    column = first + tl.arange(0, COLUMNS)
    k = tile(key_base, first, end, width, COLUMNS, WIDTH, EVEN, RAGGED, DOT)
    score = product(q, tl.trans(k), tl.zeros([ROWS, COLUMNS], tl.float32), PRECISION, INTERPRETED)
    here = column < end
    offset = tl.load(bias_base + column, mask=here, other=0.0) if BIASED else column
    label = tl.load(label_base + column, mask=here, other=0) if LABELLED else column
    z = logits(
        score, factor[:, None], s[:, None], most[:, None], own[:, None], exists[:, None], index[:, None],
        offset[None, :], label[None, :], column[None, :], end, LIMITED, BIASED, LABELLED, INDICES, RAGGED,
    )  # fmt: skip
    return k, z


@triton.jit
def absorb(z, v, top, total, acc, POOLED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """The online softmax: logits and values of more columns into the largest logit, the sum and the weighted sum of each row."""
    higher = tl.maximum(top, tl.max(z, 1))
    shift = finite_or_zero(higher)
    p = tl.exp2(z - shift[:, None])
    rescale = tl.exp2(top - shift)
    total = total * rescale + tl.sum(p, 1)
    if POOLED:
        acc = product(p.to(DOT), v, acc * rescale[:, None], PRECISION, INTERPRETED)
    return higher, total, acc


@triton.jit
def forward(
    query, keys, values, scale, bias, start_logit, start_value, query_labels, key_labels, key_index, limit, valid,
    lse, lse_low, pooled, part_top, part_total, part_pooled,
    rows, columns, width, value_width, keys_stride, values_stride, bias_stride, labels_stride, valid_stride, batch, split_columns,
    OVER_KEYS: tl.constexpr, BIASED: tl.constexpr, STARTED: tl.constexpr, START_VALUE: tl.constexpr, LABELLED: tl.constexpr,
    INDICES: tl.constexpr, LIMITED: tl.constexpr, COUNTED: tl.constexpr, POOLED: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, EVEN: tl.constexpr,
    EVEN_VALUES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of rows over the columns of its split: lse and pooled, or with SPLIT the parts of them that `merge` joins."""
    row_tile, b, split, entry = place(tl.cdiv(rows, ROWS), batch)
    first_row = row_tile * ROWS
    at, exists, q, s, factor, most, own, index = row_side(
        query, scale, limit, query_labels, key_index, b, first_row, rows, width, LIMITED, LABELLED, INDICES, ROWS, WIDTH, EVEN, DOT
    )
    begin, whole, end = share_of_columns(columns, valid + b * valid_stride, split, split_columns, COUNTED, COLUMNS)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    if STARTED:  # noqa: SIM102, one is known when the kernel is compiled, the other is not
        if split == 0:
            top, _, total = begun(tl.load(start_logit + at, mask=exists, other=0.0))
            if START_VALUE:
                acc = total[:, None] * tile(
                    start_value + b * rows * value_width, first_row, rows, value_width, ROWS, VALUE_WIDTH, EVEN_VALUES, True, tl.float32
                )

    key_base, value_base = keys + b * keys_stride, values + b * values_stride
    bias_base, label_base = bias + b * bias_stride, key_labels + b * labels_stride
    for ragged in tl.static_range(2):  # whole tiles, then a ragged one
        for first in tl.range(whole if ragged else begin, end if ragged else whole, COLUMNS, num_stages=1 if ragged else STAGES):
            k, z = column_logits(
                q, key_base, bias_base, label_base, first, end, width, factor, s, most, own, index, exists,
                BIASED, LABELLED, INDICES, LIMITED, EVEN, ragged == 1, ROWS, COLUMNS, WIDTH, DOT, PRECISION, INTERPRETED,
            )  # fmt: skip
            v = k if OVER_KEYS else tile(value_base, first, end, value_width, COLUMNS, VALUE_WIDTH, EVEN_VALUES, ragged == 1, DOT)
            top, total, acc = absorb(z, v, top, total, acc, POOLED, DOT, PRECISION, INTERPRETED)

    d = tl.arange(0, VALUE_WIDTH)
    inside = exists[:, None] & (d < value_width)[None, :]
    if SPLIT:
        part = entry * rows + first_row + tl.arange(0, ROWS)
        tl.store(part_top + part, top, mask=exists)
        tl.store(part_total + part, total, mask=exists)
        if POOLED:
            tl.store(part_pooled + part[:, None] * value_width + d[None, :], acc, mask=inside)
    else:
        level, low = exact_log_sum(top, total)
        tl.store(lse + at, level, mask=exists)
        tl.store(lse_low + at, low, mask=exists)
        if POOLED:
            acc /= tl.where(total == 0, 1.0, total)[:, None]
            tl.store(pooled + at[:, None] * value_width + d[None, :], acc, mask=inside)


@triton.jit
def merge(
    part_top, part_total, part_pooled, lse, lse_low, pooled, count, value_width, splits,
    POOLED: tl.constexpr, ROWS: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """lse and pooled from the parts of a split bank, [splits, count] and [splits, count, Dv], always in the same order."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = at < count
    d = tl.arange(0, VALUE_WIDTH)
    inside = exists[:, None] & (d < value_width)[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for split in range(splits):
        top = tl.maximum(top, tl.load(part_top + split * count + at, mask=exists, other=float("-inf")))
    shift = finite_or_zero(top)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for split in range(splits):
        part = split * count + at
        weight = tl.exp2(tl.load(part_top + part, mask=exists, other=float("-inf")) - shift)
        total += weight * tl.load(part_total + part, mask=exists, other=0.0)
        if POOLED:
            acc += weight[:, None] * tl.load(part_pooled + part[:, None] * value_width + d[None, :], mask=inside, other=0.0)
    level, low = exact_log_sum(top, total)
    tl.store(lse + at, level, mask=exists)
    tl.store(lse_low + at, low, mask=exists)
    if POOLED:
        acc /= tl.where(total == 0, 1.0, total)[:, None]
        tl.store(pooled + at[:, None] * value_width + d[None, :], acc, mask=inside)


@triton.jit
def add_columns(
    z, k, v, level, g, toward, acc, mass, total,
    WITH_H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """More columns into a tile of rows' sums of dz k, p and dz; without h of p k and p alone, for dz is slope p."""
    p = tl.exp2(z - level[:, None])
    mass += tl.sum(p, 1)
    weight = p
    if WITH_H:
        weight = p * (g[:, None] + product(toward, tl.trans(v), tl.zeros([ROWS, COLUMNS], tl.float32), PRECISION, INTERPRETED))
        total += tl.sum(weight, 1)
    return product(weight.to(DOT), k, acc, PRECISION, INTERPRETED), mass, total


@triton.jit
def grad_rows(
    slope, h, lse, lse_low, query, keys, values, scale, bias, query_labels, key_labels, key_index, limit, valid,
    out, mass_out, total_out,
    rows, columns, width, value_width, keys_stride, values_stride, bias_stride, labels_stride, valid_stride, batch, split_columns,
    WITH_H: tl.constexpr, OVER_KEYS: tl.constexpr, BIASED: tl.constexpr, LABELLED: tl.constexpr, INDICES: tl.constexpr,
    LIMITED: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, EVEN: tl.constexpr, EVEN_VALUES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sum_j dz_ij k_j, sum_j p_ij and sum_j dz_ij of a tile of rows over the columns of its split, dz_ij = p_ij (slope_i + h_i.v_j)."""
    row_tile, b, split, entry = place(tl.cdiv(rows, ROWS), batch)
    first_row = row_tile * ROWS
    at, exists, q, s, factor, most, own, index = row_side(
        query, scale, limit, query_labels, key_index, b, first_row, rows, width, LIMITED, LABELLED, INDICES, ROWS, WIDTH, EVEN, DOT
    )
    level, correction = level_of(tl.load(lse + at, mask=exists, other=0.0), tl.load(lse_low + at, mask=exists, other=0.0))
    g = tl.load(slope + at, mask=exists, other=0.0)
    toward = q  # not read without h
    if WITH_H:
        toward = tile(h + b * rows * value_width, first_row, rows, value_width, ROWS, VALUE_WIDTH, EVEN_VALUES, True, DOT)
    begin, whole, end = share_of_columns(columns, valid + b * valid_stride, split, split_columns, COUNTED, COLUMNS)

    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    key_base, value_base = keys + b * keys_stride, values + b * values_stride
    bias_base, label_base = bias + b * bias_stride, key_labels + b * labels_stride
    for ragged in tl.static_range(2):  # whole tiles, then a ragged one
        for first in tl.range(whole if ragged else begin, end if ragged else whole, COLUMNS, num_stages=1 if ragged else STAGES):
            k, z = column_logits(
                q, key_base, bias_base, label_base, first, end, width, factor, s, most, own, index, exists,
                BIASED, LABELLED, INDICES, LIMITED, EVEN, ragged == 1, ROWS, COLUMNS, WIDTH, DOT, PRECISION, INTERPRETED,
            )  # fmt: skip
            v = (
                tile(value_base, first, end, value_width, COLUMNS, VALUE_WIDTH, EVEN_VALUES, ragged == 1, DOT)
                if WITH_H and not OVER_KEYS
                else k
            )
            acc, mass, total = add_columns(z, k, v, level, g, toward, acc, mass, total, WITH_H, ROWS, COLUMNS, DOT, PRECISION, INTERPRETED)
    if not WITH_H:
        acc *= g[:, None]
        total = mass * g

    part = entry * rows + first_row + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    tl.store(out + part[:, None] * width + d[None, :], acc * correction[:, None], mask=exists[:, None] & (d < width)[None, :])
    tl.store(mass_out + part, mass * correction, mask=exists)
    tl.store(total_out + part, total * correction, mask=exists)


@triton.jit
def grad_keys(
    slope, h, lse, lse_low, query, keys, values, scale, bias, query_labels, key_labels, key_index, limit, valid,
    dkeys, dbias, dvalues,
    rows, columns, width, value_width, keys_stride, values_stride, bias_stride, labels_stride, valid_stride, batch,
    WITH_H: tl.constexpr, OVER_KEYS: tl.constexpr, BIASED: tl.constexpr, LABELLED: tl.constexpr, INDICES: tl.constexpr,
    LIMITED: tl.constexpr, COUNTED: tl.constexpr, WANT_KEYS: tl.constexpr, WANT_BIAS: tl.constexpr, WANT_VALUES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, EVEN: tl.constexpr,
    EVEN_VALUES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sum_i dz_ij s_i q_i, sum_i dz_ij and sum_i p_ij h_i of a tile of columns, which no other program writes: no atomics."""
    column_tile, b, _, _ = place(tl.cdiv(columns, COLUMNS), batch)
    first_column = column_tile * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    count = columns
    if COUNTED:
        count = tl.minimum(columns, tl.load(valid + b * valid_stride).to(tl.int32))
    here = column < count
    k = tile(keys + b * keys_stride, first_column, count, width, COLUMNS, WIDTH, EVEN, True, DOT)
    v = k
    if WITH_H and not OVER_KEYS:
        v = tile(values + b * values_stride, first_column, count, value_width, COLUMNS, VALUE_WIDTH, EVEN_VALUES, True, DOT)
    offset = tl.load(bias + b * bias_stride + column, mask=here, other=0.0) if BIASED else column
    label = tl.load(key_labels + b * labels_stride + column, mask=here, other=0) if LABELLED else column

    acc = tl.zeros([COLUMNS, WIDTH], tl.float32)
    value_acc = tl.zeros([COLUMNS, VALUE_WIDTH], tl.float32)
    bias_acc = tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(0, rows, ROWS, num_stages=STAGES):
        at, exists, q, s, factor, most, own, index = row_side(
            query, scale, limit, query_labels, key_index, b, first, rows, width, LIMITED, LABELLED, INDICES, ROWS, WIDTH, EVEN, DOT
        )
        level, correction = level_of(tl.load(lse + at, mask=exists, other=float("-inf")), tl.load(lse_low + at, mask=exists, other=0.0))
        g = tl.load(slope + at, mask=exists, other=0.0)
        score = product(k, tl.trans(q), tl.zeros([COLUMNS, ROWS], tl.float32), PRECISION, INTERPRETED)  # columns by rows
        z = logits(
            score, factor[None, :], s[None, :], most[None, :], own[None, :], exists[None, :], index[None, :],
            offset[:, None], label[:, None], column[:, None], count, LIMITED, BIASED, LABELLED, INDICES, False,
        )  # fmt: skip
        p = tl.exp2(z - level[None, :]) * correction[None, :]
        weight = p * g[None, :]
        if WITH_H:
            toward = tile(h + b * rows * value_width, first, rows, value_width, ROWS, VALUE_WIDTH, EVEN_VALUES, True, DOT)
            inner = product(v, tl.trans(toward), tl.zeros([COLUMNS, ROWS], tl.float32), PRECISION, INTERPRETED)
            weight += p * inner
            if WANT_VALUES:
                value_acc = product(p.to(DOT), toward, value_acc, PRECISION, INTERPRETED)
        if WANT_BIAS:
            bias_acc += tl.sum(weight, 1)
        if WANT_KEYS:
            acc = product((weight * s[None, :]).to(DOT), q, acc, PRECISION, INTERPRETED)
            if WITH_H and OVER_KEYS:
                acc = product(p.to(DOT), toward, acc, PRECISION, INTERPRETED)

    # columns beyond `count` have keys of zeros, but logits like others
    acc = tl.where(here[:, None], acc, 0.0)
    value_acc = tl.where(here[:, None], value_acc, 0.0)
    bias_acc = tl.where(here, bias_acc, 0.0)
    to = b * columns + column
    written = column < columns
    if WANT_KEYS:
        d = tl.arange(0, WIDTH)
        tl.store(dkeys + to[:, None] * width + d[None, :], acc, mask=written[:, None] & (d < width)[None, :])
    if WANT_BIAS:
        tl.store(dbias + to, bias_acc, mask=written)
    if WANT_VALUES:
        e = tl.arange(0, VALUE_WIDTH)
        tl.store(dvalues + to[:, None] * value_width + e[None, :], value_acc, mask=written[:, None] & (e < value_width)[None, :])
