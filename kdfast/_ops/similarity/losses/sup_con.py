"""Rows of a batch among each other, attracted by the others of their class (SupCon's L_out).

With z_ij = s x_i.x_j over j != i and C_i the others of i's class: loss_i = lse_i - mean of z_ij over C_i. Its gradient weighs a pair by
p_ij - [j in C_i] / |C_i|, two numbers that are close where a row is learnt, and are subtracted before anything is summed: on the CPU a call
is one op, and its gradient another (csrc/cpu/matching/symmetric.inl).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ...._core import impls
from .. import cpu
from ..apply import streaming_softmax, transformed
from ..arguments import Problem, how_to_compute, problem, rounded, row_parameter
from ..definition import SecondOrder, with_values
from ..exclusions import Rules
from ..passes import KERNELS
from ..positives import dot, sum_rows
from ..triton import pairs as triton_pairs
from . import sup_con_values
from .attraction import attracted_rows
from .info_nce import Positives, info_nce_rows

impls.register(
    "sup_con",
    impls.Implementation("cpu", cpu.missing, cpu.refuses),
    impls.Implementation("triton", triton_pairs.missing, triton_pairs.refuses),
)


class Call(NamedTuple):
    """What a call is beside its differentiable tensors x and scale."""

    labels: Tensor  # int64 [N]
    mean: bool  # the mean of the losses that count instead of them
    precision: str | None
    impl: str | None
    kernels: cpu.Kernels  # that serve it
    products: int  # their number for how products are formed


def sup_con_rows(
    x: Tensor, labels: Tensor, scale: float | Tensor, *, mean: bool, precision: str | None, impl: str | None
) -> tuple[Tensor, Tensor | None]:
    """(losses [N], whether a row counts [N]: has others of its class), or, with `mean`, (the mean of those that count [], None).

    x: [N, D], N >= 1. labels: int64 [N]. scale: a float, 0-d or [N].
    """
    compute = how_to_compute(x, precision)
    chosen = impls.choose("sup_con", impl, device_type=x.device.type, dtype=compute.dtype)
    kernels = KERNELS.get(chosen, cpu.KERNELS)
    call = Call(labels, mean, precision, impl, kernels, cpu.product_number(compute.products, x, kernels))
    of_rows = isinstance(scale, Tensor) and scale.dim() > 0
    if of_rows and chosen in ("cpu", "triton") and not transformed():  # a pair's weights differ by side: rows beside a bank of them
        rows = _as_bank(call, x, scale)
        if chosen == "cpu":
            losses = info_nce_rows(rows, Positives(None, None, None, True), attract=True, reduction="mean" if mean else "none", weight=None)
            counted = None if mean else _not_alone(labels)
        else:
            losses, counted = attracted_rows(rows, None, include=True)
            losses = _mean(losses, counted) if mean else losses
    elif chosen not in KERNELS or transformed() or of_rows:
        losses, counted = _definition(call, x, scale)
        if chosen == "triton" and not of_rows:
            values, _ = kernels.ops.sup_con(x.detach().contiguous(), _scalar(scale, x).detach(), labels, False, call.products)
        else:
            exactly = torch.ops.kdfast_torch.sup_con_losses if torch.compiler.is_compiling() else sup_con_values.losses
            values = exactly(x.detach(), row_parameter("scale", scale, x).detach(), labels, compute.dtype)
        losses = with_values(losses, values)
        losses = _mean(losses, counted) if mean else losses
    else:
        losses, statistics = SupCon.apply(call, x.contiguous(), _scalar(scale, x))
        counted = statistics[2] > 0
    return losses, None if mean else counted


def _scalar(scale: float | Tensor, x: Tensor) -> Tensor:
    return scale.to(x.device, torch.float32) if isinstance(scale, Tensor) else x.new_full((), scale, dtype=torch.float32)


def _as_bank(call: Call, x: Tensor, scale: Tensor) -> Problem:
    """The rows, with a scale each, against a bank of them all."""
    (x,) = rounded(call.precision, x)
    rules = Rules(call.labels, call.labels, torch.arange(len(x), device=x.device)[:, None])
    return problem(x, x, scale, None, None, None, rules, None, call.precision, call.impl)


def _not_alone(labels: Tensor) -> Tensor:
    """Whether each row has others of its class."""
    _, place, count = labels.unique(return_inverse=True, return_counts=True)
    return (count > 1)[place]


def _definition(call: Call, x: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """In PyTorch's operations around the streaming softmax, for any device and transform, and for derivatives of the second order."""
    labels, _, precision, impl, *_ = call
    (x,) = rounded(precision, x)
    scale = row_parameter("scale", scale, x)  # for its gradient: a row's mean logit is taken off before rows are added up
    rules = Rules(key_index=torch.arange(len(x), device=x.device)[:, None])
    spec, tensors = problem(x, x, scale, None, None, None, rules, None, precision, impl)
    lse, *_ = streaming_softmax(spec, tensors.folded(spec), pool=False, need_pooled=False)
    lse = lse[0]
    wide, place = x.to(lse.dtype), torch.searchsorted(labels.sort().values, labels)  # a class is named by its first place in order
    others = sum_rows(torch.ones_like(lse.detach())[:, None], place, len(place))[:, 0][place] - 1
    sums = F.embedding(place, sum_rows(wide, place, len(place))) - wide
    counted = others > 0
    return torch.where(counted, lse - scale * dot(x, sums) / others.clamp(min=1), 0.0), counted


def _mean(losses: Tensor, counted: Tensor) -> Tensor:
    return losses.sum() / counted.sum().clamp(min=1)


class SupCon(Function):
    """The same by fused kernels, outside transforms: (losses, statistics [3, N]: lse, its low digits, 1 / others of the class)."""

    @staticmethod
    def forward(ctx, call, x, scale):
        losses, statistics = call.kernels.ops.sup_con(x, scale, call.labels, call.mean, call.products)
        ctx.call = call
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(statistics, x, scale)
        ctx.set_materialize_grads(False)
        return losses, statistics

    @staticmethod
    def backward(ctx, g, _):
        if g is None:
            return (None,) * 3
        run = SupConGradients.apply if torch.is_grad_enabled() else _gradients
        return None, *run(ctx.call, ctx.needs_input_grad[1:], g, *ctx.saved_tensors)


class SupConGradients(Function):
    """`_gradients`, and their derivative."""

    @staticmethod
    def forward(ctx, call, want, g, statistics, x, scale):
        ctx.call, ctx.want = call, want
        ctx.save_for_backward(g, x, scale)
        ctx.set_materialize_grads(False)
        return _gradients(call, want, g, statistics, x, scale)

    @staticmethod
    def backward(ctx, *cotangents):
        def definition(x, scale):
            losses, counted = _definition(ctx.call, x, scale)
            return _mean(losses, counted) if ctx.call.mean else losses

        dg, dx, dscale = SecondOrder.apply(definition, ctx.want, *cotangents, *ctx.saved_tensors)
        return None, None, dg, None, dx, dscale


def _gradients(call, want, g, statistics, x, scale) -> tuple[Tensor | None, ...]:
    """The gradients of <g, losses> in (x, scale), None where not wanted."""
    found = call.kernels.ops.sup_con_grad(g.contiguous(), statistics, x, scale, call.labels, *want, call.products)
    return tuple([grad if wanted else None for grad, wanted in zip(found, want, strict=True)])


def _sup_con_fake(x, scale, labels, mean, products):
    return scale.new_empty(() if mean else x.shape[:1]), scale.new_empty((3, len(x)))


def _sup_con_grad_fake(g, statistics, x, scale, labels, want_x, want_scale, products):
    return torch.empty_like(x) if want_x else scale.new_empty(0), scale.new_empty(() if want_scale else 0)


if cpu.missing() is None:
    torch.library.register_fake("kdfast::sup_con", _sup_con_fake)
    torch.library.register_fake("kdfast::sup_con_grad", _sup_con_grad_fake)
