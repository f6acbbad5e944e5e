"""The differentiable pieces: potentials, what they make, the dual value, the transport cost, products with the plan.

Potentials differentiates the iterations, the others what is computed from potentials; `grad` chooses how they are joined.
Each Function takes a Problem as its eight tensors and `static`, the rest. (Signatures are explicit: Dynamo counts them.)
The value with grad="envelope", which needs no derivative of the potentials, is in envelope.py.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from . import library
from .dual import dual, dual_slopes
from .geometry import Problem, conjugate_slope
from .graph import given, once, signed

TENSORS = 8


@signed
class Potentials(Function):
    """A Problem, g0 [B, m], a Schedule as a tuple, `unrolled` -> what library.run returns, of which f and g are differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(cost, x, y, a, b, epsilon, rows, cols, static, g0, schedule, unrolled):
        return library.run(cost, x, y, a, b, epsilon, rows, cols, static, g0, schedule, unrolled)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        *tensors, ctx.static, g0, ctx.schedule, ctx.unrolled = inputs
        f, g, done, *histories = output[:5]
        ctx.save_for_backward(*tensors, done, *((g0, *histories) if ctx.unrolled else (f, g)))

    @staticmethod
    @once
    def backward(ctx, to_f, to_g, *_):
        if to_f is None and to_g is None:
            return (None,) * 12
        return *pulled(ctx, library.replay if ctx.unrolled else library.implicit, to_f, to_g, ctx.needs_input_grad[5]), *(None,) * 6


def pulled(ctx, pull, to_f: Tensor | None, to_g: Tensor | None, to_epsilon: bool) -> tuple[Tensor | None, ...]:
    """Gradients in a Problem's first six tensors by `pull`, library.replay or .implicit; the Problem, `done` and what `pull` starts from
    are what `ctx` has saved."""
    tensors, (done, *states) = ctx.saved_tensors[:TENSORS], ctx.saved_tensors[TENSORS:]
    p = Problem(*tensors, *ctx.static)
    to_f = torch.zeros_like(p.a) if to_f is None else to_f.contiguous()
    to_g = torch.zeros_like(p.b) if to_g is None else to_g.contiguous()
    gradients = pull(*p, *states, done, to_f, to_g, to_epsilon, *ctx.schedule)
    return tuple(map(given, gradients, tensors[:6]))


@signed
class Marginals(Function):
    """f, g, a Problem -> (row, col, transport, error) of a Solution, without gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(f, g, cost, x, y, a, b, epsilon, rows, cols, static):
        return library.marginals(cost, x, y, a, b, epsilon, rows, cols, *static, f, g)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx, *_):
        return (None,) * 11


@signed
class DualValue(Function):
    """(f, g, row, col, transport), a Problem -> value [B], differentiable in f and g too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(f, g, row, col, transport, cost, x, y, a, b, epsilon, rows, cols, static):
        return dual(Problem(cost, x, y, a, b, epsilon, rows, cols, *static), f, g, col)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        *tensors, ctx.static = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once
    def backward(ctx, w):
        if w is None:
            return (None,) * 14
        f, g, row, col, transport, *tensors = ctx.saved_tensors
        p, w = Problem(*tensors, *ctx.static), w.contiguous()
        source = library.plan_gradient(*p, f, g, w, None)[:3] if any(ctx.needs_input_grad[5:8]) else (None, None, None)
        slopes = dual_slopes(p, w, f, g, lambda: (row, col), lambda: transport, ctx.needs_input_grad[8:11])
        v = w[:, None]
        to_f, to_g = v * p.a * (conjugate_slope(p.rho_a, f) - row), v * p.b * (conjugate_slope(p.rho_b, g) - col)
        return to_f, to_g, None, None, None, *map(given, source, tensors[:3]), *slopes, *(None,) * 3


@signed
class TransportCost(Function):
    """(f, g, transport), a Problem, `constant` -> <P, C> [B]; with a constant plan only C gets a gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(f, g, transport, cost, x, y, a, b, epsilon, rows, cols, static, constant):
        return transport.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        f, g, _, *tensors, ctx.static, ctx.constant = inputs
        ctx.save_for_backward(f, g, *tensors)

    @staticmethod
    @once
    def backward(ctx, w):
        if w is None:
            return (None,) * 13
        f, g, *tensors = ctx.saved_tensors
        p, w = Problem(*tensors, *ctx.static), w.contiguous()
        over = w / p.epsilon
        *source, row, col, steepness = library.plan_gradient(*p, f, g, w, None if ctx.constant else -over)
        source = map(given, source, tensors[:3])
        if ctx.constant:
            return None, None, None, *source, *(None,) * 7
        weighted_row, weighted_col = p.a * row, p.b * col  # sum_j P_ij C_ij, sum_i P_ij C_ij
        v = over[:, None]
        return v * weighted_row, v * weighted_col, None, *source, w[:, None] * row, w[:, None] * col, -over * steepness, *(None,) * 4


@signed
class PlanProduct(Function):
    """v [B, m, d], f, g, a Problem, `transpose` -> P v (or P^T v), differentiable in v alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v, f, g, cost, x, y, a, b, epsilon, rows, cols, static, transpose):
        return library.apply_plan(cost, x, y, a, b, epsilon, rows, cols, *static, f, g, v, transpose)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *tensors, ctx.static, ctx.transpose = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, to_product):
        back = PlanProduct.apply(to_product.contiguous(), *ctx.saved_tensors, ctx.static, not ctx.transpose)
        return back, *(None,) * 12
