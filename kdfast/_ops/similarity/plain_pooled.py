"""The short way of `similarity_softmax` for whole matrices on the CPU, as plain.py has it for losses; its Function."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..._core import extension
from ..._core.recording import recorded
from . import cpu
from .arguments import Compute
from .autograd import Gradients, _like
from .exclusions import SameLabel
from .plain import PRODUCTS, number_of, plain, usual, whole_index, whole_rows


class Call(NamedTuple):
    """What a call is told beside the tensors that may have a gradient."""

    factor: float  # the scale of every row, where there is no [N] of them
    products: int
    labels: tuple[Tensor | None, Tensor | None]  # [N] and [M], of which equal ones are left out


def pooled_softmax(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    scale: float | Tensor,
    bias: Tensor | None,
    exclude: tuple,
    valid: int | None,
) -> tuple[Tensor, Tensor] | None:
    """(lse [N], pooled [N, Dv]) of query [N, D] over keys [M, D] and values [M, Dv], None: the keys; None where the call is not plain.

    scale: a number, 0-d or [N]. bias [M]. exclude: a SameLabel or nothing. valid: so many keys count.
    """
    matrices = (query, keys) if values is None else (query, keys, values)
    if not plain(*matrices) or keys.shape[1] != query.shape[1] or (values is not None and len(values) != len(keys)):
        return None
    number = number_of(scale)
    by_row = not usual(number)
    if by_row and not whole_rows(number, len(query)):
        return None
    labels = (None, None)
    if exclude != ():
        if type(exclude) is not tuple or len(exclude) != 1 or type(exclude[0]) is not SameLabel:
            return None
        labels = exclude[0]
        if not (_whole_labels(labels[0], len(query)) and _whole_labels(labels[1], len(keys))):
            return None
    if bias is not None and not whole_rows(bias, len(keys)):
        return None
    if valid is not None:
        if type(valid) is not int or not 0 < valid <= len(keys):
            return None
        keys, values, bias = keys[:valid], None if values is None else values[:valid], None if bias is None else bias[:valid]
        labels = labels[0], None if labels[1] is None else labels[1][:valid]
    call = Call(1.0 if by_row else number, cpu.product_number(None, query), labels)
    learnt = None if number is scale and not by_row else scale
    if recorded(query, keys, values, learnt, bias):
        return PooledSoftmax.apply(call, query, keys, values, learnt, bias)
    return torch.ops.kdfast.pooled_softmax(
        query, keys, values, call.factor, False, call.products, scale if by_row else None, bias, *labels
    )[:2]


def _whole_labels(x, count: int) -> bool:
    return whole_index(x, count) and x.is_contiguous()


class PooledSoftmax(Function):
    """Both outputs of a plain call; a second derivative is left to the general Functions. A 0-d scale has the call's factor."""

    @staticmethod
    def forward(ctx, call, query, keys, values, scale, bias):
        scales = None if scale is None or scale.dim() == 0 else scale
        rules = scales, bias, *call.labels
        lse, pooled, lse_low, scores = torch.ops.kdfast.pooled_softmax(query, keys, values, call.factor, True, call.products, *rules)
        ctx.set_materialize_grads(False)
        ctx.call = call
        outputs = lse, lse_low, pooled, scores
        ctx.save_for_backward(query, keys, values, scale, bias, *call.labels, *outputs)  # labels: what is changed in place is noticed
        return lse, pooled

    @staticmethod
    def backward(ctx, g, h):
        if g is None and h is None:
            return (None,) * 6
        call = ctx.call
        query, keys, values, scale, bias, *labels, lse, lse_low, pooled, scores = ctx.saved_tensors
        _, want_query, want_keys, want_values, want_scale, want_bias = ctx.needs_input_grad
        want_values = want_values and h is not None
        if torch.is_grad_enabled():
            return _general(ctx, g, h, (want_query, want_scale, want_keys, want_bias, want_values, g is not None))
        scales = None if scale is None or scale.dim() == 0 else scale
        of_rows = want_query or want_scale
        closed = h is None and values is None  # the rows' sums of lse are pooled
        rows = dkeys = dvalues = dbias = None
        if not closed or want_keys or want_bias:
            rows, dkeys, dvalues, dbias = torch.ops.kdfast.pooled_softmax_grad(
                g, h, pooled, lse, lse_low, scores, query, keys, values, call.factor, of_rows and not closed, want_keys, want_values,
                call.products, scales, bias, *labels, want_bias,
            )  # fmt: skip
        if closed and of_rows:
            rows = pooled * (g if scales is not None else g * call.factor).unsqueeze(1)
        dscale = None
        if want_scale:
            dscale = (query * rows).sum() / call.factor if scales is None else (query * rows).sum(1)
        if scales is not None and want_query:
            rows = rows * scales.unsqueeze(1)
        return (
            None,
            _like(rows, query) if want_query else None,
            _like(dkeys, keys) if want_keys else None,
            _like(dvalues, values) if want_values else None,
            dscale,
            dbias if want_bias else None,
        )


def _general(ctx, g: Tensor | None, h: Tensor | None, want: tuple[bool, ...]) -> tuple:
    """The gradients through the Function that is differentiable."""
    query, keys, values, scale, bias, *labels, lse, lse_low, pooled, _ = (None if x is None else x.unsqueeze(0) for x in ctx.saved_tensors)
    scales = torch.full_like(lse, ctx.call.factor) if scale is None else scale.reshape(1, -1).expand_as(lse).contiguous()
    g = torch.zeros_like(lse) if g is None else g.contiguous().unsqueeze(0)
    h = None if h is None else h.contiguous().unsqueeze(0)
    dquery, dkeys, dscale, dbias, _, dvalues, _ = Gradients.apply(
        "cpu", Compute(query.dtype, PRODUCTS[query.dtype]), want, None,
        g, h, query, keys, scales, bias, None, values, None, lse, lse_low, pooled, *labels, None, None, None,
    )  # fmt: skip
    if dscale is not None:
        dscale = dscale.sum() if scale.dim() == 1 else dscale.squeeze(0)  # one that was 0-d, or [N]
    first, second, third, last = (None if x is None else x.squeeze(0) for x in (dquery, dkeys, dvalues, dbias))
    return None, first, second, third, dscale, last


def _fake(query, keys, values, factor, keep, products, scale=None, bias=None, query_labels=None, key_labels=None):
    values = keys if values is None else values
    made = partial(query.new_empty, dtype=torch.float32)
    rows, columns = len(query), len(keys)
    kept = keep and bias is query_labels is None and extension.load("_C")[0].few_pairs(rows, columns, max(keys.shape[1], values.shape[1]))
    scores = (rows + 31, (columns + 63) // 64 * 64 + 16) if kept else (0,)
    return made(rows), made((rows, values.shape[1])), made(rows), made(scores)


def _grad_fake(
    g, h, pooled, lse, lse_low, scores, query, keys, values, factor, want_query, want_keys, want_values, products, scale=None, bias=None,
    query_labels=None, key_labels=None, want_bias=False,
):  # fmt: skip
    wanted = (query, want_query), (keys, want_keys), (values, want_values), (bias, want_bias)
    return tuple(lse.new_empty(x.shape if want else (0,)) for x, want in wanted)


if cpu.missing() is None:
    torch.library.register_fake("kdfast::pooled_softmax", _fake)
    torch.library.register_fake("kdfast::pooled_softmax_grad", _grad_fake)
