"""impl="cpu": the fused C++ kernels (csrc/cpu/sinkhorn.inl), with the signatures of portable.py."""

import torch
from torch import Tensor

from kdfast._core import extension

from . import portable
from .geometry import Problem
from .portable import Schedule, Solution


def missing() -> str | None:
    """Why the kernels are not on this machine (None: they are)."""
    return extension.missing_cpu()


def refuses(*, device_type: str = "cpu", **_facts) -> str | None:
    """Why they cannot serve a call on this device type (None: they can)."""
    return None if device_type == "cpu" else f"it runs on CPU tensors, these are on {device_type}"


def solve(p: Problem, g: Tensor, schedule: Schedule, history: bool) -> Solution:
    """Run `schedule` on every problem from column potentials g [B, m]. Weights below 1.2e-38 (2.2e-308) count as zero."""
    if p.cost is None:
        return portable.solve(p, g, schedule, history)
    return Solution(*torch.ops.kdfast.sinkhorn_solve(*_fields(p), g.contiguous(), *schedule, history))


def _fields(p: Problem) -> tuple:
    cost = p.cost if p.cost is None or p.cost.stride(-1) == 1 else p.cost.contiguous()
    return cost, *(None if t is None else t.contiguous() for t in p[1:8]), p.metric, p.rho_a, p.rho_b


def _solve_shapes(cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b, g, iterations, *schedule_and_history):
    steps = iterations if schedule_and_history[-1] else 0
    count = torch.empty_like(epsilon, dtype=torch.int64)
    histories = (s.new_empty(s.shape[0], steps, s.shape[1]) for s in (a, b))
    return (*(torch.empty_like(s) for s in (a, b, a, b, epsilon, epsilon)), count, *histories)


if missing() is None:
    torch.library.register_fake("kdfast::sinkhorn_solve", _solve_shapes)
