"""A step of conjugate gradients (adjoint.descended) in Triton: all that its vectors go through in one launch, a program a problem.

Imported only where Triton is.
"""

import triton
import triton.language as tl


@triton.jit
def conjugate_step(
    through, c, over_c, share, damp, target, residual, solution, direction, sent, best, norm, least, active, size,
    PROJECT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a problem that is `active` [B]: with image = sent - damp through, all [B, size], sent = c direction,

    solution += length direction,  residual -= length image,  length = norm / <direction, image>
    direction = residual / c + (new norm / norm) direction,  norm = <residual, residual / c>

    PROJECT: and share times the residual's sum is taken off it.

    best is the solution of the `least` norm so far. The problem stays active while norm > target.
    """
    b = tl.program_id(0).to(tl.int64)
    if not tl.load(active + b):
        return
    of, lane = b * size, tl.arange(0, BLOCK)
    before, scale = tl.load(norm + b), tl.load(damp + b)
    dots = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        at, here = of + first + lane, first + lane < size
        image = tl.load(sent + at, mask=here, other=0.0) - scale * tl.load(through + at, mask=here, other=0.0)
        dots += tl.load(direction + at, mask=here, other=0.0) * image
    curvature = tl.sum(dots, 0)
    going = curvature > 0
    length = tl.where(going, before / curvature, 0.0)
    left = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        at, here = of + first + lane, first + lane < size
        image = tl.load(sent + at, mask=here, other=0.0) - scale * tl.load(through + at, mask=here, other=0.0)
        stepped = tl.load(solution + at, mask=here, other=0.0) + length * tl.load(direction + at, mask=here, other=0.0)
        rest = tl.load(residual + at, mask=here, other=0.0) - length * image
        tl.store(solution + at, stepped, mask=here)
        tl.store(residual + at, rest, mask=here)
        left += rest
    tl.debug_barrier()  # what is read next may have been written by another thread
    common = tl.sum(left, 0)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        at, here = of + first + lane, first + lane < size
        rest = tl.load(residual + at, mask=here, other=0.0)
        if PROJECT:
            rest -= common * tl.load(share + at, mask=here, other=0.0)
            tl.store(residual + at, rest, mask=here)
        squares += rest * rest * tl.load(over_c + at, mask=here, other=0.0)
    tl.debug_barrier()
    now = tl.where(going, tl.sum(squares, 0), 0.0)
    so_far = tl.load(least + b)
    better = tl.where(going, now, so_far) < so_far
    turn = tl.where(going, now / before, 0.0)
    for first in range(0, size, BLOCK):
        at, here = of + first + lane, first + lane < size
        kept, stepped = tl.load(best + at, mask=here, other=0.0), tl.load(solution + at, mask=here, other=0.0)
        tl.store(best + at, tl.where(better, stepped, kept), mask=here)
        rest = tl.load(residual + at, mask=here, other=0.0) * tl.load(over_c + at, mask=here, other=0.0)
        new = rest + turn * tl.load(direction + at, mask=here, other=0.0)
        tl.store(direction + at, new, mask=here)
        tl.store(sent + at, new * tl.load(c + at, mask=here, other=0.0), mask=here)
    tl.debug_barrier()
    tl.store(norm + b, now)
    tl.store(least + b, tl.where(better, now, so_far))
    tl.store(active + b, now > tl.load(target + b))
