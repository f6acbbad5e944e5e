"""Row losses of InfoNCE where the keys of a row's class attract it.

On a GPU they are one op of Triton's kernels and their gradients another (triton/attraction.py); on the CPU info_nce.py's op has them
(csrc/cpu/info_nce/bind_attraction.h). For any device and transform, and for derivatives of the second order, they are PyTorch's
operations around the streaming softmax.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import cpu, triton
from ..apply import streaming_softmax, transformed
from ..arguments import Problem, Spec, Tensors
from ..autograd import _keep, _kept, _unchanged, _versions
from ..definition import SecondOrder
from ..passes import for_kernel
from ..positives import positive_logits
from ..triton import attraction as triton_attraction
from .score_sums import score_sums


def attracted_rows(p: Problem, positive: Tensor | None, include: bool) -> tuple[Tensor, Tensor]:
    """(losses [*B, N], which of them count): loss_i = lse_i - mean of z over the keys of i's class and the rows of `positive`.

    positive: [*B, N, D] or [*B, N, J, D]. include: all of them are in the one denominator; else none is. A row counts that has a positive
    and something in its denominator.
    """
    spec, tensors = p
    logits = None
    if positive is not None:
        _, logits = positive_logits(tensors.query, tensors.keys, tensors.scale, None, positive, None)
    learnt = tensors.bias is not None and tensors.bias.requires_grad
    if spec.impl not in triton_attraction.BESIDE or transformed() or learnt:
        return _composed(p, logits, include)
    t = tensors.folded(spec)
    pull = torch.is_grad_enabled() and not t.keys.requires_grad and (t.query.requires_grad or t.scale.requires_grad)
    call = Call(spec, include, pull, cpu.product_number(spec.compute.products, t.query, triton.KERNELS))
    rules = t.query_labels, t.key_labels, t.key_index, t.valid
    losses, statistics = Attracted.apply(call, t.query, t.keys, t.scale, t.bias, *rules, _folded(spec, logits))
    return losses.view(spec.rows), (statistics[2] > 0).view(spec.rows)


def _folded(spec: Spec, logits: Tensor | None) -> Tensor | None:
    """[*B, N, J] as [B, N, J]."""
    return logits[None] if logits is not None and len(spec.rows) == 1 else spec.per_row(logits)


def _composed(p: Problem, logits: Tensor | None, include: bool) -> tuple[Tensor, Tensor]:
    """`attracted_rows` in PyTorch's operations; logits [*B, N, J] of positives that are no keys."""
    spec, tensors = p
    labels = tensors.query_labels, tensors.key_labels
    softmax = tensors._replace(query_labels=None, key_labels=None) if include else tensors
    lse, *_ = streaming_softmax(spec, softmax.folded(spec), pool=False, need_pooled=False)
    lse = lse.reshape(spec.rows)
    rules = dict(zip(("query_labels", "bank_labels"), labels, strict=True), skip=tensors.key_index)
    sums = score_sums(tensors.query, tensors.keys, tensors.scale, valid=tensors.valid, bias=tensors.bias, **rules)
    total, number = sums.same, sums.same_count
    if logits is not None:
        if include:
            lse = torch.logsumexp(torch.cat([lse[..., None], logits], dim=-1), dim=-1)
        total, number = total + logits.sum(-1), number + logits.shape[-1]
    return lse - total / number.clamp(min=1), (number > 0) & (lse != -torch.inf)


class Call(NamedTuple):
    """What the fused call is told beside its tensors."""

    spec: Spec
    include: bool
    pull: bool  # whether the forward makes the rows' gradients: the bank has none, and may have changed by the backward
    products: int


class Attracted(Function):
    """(losses [B, N], statistics [3, B, N]) as triton_attraction.attracted has them, outside transforms; bias has no gradient.

    A bank without gradient is held by reference: it may change before the backward.
    """

    @staticmethod
    def forward(ctx, call, query, keys, scale, bias, query_labels, key_labels, key_index, valid, logits):
        rules = query_labels, key_labels, key_index, valid
        losses, statistics, *pulls = torch.ops.kdfast_triton.attracted(
            *_for_kernel(query, keys, scale, bias, *rules), logits, call.include, call.pull, call.products
        )
        ctx.call, ctx.want = call, (*ctx.needs_input_grad[1:4], ctx.needs_input_grad[9])
        hold, bank = not ctx.want[1], (keys, bias, *rules)
        ctx.versions = _versions(bank) if hold else None
        _keep(ctx, (statistics, *pulls, query, scale, logits), bank, hold)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return losses, statistics

    @staticmethod
    def backward(ctx, g, _):
        if g is None:
            return (None,) * 10
        rows, bank = _kept(ctx, 6)
        run = Gradients.apply if torch.is_grad_enabled() else _gradients
        dquery, dkeys, dscale, dlogits = run(ctx.call, ctx.want, ctx.versions, g.contiguous(), *rows, *bank)
        return None, dquery, dkeys, dscale, *(None,) * 5, dlogits


class Gradients(Function):
    """`_gradients`, and their derivative: that of the definition, taken twice."""

    @staticmethod
    def forward(ctx, call, want, versions, g, statistics, dquery, dscale, query, scale, logits, *bank):
        ctx.call, ctx.want, ctx.versions = call, want, versions
        _keep(ctx, (g, query, scale, logits), bank, versions is not None)
        ctx.set_materialize_grads(False)
        return _gradients(call, want, versions, g, statistics, dquery, dscale, query, scale, logits, *bank)

    @staticmethod
    def backward(ctx, *cotangents):
        (g, query, scale, logits), bank = _kept(ctx, 4)
        _unchanged(bank, ctx.versions, "info_nce")
        keys, *rest = bank
        definition = partial(_definition, ctx.call, rest)
        dg, dquery, dkeys, dscale, dlogits = SecondOrder.apply(definition, ctx.want, *cotangents, g, query, keys, scale, logits)
        return None, None, None, dg, None, None, None, dquery, dscale, dlogits, dkeys, *(None,) * 5


def _gradients(call, want, versions, g, statistics, dquery, dscale, query, scale, logits, keys, *rest) -> tuple[Tensor | None, ...]:
    """The gradients of <g, losses> in (query, keys, scale, logits), None where not wanted."""
    want_query, want_keys, want_scale, want_logits = want
    lse, low, share = statistics
    counted, dkeys, dlogits = share > 0, None, None
    g = torch.where(counted, g, 0.0)
    if call.pull:  # of rows that do not count, whatever they hold, there is none
        dquery = torch.where(counted[..., None], g[..., None] * dquery, 0.0)
        dscale = torch.where(counted, g * dscale, 0.0)
    elif want_query or want_keys or want_scale:
        problem = _for_kernel(query, keys, scale, *rest)
        dquery, dkeys, dscale = torch.ops.kdfast_triton.attracted_grad(
            g, statistics, *problem, call.include, want_query, want_keys, call.products
        )
    if want_logits:
        p = torch.exp((logits - lse[..., None]) - low[..., None]) if call.include else torch.zeros_like(logits)
        dlogits = torch.where(counted[..., None], g[..., None] * (p - share[..., None]), 0.0)
    found = (dquery, dkeys, dscale, dlogits)
    inputs = (query, keys, scale, logits)
    return tuple([x.to(like.dtype) if wanted else None for x, like, wanted in zip(found, inputs, want, strict=True)])


def _for_kernel(query, keys, scale, bias, query_labels, key_labels, key_index, valid) -> tuple:
    *tensors, _, valid = for_kernel(query, keys, scale, bias, query_labels, key_labels, key_index, None, valid)
    return *tensors, valid


def _definition(call: Call, rest: list, query, keys, scale, logits) -> Tensor:
    """The losses [B, N] in PyTorch's operations."""
    bias, *labels_and_index, valid = rest
    spec = call.spec._replace(rows=query.shape[:2], lead=query.shape[:2])
    tensors = Tensors(query, keys, scale, bias, None, None, None, *labels_and_index, None, valid)
    losses, counted = _composed(Problem(spec, tensors), logits, call.include)
    return torch.where(counted, losses, 0.0)
