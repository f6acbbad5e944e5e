"""impl="triton": what it serves, and how it multiplies operands of each dtype."""

import torch

from ...._core import triton_runtime as runtime
from .. import cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = cpu.Kernels(torch.ops.kdfast_triton, {"ieee": 0, "bf16x3": 1, "bf16": 2, "tf32": 3})
PRECISIONS = ("ieee", "tf32x3", "ieee", "tf32")  # of products of float32 operands, by that number

missing = runtime.missing


def refuses(*, device_type: str = "cuda", dtype: torch.dtype = torch.float32, **_facts) -> str | None:
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 or float16, not {dtype}"
    return runtime.refuses_device(device_type)
