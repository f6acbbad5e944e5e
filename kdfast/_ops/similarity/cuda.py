"""impl="cuda": kernels for Hopper GPUs (csrc/cuda/similarity), for rows of up to 256 numbers of 16 bits: the forward pass, and the bank's
gradient of a loss of lse alone in bfloat16. The other sums that gradients need are Triton's.

The functions are the ops of cpu.py, with the same schemas.
"""

import sys

import torch

from ..._core import cuda_runtime as runtime
from . import cpu, triton
from .portable import start_weight

DTYPES = (torch.bfloat16, torch.float16)
WIDTH, MULTIPLE = 256, 8  # the widest row, and what rows are multiples of: copies take 16 bytes
VALUED_WIDTH = 128  # the widest key and value where values pass by too
MASKED_WIDTH = 128  # the widest where the bank's gradient has a bias, labels or indices
#: whose kernels make the other sums; tests put the CPU's here (tests/cuda_kernels.py)
GRADIENTS = triton


def missing() -> str | None:
    wrong = runtime.missing() or GRADIENTS.missing()
    return wrong or (None if runtime.is_hopper() else "it needs a GPU of compute capability 9.0")


def refuses(
    *, device_type: str = "cuda", dtype: torch.dtype = torch.bfloat16, stored: torch.dtype | None = None, width: int = MULTIPLE,
    value_width: int | None = None, **_facts,
) -> str | None:  # fmt: skip
    """Why it cannot serve a call (None: it can). value_width: None where what is pooled are the keys."""
    if dtype not in DTYPES:
        return f"it takes bfloat16 or float16, not {dtype}"
    if stored not in (None, dtype):
        return f"it takes rows stored as {dtype}, not {stored}"
    if not 0 < width <= WIDTH or width % MULTIPLE:
        return f"it takes rows of at most {WIDTH} numbers, a multiple of {MULTIPLE}, not {width}"
    if value_width is not None and not _takes_values(width, value_width):
        return f"beside values it takes rows of at most {VALUED_WIDTH} numbers, a multiple of {MULTIPLE}, not {width} and {value_width}"
    return runtime.refuses_device(device_type)


def _takes_values(width: int, value_width: int) -> bool:
    return width <= VALUED_WIDTH and 0 < value_width <= VALUED_WIDTH and value_width % MULTIPLE == 0


def similarity_softmax(query, keys, scale, bias, start_logit, values, start_value, *args):
    if values is not None and not (values.dtype == query.dtype and _takes_values(query.shape[-1], values.shape[-1])):  # second derivatives'
        return GRADIENTS.KERNELS.ops.similarity_softmax(query, keys, scale, bias, start_logit, values, start_value, *args)
    lse, pooled, lse_low = runtime.OPS.similarity_softmax(query, keys, scale, bias, start_logit, values, None, *args)
    if start_value is not None and pooled.dim() > 1:  # asked for
        pooled = pooled + start_weight(start_logit, lse, lse_low)[..., None] * start_value
    return lse, pooled, lse_low


def similarity_grad_rows(*args):
    return GRADIENTS.KERNELS.ops.similarity_grad_rows(*args)


def similarity_grad_keys(slope, h, lse, lse_low, query, keys, scale, bias, values, *args):
    _, key_labels, key_index, limit, _, want_keys, want_bias, want_values, _ = args
    here = all(x is None for x in (h, values, limit)) and want_keys and not (want_bias or want_values)
    here &= query.shape[-1] <= MASKED_WIDTH or all(x is None for x in (bias, key_labels, key_index))
    # float16 has no room for weights that carry an upstream gradient
    ops = runtime.OPS if here and query.dtype == torch.bfloat16 else GRADIENTS.KERNELS.ops
    return ops.similarity_grad_keys(slope, h, lse, lse_low, query, keys, scale, bias, values, *args)


KERNELS = cpu.Kernels(sys.modules[__name__], triton.KERNELS.products)
