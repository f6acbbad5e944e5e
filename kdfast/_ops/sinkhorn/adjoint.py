"""Adjoints of the iterations and of sums over the plan, in row tiles; the equations are in README.md.

A_ij = b_j exp((f^_i + g_j - C_ij)/eps), rows summing to 1, is the Jacobian of the row step (times -lambda_a);
B_ij = a_i exp((f_i + g^_j - C_ij)/eps), columns summing to 1, that of the column step (times -lambda_b).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import Gradients, Problem, Tiles, blocks, damping
from .portable import TINY, Schedule, Step, effective_epsilon, exponential, exponentials, times, weighted

#: Conjugate gradients stop at this relative residual, in the norm of the preconditioner, or after so many steps, and give the best solution
#: there was: float32 degrades when iterated past its floor. At 1e-6 gradients of uneven weights, whose light columns that norm hardly
#: sees, are up to 2e-5 off; 1e-7 costs one step or two more.
RESIDUAL = {torch.float32: 1e-7, torch.float64: 1e-13}
CG_STEPS, CG_STEPS_UNREAD = 200, 50


class Pulled(NamedTuple):
    """Gradients; an empty tensor for what the problem has not or was not asked for."""

    cost: Tensor
    x: Tensor
    y: Tensor
    a: Tensor  # [B, n]
    b: Tensor  # [B, m]
    epsilon: Tensor  # [B]


class Moments(NamedTuple):
    cost: Tensor
    x: Tensor
    y: Tensor
    row: Tensor  # [B, n]: sum_j b_j E_ij C_ij
    col: Tensor  # [B, m]: sum_i a_i E_ij C_ij
    steepness: Tensor  # [B]: sum_ij P_ij C_ij log E_ij


def plan(p: Problem, f: Tensor, g: Tensor) -> Tensor:
    """P [B, n, m], in which tiles are written one after another."""
    out = p.a.new_empty(*p.a.shape, p.b.shape[1])
    with torch.autocast(p.a.device.type, enabled=False):
        for lo, hi in blocks(p):
            q = p.part(lo, hi)
            for rows, e, _ in exponentials(q, Tiles(q), f[lo:hi], g[lo:hi], q.epsilon):
                out[lo:hi, rows] = e.mul_(q.a[:, rows, None]).mul_(q.b[:, None])
    return out


def plan_gradient(p: Problem, f: Tensor, g: Tensor, w0: Tensor, w1: Tensor | None) -> Moments:
    """The gradient P_ij (w0 + w1 C_ij) in the cost, w0 and w1 [B], pulled to its source; with w1, the moments of C under P."""
    out = Gradients(p)
    row, col, steepness = (torch.zeros_like(t) if w1 is not None else t.new_empty(0) for t in (p.a, p.b, p.epsilon))
    with torch.autocast(p.a.device.type, enabled=False):
        for lo, hi in blocks(p):
            block, q = slice(lo, hi), p.part(lo, hi)
            for rows, e, c in exponentials(q, Tiles(q), f[block], g[block], q.epsilon):
                weights = w0[block, None] * q.a[:, rows]
                if w1 is None:
                    out.add(q, block, rows, e.mul_(weights[..., None]).mul_(q.b[:, None]), c)
                    continue
                ec = weighted(e, c)
                row[block, rows] = times(ec, q.b)
                col[block] += times(ec.mT, q.a[:, rows])
                steepness[block] += (times(weighted(torch.xlogy(e, e), c), q.b) * q.a[:, rows]).sum(-1)
                slopes = w1[block, None] * q.a[:, rows]
                out.add(q, block, rows, e.mul_(weights[..., None]).addcmul_(ec, slopes[..., None]).mul_(q.b[:, None]), c)
    return Moments(*out.outputs(p), row, col, steepness)


def apply_plan(p: Problem, f: Tensor, g: Tensor, v: Tensor, transpose: bool) -> Tensor:
    """P v [B, n, d] for v [B, m, d], or P^T v [B, m, d] for v [B, n, d]."""
    out = torch.zeros(*(p.b if transpose else p.a).shape, v.shape[-1], dtype=p.a.dtype, device=v.device)
    with torch.autocast(p.a.device.type, enabled=False):
        for lo, hi in blocks(p):
            block, q = slice(lo, hi), p.part(lo, hi)
            for rows, e, _ in exponentials(q, Tiles(q), f[block], g[block], q.epsilon):
                if transpose:
                    out[block] += q.b[..., None] * (e.mT @ (q.a[:, rows, None] * v[block, rows]))
                else:
                    out[block, rows] = q.a[:, rows, None] * (e @ (q.b[..., None] * v[block]))
    return out


class _Adjoint:
    """Accumulates the gradients of iterations on one block."""

    def __init__(self, p: Problem, block: slice, gradients: Gradients, to_epsilon: bool):
        self.p, self.block, self.tiles, self.gradients, self.to_epsilon = p, block, Tiles(p), gradients, to_epsilon
        self.a, self.b, self.epsilon = torch.zeros_like(p.a), torch.zeros_like(p.b), torch.zeros_like(p.epsilon)

    def step(self, eps, f, g, f_hat, g_hat, start, to_f, to_g, share) -> Tensor:
        """Pull (to_f [B, n], to_g [B, m]) through f from `start`, then g from f; returns the gradient in `start` [B, m].

        f_hat, g_hat make the rows of A (at `start`) and the columns of B (at f) sum to 1; `share` [B] is d eps / d epsilon.
        """
        p, scale = self.p, eps[:, None]
        damp_a, damp_b = damping(p.rho_a, eps), damping(p.rho_b, eps)
        columns, through, steepness = torch.zeros_like(to_g), torch.zeros_like(to_g), torch.zeros_like(eps)
        # rounding leaves sums off 1 by 1e-7 range(C)/eps, the same for a whole row or column, and steps would add that up
        for rows, e_col, _ in exponentials(p, self.tiles, f, g_hat, eps):
            columns += times(e_col.mT, p.a[:, rows])
        to_g = torch.where(columns == 0, 0.0, to_g)  # where nothing is summed the potential is a constant
        y = damp_b * to_g / columns.clamp_min(TINY)
        x, h, pulled = torch.empty_like(to_f), torch.empty_like(to_f), torch.empty_like(to_f)
        for rows, c in self.tiles:
            if self.tiles.whole is None:
                e_col = exponential(p, f[:, rows], g_hat, c, eps)
            e_row = exponential(p, f_hat[:, rows], start, c, eps)
            sums = times(e_row, p.b)
            e_row /= sums.clamp_min(TINY)[..., None]
            h[:, rows] = times(e_col, y)
            pulled[:, rows] = torch.where(sums == 0, 0.0, (to_f - p.a * h)[:, rows])
            x[:, rows] = damp_a * pulled[:, rows]
            through += times(e_row.mT, x[:, rows])
            if self.to_epsilon:
                steepness += (p.a[:, rows] * times(torch.xlogy(e_col, e_col), y)).sum(-1)
                steepness += (x[:, rows] * times(torch.xlogy(e_row, e_row), p.b)).sum(-1)
            w = e_row.mul_(x[:, rows, None]).mul_(p.b[:, None]).addcmul_(e_col.mul_(y[:, None]), p.a[:, rows, None])
            self.gradients.add(p, self.block, rows, w, c)
        self.a -= scale * h
        self.b -= scale * through
        if not self.to_epsilon:
            return -p.b * through
        # d f_i / d eps = lambda sum_j A_ij log(A_ij/b_j), which are small numbers, and through lambda - f_i/(rho + eps); g likewise
        total = steepness - (damp_b * to_g * columns.clamp_min(TINY).log()).sum(-1)
        if p.rho_a is not None:
            total = total - (pulled * f).sum(-1) / (p.rho_a + eps)
        if p.rho_b is not None:
            total = total - (to_g * g).sum(-1) / (p.rho_b + eps)
        self.epsilon += share * total
        return -p.b * through


def replay(
    p: Problem, g0: Tensor, history_f: Tensor, history_g: Tensor, done: Tensor, to_f, to_g, to_epsilon: bool, schedule: Schedule
) -> Pulled:
    """Reverse through every iteration, each recomputed from its potentials: exact for truncated iterations."""

    def run(q: Problem, block: slice, adjoint: _Adjoint) -> None:
        f, g, gg, left = history_f[block], history_g[block], g0[block], done[block]
        last = int(left.max()) if p.readable and left.numel() else schedule.iterations
        at_f, at_g, at_older = to_f[block], to_g[block], torch.zeros_like(q.b)
        zero = torch.zeros_like(gg)
        for t in range(last, 0, -1):
            active = (t <= left)[:, None]
            c1, c2 = schedule.start(t)
            previous, older = (g[:, t - 2] if t > 1 else gg), (g[:, t - 3] if t > 2 else zero)
            start = c1 * previous + c2 * older if c2 else previous
            eps = schedule.epsilon(q.epsilon, t)
            share = torch.full_like(eps, 1 / t) if schedule.method == "proximal" else (eps == q.epsilon).to(eps.dtype)
            hats = f[:, t - 1] / damping(q.rho_a, eps), g[:, t - 1] / damping(q.rho_b, eps)
            sent = (torch.where(active, at_f, 0.0), torch.where(active, at_g, 0.0))
            back = adjoint.step(eps, f[:, t - 1], g[:, t - 1], *hats, start, *sent, share)
            at_f = torch.where(active, 0.0, at_f)
            at_g, at_older = torch.where(active, at_older + c1 * back, at_g), torch.where(active, c2 * back, at_older)

    return _over_blocks(p, run, to_epsilon)


def implicit(p: Problem, f, g, done, to_f, to_g, to_epsilon: bool, schedule: Schedule) -> Pulled:
    """The gradient of the fixed point: conjugate gradients on diag(c) - lambda_a lambda_b P^T diag(1/r) P, then one step's adjoint."""
    epsilon = effective_epsilon(p, schedule, done)

    def run(q: Problem, block: slice, adjoint: _Adjoint) -> None:
        eps, u, v = epsilon[block], f[block], g[block]
        # relaxed rows may hold almost no mass, or none in this precision: normalised from their own maxima
        _, new_g, lse = Step(q, adjoint.tiles, "log").exact(v, eps)
        hats = torch.where(lse == -torch.inf, u, -eps[:, None] * lse), new_g / damping(q.rho_b, eps)
        y = _solve_adjoint(q, adjoint.tiles, eps, u, v, *hats, to_f[block], to_g[block])
        adjoint.step(eps, u, v, *hats, v, to_f[block], y, eps / q.epsilon)

    return _over_blocks(p, run, to_epsilon)


def _over_blocks(p: Problem, run, to_epsilon: bool) -> Pulled:
    gradients, parts = Gradients(p), []
    with torch.autocast(p.a.device.type, enabled=False):
        for lo, hi in blocks(p):
            q = p.part(lo, hi)
            adjoint = _Adjoint(q, slice(lo, hi), gradients, to_epsilon)
            run(q, slice(lo, hi), adjoint)
            parts.append((adjoint.a, adjoint.b, adjoint.epsilon))
    return Pulled(*gradients.outputs(p), *(torch.cat(part) for part in zip(*parts, strict=True)))


def _solve_adjoint(p: Problem, tiles: Tiles, eps, f, g, f_hat, g_hat, to_f, to_g) -> Tensor:
    """conjugate_gradients by PyTorch's products with tiles of exponentials."""
    damp_b = damping(p.rho_b, eps)
    balanced = p.rho_a is None and p.rho_b is None
    row_factor, col_factor = torch.exp((f_hat - f) / eps[:, None]), torch.exp((g - g_hat) / eps[:, None])

    def jacobians():
        """(rows, B over a, A over b or None): without relaxation A is B with its rows and columns rescaled."""
        for rows, e, cost in exponentials(p, tiles, f, g_hat, eps):
            yield rows, e, None if balanced else exponential(p, f_hat[:, rows], g, cost, eps)

    kept = None if tiles.whole is None else list(jacobians())

    def through(y: Tensor, plus: Tensor | None, _active: Tensor | None) -> Tensor:
        out = torch.zeros_like(y)
        for rows, e, other in kept or jacobians():
            x = p.a[:, rows] * times(e, y)
            x = x if plus is None else plus[:, rows] - damp_b * x
            if balanced:
                out += col_factor * times(e.mT, row_factor[:, rows] * x)
            else:
                out += times(other.mT, x)
        return p.b * out

    return conjugate_gradients(p, eps, g, g_hat, to_f, to_g, through)


def conjugate_gradients(
    p: Problem, eps: Tensor, g: Tensor, g_hat: Tensor, to_f: Tensor, to_g: Tensor, through, descend: Callable[..., Tensor] | None = None
) -> Tensor:
    """y [B, m] with y + lambda_a A^T x = to_g, x = to_f - lambda_b B y.

    through(y, plus, active) is A^T (plus - lambda_b B y), or A^T B y where `plus` is None, in one pass; of problems that are not `active`
    [B] (None: all are) it may be any finite number. A's columns sum to b exp((g - g_hat)/eps). descend: `descended` in another form.
    """
    damp_a, damp_b = damping(p.rho_a, eps), damping(p.rho_b, eps)
    balanced = p.rho_a is None and p.rho_b is None
    log_c = p.b.log() + (g - g_hat) / eps[:, None]
    c = torch.exp(log_c - log_c.amax(-1, keepdim=True))  # the plan's column sums, up to a factor: there may be no mass in this precision
    free = c > 0  # a column without weight keeps y = to_g
    residual = torch.where(free, to_g - damp_a * through(torch.where(free, 0.0, to_g), to_f, None), 0.0)
    system = System(c, torch.where(free, 1 / c, 0.0), c / c.sum(-1, keepdim=True).clamp_min(TINY) if balanced else None, damp_a * damp_b)
    steps = CG_STEPS if p.readable else CG_STEPS_UNREAD
    best = (descend or descended)(system, system.project(residual), steps, p.readable, through)
    y = torch.where(free, c * best, to_g)
    # relaxed columns of relatively no mass have a weight, but no c: the equation itself gives them
    return y if balanced else to_g - damp_a * through(y, to_f, None)


class System(NamedTuple):
    """diag(c) - damp A^T B diag(c), of B problems."""

    c: Tensor  # [B, m]
    over_c: Tensor  # 1 / c, and 0 where that is 0
    share: Tensor | None  # c over its sum: constants are the null space, nothing may remain along them. None: there is none
    damp: Tensor | float  # [B, 1]

    def project(self, r: Tensor) -> Tensor:
        return r if self.share is None else r - self.share * r.sum(-1, keepdim=True)


def descended(system: System, residual: Tensor, steps: int, readable: bool, through) -> Tensor:
    """The best solution [B, m] of `steps` conjugate gradients preconditioned by 1/c. readable: the host may look whether all is done."""
    c, over_c, _, damp = system
    solution, direction = torch.zeros_like(c), over_c * residual
    norm = (residual * direction).sum(-1)  # [B], of the residual preconditioned by 1/c
    target = RESIDUAL[c.dtype] ** 2 * norm
    best, least = solution, norm
    for _ in range(steps):
        active = norm > target
        if readable and not bool(active.any()):
            break
        image = c * direction - damp * through(c * direction, None, active)
        curvature = (direction * image).sum(-1)
        active = active & (curvature > 0)
        length = torch.where(active, norm / curvature, 0.0)[:, None]
        solution = solution + length * direction
        residual = system.project(residual - length * image)
        norm, last = torch.where(active, (residual * residual * over_c).sum(-1), 0.0), norm
        better = active & (norm < least)
        best, least = torch.where(better[:, None], solution, best), torch.where(better, norm, least)
        direction = over_c * residual + torch.where(active, norm / last, 0.0)[:, None] * direction
    return best
