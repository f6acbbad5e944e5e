"""Losses of chosen triplets by kernels, differentiable twice: O(triplets x width) each way (csrc/cpu/triplet/chosen.inl).

The forward pass leaves the factor of each distance's gradient, so that the backward is sums of rows. The second derivative
is that of the formula in PyTorch's operations, block by block.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from ..._core import extension
from . import blocks, distances, portable
from .mining import Settings

METRICS = {"euclidean": 0, "sqeuclidean": 1, "cosine": 2}


def losses(s: Settings, x: Tensor, y: Tensor | None, positive: Tensor, negative: Tensor) -> Tensor:
    """Hinge [N, P] of triplets (a, positive[a, k], negative[a, k]), int32, 0 where either is -1.

    x [N, D] and y [M, D] (None: x) are rows as given.
    """
    x, y = x.contiguous(), None if y is None else y.contiguous()
    return ChosenLosses.apply(s, positive, negative, x, y)[0]


def _form(s: Settings) -> tuple[bool, int]:
    return s.normalize or s.metric == "cosine", METRICS[s.metric]


class ChosenLosses(Function):
    @staticmethod
    def forward(s, positive, negative, x, y):
        return torch.ops.kdfast.triplet_chosen(x, y, positive, negative, *_form(s), s.margin, s.sign, s.soft, s.swap)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.s, *tensors = inputs
        _, *left = output
        ctx.mark_non_differentiable(*left)
        ctx.save_for_backward(*left, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, g, *_):
        if g is None:
            return (None,) * 5
        want = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        return None, None, None, *ChosenGradients.apply(ctx.s, want, g, *ctx.saved_tensors)


class ChosenGradients(Function):
    @staticmethod
    def forward(s, want, g, factors, x_scale, y_scale, positive, negative, x, y):
        dx, dy = torch.ops.kdfast.triplet_chosen_grad(g.contiguous(), factors, x_scale, y_scale, x, y, positive, negative, *_form(s), *want)
        return dx.to(x.dtype) if want[0] else None, dy.to(y.dtype) if want[1] else None

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.s, ctx.want, g, _, _, _, positive, negative, x, y = inputs
        ctx.save_for_backward(g, positive, negative, x, y)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, u_x, u_y):
        g, positive, negative, x, y = ctx.saved_tensors
        moving = (x,) if y is None else (x, y)
        kept = [i for i, u in enumerate((u_x, u_y)) if u is not None]
        if not kept:
            return (None,) * 10

        def first(g, *rows):
            """The gradient of <g, losses> in `rows`, of which cotangents came."""
            gradients = torch.func.vjp(lambda *moving: _total(ctx.s, positive, negative, *moving), g, *rows)[1](torch.ones_like(g[:, 0]))
            return tuple(gradients[1 + i] for i in kept)

        dg, dx, *dy = torch.func.vjp(first, g, *moving)[1](tuple((u_x, u_y)[i] for i in kept))
        return None, None, dg, None, None, None, None, None, dx, *(dy or (None,))


def _total(s: Settings, positive: Tensor, negative: Tensor, g: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
    """sum_k g_k loss_k [N], in PyTorch's operations."""
    y = x if y is None else y
    n, per = positive.shape
    plan = blocks.plan(n, per, 1, x.shape[1], blocks.budget(x.device))
    return blocks.row_sums(_block, s, plan, (x, g), (y,), (positive, negative), ())[0][:, 0]


def _block(s, block, moving, shared, fixed_rows, fixed):
    (x, g), (y,), (positive, negative) = moving, shared, fixed_rows
    some = slice(block.first, block.last)
    positive, negative, g = positive[:, some], negative[:, some], g[:, some]
    rows = (x[:, None], *(distances.gather(y, i.clamp_min(0)) for i in (positive, negative)))
    x, y_p, y_n = (distances.prepare(t, s.metric, s.normalize) for t in rows)
    loss = portable.hinge_of_rows(s, x, y_p, y_n)
    valid = (positive >= 0) & (negative >= 0)
    loss = torch.where(valid, loss, torch.zeros_like(loss))
    return (loss * g).sum(1)[:, None], valid.sum(1)[:, None]


def _losses_fake(x, y, positive, negative, normalize, metric, margin, sign, soft, swap):
    n, per = positive.shape
    floats = x.new_empty((), dtype=torch.float32)
    return (
        floats.new_empty(n, per),
        floats.new_empty(3 if swap else 2, n, per),
        floats.new_empty(n if normalize else 0),
        floats.new_empty(0 if y is None or not normalize else y.shape[0]),
    )


def _gradients_fake(g, factors, x_scale, y_scale, x, y, positive, negative, normalize, metric, want_x, want_y):
    return g.new_empty(x.shape[0] if want_x else 0, x.shape[1]), g.new_empty(y.shape[0] if want_y else 0, x.shape[1])


if extension.missing_cpu() is None:
    torch.library.register_fake("kdfast::triplet_chosen", _losses_fake)
    torch.library.register_fake("kdfast::triplet_chosen_grad", _gradients_fake)
