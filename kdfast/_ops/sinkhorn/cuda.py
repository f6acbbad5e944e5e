"""impl="cuda": the kernels of csrc/cuda/sinkhorn.

A cost of at most 256 columns and 128 rows, 1024 rows on GPUs with clusters (from compute capability 9.0), stays on chip through all
iterations; others are read once an iteration, by blocks that wait for one another.
"""

import torch
from torch import Tensor

from kdfast._core import cuda_runtime as runtime

from .geometry import Problem
from .portable import Schedule, Solution

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COLUMNS, BLOCK_ROWS, BLOCKS = 256, 128, 8
#: of a block that reads rows one pair after another
STREAMED_COLUMNS = 8192
#: What normalize takes: a warp holds a matrix, shared memory, 99 KB on the smallest GPUs, the divisors of all steps of a block's.
NORMALIZED_ROWS, NORMALIZED_ITERS = 32, 96


def missing() -> str | None:
    return runtime.missing()


def refuses(
    *,
    device_type: str = "cuda",
    dtype: torch.dtype = torch.float32,
    size: tuple[int, int] | None = None,
    points: bool = False,
    method: str = "auto",
    tol: float | None = None,
    **_facts,
) -> str | None:
    """Why the kernels cannot serve a call (None: they can)."""
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 or float16, not {dtype}"
    if points:
        return "it takes a cost, not points"
    if method == "proximal" and tol is not None:
        return "it takes no tol with method='proximal'"
    wrong = runtime.refuses_device(device_type)
    if wrong is not None or size is None:
        return wrong
    blocks = BLOCKS if runtime.has_clusters() else 1
    if size[0] <= BLOCK_ROWS * blocks and size[1] <= COLUMNS:
        return None
    if not runtime.has_cooperative_launches():
        return f"without cooperative launches it takes costs of at most {BLOCK_ROWS * blocks} x {COLUMNS}, which stay on chip"
    most = STREAMED_COLUMNS * blocks
    return None if size[1] <= most else f"it takes at most {most} columns, not {size[1]}"


def refuses_matrices(*, device_type: str, dtype: torch.dtype, size: int, iters: int, **_facts) -> str | None:
    """Why normalize cannot serve a call (None: it can)."""
    if dtype != torch.float32:
        return f"it takes float32, not {dtype}"
    if size > NORMALIZED_ROWS or iters > NORMALIZED_ITERS:
        return f"it takes matrices of at most {NORMALIZED_ROWS} rows and {NORMALIZED_ITERS} iterations, not {size} and {iters}"
    return runtime.refuses_device(device_type)


def refuses_scores(*, device_type: str, dtype: torch.dtype, columns: int, **_facts) -> str | None:
    """Why assign_pass cannot serve a call (None: it can)."""
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 or float16, not {dtype}"
    wrong = runtime.refuses_device(device_type)
    if wrong is not None:
        return wrong
    most = STREAMED_COLUMNS * (BLOCKS if runtime.has_clusters() else 1)
    return None if columns <= most else f"it takes at most {most} columns, not {columns}"


def assign_pass(scores: Tensor, v: Tensor | None, inverse: Tensor, *, codes: bool) -> Tensor:
    """cpu.assign_pass."""
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    return runtime.OPS.sinkhorn_assign(scores, v, inverse, codes)


def normalize(logits: Tensor, gradient: Tensor | None, iters: int, eps: float) -> Tensor:
    """cpu.normalize."""
    return runtime.OPS.sinkhorn_normalize(logits.contiguous(), None if gradient is None else gradient.contiguous(), iters, eps)


def solve(p: Problem, g: Tensor, schedule: Schedule, history: bool) -> Solution:
    """Run `schedule` on every problem from column potentials g [B, m], in one launch."""
    cost = p.cost if p.cost.stride(-1) == 1 else p.cost.contiguous()
    fields = (cost, *(None if t is None else t.contiguous() for t in p[1:8]), p.metric, p.rho_a, p.rho_b)
    return Solution(*runtime.OPS.sinkhorn_solve(*fields, g.contiguous(), *schedule, history))
