"""Balanced assignment codes: a few Sinkhorn iterations on scores, over a batch that may be spread over processes."""

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast._core import impls

from . import cpu, cuda
from .geometry import TILE, TILE_ELSEWHERE

impls.register(
    "sinkhorn_assign",
    impls.Implementation("cpu", cpu.missing, cpu.refuses),
    impls.Implementation("cuda", cuda.missing, cuda.refuses_scores),
)


def assign(scores: Tensor, epsilon: Tensor, iters: int, group, impl: str | None) -> Tensor:
    """Codes [B, N, K] of scores [B, N, K], epsilon [], in the accumulator's dtype: `iters` reads more than one, one write.

    With column potentials v (nats), rows are softmax(s/epsilon + v), so only v is kept: first v = -LSE over all samples,
    then each pass adds -log of the rows' column sums (which cannot underflow: at least 1/K of their target). Its mean is free:
    without it v is as small, and as exact, as columns differ.
    """
    impl = impls.choose("sinkhorn_assign", impl, device_type=scores.device.type, dtype=scores.dtype, columns=scores.shape[-1])
    one_pass = {"cpu": cpu.assign_pass, "cuda": cuda.assign_pass}.get(impl, _pass)
    inverse = 1 / epsilon
    if impl == "cpu" and group is None:
        return cpu.assign(scores, inverse, iters)
    v = _centred(-_total_lse(one_pass(scores, None, inverse, codes=False), group))
    for _ in range(iters - 1):
        v = _centred(v - _total(one_pass(scores, v, inverse, codes=False), group).log())
    return one_pass(scores, v, inverse, codes=True)


def _pass(scores: Tensor, v: Tensor | None, inverse: Tensor, *, codes: bool) -> Tensor:
    """softmax(s/epsilon + v) over the columns [B, N, K], or its column sums [B, K]; without v log sum_n exp(s_nk/epsilon) [B, K]."""
    batch, _, k = scores.shape
    if codes:
        out = torch.empty(scores.shape, dtype=inverse.dtype, device=scores.device)
    else:
        out = torch.full((batch, k), -torch.inf if v is None else 0.0, dtype=inverse.dtype, device=scores.device)
    for rows in _tiles(scores):
        z = scores[:, rows].to(inverse.dtype) * inverse
        if v is None:
            out = torch.logaddexp(out, z.logsumexp(-2))
        elif codes:
            out[:, rows] = (z + v[:, None]).softmax(-1)
        else:
            out += (z + v[:, None]).softmax(-1).sum(-2)
    return out


def _centred(v: Tensor) -> Tensor:
    return v - v.mean(-1, keepdim=True)


def _total_lse(lse: Tensor, group) -> Tensor:
    """log of the sum of exp(lse) over every process."""
    if group is None:
        return lse
    largest = lse.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest + _total(torch.exp(lse - largest), group).log()


def _total(x: Tensor, group) -> Tensor:
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def _tiles(scores: Tensor):
    batch, n, k = scores.shape
    step = max(1, TILE.get(scores.device.type, TILE_ELSEWHERE) // max(1, batch * k))
    if torch.compiler.is_compiling():  # a compiler fuses the passes itself
        step = max(1, n)
    for lo in range(0, n, step):
        yield slice(lo, min(lo + step, n))
