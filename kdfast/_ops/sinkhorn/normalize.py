"""Doubly stochastic normalisation of many small matrices, with the gradient of its truncated iterations.

x = softmax(logits) + eps; columns; then (rows, columns) iters - 1 times, each x <- x / (sum x + eps). With y = x/d, d = sum x + eps:
dx = (dy - sum dy y)/d along the normalised dimension, and x = y d, so only the divisors are stored: (2 iters - 1) n a matrix; the
fused form stores nothing and forms them again.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from kdfast._core import impls

from . import cpu, cuda


def _too_large(*, device_type: str, size: int, **_facts) -> str | None:
    too_many = size * size > cpu.NORMALIZED_ENTRIES
    return cpu.refuses(device_type=device_type) or (f"it takes matrices of at most {cpu.NORMALIZED_ENTRIES} entries" if too_many else None)


impls.register(
    "sinkhorn_normalize",
    impls.Implementation("cpu", cpu.missing, _too_large),
    impls.Implementation("cuda", cuda.missing, cuda.refuses_matrices),
)


def normalize(logits: Tensor, iters: int, eps: float, impl: str | None) -> Tensor:
    """logits [B, n, n] in the working dtype -> [B, n, n]."""
    facts = {"device_type": logits.device.type, "dtype": logits.dtype, "size": logits.shape[1], "iters": iters}
    impl = impls.choose("sinkhorn_normalize", impl, **facts)
    return Normalize.apply(logits, iters, eps)[0] if impl == "torch" else FusedNormalize.apply(logits, iters, eps, impl)


def plain(logits: Tensor, iters: int, eps: float) -> Tensor:
    """The definition, differentiable any number of times; logits [B, n, m] -> [B, n, m]."""
    x = logits.softmax(-1) + eps
    for dim in _order(iters):
        x = x / (x.sum(dim, keepdim=True) + eps)
    return x


def _plain_gradient(logits: Tensor, dy: Tensor, iters: int, eps: float) -> Tensor:
    return torch.func.vjp(lambda x: plain(x, iters, eps), logits)[1](dy)[0]


def _order(iters: int) -> list[int]:
    return [-2] + [-1, -2] * (iters - 1)


class Normalize(Function):
    """(logits [B, n, m], iters, eps) -> (the matrices, then the divisors of each step)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits, iters, eps):
        x, divisors = logits.softmax(-1) + eps, []
        for dim in _order(iters):
            divisors.append(x.sum(dim, keepdim=True) + eps)
            x = x / divisors[-1]
        return x, *divisors

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, ctx.iters, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(logits, *output)

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return None, None, None
        logits, y, *divisors = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            return _plain_gradient(logits, dy, ctx.iters, ctx.eps), None, None
        for dim, d in zip(reversed(_order(ctx.iters)), reversed(divisors), strict=True):
            dy = (dy - (dy * y).sum(dim, keepdim=True)) / d
            y = y * d
        p = y - ctx.eps
        return p * (dy - (dy * p).sum(-1, keepdim=True)), None, None


class FusedNormalize(Function):
    """(logits [B, n, n], iters, eps, impl) -> the matrices, by a kernel that keeps each on chip, or a C++ one with a matrix to a lane."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits, iters, eps, impl):
        return _FUSED[impl](logits, None, iters, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, ctx.iters, ctx.eps, ctx.impl = inputs
        ctx.save_for_backward(logits)

    @staticmethod
    def backward(ctx, dy):
        (logits,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            return _plain_gradient(logits, dy, ctx.iters, ctx.eps), None, None, None
        return _FUSED[ctx.impl](logits, dy, ctx.iters, ctx.eps), None, None, None


_FUSED = {"cpu": cpu.normalize, "cuda": cuda.normalize}
