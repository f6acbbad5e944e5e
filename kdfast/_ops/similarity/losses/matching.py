"""Losses in which every row has one match among the columns, and the others are its negatives: CLIP's, InfoNCE's, NT-Xent's and SigLIP's.

With z_i the logit of row i and its match, a side's loss is log(1 + e^(lse_i - z_i)), lse_i over the pairs that are not left out; the
sigmoid loss adds up all pairs of a row. A call is one op, and its gradient another: on the CPU (csrc/cpu/matching/matching.inl), and but
for the sigmoid loss in Triton (triton/matching.py).
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ...._core import dtypes, extension, impls
from ...._core.reduction import reduce_rows, row_weights
from .. import cpu
from ..apply import PlainFunction, streaming_softmax, transformed
from ..arguments import how_to_compute, problem
from ..autograd import _versions
from ..definition import SecondOrder
from ..exclusions import SameLabel
from ..passes import KERNELS
from ..positives import dot
from ..symmetric import lse_by_rows
from ..triton import matching as triton_matching
from . import info_nce_second
from .score_sums import score_sums
from .sigmoid import sigmoid_pair_loss

impls.register(
    "matching_loss",
    impls.Implementation("cpu", cpu.missing, cpu.refuses),
    impls.Implementation("triton", triton_matching.missing, triton_matching.refuses),
)


class Call(NamedTuple):
    """What a call is beside its differentiable tensors x, y, scale and shift."""

    labels: Tensor | None  # int64 [N] of rows alone, [2N] of two views: pairs of equal labels are left out; None: those of a sample
    reduction: str  # of the losses
    grad: bool  # whether gradients may be asked for
    precision: str | None
    impl: str | None
    kernels: cpu.Kernels  # that serve it
    products: int  # their number for how products are formed
    rows_alone: bool = False  # the rows' side instead of the mean of both
    smoothing: float = 0.0  # this much of each side's target is spread evenly over its candidates
    weight: Tensor | None = None  # [N] float32, of the losses
    include: bool = True  # whether a match is in its denominator; else the rows' side alone
    factor: float = 1.0  # the scale, where it is no tensor

    @property
    def reduced(self) -> bool:
        return self.reduction != "none"

    @property
    def options(self) -> tuple:
        """What both CPU ops are told of these; Triton's know the whole mean and the losses alone."""
        return (self.rows_alone, self.smoothing, self.factor) if self.kernels is cpu.KERNELS else ()

    @property
    def of_losses(self) -> tuple:
        """The same, and what the first one alone is told."""
        if self.kernels is not cpu.KERNELS:
            return ()
        return self.rows_alone, self.smoothing, self.factor, self.include, self.weight, self.reduction == "sum"


def clip_rows(x: Tensor, y: Tensor, scale: float | Tensor, *, smoothing: float = 0.0, **options) -> Tensor:
    """Of z = scale x y^T with row i matching column i, the mean of both sides' losses: [N], or as `reduction` says.

    x, y: [N, D] of one dtype, N >= 1. scale: a float or 0-d. smoothing: this much of the target is spread evenly over a side's candidates.
    options: reduction, weight [N] or None, precision and impl.
    """
    return _losses(x, y, scale, None, None, smoothing=smoothing, **options)


def paired_rows(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    labels: Tensor | None,
    *,
    reduction: str,
    weight: Tensor | None,
    precision: str | None,
    impl: str | None,
    smoothing: float = 0.0,
    include: bool = True,
) -> Tensor | None:
    """As `clip_rows`, of the rows' side alone. labels: int64 [N], of equal ones pairs are left out. None where no kernel serves it.

    include: whether a match is in its denominator; if not, rows of which nothing is there do not count.
    """
    if transformed() or impl not in (None, "cpu") or _of_rows(scale) or y.dtype != x.dtype or (smoothing and labels is not None):
        return None
    compute = how_to_compute(x, precision)
    if impls.choose("matching_loss", None, device_type=x.device.type, dtype=compute.dtype) != "cpu":
        return None
    products = cpu.product_number(compute.products, x)
    weight = row_weights(weight, x.shape[:1], torch.float32, x.device)
    call = Call(labels, reduction, torch.is_grad_enabled(), precision, impl, cpu.KERNELS, products, True, smoothing, weight, include)
    return fused_losses(call, x, y, scale, None)


def sigmoid_rows(x: Tensor, y: Tensor, scale: float | Tensor, shift: float | Tensor, **options) -> Tensor:
    """`sigmoid_pair_loss` of x and y [N, D], row i matching column i: [N], or reduced. scale, shift: floats or 0-d; options as above."""
    return _losses(x, y, scale, shift, None, **options)


def view_rows(x: Tensor, scale: float | Tensor, labels: Tensor | None, **options) -> Tensor:
    """The losses of the rows of x [2N, D], two views of N >= 1 samples, among each other: [2N], or reduced; options as of `clip_rows`.

    scale: a float, 0-d or [2N]. labels: int64 [2N], equal for the views of a sample.
    """
    return _losses(x, None, scale, None, labels, **options)


def _losses(
    x: Tensor,
    y: Tensor | None,
    scale: float | Tensor,
    shift: float | Tensor | None,
    labels: Tensor | None,
    *,
    reduction: str,
    weight: Tensor | None,
    precision: str | None,
    impl: str | None,
    smoothing: float = 0.0,
) -> Tensor:
    compute = how_to_compute(x, precision)
    chosen = impl
    if impl in (None, "cpu", "triton"):  # another serves the pass over all pairs, within the definition
        chosen = impls.choose("matching_loss", impl, device_type=x.device.type, dtype=compute.dtype)
    kernels = KERNELS.get(chosen, cpu.KERNELS)
    products = cpu.product_number(compute.products, x, kernels)
    weight = row_weights(weight, x.shape[:1], dtypes.accumulator(x.dtype), x.device)
    call = Call(labels, reduction, torch.is_grad_enabled(), precision, impl, kernels, products, False, smoothing, weight)
    fused = chosen == "cpu" or (chosen == "triton" and shift is None and not smoothing)
    if not fused or transformed() or _of_rows(scale) or _of_rows(shift):
        return _definition(call, x, y, scale, shift)
    if chosen == "triton" and (weight is not None or reduction == "sum"):
        losses = fused_losses(call._replace(reduction="none", weight=None), x, y, scale, shift)
        return reduce_rows(losses, weight=weight, reduction=reduction)
    return fused_losses(call, x, y, scale, shift)


def fused_losses(call: Call, x: Tensor, y: Tensor | None, scale: float | Tensor, shift: float | Tensor | None) -> Tensor:
    """By the call's kernels, outside transforms; scale and shift are floats or 0-d."""
    # made contiguous here, not within: what a Function saves must be what it was given, or the second derivative misses it
    x, y = x.contiguous(), None if y is None else y.contiguous()
    if not all([t is None or t.is_contiguous() for t in (call.labels, call.weight)]):
        labels, weight = (None if t is None else t.contiguous() for t in (call.labels, call.weight))
        call = call._replace(labels=labels, weight=weight)
    device = x.device
    if call.kernels is cpu.KERNELS and not isinstance(scale, Tensor):
        call, scale = call._replace(factor=float(scale)), None
    else:
        scale = _scalar(scale, device)
    return MatchingLoss.run(call, x, y, scale, None if shift is None else _scalar(shift, device))


def _of_rows(x: float | Tensor | None) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0


def _by_rows(scale: float | Tensor, x: Tensor) -> Tensor:
    """[N]: its gradient takes off each row's the match's before rows are added up."""
    acc = dtypes.accumulator(x.dtype)
    return scale.to(x.device, acc).expand(len(x)) if isinstance(scale, Tensor) else x.new_full((len(x),), scale, dtype=acc)


def _scalar(x: float | Tensor, device: torch.device) -> Tensor:
    return x.to(device, torch.float32) if isinstance(x, Tensor) else torch.scalar_tensor(x, dtype=torch.float32, device=device)


def _definition(call: Call, x: Tensor, y: Tensor | None, scale: float | Tensor | None, shift: float | Tensor | None) -> Tensor:
    """In PyTorch's operations around the pass over all pairs, for any device and transform, and for derivatives of the second order."""
    scale = call.factor if scale is None else scale
    labels, precision, impl, rows_alone = call.labels, call.precision, call.impl, call.rows_alone
    if x.dim() > 2:
        entries = [call._replace(reduction="none", labels=None if labels is None else labels[i]) for i in range(len(x))]
        losses = [_definition(entry, *pair, scale, shift) for entry, *pair in zip(entries, x, y, strict=True)]
        return reduce_rows(torch.stack(losses), reduction=call.reduction)
    own = torch.arange(len(x), device=x.device)
    if shift is not None:
        losses = sigmoid_pair_loss(x, y, scale, shift, own, precision=precision, impl=impl)
        return reduce_rows(losses, weight=call.weight, reduction=call.reduction)
    scale = _by_rows(scale, x)
    if y is None or rows_alone:
        half = len(x) // 2
        columns, match = (x, x.roll(half, 0)) if y is None else (y, y)
        labels = (own if rows_alone else own % half) if labels is None else labels
        spec, tensors = problem(x, columns, scale, None, None, None, (SameLabel(labels, labels),), None, precision, impl)
        lse, *_ = streaming_softmax(spec, tensors.folded(spec), pool=False, need_pooled=False)
        logits, sides = scale * dot(x, match), lse[:1]
    else:
        logits, sides = scale * dot(x, y), torch.stack(lse_by_rows(x, y, scale, labels=(own, own), precision=precision, impl=impl))
    losses = F.softplus(sides - logits, threshold=40).mean(0)  # beyond 40, log(1 + e^x) is x in float64 too
    if call.smoothing:
        spread = [score_sums(a, b, scale) for a, b in ((x, y), (y, x))[: len(sides)]]
        losses = losses + call.smoothing * (logits - sum(s.other / s.other_count for s in spread) / len(sides))
    return reduce_rows(losses, weight=call.weight, reduction=call.reduction)


class MatchingLoss(PlainFunction):
    """The same by fused kernels, outside transforms. Gradients of what few pairs are reduced to come with it, from the same scores.

    x and y are [N, D] or, of few pairs on the CPU and without weights, [B, N, D], problems by themselves.
    """

    @staticmethod
    def forward(ctx, call, x, y, scale, shift):
        _, want_x, want_y, want_scale, _ = ctx.needs_input_grad
        keep = call.grad and (want_x or want_scale), call.grad and want_y
        options = call.labels, call.reduced, *keep, call.products, *call.of_losses
        losses, *found = call.kernels.ops.matching_loss(x, y, scale, shift, *options)
        ctx.call, ctx.versions = call, _versions((call.labels, call.weight))
        ctx.save_for_backward(*found, x, y, scale, shift, call.labels)  # labels so that what is changed in place is noticed
        ctx.set_materialize_grads(False)
        return losses

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * 5
        call, want = ctx.call, ctx.needs_input_grad[1:]
        *saved, _ = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *MatchingGradients.apply(call, want, ctx.versions, g, *saved)
        return None, *_gradients(call, want, g, *saved)


class MatchingGradients(Function):
    """`_gradients`, and their derivative."""

    @staticmethod
    def forward(ctx, call, want, versions, g, statistics, kept_x, kept_y, *inputs):
        ctx.call, ctx.want, ctx.versions = call, want, versions
        ctx.save_for_backward(g, *inputs)
        ctx.set_materialize_grads(False)
        return _gradients(call, want, g, statistics, kept_x, kept_y, *inputs)

    @staticmethod
    def backward(ctx, *cotangents):
        if _versions((ctx.call.labels, ctx.call.weight)) != ctx.versions:
            raise RuntimeError("double backward needs labels and weight as the forward saw them, but one was updated in place since")
        g, x, y, scale, shift = ctx.saved_tensors
        if x.dim() == 2 and shift is None and not ctx.call.smoothing and ctx.call.kernels is cpu.KERNELS:
            _, _, _, of_g, _, _, _, *of_inputs = ctx.needs_input_grad
            dg, *dinputs = *info_nce_second.of_matches(ctx.call, (of_g, *of_inputs[:3]), *cotangents[:3], g, x, y, scale), None
        else:
            dg, *dinputs = SecondOrder.apply(partial(_definition, ctx.call), ctx.want, *cotangents, g, x, y, scale, shift)
        return None, None, None, dg, None, None, None, *dinputs


def _gradients(call, want, g, statistics, kept_x, kept_y, *inputs) -> tuple[Tensor | None, ...]:
    """The gradients of <g, losses> in (x, y, scale, shift), None where not wanted. kept_x, kept_y: those of x and y for g = 1, where the
    forward pass has left them, and statistics has the other two; of losses that are not reduced, kept_y is the table for y's."""
    want_x, want_y, want_scale, want_shift = want
    kept = (kept_x, kept_y) if kept_x.numel() or kept_y.numel() else ()
    if kept and call.reduced:
        dx, dy = kept_x * g if want_x else None, kept_y * g if want_y else None
        if inputs[0].dtype is not torch.float32:
            dx, dy = (None if grad is None else grad.to(inputs[0].dtype) for grad in (dx, dy))
        return dx, dy, statistics[0] * g if want_scale else None, statistics[1] * g if want_shift else None
    options = call.labels, *want, call.products, *call.options, *kept
    dx, *found = call.kernels.ops.matching_loss_grad(g.contiguous(), statistics, *inputs, *options)
    if dx.dtype is not inputs[0].dtype:
        dx = dx.to(inputs[0].dtype)
    return tuple([grad if wanted else None for grad, wanted in zip((dx, *found), want, strict=True)])


def _loss_fake(
    x, y, scale, shift, labels, mean, keep_x, keep_y, products, rows_alone=False, smoothing=0.0, factor=1.0, include=True, row_weights=None,
    sum=False,
):  # fmt: skip
    made = partial(x.new_empty, dtype=torch.float32)
    *batch, rows, width = x.shape
    by_row = (shift is not None or rows_alone) and products != cpu.KERNELS.products["bf16"]
    kept = (mean or by_row) and (keep_x or keep_y) and extension.load("_C")[0].few_pairs(rows, rows, width)
    weighted = row_weights is not None or (mean and sum) or not include
    statistics = (0 if shift is not None else 3 if y is None or rows_alone else 6) + weighted
    statistics = (*batch, statistics, rows) if not kept else (2,) if mean else (*batch, 4, rows)
    dx, dy = x.shape if kept and keep_x else (0,), (x.shape if mean else (*batch, rows, rows)) if kept and keep_y else (0,)
    return made(() if mean else x.shape[:-1]), made(statistics), made(dx), made(dy)


def _grad_fake(
    g, statistics, x, y, scale, shift, labels, want_x, want_y, want_scale, want_shift, products, rows_alone=False, smoothing=0.0,
    factor=1.0, kept_x=None, table=None,
):  # fmt: skip
    dx = torch.empty_like(x) if kept_x is None else torch.empty_like(x, dtype=torch.float32)
    shapes = (dx, torch.empty_like(x), *(x.new_empty((), dtype=torch.float32) for _ in range(2)))
    want = want_x, want_y, want_scale, want_shift
    return tuple([like if want else x.new_empty(0, dtype=torch.float32) for like, want in zip(shapes, want, strict=True)])


if cpu.missing() is None:
    torch.library.register_fake("kdfast::matching_loss", _loss_fake)
    torch.library.register_fake("kdfast::matching_loss_grad", _grad_fake)
