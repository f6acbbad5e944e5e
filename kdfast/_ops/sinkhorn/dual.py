"""The dual value of potentials and its partial derivatives; the plan as a differentiable tensor."""

import torch
from torch import Tensor

from .geometry import MAX_EXPONENT, Problem, conjugate, conjugate_slope, cost_tile


def dual(p: Problem, f: Tensor, g: Tensor, col: Tensor | None) -> Tensor:
    """value [B]. `col` [B, m] is sum_i a_i E_ij; None: what an update of g, which makes g stationary, has made it if there is mass."""
    mass_a, mass_b = p.a.sum(-1), p.b.sum(-1)
    if col is None:
        mass = (mass_b if p.rho_b is None else (p.b * conjugate_slope(p.rho_b, g)).sum(-1)) * (mass_a > 0)
    else:
        mass = (p.b * col).sum(-1)
    potentials = (p.a * conjugate(p.rho_a, f)).sum(-1) + (p.b * conjugate(p.rho_b, g)).sum(-1)
    return potentials - p.epsilon * (mass - mass_a * mass_b)


def dual_slopes(p: Problem, w: Tensor, f: Tensor, g: Tensor, marginals, transport, wanted) -> tuple[Tensor | None, ...]:
    """The gradients of <w, value> in a, b and epsilon, each where `wanted`. marginals() are the plan's over a and b, [B, n] and [B, m];
    transport() is <P, C> [B], which epsilon's alone needs."""
    to_a, to_b, to_epsilon = wanted
    if not (to_a or to_b or to_epsilon):
        return None, None, None
    row, col = marginals()
    mass_a, mass_b, eps, v = p.a.sum(-1), p.b.sum(-1), p.epsilon[:, None], w[:, None]
    da = v * (conjugate(p.rho_a, f) - eps * (row - mass_b[:, None])) if to_a else None
    db = v * (conjugate(p.rho_b, g) - eps * (col - mass_a[:, None])) if to_b else None
    if not to_epsilon:
        return da, db, None
    pairing = (p.a * row * f).sum(-1) + (p.b * col * g).sum(-1) - transport()  # eps <P, log P/(a b)>
    return da, db, w * (pairing / p.epsilon - (p.a * row).sum(-1) + mass_a * mass_b)


def dense_exponential(p: Problem, f: Tensor, g: Tensor, c: Tensor) -> Tensor:
    """exp((f_i + g_j - C_ij)/eps) [B, n, m], differentiable."""
    z = (f[..., None] + g[:, None] - allowed(c)) / p.epsilon[:, None, None]
    return z.clamp(max=MAX_EXPONENT).exp().masked_fill(c == torch.inf, 0.0)


def allowed(c: Tensor) -> Tensor:
    """The cost with 0 at forbidden pairs: an infinity times the plan's 0 would be NaN in derivatives."""
    return c.masked_fill(c == torch.inf, 0.0)


def dense_plan(p: Problem, f: Tensor, g: Tensor) -> Tensor:
    """P [B, n, m], differentiable."""
    return p.a[..., None] * p.b[:, None] * dense_exponential(p, f, g, cost_tile(p, slice(None)))
