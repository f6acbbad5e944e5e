"""Triton: functions that keep float32's digits where the hardware's own do not.

Imported only where Triton is.
"""

import triton
import triton.language as tl


@triton.jit
def softplus(u):
    """log(1 + exp u) to float32's relative accuracy, and its derivative.

    log(1 + e) = 2 artanh(e / (2 + e)), whose argument is at most 1/3.
    """
    e = tl.exp(-tl.abs(u))
    s = e / (2 + e)
    s2 = s * s
    series = 1 / 17
    for term in tl.static_range(8):
        series = series * s2 + 1 / (15 - 2 * term)
    return tl.where(u > 0, u, 0.0) + 2 * s * series, tl.where(u > 0, 1.0, e) / (1 + e)
