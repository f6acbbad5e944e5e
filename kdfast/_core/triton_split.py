"""Rows of float32 as sums of bfloat16 matrices (triton_runtime.split), in Triton. Imported only where Triton is."""

import triton
import triton.language as tl

_LARGEST = tl.constexpr(3.3895313892515355e38)  # of a bfloat16


@triton.jit
def split_rows(
    x, out, square, rows, size, width, padded, PARTS: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    """x [rows, width], `size` of them to an entry of a batch, into parts out [batch, PARTS, size, padded]; and |x|^2, [rows]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    entry, place = row // size, row % size
    there = row < rows
    squares = tl.zeros([ROWS, EACH], tl.float32)
    for first in range(0, padded, EACH):
        d = first + tl.arange(0, EACH)
        inside = there[:, None] & (d < width)[None, :]
        value = tl.load(x + row[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += value * value
        rest = tl.where(tl.abs(value) < float("inf"), tl.minimum(tl.maximum(value, -_LARGEST), _LARGEST), 0.0)
        for part in tl.static_range(PARTS):
            piece = rest.to(out.dtype.element_ty)
            at = out + ((entry * PARTS + part) * size + place)[:, None] * padded + d[None, :]
            tl.store(at, piece, mask=there[:, None] & (d < padded)[None, :])
            rest -= piece.to(tl.float32)
    tl.store(square + row, tl.sum(squares, 1), mask=there)
