"""The differentiable pieces: potentials, the dual value, the transport cost, products with the plan.

Potentials differentiates the iterations, the others what is computed from potentials; `grad` chooses how they are joined.
Each Function takes a Problem as its eight tensors and `static`, the rest. (Signatures are explicit: Dynamo counts them.)
"""

import functools
import inspect
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from kdfast._core import checks

from . import library
from .geometry import MAX_EXPONENT, Problem, conjugate, conjugate_slope, cost_tile, pull

_TENSORS = 8

_ONCE = "of this family only `value` with grad='envelope' can be differentiated twice"


def dense_exponential(p: Problem, f: Tensor, g: Tensor, c: Tensor) -> Tensor:
    """exp((f_i + g_j - C_ij)/eps) [B, n, m], differentiable."""
    z = (f[..., None] + g[:, None] - _allowed(c)) / p.epsilon[:, None, None]
    return z.clamp(max=MAX_EXPONENT).exp().masked_fill(c == torch.inf, 0.0)


def _allowed(c: Tensor) -> Tensor:
    """The cost with 0 at forbidden pairs: an infinity times the plan's 0 would be NaN in derivatives."""
    return c.masked_fill(c == torch.inf, 0.0)


def dense_plan(p: Problem, f: Tensor, g: Tensor) -> Tensor:
    """P [B, n, m], differentiable."""
    return p.a[..., None] * p.b[:, None] * dense_exponential(p, f, g, cost_tile(p, slice(None)))


def followed(*tensors: Tensor | None) -> bool:
    """Whether gradients may be asked of any of `tensors`. Inside a torch.func transform, whose wrappers do not say, yes."""
    if not torch.is_grad_enabled():
        return False
    present = [t for t in tensors if t is not None]
    return any(t.requires_grad for t in present) or not (torch.compiler.is_compiling() or all(map(checks.readable, present)))


def applied(function: type[Function], *arguments):
    """function.apply(*arguments), or its forward alone where nobody can ask for gradients: apply takes 50 microseconds to look around."""
    follows = followed(*(t for t in arguments if isinstance(t, Tensor)))
    return function.apply(*arguments) if follows else function.forward(*arguments)


class _Given(NamedTuple):
    """Bound arguments that are all there."""

    args: tuple
    kwargs: dict

    def apply_defaults(self) -> None:
        pass


class _Positional(inspect.Signature):
    """A signature to which arguments are bound in their order, every one given."""

    def bind(self, *args, **named):
        return super().bind(*args, **named) if named or len(args) != len(self.parameters) else _Given(args, {})


def _signed(function: type[Function]) -> type[Function]:
    """`function` with the signature of its forward at hand, which apply otherwise works out, and binds by name, at every call."""
    known = inspect.signature(function.forward)
    function.forward.__signature__ = _Positional(tuple(known.parameters.values()), return_annotation=known.return_annotation)
    return function


def _none(gradient: Tensor, source: Tensor | None) -> Tensor | None:
    return None if source is None else gradient


def _once(backward):
    """A `backward` whose gradients cannot be differentiated: with create_graph, doing so raises RuntimeError.

    Not autograd's once_differentiable, which raises on the way to the upstream gradients alone: the way to the saved
    tensors would be missing from second derivatives without a word.
    """

    @functools.wraps(backward)
    def first_order(ctx, *upstream):
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        sources = (*upstream, *ctx.saved_tensors)
        kept = tuple(t for t in gradients if t is not None)
        refused = iter(refuse(kept, (_ONCE,) * len(kept), sources))
        return tuple(None if t is None else next(refused) for t in gradients)

    return first_order


@_signed
class Potentials(Function):
    """A Problem, g0 [B, m], a Schedule as a tuple, `unrolled` -> the fields of a Solution, of which f and g are differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(cost, x, y, a, b, epsilon, rows, cols, static, g0, schedule, unrolled):
        return library.solve(cost, x, y, a, b, epsilon, rows, cols, *static, g0, *schedule, unrolled)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        *tensors, ctx.static, g0, ctx.schedule, ctx.unrolled = inputs
        ctx.save_for_backward(*tensors, g0, output[6], *(output[-2:] if ctx.unrolled else output[:2]))

    @staticmethod
    @_once
    def backward(ctx, to_f, to_g, *_):
        if to_f is None and to_g is None:
            return (None,) * 12
        tensors, (g0, done, *states) = ctx.saved_tensors[:_TENSORS], ctx.saved_tensors[_TENSORS:]
        p = Problem(*tensors, *ctx.static)
        to_f = torch.zeros_like(p.a) if to_f is None else to_f.contiguous()
        to_g = torch.zeros_like(p.b) if to_g is None else to_g.contiguous()
        if ctx.unrolled:
            pulled = library.replay(*p, g0, *states, done, to_f, to_g, ctx.needs_input_grad[5], *ctx.schedule)
        else:
            pulled = library.implicit(*p, *states, done, to_f, to_g, ctx.needs_input_grad[5], *ctx.schedule)
        return *(_none(d, s) for d, s in zip(pulled, tensors[:6], strict=True)), *(None,) * 6


@_signed
class DualValue(Function):
    """(f, g, row, col, transport), a Problem, `exact`, `proximal` -> value [B].

    `exact`: the partial derivatives at these potentials, f and g included. Otherwise the envelope theorem's, in which
    f and g count as optimal and get no gradient; differentiating those once more reaches f and g, and what lies behind them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(f, g, row, col, transport, cost, x, y, a, b, epsilon, rows, cols, static, exact, proximal):
        if proximal:
            return transport.clone()
        p = Problem(cost, x, y, a, b, epsilon, rows, cols, *static)
        dual = (p.a * conjugate(p.rho_a, f)).sum(-1) + (p.b * conjugate(p.rho_b, g)).sum(-1)
        return dual - p.epsilon * ((p.b * col).sum(-1) - p.a.sum(-1) * p.b.sum(-1))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        *tensors, ctx.static, ctx.exact, ctx.proximal = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, w):
        if w is None:
            return (None,) * 16
        f, g, row, col, transport, *tensors = ctx.saved_tensors
        p, w = Problem(*tensors, *ctx.static), w.contiguous()
        if torch.is_grad_enabled():  # create_graph: differentiable formulas, at the price of the plan
            c = cost_tile(p, slice(None))
            e = dense_exponential(p, f, g, c)
            plan = p.a[..., None] * p.b[:, None] * e
            row, col, transport = (e @ p.b[..., None])[..., 0], (e.mT @ p.a[..., None])[..., 0], (plan * _allowed(c)).sum((-2, -1))
            source = _dense_pull(p, w[:, None, None] * plan, c)
        elif any(ctx.needs_input_grad[5:8]):
            source = library.plan_gradient(*p, f, g, w, None)[:3]
        else:
            source = (None, None, None)
        source = (_none(d, t) for d, t in zip(source, tensors[:3], strict=True))
        to_a, to_b, to_epsilon = ctx.needs_input_grad[8:11]
        if not (ctx.exact or to_a or to_b or to_epsilon):
            return *(None,) * 5, *source, *(None,) * 8
        slope_f, slope_g = conjugate_slope(p.rho_a, f), conjugate_slope(p.rho_b, g)
        s, t = (row, col) if ctx.exact else (slope_f, slope_g)
        mass_a, mass_b, eps, v = p.a.sum(-1), p.b.sum(-1), p.epsilon[:, None], w[:, None]
        da = v * (conjugate(p.rho_a, f) - eps * (s - mass_b[:, None])) if to_a else None
        db = v * (conjugate(p.rho_b, g) - eps * (t - mass_a[:, None])) if to_b else None
        deps = torch.zeros_like(w) if to_epsilon else None
        if to_epsilon and not ctx.proximal:
            pairing = (p.a * s * f).sum(-1) + (p.b * t * g).sum(-1) - transport  # eps <P, log P/(a b)>
            deps = w * (pairing / p.epsilon - (p.a * s).sum(-1) + mass_a * mass_b)
        df, dg = (v * p.a * (slope_f - row), v * p.b * (slope_g - col)) if ctx.exact else (None, None)
        return df, dg, None, None, None, *source, da, db, deps, *(None,) * 5


def _dense_pull(p: Problem, w: Tensor, c: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if p.cost is None:
        return None, *pull(p, slice(None), w, c)
    return (w.sum(0) if p.cost.dim() == 2 else w).to(p.cost.dtype), None, None


@_signed
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
    @_once
    def backward(ctx, w):
        if w is None:
            return (None,) * 13
        f, g, *tensors = ctx.saved_tensors
        p, w = Problem(*tensors, *ctx.static), w.contiguous()
        over = w / p.epsilon
        *source, row, col, steepness = library.plan_gradient(*p, f, g, w, None if ctx.constant else -over)
        source = (_none(d, t) for d, t in zip(source, tensors[:3], strict=True))
        if ctx.constant:
            return None, None, None, *source, *(None,) * 7
        weighted_row, weighted_col = p.a * row, p.b * col  # sum_j P_ij C_ij, sum_i P_ij C_ij
        v = over[:, None]
        return v * weighted_row, v * weighted_col, None, *source, w[:, None] * row, w[:, None] * col, -over * steepness, *(None,) * 4


@_signed
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


@_signed
class Refusal(Function):
    """The values of tensors whose use in a graph is an error, told by a message for each."""

    generate_vmap_rule = True

    @staticmethod
    def forward(messages, *values_and_sources):
        return tuple(values.clone() for values in values_and_sources[: len(messages)])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.messages = inputs[0]

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(next(message for message, gradient in zip(ctx.messages, gradients, strict=True) if gradient is not None))


def refuse(values: tuple[Tensor, ...], messages: tuple[str, ...], sources: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """`values` without gradient; backward through one raises RuntimeError(its message). (Compiled code cannot raise: a constant.)"""
    values = tuple(v.detach() for v in values)
    sources = tuple(s for s in sources if s is not None)
    if torch.compiler.is_compiling() or not followed(*sources):
        return values
    return Refusal.apply(messages, *values, *sources)
