"""impl="triton": what it serves, and how it multiplies operands of each dtype."""

import torch

from ...._core import triton_runtime as runtime
from ...._core.architectures import Architecture
from .. import cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = cpu.Kernels(torch.ops.kdfast_triton, {"ieee": 0, "bf16x3": 1, "bf16": 2, "tf32": 3})


def products(precision: int, arch: Architecture) -> str:
    """Triton's name for products of float32 operands, `precision` being a number of KERNELS.products.

    Of AMD's GPUs gfx942 alone multiplies tf32: three products of bfloat16 parts (2^-16) stand for it on the others. They are "bf16x3" on
    all of them, where NVIDIA's have three of tf32.
    """
    if not arch.amd:
        return ("ieee", "tf32x3", "ieee", "tf32")[precision]
    return ("ieee", "bf16x3", "ieee", "tf32" if arch.name == "gfx942" else "bf16x3")[precision]


missing = runtime.missing


def refuses(*, device_type: str = "cuda", dtype: torch.dtype = torch.float32, **_facts) -> str | None:
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 or float16, not {dtype}"
    return runtime.refuses_device(device_type)
