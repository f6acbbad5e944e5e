"""Triton: scores of a tile of rows against a tile of columns, of any width: of the rows as they are, or of their parts in 16 bits.

Imported only where Triton is. Parts make scores as exact as float32's: a float32 is the sum of three bfloat16 numbers (triton_runtime.split
makes them), and the product of two such sums is six products of parts, what it leaves out being below 2^-24 of it: float32's digits at a
sixth of the rate of bfloat16, which is about twice what a GPU's float32 units do.
"""

import triton
import triton.language as tl


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + a b. The interpreter has no arithmetic in 16 bits."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def scores(
    x, y, first_row, rows, first_column, columns, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
    SWAPPED: tl.constexpr = False,
):  # fmt: skip
    """x_i . y_j [ROWS, COLUMNS] float32 of x [PARTS, rows, width] and y [PARTS, columns, width], whose width is a multiple of DEPTH.

    Rows and columns past the end are copies of the last one. Addresses of a tile take 64 bits, offsets from them 32. SWAPPED: the products
    are added in the order that has the bits of y_j . x_i.
    """
    i = tl.minimum(tl.arange(0, ROWS), rows - 1 - first_row)
    j = tl.minimum(tl.arange(0, COLUMNS), columns - 1 - first_column)
    d = tl.arange(0, DEPTH)
    one = tl.full([], 1, tl.int64)
    x_part, y_part = one * rows * width, one * columns * width
    x_at = x + one * first_row * width + (i[:, None] * width + d[None, :])
    y_at = y + one * first_column * width + (j[:, None] * width + d[None, :])
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, width, DEPTH, num_stages=STAGES):
        x0, y0 = tl.load(x_at + start), tl.trans(tl.load(y_at + start))
        if PARTS > 1:  # what is least first
            x1, y1 = tl.load(x_at + x_part + start), tl.trans(tl.load(y_at + y_part + start))
            if PARTS > 2:
                x2, y2 = tl.load(x_at + 2 * x_part + start), tl.trans(tl.load(y_at + 2 * y_part + start))
                acc = product(x0 if SWAPPED else x2, y2 if SWAPPED else y0, acc, "ieee", INTERPRETED)
                acc = product(x1, y1, acc, "ieee", INTERPRETED)
                acc = product(x2 if SWAPPED else x0, y0 if SWAPPED else y2, acc, "ieee", INTERPRETED)
            acc = product(x0 if SWAPPED else x1, y1 if SWAPPED else y0, acc, "ieee", INTERPRETED)
            acc = product(x1 if SWAPPED else x0, y0 if SWAPPED else y1, acc, "ieee", INTERPRETED)
        acc = product(x0, y0, acc, "ieee", INTERPRETED)
    return acc


@triton.jit
def row_scores(
    x, y, first_row, rows, first_column, columns, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """x_i . y_j [ROWS, COLUMNS] float32 of x [rows, width] and y [columns, width], multiplied as DOT. EVEN: width is a multiple of DEPTH.

    Rows and columns past the end are copies of the last one (there is one). Addresses as in `scores`.
    """
    i = tl.minimum(tl.arange(0, ROWS), rows - 1 - first_row)
    j = tl.minimum(tl.arange(0, COLUMNS), columns - 1 - first_column)
    d = tl.arange(0, DEPTH)
    one = tl.full([], 1, tl.int64)
    x_at = x + one * first_row * width + (i[:, None] * width + d[None, :])
    y_at = y + one * first_column * width + (j[:, None] * width + d[None, :])
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, width, DEPTH, num_stages=STAGES):
        if EVEN:
            a, b = tl.load(x_at + start), tl.load(y_at + start)
        else:
            inside = (d < width - start)[None, :]
            a, b = tl.load(x_at + start, mask=inside, other=0.0), tl.load(y_at + start, mask=inside, other=0.0)
        acc = product(a.to(DOT), tl.trans(b.to(DOT)), acc, PRECISION, INTERPRETED)
    return acc


@triton.jit
def weighted(w, y, first_column, columns, width, first_width, acc, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + w y for CHUNK numbers of each row of y [3, columns, width], w in three parts as well: float32's digits."""
    j = tl.minimum(tl.arange(0, COLUMNS), columns - 1 - first_column)  # weights of columns past the end are 0
    e = first_width + tl.arange(0, CHUNK)
    inside = (e < width)[None, :]
    one = tl.full([], 1, tl.int64)
    part = one * columns * width
    at = y + one * first_column * width + (j[:, None] * width + e[None, :])
    y0 = tl.load(at, mask=inside, other=0.0)
    y1 = tl.load(at + part, mask=inside, other=0.0)
    y2 = tl.load(at + 2 * part, mask=inside, other=0.0)
    w0 = w.to(tl.bfloat16)
    rest = w - w0.to(tl.float32)
    w1 = rest.to(tl.bfloat16)
    w2 = (rest - w1.to(tl.float32)).to(tl.bfloat16)
    acc = product(w2, y0, acc, "ieee", INTERPRETED)
    acc = product(w1, y1, acc, "ieee", INTERPRETED)
    acc = product(w0, y2, acc, "ieee", INTERPRETED)
    acc = product(w1, y0, acc, "ieee", INTERPRETED)
    acc = product(w0, y1, acc, "ieee", INTERPRETED)
    return product(w0, y0, acc, "ieee", INTERPRETED)
