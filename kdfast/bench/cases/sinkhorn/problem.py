"""The transport problems that are measured, and the loops that everybody writes for them.

Points of 64 coordinates and an epsilon at which 20 iterations converge in float32: whatever order the peers update the
potentials in, all give the same number. The time of an iteration does not depend on it.
"""

import math

import torch
from torch import Tensor

EPSILON = 0.1
DTYPES = (torch.float32,)


def points(batch: int, n: int, m: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [B, n, D] and y [B, m, D], at squared distances of about 0.4."""
    generator = torch.Generator().manual_seed(0)
    scale = 1.6 / width**0.5
    return tuple((scale * torch.rand(batch, size, width, generator=generator)).to(dtype) for size in (n, m))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT


def costs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, int]:
    """(C [B, n, m], T iterations), of uniform weights."""
    batch, n, m, iterations = shape
    return squared_distances(*points(batch, n, m, 64, torch.float64)).to(dtype), iterations


def log_iteration(cost: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """f and g [B, n], [B, m] after one more iteration of the stable form, for uniform weights."""
    n, m = cost.shape[-2:]
    f = -EPSILON * ((g[:, None, :] - cost) / EPSILON - math.log(m)).logsumexp(-1)
    return f, -EPSILON * ((f[:, :, None] - cost) / EPSILON - math.log(n)).logsumexp(-2)


def potentials(cost: Tensor, iterations: int, iteration=log_iteration) -> tuple[Tensor, Tensor]:
    g = torch.zeros_like(cost[:, 0])
    for _ in range(iterations):
        f, g = iteration(cost, g)
    return f, g


def plan(cost: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return ((f[:, :, None] + g[:, None, :] - cost) / EPSILON).exp() / cost[0].numel()


def value(f: Tensor, g: Tensor) -> Tensor:
    return f.mean(-1) + g.mean(-1)


def kernel_iteration(kernel: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Scalings u and v [B, n, 1], [B, m, 1] of kernel = exp(-C/EPSILON): two matrix-vector products, no exponential."""
    n, m = kernel.shape[-2:]
    u = m / (kernel @ v)
    return u, n / (kernel.mT @ u)


def kernel_value(cost: Tensor, iterations: int, iteration=kernel_iteration) -> Tensor:
    kernel = (-cost / EPSILON).exp()
    v = torch.ones_like(cost[:, 0, :, None])
    for _ in range(iterations):
        u, v = iteration(kernel, v)
    return EPSILON * value(u[..., 0].log(), v[..., 0].log())
