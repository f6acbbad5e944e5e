"""impl="triton" and "cuda": gradients of potentials as adjoint.py has them, two launches an iteration in reverse, one for all of the cost.

Beside histories of potentials there are those of slopes, T (n + m) numbers each. A gradient in a given cost is written once; that in points
is made in slabs of rows, of which products with the points are taken at once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast._core import triton_runtime as runtime
from kdfast._core.architectures import Architecture

from .. import adjoint
from ..adjoint import Pulled
from ..geometry import Problem, blocks, damping, row_tiles
from ..portable import Schedule, effective_epsilon
from . import PARTS, Side, Step, tiles
from .plan import CHUNK, from_differences, from_products, product_tiles


def adjoint_tiles(flags: dict, along_rows: bool, width: int, arch: Architecture) -> runtime.ScoreTiles:
    """Fewer entries a thread than a half step has: of each two exponentials are taken, and up to four sums kept."""
    t = tiles(flags["GIVEN"], along_rows, width)
    if flags["GIVEN"] and along_rows:
        return t._replace(columns=min(128, t.columns))
    if not arch.from_shared and not flags["GIVEN"]:  # addresses of a third stage are registers too
        return t._replace(columns=32, warps=8, stages=min(2, t.stages))
    return t._replace(columns=32 if flags["DIRECT"] else t.columns, warps=8)


def replay(
    p: Problem,
    g0: Tensor,
    history_f: Tensor,
    history_g: Tensor,
    done: Tensor,
    to_f: Tensor,
    to_g: Tensor,
    to_epsilon: bool,
    schedule: Schedule,
) -> Pulled:
    """adjoint.replay."""
    with torch.autocast(p.a.device.type, enabled=False):
        return _pulled(Step(p), _iterations(p, g0, history_f, history_g, schedule), done, to_f, to_g, to_epsilon, schedule)


def implicit(p: Problem, f: Tensor, g: Tensor, done: Tensor, to_f: Tensor, to_g: Tensor, to_epsilon: bool, schedule: Schedule) -> Pulled:
    """adjoint.implicit: a fixed number of conjugate gradients, three launches each, and one iteration's adjoint.

    The host does not learn when a problem has converged; its programs end at once from then on.
    """
    epsilon, once = effective_epsilon(p, schedule, done), Schedule(1, None, "log", None, None)
    q = p._replace(epsilon=epsilon)
    with torch.autocast(p.a.device.type, enabled=False):
        step = Step(q)
        _, new_g, lse = step(f, g, epsilon, fresh=True)  # by true maxima: rows and columns sum to 1 in this precision
        damp_b = damping(p.rho_b, epsilon)
        f_hat, g_hat = torch.where(lse == -torch.inf, f, -epsilon[:, None] * lse), new_g / damp_b

        def through(y: Tensor, plus: Tensor | None, active: Tensor | None) -> Tensor:
            x = _sums(step, step.rows, step.columns, p.a, f, g_hat, y, active)
            x = x if plus is None else plus - damp_b * x
            return _sums(step, step.columns, step.rows, p.b, g, f_hat, x, active)

        y = adjoint.conjugate_gradients(q, epsilon, g, g_hat, to_f, to_g, through, descended)
        vectors = (t[:, None].contiguous() for t in (f, f_hat, g, g, g_hat, epsilon, epsilon / p.epsilon))
        return _pulled(step, _Iterations(*vectors), torch.ones_like(done), to_f, y, to_epsilon, once)


def descended(system: adjoint.System, residual: Tensor, steps: int, readable: bool, through) -> Tensor:
    """adjoint.descended: a step's vectors in one launch beside the two of its product with both Jacobians."""
    from .conjugate_kernels import conjugate_step

    c, over_c, share, damp = (x.contiguous() if isinstance(x, Tensor) else x for x in system)
    batch, size = c.shape
    residual, solution, direction = residual.clone(memory_format=torch.contiguous_format), torch.zeros_like(c), over_c * residual
    sent, best, norm = c * direction, torch.zeros_like(c), (residual * direction).sum(-1)
    least, target = norm.clone(), adjoint.RESIDUAL[c.dtype] ** 2 * norm
    active, damp = norm > target, damp.flatten() if isinstance(damp, Tensor) else torch.full_like(norm, damp)
    block = min(32 if runtime.INTERPRETED else 2048, runtime.power_of_two(size))
    for _ in range(steps if batch else 0):
        if readable and not bool(active.any()):
            break
        through_both = through(sent, None, active)
        with torch.cuda.device_of(c):
            conjugate_step[(batch,)](
                through_both, c, over_c, c if share is None else share, damp, target, residual, solution, direction, sent, best,
                norm, least, active, size, PROJECT=share is not None, BLOCK=block, num_warps=8 if block > 1024 else 4,
            )  # fmt: skip
    return best


class _Iterations(NamedTuple):
    """What the reverse of every iteration needs: [B, T, n] of rows, [B, T, m] of columns, [B, T]."""

    f: Tensor
    f_hat: Tensor
    previous: Tensor
    g: Tensor
    g_hat: Tensor
    epsilon: Tensor
    share: Tensor  # d eps / d epsilon


def _iterations(p: Problem, g0: Tensor, f: Tensor, g: Tensor, schedule: Schedule) -> _Iterations:
    proximal = schedule.method == "proximal"
    epsilon = torch.stack([schedule.epsilon(p.epsilon, t + 1) for t in range(schedule.iterations)], 1)
    share = epsilon / p.epsilon[:, None] if proximal else (epsilon == p.epsilon[:, None]).to(epsilon.dtype)
    previous = torch.cat((g0[:, None], g[:, :-1]), 1)
    if proximal:
        older = torch.cat((torch.zeros_like(g[:, :1]), previous[:, :-1]), 1)
        starts = [schedule.start(t + 1) for t in range(schedule.iterations)]
        previous = torch.stack([now * previous[:, t] + before * older[:, t] for t, (now, before) in enumerate(starts)], 1)
    hats = (h if rho is None else h * ((rho + epsilon) / rho)[..., None] for h, rho in ((f, p.rho_a), (g, p.rho_b)))
    f_hat, g_hat = (h.contiguous() for h in hats)
    return _Iterations(f.contiguous(), f_hat, previous.contiguous(), g.contiguous(), g_hat, epsilon, share)


def _pulled(step: Step, at: _Iterations, done: Tensor, to_f: Tensor, to_g: Tensor, to_epsilon: bool, schedule: Schedule) -> Pulled:
    from . import adjoint_kernels as kernels

    p = step.p
    a, b, x, y = p.a.contiguous(), p.b.contiguous(), torch.empty_like(at.f), torch.empty_like(at.g)
    done, to_f, to_g, older = done.contiguous(), to_f.contiguous(), to_g.clone(memory_format=torch.contiguous_format), torch.zeros_like(b)
    to_a, to_b, epsilon_rows, epsilon_columns = (torch.zeros_like(t) for t in (a, b, a, b))

    def columns(t: int, *, through: bool) -> None:
        _launch(
            kernels.pull_columns, step, step.columns, step.rows, (b, a, at.epsilon, at.share),
            (at.g, at.g_hat, at.previous, at.f, at.f_hat, y, x, done, to_g, older, to_b, epsilon_columns, p.rho_b or 0.0),
            schedule.start(t + 1) if through else (0.0, 0.0), (t, schedule.iterations),
            RELAXED=p.rho_b is not None, STEEP=to_epsilon, THROUGH=through, NEXT=t > 0,
        )  # fmt: skip

    columns(schedule.iterations, through=False)
    for t in range(schedule.iterations - 1, -1, -1):
        _launch(
            kernels.pull_rows, step, step.rows, step.columns, (a, b, at.epsilon, at.share),
            (at.f, at.f_hat, at.previous, at.g_hat, x, y, done, to_f, to_a, epsilon_rows, p.rho_a or 0.0),
            (), (t, schedule.iterations), RELAXED=p.rho_a is not None, STEEP=to_epsilon,
        )  # fmt: skip
        columns(t, through=True)
    source = _given(step, at, a, b, x, y) if step.given else _of_points(p, at, x, y)
    return Pulled(*source, to_a, to_b, epsilon_rows.sum(-1) + epsilon_columns.sum(-1))


def _given(step: Step, at: _Iterations, a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p, none = step.p, a.new_empty(0)
    out = torch.empty_like(p.cost, memory_format=torch.contiguous_format)
    _entries(step, at, a, b, x, y, slice(0, a.shape[1]), out)
    return out, none, none.clone()


def _of_points(p: Problem, at: _Iterations, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx, dy = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (p.x, p.y))
    for lo, hi in blocks(p):
        block, q = slice(lo, hi), p.part(lo, hi)
        step, here = Step(q), _Iterations(*(t[block].contiguous() for t in at))
        for rows in row_tiles(q):
            w = q.a.new_empty(hi - lo, rows.stop - rows.start, q.b.shape[1])
            _entries(step, here, q.a.contiguous(), q.b.contiguous(), x[block].contiguous(), y[block].contiguous(), rows, w)
            of_rows = q.x[:, rows]
            dx[block, rows] = _pull(q, w, of_rows, q.y)
            dy[block] += _pull(q, w.mT, q.y, of_rows)
    return q.a.new_empty(0), dx, dy


def _entries(step: Step, at: _Iterations, a: Tensor, b: Tensor, x: Tensor, y: Tensor, rows: slice, out: Tensor) -> None:
    """The gradient in the cost of `rows` into out [B, r, m], or [r, m], the sum over the problems."""
    from . import adjoint_kernels as kernels

    total, size = out.dim() == 2, rows.stop - rows.start
    _launch(
        kernels.adjoint_entries, step, step.rows, step.columns, (a, b, at.epsilon),
        (at.f, at.f_hat, at.previous, at.g_hat, x, y, out), (), (rows.start, rows.stop, len(a), at.f.shape[1]),
        programs=lambda t: -(-size // t.rows) * -(-b.shape[1] // t.columns) * (1 if total else len(a)), TOTAL=total,
    )  # fmt: skip


def _pull(p: Problem, w: Tensor, points: Tensor, others: Tensor) -> Tensor:
    """The gradient [B, r, D] in `points` of the sum of W C, W [B, r, m], with metric "euclidean" divided by the cost."""
    from . import adjoint_kernels as kernels

    points, apart = points.contiguous(), p.direct
    values = others.contiguous() if apart else runtime.split(others, PARTS, 16).parts
    t, chunk = product_tiles(16), min(CHUNK, runtime.power_of_two(values.shape[-1]))
    batch, size, columns = w.shape
    out, mass = w.new_empty(batch, size, values.shape[-1]), w.new_empty(batch, size)
    programs = -(-size // t.rows) * -(-values.shape[-1] // chunk) * batch
    if programs:
        with torch.cuda.device_of(w):
            kernels.matrix_products[(programs,)](
                w, points, values, out, mass, *w.stride(), size, columns, values.shape[-1], APART=apart, CHUNK=chunk,
                ROWS=t.rows, COLUMNS=t.columns, INTERPRETED=runtime.INTERPRETED, num_warps=runtime.pipeline(t.warps, t.stages)["num_warps"],
            )  # fmt: skip
    return from_differences(p.metric, out) if apart else from_products(p.metric, points, out[..., : points.shape[-1]], mass)


def _sums(step: Step, mine: Side, others: Side, weight: Tensor, f: Tensor, g: Tensor, v: Tensor, active: Tensor | None) -> Tensor:
    """weight_i sum_j v_j exp((f_i + g_j - C_ij)/eps) [B, mine.size], with potentials of either side; 0 of problems not `active` [B]."""
    from . import adjoint_kernels as kernels

    out = torch.empty_like(f, memory_format=torch.contiguous_format)
    vectors = (weight.contiguous(), f.contiguous(), g.contiguous(), v.contiguous(), step.p.epsilon.contiguous())
    needed = torch.ones_like(step.p.epsilon, dtype=torch.bool) if active is None else active
    _launch(kernels.plan_sums, step, mine, others, vectors, (needed, out), (), ())
    return out


def _launch(kernel, step: Step, mine: Side, others: Side, before, after, scalars, sizes, *, programs=None, **constants) -> None:
    """A program for a tile of `mine`, a problem, or as many as programs(tiles); tensors `before` and `after` the counts of what is real."""
    p, width = step.p, 0 if step.given else mine.points.shape[-1]
    t = adjoint_tiles(step.flags, others.stride == 1, width, runtime.architecture(p.a.device.index or 0))
    points = (p.cost, mine.points, others.points, mine.square, others.square)
    count = -(-mine.size // t.rows) * len(p.a) if programs is None else programs(t)
    if count:
        with torch.cuda.device_of(p.a):
            kernel[(count,)](
                *(p.epsilon if x is None else x for x in (*points, *before, mine.count, others.count)), *after, *scalars,
                p.cost.stride(0) if step.given and p.cost.dim() == 3 else 0, mine.stride, others.stride, mine.size, others.size, width,
                *sizes, **step.flags, **constants, **t.options(PARTS),
            )  # fmt: skip
