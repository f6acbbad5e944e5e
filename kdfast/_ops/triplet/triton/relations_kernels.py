"""Sums over the relations of rows in Triton, with their gradients from the same pass. Imported only where Triton is."""

import triton
import triton.language as tl

from ...._core.triton_scores import weighted
from .dense_kernels import EUCLIDEAN, SQUARED, distances

#: what is summed over the columns: Gaussian kernels; distances; smooth L1 between two sides' distances over their means
GAUSSIANS: tl.constexpr = tl.constexpr(0)
DISTANCES: tl.constexpr = tl.constexpr(1)
RATIOS: tl.constexpr = tl.constexpr(2)


@triton.jit
def without_own(d, row, column):
    """A row is at distance 0 from itself, which |x|^2 + |x|^2 - 2 x.x is not."""
    return tl.where(row[:, None] == column[None, :], 0.0, d)


@triton.jit
def relation_sums(
    x, y, x_square, y_square, teacher, teacher_square, rates, mean, teacher_mean, out, weight_sum, sums,
    rows, columns, width, teacher_width, split_columns,
    RULE: tl.constexpr, SAME: tl.constexpr, COUNT: tl.constexpr, GRADIENT: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Two sums for each row, float64 [splits, 2, rows], and with GRADIENT sum_j w_ij y_j, out [splits, rows, width], and sum_j w_ij.

    GAUSSIANS  sum_j f, 0                  f = sum_s exp(-r_s q_ij), r [COUNT]                          w = sum_s 2 r_s exp(-r_s q_ij)
    DISTANCES  sum_j d_ij, how many are > 0                                                             w = -1 / d_ij
    RATIOS     sum_j l(z), sum_j l'(z) d_ij    z = d_ij / mean - d'_ij / teacher_mean, l: smooth L1     w = -l'(z) / d_ij

    So sum_j w_ij (y_j - x_i) is the gradient of the first sum in x_i alone, over mean in RATIOS. SAME: y is x.
    """
    first_row, split, first_width = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2) * CHUNK
    row = first_row + tl.arange(0, ROWS)
    there = row < rows
    if RULE == RATIOS:
        inverse, teacher_inverse = 1 / tl.load(mean), 1 / tl.load(teacher_mean)
    acc = tl.zeros([ROWS, CHUNK], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    one = tl.zeros([ROWS], tl.float64)
    two = tl.zeros([ROWS], tl.float64)
    begin = split * split_columns
    for first_column in range(begin, tl.minimum(begin + split_columns, columns), COLUMNS):
        column = first_column + tl.arange(0, COLUMNS)
        here = (column < columns)[None, :]
        if RULE == RATIOS:
            other = distances(
                teacher, teacher, teacher_square, teacher_square, first_row, rows, first_column, columns, teacher_width,
                EUCLIDEAN, False, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
            )  # fmt: skip
            other = without_own(other, row, column) * teacher_inverse
        d = distances(
            x, y, x_square, y_square, first_row, rows, first_column, columns, width,
            SQUARED if RULE == GAUSSIANS else EUCLIDEAN, False, ROWS, COLUMNS, DEPTH, PARTS, STAGES, INTERPRETED,
        )  # fmt: skip
        if SAME:
            d = without_own(d, row, column)
        if RULE == GAUSSIANS:
            value = tl.zeros([ROWS, COLUMNS], tl.float32)
            w = tl.zeros([ROWS, COLUMNS], tl.float32)
            for s in tl.static_range(COUNT):
                rate = tl.load(rates + s)
                f = tl.exp(-rate * d)
                value += f
                w += 2 * rate * f
            second = tl.zeros([ROWS, COLUMNS], tl.float32)
        else:
            reciprocal = tl.where(d > 0, 1 / tl.where(d > 0, d, 1.0), 0.0)
            value, w, second = d, -reciprocal, tl.where(d > 0, 1.0, 0.0)
        if RULE == RATIOS:
            z = d * inverse - other
            size = tl.abs(z)
            slope = tl.where(size < 1, z, tl.where(z < 0, -1.0, 1.0))
            value, w, second = tl.where(size < 1, 0.5 * z * z, size - 0.5), -slope * reciprocal, slope * d
        one += tl.sum(tl.where(here, value, 0.0), 1).to(tl.float64)
        two += tl.sum(tl.where(here, second, 0.0), 1).to(tl.float64)
        if GRADIENT:
            w = tl.where(here, w, 0.0)
            total += tl.sum(w, 1)
            acc = weighted(w, y, first_column, columns, width, first_width, acc, COLUMNS, CHUNK, INTERPRETED)
    to = split.to(tl.int64) * rows + row
    if first_width == 0:
        at = split.to(tl.int64) * 2 * rows + row
        tl.store(sums + at, one, mask=there)
        tl.store(sums + at + rows, two, mask=there)
        if GRADIENT:
            tl.store(weight_sum + to, total, mask=there)
    if GRADIENT:
        e = first_width + tl.arange(0, CHUNK)
        tl.store(out + to[:, None] * width + e[None, :], acc, mask=there[:, None] & (e < width)[None, :])


@triton.jit
def angle_sums(
    student, teacher, slopes, losses, rows, APEX: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Sums of smooth_l1(cos_ijk - cos'_ijk) and of its slopes, with cos_ijk = (q_ij + q_ik - q_jk) r_ij r_ik and r = (2 q)^(-1/2).

    APEX   a tile of i and j, all k: losses [tiles], float64, and sum_k l' dcos/dq_ij, dcos/dq_ij = r_ij (r_ik - r_ij cos_ijk)
    else   a tile of j and k, all i: sum_i l' dcos/dq_jk, dcos/dq_jk = -r_ij r_ik; no losses

    Each side [3, rows, rows]: q on a grid on which the sum of three is exact, the rest of it, and r. All are symmetric.
    """
    a, b = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    a_here, b_here = a < rows, b < rows
    inside = a_here[:, None] & b_here[None, :]
    part = tl.full([], 1, tl.int64) * rows * rows
    tile = a[:, None].to(tl.int64) * rows + b[None, :]
    q, rest = tl.load(student + tile, mask=inside, other=0.0), tl.load(student + part + tile, mask=inside, other=0.0)
    q_t, rest_t = tl.load(teacher + tile, mask=inside, other=0.0), tl.load(teacher + part + tile, mask=inside, other=0.0)
    r, r_t = q, q_t
    if APEX:
        r = tl.load(student + 2 * part + tile, mask=inside, other=0.0)
        r_t = tl.load(teacher + 2 * part + tile, mask=inside, other=0.0)
    slope = tl.zeros([ROWS, COLUMNS], tl.float32)
    loss = tl.zeros([ROWS, COLUMNS], tl.float32)
    for c in tl.range(0, rows, num_stages=1):
        line = tl.full([], 1, tl.int64) * c * rows
        numerator, r_a, r_b = sides_of_angles(student + line, part, q, rest, r, a, b, a_here, b_here, APEX)
        cosine = numerator * r_a * r_b
        numerator, r_a_t, r_b_t = sides_of_angles(teacher + line, part, q_t, rest_t, r_t, a, b, a_here, b_here, APEX)
        z = cosine - numerator * r_a_t * r_b_t
        size = tl.abs(z)
        if APEX:
            loss += tl.where(size < 1, 0.5 * z * z, size - 0.5)
        if GRADIENT:
            pull = tl.where(size < 1, z, tl.where(z < 0, -1.0, 1.0))
            if APEX:
                slope += pull * r_b * (r_a - r_b * cosine)
            else:
                slope -= pull * r_a * r_b
    if APEX:
        total = tl.sum(tl.sum(tl.where(inside, loss, 0.0), 1).to(tl.float64), 0)
        tl.store(losses + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), total)
    if GRADIENT:
        tl.store(slopes + tile, slope, mask=inside)


@triton.jit
def sides_of_angles(line, part, q, rest, r, a, b, a_here, b_here, APEX: tl.constexpr):
    """q_ij + q_ik - q_jk and the two r of a tile, from it and the row `line` of all distances to the third corner."""
    q_a, rest_a = tl.load(line + a, mask=a_here, other=0.0), tl.load(line + part + a, mask=a_here, other=0.0)
    q_b, rest_b = tl.load(line + b, mask=b_here, other=0.0), tl.load(line + part + b, mask=b_here, other=0.0)
    r_a = tl.load(line + 2 * part + a, mask=a_here, other=0.0)[:, None]
    if APEX:
        return (q + q_a[:, None] - q_b[None, :]) + (rest + (rest_a[:, None] - rest_b[None, :])), r_a, r
    else:
        r_b = tl.load(line + 2 * part + b, mask=b_here, other=0.0)[None, :]
        return (q_a[:, None] + q_b[None, :] - q) + ((rest_a[:, None] + rest_b[None, :]) - rest), r_a, r_b
