"""Row losses of InfoNCE: each positive of a query against the log-sum-exp of its negatives, in one differentiable call.

With z+_ij the logit of positive j, x_ij = lse_i - z+_ij and weights w_ij: loss_i = sum_j w_ij log(1 + e^x_ij). Its slopes
w_ij e^x_ij / (1 + e^x_ij), and what they pull the query by, come from the forward pass, so the backward is a product with the
upstream gradient. csrc/cpu/info_nce.inl states the formulas.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..._core import impls
from . import cpu
from .apply import streaming_softmax, transformed
from .arguments import Problem, Spec, Tensors
from .autograd import _for_kernel, _keep, _kept, _versions
from .positives import positive_logits

impls.register("info_nce", impls.Implementation("cpu", cpu.missing, cpu.refuses))


class Positives(NamedTuple):
    """A query's positives: rows given, or columns of the bank. One of the two."""

    rows: Tensor | None  # [*B, N, D] or [*B, N, J, D]
    columns: Tensor | None  # [*B, N, J] int64, -1: row without this positive
    weights: Tensor | None  # [*B, N, J] in the accumulator's dtype; None: 1 / J
    include: bool  # whether a positive is in its own denominator


def info_nce_rows(p: Problem, positives: Positives, *, mean: bool = False) -> tuple[Tensor, Tensor | None]:
    """(losses [*B, N] or, with `mean`, their mean; lse of the negatives [*B, N], without gradient, unless they include the positive).

    The problem has neither a start nor values.
    """
    spec, tensors = p
    weights = positives.weights
    if spec.impl == "cpu" and not transformed() and (weights is None or not weights.requires_grad):
        query, keys, scale, bias, _, _, _, *rules = tensors
        pull = torch.is_grad_enabled() and (query.requires_grad or scale.requires_grad)
        call = Call(spec, positives.include, mean, pull)
        out = InfoNceRows.apply(call, (positives.columns, weights, *rules), query, keys, scale, bias, positives.rows)
        return (out, None) if positives.include else out
    losses, lse = _composed(p, positives)
    return losses.mean() if mean else losses, lse.detach()


def _composed(p: Problem, positives: Positives) -> tuple[Tensor, Tensor]:
    """The definition in PyTorch's operations, for any device and transform, and for derivatives of the second order."""
    spec, tensors = p
    rows, columns, weights, include = positives
    lse, *_ = streaming_softmax(spec, tensors.folded(spec), pool=False, need_pooled=False)
    lse = lse.reshape(spec.rows)
    _, logits = positive_logits(tensors.query, tensors.keys, tensors.scale, tensors.bias, rows, columns)
    gap = lse[..., None] - logits
    losses = F.softplus(gap, threshold=40) if include else gap  # beyond 40, log(1 + e^gap) is gap in float64 too
    if columns is not None:
        losses = torch.where(columns >= 0, losses, 0.0)
    if weights is not None:
        return (losses * weights).sum(-1), lse
    return losses.squeeze(-1) if losses.shape[-1] == 1 else losses.mean(-1), lse


class Call(NamedTuple):
    """What the fused call is told beside its tensors."""

    spec: Spec
    include: bool
    mean: bool
    pull: bool  # whether the gradient of query or scale will be asked for


class InfoNceRows(Function):
    """The same by fused kernels, outside transforms. A bank without gradient is held by reference: it may change before the backward.

    `rest` = (columns, weights, query_labels, key_labels, key_index, limit, valid).
    """

    @staticmethod
    def forward(ctx, call, rest, query, keys, scale, bias, positive):
        spec, include, mean, need_pull = call
        q, k, s, b, given, columns, weights, *rules = _folded(spec, query, keys, scale, bias, positive, *rest)
        problem = _for_kernel(q, k, s, b, *rules)
        lse, pull, lse_low = cpu.forward(*problem[:4], None, None, *problem[4:], need_pull, products=spec.compute.products)
        pull = pull if need_pull else None
        candidates, terms = (_once(problem[1]), _once(problem[3])) if given is None else (given, None)
        losses, slopes = torch.ops.kdfast.info_nce_rows(lse, pull, problem[0], s, candidates, columns, terms, weights, include)
        _, _, want_query, want_keys, want_scale, want_bias, want_positive = ctx.needs_input_grad
        ctx.call, ctx.want = call, (want_query, want_keys, want_scale, want_bias, want_positive)
        bank, hold = (keys, bias, *rest), not (want_keys or want_bias)
        ctx.versions = _versions(bank) if hold else None
        _keep(ctx, (slopes, pull, lse, lse_low, query, scale, positive), bank, hold)
        ctx.set_materialize_grads(False)
        losses = losses.mean() if mean else losses.view(spec.rows)
        if include:
            return losses
        lse = lse.view(spec.rows)
        ctx.mark_non_differentiable(lse)
        return losses, lse

    @staticmethod
    def backward(ctx, g, *_):
        if g is None:
            return (None,) * 7
        rows, bank = _kept(ctx, 7)
        run = Gradients.apply if torch.is_grad_enabled() else _gradients
        return None, None, *run(ctx.call, ctx.want, ctx.versions, g, *rows, *bank)


class Gradients(Function):
    """`_gradients`, and their derivative: that of the definition, taken twice."""

    @staticmethod
    def forward(ctx, call, want, versions, g, slopes, pull, lse, lse_low, query, scale, positive, *bank):
        ctx.call, ctx.want, ctx.versions = call, want, versions
        _keep(ctx, (g, query, scale, positive), bank, versions is not None)
        ctx.set_materialize_grads(False)
        return _gradients(call, want, versions, g, slopes, pull, lse, lse_low, query, scale, positive, *bank)

    @staticmethod
    def backward(ctx, *cotangents):
        (g, query, scale, positive), bank = _kept(ctx, 4)
        if ctx.versions is not None and _versions(bank) != ctx.versions:
            raise RuntimeError(
                "double backward through info_nce needs the bank as the forward saw it, but it was updated in place since; "
                "push to the bank after the last backward, or give the loss a clone of it"
            )
        dg, dquery, dkeys, dscale, dbias, dpositive = SecondOrder.apply(
            ctx.call, ctx.want, bank[2:], *cotangents, g, query, bank[0], scale, bank[1], positive
        )
        return None, None, None, dg, None, None, None, None, dquery, dscale, dpositive, dkeys, dbias, *(None,) * 7


class SecondOrder(Function):
    """Gradients of <cotangents, first-order gradients> in (g, query, keys, scale, bias, positive)."""

    @staticmethod
    def forward(ctx, call, want, rest, u_query, u_keys, u_scale, u_bias, u_positive, g, *inputs):
        cotangents, (columns, weights, *rules) = (u_query, u_keys, u_scale, u_bias, u_positive), rest
        inputs = [None if x is None else x.detach() for x in inputs]
        at = [i for i, wanted in enumerate(want) if wanted]
        leaves = [g.detach().requires_grad_(), *(inputs[i].requires_grad_() for i in at)]
        query, keys, scale, bias, positive = inputs
        with torch.enable_grad():
            tensors = Tensors(query, keys, scale, bias, None, None, None, *rules)
            losses, _ = _composed(Problem(call.spec, tensors), Positives(positive, columns, weights, call.include))
            losses = losses.mean() if call.mean else losses
            first = torch.autograd.grad(losses, leaves[1:], leaves[0], create_graph=True)
        along = [(x, cotangents[i]) for x, i in zip(first, at, strict=True) if cotangents[i] is not None]
        dg, *found = torch.autograd.grad([x for x, _ in along], leaves, [u for _, u in along], allow_unused=True)
        second = dict(zip(at, found, strict=True))
        return dg, *(second.get(i) for i in range(5))

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError("info_nce has first and second derivatives only; a third was asked for")


def _gradients(call, want, versions, g, slopes, pull, lse, lse_low, query, scale, positive, keys, bias, *rest):
    """The gradients of <g, losses> in (query, keys, scale, bias, positive), None where not wanted."""
    spec = call.spec
    want_query, want_keys, want_scale, want_bias, want_positive = want
    q, k, s, b, _, columns, _, *rules = _folded(spec, query, keys, scale, bias, None, *rest)
    rows = q.contiguous()
    g = g if call.mean else spec.per_row(g).contiguous()
    of_bank = want_keys or want_bias
    dquery, dscale, dpositive, dlse = torch.ops.kdfast.info_nce_grad_rows(
        g, slopes, pull, rows, s, want_query, want_scale, want_positive, of_bank
    )
    dkeys = dbias = None
    if of_bank:
        dkeys, dbias = cpu.grad_keys(
            dlse, lse, lse_low, *_for_kernel(q, k, s, b, *rules), want_keys, want_bias, products=spec.compute.products
        )
        dkeys, dbias = dkeys if want_keys else None, dbias if want_bias else None
        if columns is not None:
            torch.ops.kdfast.info_nce_grad_candidates(g, slopes, rows, s, columns, dkeys, dbias)
    return (
        dquery.view(query.shape).to(query.dtype) if want_query else None,
        _of_bank(dkeys, keys),
        dscale.view(scale.shape) if want_scale else None,
        _of_bank(dbias, bias),
        dpositive.view(positive.shape).to(positive.dtype) if want_positive else None,
    )


def _folded(spec, query, keys, scale, bias, positive, columns, weights, *rules):
    """Everything with one leading batch dimension, the rows of InfoNCE's own kernels dense and the positives [B, N, J, D]."""
    q, k, s, b, _, _, _, *rules = Tensors(query, keys, scale, bias, None, None, None, *rules).folded(spec)
    if positive is not None:
        given = spec.per_row(positive)
        positive = (given.unsqueeze(2) if given.dim() == 3 else given).contiguous()
    columns, weights = (None if x is None else spec.per_row(x).contiguous() for x in (columns, weights))
    return q, k, s, b, positive, columns, weights, *rules


def _once(x: Tensor | None) -> Tensor | None:
    """One batch entry of what all share."""
    return x[:1] if x is not None and x.shape[0] > 1 and x.stride(0) == 0 else x


def _of_bank(grad: Tensor | None, x: Tensor | None) -> Tensor | None:
    """The gradient [B, ...] as that of `x`, which the batch may share."""
    if grad is None:
        return None
    if x.dim() < grad.dim():
        grad = grad.sum(0) if grad.shape[0] > 1 else grad.squeeze(0)
    return grad.view(x.shape).to(x.dtype)


def _rows_fake(lse, pull, query, scale, candidates, columns, bias, weights, include):
    shape = candidates.shape[:3] if columns is None else columns.shape
    return torch.empty_like(lse), lse.new_empty(shape)


def _grad_rows_fake(g, slopes, pull, query, scale, want_query, want_scale, want_positive, want_lse):
    shapes = (query.shape, scale.shape, (*slopes.shape, query.shape[-1]), scale.shape)
    wanted = (want_query, want_scale, want_positive, want_lse)
    return tuple(slopes.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True))


if cpu.missing() is None:
    torch.library.register_fake("kdfast::info_nce_rows", _rows_fake)
    torch.library.register_fake("kdfast::info_nce_grad_rows", _grad_rows_fake)
    torch.library.register_fake("kdfast::info_nce_grad_candidates", lambda *args: None)
