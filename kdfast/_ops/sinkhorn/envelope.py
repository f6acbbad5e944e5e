"""The value by the envelope theorem: potentials count as optimal, so that its gradient needs none of theirs.

Differentiating that gradient once more does: then f and g are functions of the inputs, by the implicit solve.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from . import library
from .autograd import TENSORS, pulled
from .dual import allowed, dense_exponential, dual, dual_slopes
from .geometry import Problem, conjugate_slope, cost_tile, pull
from .graph import given, once, signed
from .portable import Schedule, effective_epsilon


@signed
class EnvelopeValue(Function):
    """A Problem, g0 [B, m], a Schedule as a tuple -> value [B], alone differentiable, and f, g, done, *marginals of library.run."""

    generate_vmap_rule = True

    @staticmethod
    def forward(cost, x, y, a, b, epsilon, rows, cols, static, g0, schedule):
        f, g, done, _, _, *marginals = library.run(cost, x, y, a, b, epsilon, rows, cols, static, g0, schedule, False)
        if Schedule(*schedule).method == "proximal":
            value = marginals[2].clone()
        else:
            value = dual(Problem(cost, x, y, a, b, epsilon, rows, cols, *static), f, g, marginals[1] if marginals else None)
        return value, f, g, done, *marginals

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        *tensors, ctx.static, _, ctx.schedule = inputs
        ctx.save_for_backward(*tensors, *output[1:4], *output[6:7])

    @staticmethod
    def backward(ctx, w, *_):
        if w is None:
            return (None,) * 11
        tensors, (f, g, done, *transport) = ctx.saved_tensors[:TENSORS], ctx.saved_tensors[TENSORS:]
        p, schedule, w = Problem(*tensors, *ctx.static), Schedule(*ctx.schedule), w.contiguous()
        *to_source, to_a, to_b, to_epsilon = ctx.needs_input_grad[:6]
        proximal, plan = schedule.method == "proximal", None
        if torch.is_grad_enabled():  # create_graph: differentiable formulas, at the price of the plan
            f, g = Optimum.apply(f, g, done, *tensors, ctx.static, ctx.schedule)
            p = p._replace(epsilon=effective_epsilon(p, schedule, done))
            c = cost_tile(p, slice(None))
            plan = p.a[..., None] * p.b[:, None] * dense_exponential(p, f, g, c)
            source = _dense_pull(p, w[:, None, None] * plan, c)
        else:
            p = p._replace(epsilon=effective_epsilon(p, schedule, done))
            source = library.plan_gradient(*p, f, g, w, None)[:3] if any(to_source) else (None, None, None)

        def marginals():
            return conjugate_slope(p.rho_a, f), conjugate_slope(p.rho_b, g)

        def cost_of_plan():
            if plan is not None:
                return (plan * allowed(c)).sum((-2, -1))
            return transport[0] if transport else library.marginals(*p, f, g)[2]

        da, db, deps = dual_slopes(p, w, f, g, marginals, cost_of_plan, (to_a, to_b, to_epsilon and not proximal))
        if to_epsilon and proximal:
            deps = torch.zeros_like(w)
        return *map(given, source, tensors[:3]), da, db, deps, *(None,) * 5


def _dense_pull(p: Problem, w: Tensor, c: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if p.cost is None:
        return None, *pull(p, slice(None), w, c, graph=True)
    return (w.sum(0) if p.cost.dim() == 2 else w).to(p.cost.dtype), None, None


@signed
class Optimum(Function):
    """f, g, done of a solve, its Problem, its Schedule as a tuple -> (f, g), differentiable in the Problem: as at the fixed point."""

    generate_vmap_rule = True

    @staticmethod
    def forward(f, g, done, cost, x, y, a, b, epsilon, rows, cols, static, schedule):
        return f.clone(), g.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        f, g, done, *tensors, ctx.static, ctx.schedule = inputs
        ctx.save_for_backward(*tensors, done, f, g)

    @staticmethod
    @once
    def backward(ctx, to_f, to_g):
        if to_f is None and to_g is None:
            return (None,) * 13
        return None, None, None, *pulled(ctx, library.implicit, to_f, to_g, ctx.needs_input_grad[8]), *(None,) * 4
