"""Row losses of InfoNCE: each positive of a query against the log-sum-exp of its negatives, in one differentiable call.

With z+_ij the logit of positive j, x_ij = lse_i - z+_ij and weights w_ij: loss_i = sum_j w_ij log(1 + e^x_ij). Its slopes
w_ij e^x_ij / (1 + e^x_ij), and what they pull the query by, come from the forward pass, so the backward is a product with the
upstream gradient. csrc/cpu/info_nce/info_nce.inl states the formulas, bind_smoothing.h what label smoothing adds to them, and
bind_attraction.h those of rows that the keys of their class attract.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ...._core import extension, impls
from ...._core.reduction import reduce_rows
from .. import cpu, cuda, triton
from ..apply import streaming_softmax, transformed
from ..arguments import Problem, Spec, Tensors, row_parameter
from ..autograd import _keep, _kept, _like, _unchanged, _versions
from ..definition import SecondOrder
from ..passes import for_kernel
from ..positives import positive_logits, positive_rows
from . import info_nce_second
from .attraction import attracted_rows
from .score_sums import score_sums

impls.register(
    "info_nce",
    impls.Implementation("cpu", cpu.missing, cpu.refuses),
    impls.Implementation("cuda", cuda.missing, cuda.refuses),
    impls.Implementation("triton", triton.missing, triton.refuses),
)


class Positives(NamedTuple):
    """A query's positives: rows given, or columns of the bank. One of the two."""

    rows: Tensor | None  # [*B, N, D] or [*B, N, J, D]; neither is needed where keys of a row's class attract it
    columns: Tensor | None  # [*B, N, J] int64, -1: row without this positive
    weights: Tensor | None  # [*B, N, J] in the accumulator's dtype; None: 1 / J
    include: bool  # whether a positive is in its own denominator


def info_nce_rows(
    p: Problem,
    positives: Positives,
    *,
    reduction: str = "mean",
    weight: Tensor | None = None,
    smoothing: float = 0.0,
    attract: bool = False,
) -> Tensor:
    """The losses [*B, N] of rows that have a positive and something in their denominator, 0 elsewhere, as `reduce_rows` reduces them.

    `smoothing`: this much of the target is spread evenly over the positive and the keys that are not left out.
    `attract`: as `attracted_rows`, with the problem's labels; else keys of a row's class are left out.
    `weight` [*B, N], in the losses' dtype and without gradient. The problem has neither a start nor values and, with smoothing or
    attraction, no limit.
    """
    spec, tensors = p
    rows, columns, weights, include = positives
    if spec.impl == "cpu" and not transformed() and (weights is None or not weights.requires_grad):
        query, keys, scale, bias, _, _, _, *rules = tensors
        pull = torch.is_grad_enabled() and (query.requires_grad or scale.requires_grad)
        products = cpu.product_number(spec.compute.products, query)
        call = Call(spec, include, reduction, pull, products, smoothing=smoothing, attract=attract)
        return InfoNceRows.apply(call, (columns, weights, weight, *rules), query, keys, scale, bias, rows)
    return _composed(p, positives, reduction, weight, smoothing, attract)


def _composed(
    p: Problem,
    positives: Positives,
    reduction: str,
    weight: Tensor | None,
    smoothing: float,
    attract: bool,
    left: tuple | None = None,
) -> Tensor:
    """The definition in PyTorch's operations, for any device and transform, and for derivatives of the second order.

    `left`: the streaming softmax's outputs, where a forward pass has left them.
    """
    spec, tensors = p
    rows, columns, weights, include = positives
    if attract:
        losses, counted = attracted_rows(p, rows, include)
        return reduce_rows(losses, counted=counted, weight=weight, reduction=reduction)
    lse, *_ = streaming_softmax(spec, tensors.folded(spec), pool=False, need_pooled=False, left=left)
    lse = lse.reshape(spec.rows)
    _, logits = positive_logits(tensors.query, tensors.keys, tensors.scale, tensors.bias, rows, columns)
    gap = lse[..., None] - logits
    if include:
        losses = F.softplus(gap, threshold=40)  # beyond 40, log(1 + e^gap) is gap in float64 too
    else:  # 0 for a row that will be dropped: the gradient of its weights would be 0 x inf
        losses = torch.where(lse[..., None] == -torch.inf, 0.0, gap)
    if smoothing:
        rules = {"query_labels": tensors.query_labels, "bank_labels": tensors.key_labels, "skip": tensors.key_index}
        spread = score_sums(tensors.query, tensors.keys, tensors.scale, valid=tensors.valid, bias=tensors.bias, **rules)
        losses = losses + smoothing * (logits - (logits + spread.other[..., None]) / (1 + spread.other_count[..., None]))
    if columns is not None:
        losses = torch.where(columns >= 0, losses, 0.0)
    if weights is not None:
        losses = (losses * weights).sum(-1)
    else:
        losses = losses.squeeze(-1) if losses.shape[-1] == 1 else losses.mean(-1)
    counted = None if include else (lse != -torch.inf).detach()
    if columns is not None:
        some = (columns >= 0).any(-1)
        counted = some if counted is None else counted & some
    return reduce_rows(losses, counted=counted, weight=weight, reduction=reduction)


class Call(NamedTuple):
    """What the fused call is told beside its tensors."""

    spec: Spec
    include: bool
    reduction: str
    pull: bool  # whether the gradient of query or scale will be asked for
    products: int
    factor: float = 1.0  # the scale of every row, where there is no tensor of them
    smoothing: float = 0.0
    attract: bool = False

    @property
    def reduced(self) -> bool:
        return self.reduction != "none"

    @property
    def spread(self) -> bool:
        """Whether statistics hold what is taken off the slopes of a row's keys."""
        return self.smoothing > 0 or self.attract


class InfoNceRows(Function):
    """The same by fused kernels, outside transforms. A bank without gradient is held by reference: it may change before the backward.

    `rest` = (columns, weights, row_weights, query_labels, key_labels, key_index, limit, valid).
    """

    @staticmethod
    def forward(ctx, call, rest, query, keys, scale, bias, positive):
        spec, include, reduction, pull, products, factor, smoothing, attract = call
        columns, weights, row_weights, *rules = rest
        *tensors, row_weights = _folded(spec, query, keys, scale, bias, *rules, positive, columns, weights, row_weights)
        ctx.want = ctx.needs_input_grad[2:]
        _, want_keys, want_scale, want_bias, _ = ctx.want
        options = include, call.reduced, pull, products, spec.compute.panels, want_keys and pull, factor, smoothing, attract
        losses, statistics, pulls, dkeys = torch.ops.kdfast.info_nce(*tensors, *options, row_weights, reduction == "sum", want_scale)
        hold = not (want_keys or want_bias)
        bank = (keys, bias, *rest)
        ctx.call = call
        ctx.versions = _versions(bank) if hold else None
        _keep(ctx, (statistics, pulls, dkeys, query, scale, positive), bank, hold)
        ctx.set_materialize_grads(False)
        return losses.view(spec.rows) if len(spec.rows) > 1 and not call.reduced else losses

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * 7
        rows, bank = _kept(ctx, 6)
        run = Gradients.apply if torch.is_grad_enabled() else _gradients
        return None, None, *run(ctx.call, ctx.want, ctx.versions, g, *rows, *bank)


class Gradients(Function):
    """`_gradients`, and their derivative: by an op, or that of the definition, taken twice."""

    @staticmethod
    def forward(ctx, call, want, versions, g, statistics, pulls, dkeys, query, scale, positive, *bank):
        ctx.call, ctx.want, ctx.versions = call, want, versions
        _keep(ctx, (g, query, scale, positive, statistics, pulls), bank, versions is not None)
        ctx.set_materialize_grads(False)
        return _gradients(call, want, versions, g, statistics, pulls, dkeys, query, scale, positive, *bank)

    @staticmethod
    def backward(ctx, *cotangents):
        (g, query, scale, positive, statistics, pulls), bank = _kept(ctx, 6)
        _unchanged(bank, ctx.versions, "info_nce")
        needs = [ctx.needs_input_grad[i] for i in (3, 7, 10, 8, 11, 9)]  # of g, query, keys, scale, bias, positive
        if info_nce_second.served(ctx.call, cotangents, needs, pulls, bank[3]):
            found = info_nce_second.gradients(ctx.call, needs, *cotangents, g, statistics, pulls, query, scale, positive, *bank)
        else:
            left = _left(ctx.call, statistics, pulls, bank[0], positive, *bank[2:4])
            definition = partial(_definition, ctx.call, bank[2:], left)
            found = SecondOrder.apply(definition, ctx.want, *cotangents, g, query, bank[0], scale, bank[1], positive)
        dg, dquery, dkeys, dscale, dbias, dpositive = found
        return None, None, None, dg, *(None,) * 3, dquery, dscale, dpositive, dkeys, dbias, *(None,) * 8


def _left(call: Call, statistics, pulls, keys, positive, columns, weights) -> tuple[Tensor, Tensor, Tensor] | None:
    """(lse, pooled, lse_low) of the forward pass from what it left, where that tells: pulls_i = t_i O_i - sum_j slope_ij k+_ij.

    The slopes of positives with weights may cancel each other in t_i.
    """
    if len(call.spec.rows) > 1 or pulls.numel() == 0 or weights is not None or call.spread:
        return None
    rows = positive_rows(keys, columns) if positive is None else positive.reshape(len(positive), -1, positive.shape[-1])
    slopes = statistics[2:].reshape(1, len(rows), -1, 1)
    total = slopes.sum(-2)  # [1, N, 1]
    pooled = (pulls + torch.where(slopes == 0, 0.0, slopes * rows).sum(-2)) / total  # a row without a positive has some row's place
    # where no slope is left, neither is a derivative
    return statistics[0], torch.where(total > torch.finfo(total.dtype).tiny, pooled, 0.0), statistics[1]


def _definition(call: Call, rest: tuple, left: tuple | None, query, keys, scale, bias, positive) -> Tensor:
    columns, weights, row_weights, *rules = rest
    scale = row_parameter("scale", call.factor, query) if scale is None else scale
    tensors = Tensors(query, keys, scale, bias, None, None, None, *rules)
    candidates = Positives(positive, columns, weights, call.include)
    return _composed(Problem(call.spec, tensors), candidates, call.reduction, row_weights, call.smoothing, call.attract, left)


def _gradients(
    call, want, versions, g, statistics, pulls, dkeys, query, scale, positive, keys, bias, columns, weights, row_weights, *rules
) -> tuple[Tensor | None, ...]:
    """The gradients of <g, losses> in (query, keys, scale, bias, positive), None where not wanted."""
    want_query, want_keys, want_scale, want_bias, want_positive = want
    batched, kind = len(call.spec.rows) > 1, (call.spread, call.attract, call.include)
    g = call.spec.per_row(g) if batched and not call.reduced else g
    g = g.contiguous()
    if want_keys or want_bias or batched:
        tensors = _folded(call.spec, query, keys, scale, bias, *rules, columns)
        found = torch.ops.kdfast.info_nce_grad(g, statistics, pulls, *tensors, *want, call.products, dkeys, call.factor, *kind)
    else:  # nothing of the bank
        of_rows = want_query, want_scale, want_positive
        dquery, dscale, dpositive = torch.ops.kdfast.info_nce_grad_rows(
            g, statistics, pulls, query, scale, *of_rows, call.factor, call.spread
        )
        found = dquery, None, dscale, None, dpositive
    inputs = (query, keys, scale, bias, positive)
    return tuple([_like(grad, x) if wanted else None for grad, x, wanted in zip(found, inputs, want, strict=True)])


def _folded(spec: Spec, query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid, *rows) -> tuple:
    """As the kernels take it: no leading dimension, or exactly one and everything dense."""
    if len(spec.rows) == 1:
        return query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid, *rows
    t = Tensors(query, keys, scale, bias, None, None, None, query_labels, key_labels, key_index, limit, valid).folded(spec)
    rows = (None if x is None else spec.per_row(x).contiguous() for x in rows)
    return *for_kernel(t.query, t.keys, t.scale, t.bias, *t[7:]), *rows


def _beside(spread: bool) -> int:
    """Statistics of a row beside those of its positives."""
    return 4 if spread else 2


def _named(columns: Tensor | None, query: Tensor) -> int:
    """How many rows of the bank each row names: with one, and no leading dimension, the last one may be left out."""
    return 0 if columns is None else 1 if columns.dim() < query.dim() else columns.shape[-1]


def fake(
    query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid, positive, columns, weights, include, mean, pull, products,
    panels=None, keep_keys=False, factor=1.0, smoothing=0.0, attract=False, row_weights=None, sum=False, want_scale=False,
):  # fmt: skip
    made = partial(query.new_empty, dtype=torch.float32)
    batch = query.shape[:-1] if query.dim() == 3 else (1, *query.shape[:-1])
    copies = _named(columns, query)
    if positive is not None:
        copies = 1 if positive.dim() == query.dim() else positive.shape[-2]
    statistics, pulls = made((_beside(smoothing > 0 or attract) + copies, *batch)), made(query.shape if pull else (0,))
    indices = _named(key_index, query)
    named = bias is limit is valid is None and (indices <= 1 if query_labels is None or attract else indices == 0)
    named = named and (include or not attract)
    kept = keep_keys and mean and pull and query.dim() == 2 and named and extension.load("_C")[0].few_pairs(len(query), *keys.shape)
    return made(() if mean else query.shape[:-1]), statistics, pulls, made(keys.shape if kept else (0,))


def _info_nce_grad_fake(
    g, statistics, pull, query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid, columns,
    want_query, want_keys, want_scale, want_bias, want_positive, products, kept_keys=None, factor=1.0, spread=False,
    attract=False, include=True,
):  # fmt: skip
    copies, *lead = statistics.shape
    width = query.shape[-1]
    bank = (lead[0], keys.shape[-2])
    shapes = ((*lead, width), (*bank, width), lead, bank, (*lead, copies - _beside(spread), width))
    want = (want_query, want_keys, want_scale, want_bias, want_positive)
    return tuple([statistics.new_empty(shape[query.dim() == 2 :] if wanted else (0,)) for shape, wanted in zip(shapes, want, strict=True)])


def _grad_rows_fake(g, statistics, pull, query, scale, want_query, want_scale, want_positive, factor=1.0, spread=False):
    *rows, width = query.shape
    copies = 0 if statistics is None else len(statistics) - _beside(spread)
    shapes = ((*rows, width), rows, (*rows, copies, width))
    wanted = (want_query, want_scale, want_positive)
    return tuple([query.new_empty(shape if want else (0,), dtype=torch.float32) for shape, want in zip(shapes, wanted, strict=True)])


if cpu.missing() is None:
    torch.library.register_fake("kdfast::info_nce", fake)
    torch.library.register_fake("kdfast::info_nce_grad_rows", _grad_rows_fake)
    torch.library.register_fake("kdfast::info_nce_grad", _info_nce_grad_fake)
