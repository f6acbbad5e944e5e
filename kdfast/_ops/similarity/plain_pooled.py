"""The short way of `similarity_softmax` for whole matrices on the CPU and one scale, as plain.py has it for losses; its Function."""

from functools import partial

import torch
from torch import Tensor
from torch.autograd import Function

from ..._core import extension
from ..._core.recording import recorded
from . import cpu
from .arguments import Compute
from .autograd import Gradients
from .info_nce import _like
from .plain import PRODUCTS, plain, usual


def pooled_softmax(query: Tensor, keys: Tensor, values: Tensor | None, scale: float | Tensor) -> tuple[Tensor, Tensor] | None:
    """(lse [N], pooled [N, Dv]) of query [N, D] over keys [M, D] and values [M, Dv], None: the keys; None where the call is not plain."""
    matrices = (query, keys) if values is None else (query, keys, values)
    if not (usual(scale) and plain(*matrices)) or keys.shape[1] != query.shape[1]:
        return None
    if values is not None and len(values) != len(keys):
        return None
    products = cpu.product_number(None, query)
    if recorded(*matrices):
        return PooledSoftmax.apply(scale, products, query, keys, values)
    return torch.ops.kdfast.pooled_softmax(query, keys, values, scale, False, products)[:2]


class PooledSoftmax(Function):
    """Both outputs of a plain call; a second derivative is left to the general Functions."""

    @staticmethod
    def forward(ctx, scale, products, query, keys, values):
        lse, pooled, lse_low, scores = torch.ops.kdfast.pooled_softmax(query, keys, values, scale, True, products)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.products = scale, products
        ctx.save_for_backward(query, keys, values, lse, lse_low, pooled, scores)
        return lse, pooled

    @staticmethod
    def backward(ctx, g, h):
        if g is None and h is None:
            return None, None, None, None, None
        _, _, want_query, want_keys, want_values = ctx.needs_input_grad
        if h is None or torch.is_grad_enabled():
            return None, None, *_general(ctx, g, h, want_query, want_keys, want_values and h is not None)
        query, keys, values, lse, lse_low, pooled, scores = ctx.saved_tensors
        level = pooled, lse, lse_low, scores
        wanted = want_query, want_keys, want_values
        dquery, dkeys, dvalues = torch.ops.kdfast.pooled_softmax_grad(g, h, *level, query, keys, values, ctx.scale, *wanted, ctx.products)
        return (
            None,
            None,
            _like(dquery, query) if want_query else None,
            _like(dkeys, keys) if want_keys else None,
            _like(dvalues, values) if want_values else None,
        )


def _general(ctx, g: Tensor | None, h: Tensor | None, want_query: bool, want_keys: bool, want_values: bool) -> tuple:
    """The gradients of query, keys and values through the Function that is differentiable."""
    query, keys, values, lse, lse_low, pooled = (None if x is None else x.unsqueeze(0) for x in ctx.saved_tensors[:-1])
    from_lse = g is not None
    g = g.contiguous().unsqueeze(0) if from_lse else torch.zeros_like(lse)
    h = None if h is None else h.contiguous().unsqueeze(0)
    run = Gradients.apply if torch.is_grad_enabled() else Gradients.forward
    dquery, dkeys, _, _, _, dvalues, _ = run(
        "cpu", Compute(query.dtype, PRODUCTS[query.dtype]), (want_query, False, want_keys, False, want_values, from_lse), None,
        g, h, query, keys, torch.full_like(lse, ctx.scale), None, None, values, None, lse, lse_low, pooled, *(None,) * 5,
    )  # fmt: skip
    return tuple(None if x is None else x.squeeze(0) for x in (dquery, dkeys, dvalues))


def _fake(query, keys, values, factor, keep, products):
    values = keys if values is None else values
    made = partial(query.new_empty, dtype=torch.float32)
    rows, columns = len(query), len(keys)
    kept = keep and extension.load("_C")[0].few_pairs(rows, columns, max(keys.shape[1], values.shape[1]))
    scores = (rows + 31, (columns + 63) // 64 * 64 + 16) if kept else (0,)
    return made(rows), made((rows, values.shape[1])), made(rows), made(scores)


def _grad_fake(g, h, pooled, lse, lse_low, scores, query, keys, values, factor, want_query, want_keys, want_values, products):
    wanted = (query, want_query), (keys, want_keys), (values, want_values)
    return tuple(lse.new_empty(x.shape if want else (0,)) for x, want in wanted)


if cpu.missing() is None:
    torch.library.register_fake("kdfast::pooled_softmax", _fake)
    torch.library.register_fake("kdfast::pooled_softmax_grad", _grad_fake)
