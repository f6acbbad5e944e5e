"""The iterations in plain PyTorch: row tiles, one exponential an entry an iteration, no host synchronisation off the CPU.

Potentials are in units of the cost. LSE_i stands for log sum_j b_j exp((g_j - C_ij)/eps).
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import ALONE, MAX_EXPONENT, Problem, Tiles, blocks, conjugate_slope, damping

#: A row or column sum outside [TINY, HUGE] is not trusted.
TINY, HUGE = 1e-30, 1e30

#: The kernel is formed anew when a scaling leaves exp(-DRIFT) ... exp(DRIFT): until then what underflowed in it stays negligible.
DRIFT = 20.0


class Schedule(NamedTuple):
    iterations: int
    tol: float | None
    method: str  # "log", "kernel", "auto", "proximal"
    anneal_start: float | None
    anneal_factor: float | None

    def epsilon(self, eps: Tensor, t: int) -> Tensor:
        """Epsilon [B] of iteration t = 1 ... iterations; the last one is never annealed."""
        if self.method == "proximal":
            return eps / t
        if self.anneal_start is None or t == self.iterations:
            return eps
        return eps.clamp_min(self.anneal_start * self.anneal_factor ** (t - 1))

    def start(self, t: int) -> tuple[float, float]:
        """(c1, c2): iteration t starts from c1 g_{t-1} + c2 g_{t-2}. Keeping IPOT's scaling between steps extrapolates g."""
        return (2 * (t - 1) / t, -(t - 2) / t) if self.method == "proximal" else (1.0, 0.0)


class Solution(NamedTuple):
    f: Tensor  # [B, n]
    g: Tensor  # [B, m]
    row: Tensor  # [B, n]: sum_j b_j E_ij, E = exp((f + g - C)/eps): the row marginal over a
    col: Tensor  # [B, m]: sum_i a_i E_ij
    transport: Tensor  # [B]: <P, C>
    error: Tensor  # [B]: L1 error of the row marginal
    done: Tensor  # [B] int64: iterations done
    history_f: Tensor  # [B, T, n], or [B, 0, n]
    history_g: Tensor  # [B, T, m]


def solve(p: Problem, g: Tensor, schedule: Schedule, history: bool) -> Solution:
    """Run `schedule` on every problem from column potentials g [B, m]."""
    with torch.autocast(p.a.device.type, enabled=False):
        parts = [_solve_block(p.part(lo, hi), g[lo:hi], schedule, history) for lo, hi in blocks(p)]
    return Solution(*(torch.cat(field) for field in zip(*parts, strict=True)))


def effective_epsilon(p: Problem, schedule: Schedule, done: Tensor) -> Tensor:
    """The epsilon [B] in which the last potentials make the plan."""
    return p.epsilon / done.clamp_min(1) if schedule.method == "proximal" else p.epsilon


def _solve_block(p: Problem, g: Tensor, schedule: Schedule, history: bool) -> Solution:
    tiles = Tiles(p)
    return iterate(p, g, schedule, history, Step(p, tiles, schedule.method), functools.partial(marginals, p, tiles))


def iterate(p: Problem, g: Tensor, schedule: Schedule, history: bool, step: Callable, marginals: Callable) -> Solution:
    """`schedule` from g, by step(f, g, eps, fresh=) as Step has it and marginals(f, g, eps)."""
    f = torch.zeros_like(p.a)
    finished = torch.zeros_like(p.epsilon, dtype=torch.bool)
    done = torch.full_like(p.epsilon, 0 if schedule.tol is not None else schedule.iterations, dtype=torch.int64)
    older, eps, steps_f, steps_g = torch.zeros_like(g), None, [], []
    for t in range(1, schedule.iterations + 1):
        before, eps = eps, schedule.epsilon(p.epsilon, t)
        c1, c2 = schedule.start(t)
        same = before is eps or (t > 1 and p.readable and schedule.method != "proximal" and torch.equal(before, eps))
        new_f, new_g, lse = step(f, c1 * g + c2 * older if c2 else g, eps, fresh=not same)
        if schedule.tol is not None and t > 1:
            if schedule.method == "proximal":
                error = row_error(p, f, marginals(f, g, before)[0])
            else:
                error = row_error(p, f, torch.exp(f / eps[:, None] + lse))
            # before the last epsilon of its schedule a problem has not converged, whatever its marginals say
            finished = finished | ((error <= schedule.tol) & ((before == p.epsilon) | (schedule.method == "proximal")))
            if p.readable and bool(finished.all()):
                break
            keep = finished[:, None]
            new_f, new_g, older = torch.where(keep, f, new_f), torch.where(keep, g, new_g), torch.where(keep, older, g)
        else:
            older = g
        f, g = new_f, new_g
        if schedule.tol is not None:
            done = done + ~finished
        if history:
            steps_f.append(f)
            steps_g.append(g)
    row, col, transport = marginals(f, g, effective_epsilon(p, schedule, done))
    return Solution(
        f,
        g,
        row,
        col,
        transport,
        row_error(p, f, row),
        done,
        _stack(steps_f, f, schedule.iterations if history else 0),
        _stack(steps_g, g, schedule.iterations if history else 0),
    )


def _stack(steps: list[Tensor], last: Tensor, length: int) -> Tensor:
    """[B, length, n]; after an early stop the last potentials fill the rest."""
    steps = steps + [last] * (length - len(steps))
    return torch.stack(steps, 1) if steps else last.new_empty(last.shape[0], 0, last.shape[1])


def row_error(p: Problem, f: Tensor, row: Tensor) -> Tensor:
    """sum_i |row marginal - what optimality asks for| [B]: a_i, or a_i exp(-f_i/rho) under rho KL."""
    gap = p.a * (row - conjugate_slope(p.rho_a, f)).abs()
    return torch.where(p.a > 0, gap, torch.zeros_like(gap)).sum(-1)


def exponentials(p: Problem, tiles: Tiles, f: Tensor, g: Tensor, eps: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, E = exp((f_i + g_j - C_ij)/eps) [B, r, m], C) over the tiles; E may be overwritten."""
    for rows, c in tiles:
        yield rows, exponential(p, f[:, rows], g, c, eps), c


def exponential(p: Problem, f: Tensor, g: Tensor, c: Tensor, eps: Tensor) -> Tensor:
    """exp((f_i + g_j - C_ij)/eps) [B, r, m] for f [B, r], g [B, m], c [B, r, m] or [r, m], as p.impl forms it."""
    if p.impl == "cpu":
        c = c if c.stride(-1) == 1 else c.contiguous()
        eps = eps.contiguous()
        ones = [t.new_ones(t.shape) for t in (f, g, eps)]
        source = (c, None, None, *ones[:2], eps, None, None, "given", None, None)
        return torch.ops.kdfast.sinkhorn_plan(*source, f.contiguous(), g.contiguous(), ones[2], None, False, 0, f.shape[1])[0]
    inverse = 1 / eps[:, None]
    e = torch.addcmul((g * inverse)[:, None], c, -inverse[..., None])
    return e.add_((f * inverse)[..., None]).clamp_(max=MAX_EXPONENT).exp_()


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """[B, r, m] by [B, m] -> [B, r]."""
    return torch.bmm(matrix, vector[..., None])[..., 0]


def weighted(e: Tensor, c: Tensor) -> Tensor:
    """e c [B, r, m], 0 where e is 0 even if the cost is infinite (a forbidden pair)."""
    return e * c.clamp_max(torch.finfo(c.dtype).max)


def marginals(p: Problem, tiles: Tiles, f: Tensor, g: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row [B, n], col [B, m], <P, C> [B]) as in Solution."""
    row, col, transport = torch.zeros_like(p.a), torch.zeros_like(p.b), torch.zeros_like(p.epsilon)
    for rows, e, c in exponentials(p, tiles, f, g, eps):
        row[:, rows] = times(e, p.b)
        col += times(e.mT, p.a[:, rows])
        transport += (times(weighted(e, c), p.b) * p.a[:, rows]).sum(-1)
    return row, col, transport


class Step:
    """One iteration on a block, by the cheapest form that is safe; keeps the kernel between iterations."""

    def __init__(self, p: Problem, tiles: Tiles, method: str):
        self.p, self.tiles = p, tiles
        self.log_a, self.log_b = p.a.log(), p.b.log()
        # where sums cannot be looked at, "kernel" would not be safe: the log form serves it
        self.use_kernel = p.readable and (method == "kernel" or (method == "auto" and tiles.whole is not None))
        # relaxed rows may rightly hold almost no mass; without looking, only the exact form is safe for them
        self.absorbs = p.readable or (p.rho_a is None and p.rho_b is None)
        self.kernel = None

    def __call__(self, f: Tensor, g: Tensor, eps: Tensor, *, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(new f, new g, LSE [B, n] at the old g). `fresh`: f and g are not the result of an iteration at this eps."""
        result = None
        if not fresh and self.use_kernel:
            result = self._scale(f, g, eps)
        elif not fresh and self.absorbs:
            result = self._absorbed(f, g, eps)
        return self.exact(g, eps) if result is None else result

    def exact(self, g: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both half steps by logsumexp with true maxima."""
        p, inverse = self.p, 1 / eps[:, None]
        start, lse = self.log_b + g * inverse, torch.empty_like(p.a)
        col = torch.full_like(p.b, -torch.inf)
        f = torch.empty_like(p.a)
        for rows, c in self.tiles:
            z = torch.addcmul(start[:, None], c, -inverse[..., None])
            lse[:, rows] = z.logsumexp(-1)
            f[:, rows] = potential(p.rho_a, eps, lse[:, rows])
            z = torch.addcmul((self.log_a + f * inverse)[:, rows, None], c, -inverse[..., None])
            col = torch.logaddexp(col, z.logsumexp(-2))
        self.kernel = None
        return f, potential(p.rho_b, eps, col), lse

    def _absorbed(self, f: Tensor, g: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """f then g in one pass: after an iteration E is at most 1/a, so no maximum is needed. None: a sum is out of range."""
        p, scale = self.p, eps[:, None]
        lse, new_f, col = torch.empty_like(p.a), torch.empty_like(p.a), torch.zeros_like(p.b)
        for rows, e, _ in exponentials(p, self.tiles, f, g, eps):
            sums = self._trusted(times(e, p.b))
            if sums is None:
                return None
            lse[:, rows] = sums.log() - f[:, rows] / scale
            new_f[:, rows] = -damping(p.rho_a, eps) * scale * lse[:, rows]
            col += times(e.mT, p.a[:, rows] * torch.exp((new_f - f)[:, rows] / scale))
        col = self._trusted(col)
        return None if col is None else (new_f, damping(p.rho_b, eps) * (g - scale * col.log()), lse)

    def _scale(self, f: Tensor, g: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """The same by scalings of a stored kernel E, absorbed at (self.f0, self.g0)."""
        p, scale = self.p, eps[:, None]
        if self.kernel is None:
            self.f0, self.g0 = f, g
            self.kernel = torch.empty(*p.a.shape, p.b.shape[1], dtype=p.a.dtype, device=p.a.device)
            for rows, e, _ in exponentials(p, self.tiles, f, g, eps):
                self.kernel[:, rows] = e
        sums = self._trusted(times(self.kernel, p.b * torch.exp((g - self.g0) / scale)))
        if sums is None:
            return None
        lse = sums.log() - self.f0 / scale
        new_f = -damping(p.rho_a, eps) * scale * lse
        col = self._trusted(times(self.kernel.mT, p.a * torch.exp((new_f - self.f0) / scale)))
        if col is None:
            return None
        new_g = damping(p.rho_b, eps) * (self.g0 - scale * col.log())
        drift = torch.maximum((new_f - self.f0).abs().amax(-1), (new_g - self.g0).abs().amax(-1)) / eps
        if not bool((drift < DRIFT).all()):
            self.kernel = None
            if self.f0 is not f:
                return self._scale(f, g, eps)
            return self._absorbed(f, g, eps)
        return new_f, new_g, lse

    def _trusted(self, sums: Tensor) -> Tensor | None:
        """`sums` where all are in range, else None; clamped where they cannot be read (the next iterations then correct it)."""
        if self.p.readable:
            return sums if bool(((sums > TINY) & (sums < HUGE)).all()) else None
        return sums.clamp(TINY, HUGE)


def potential(rho: float | None, eps: Tensor, lse: Tensor) -> Tensor:
    """-lambda eps LSE [B, n], finite where nothing was summed."""
    alone = 0.0 if rho is None else ALONE * rho
    return torch.where(lse == -torch.inf, alone, -damping(rho, eps) * eps[:, None] * lse)
