"""impl="cpu": the fused C++ kernels (csrc/cpu/sinkhorn/sinkhorn.inl), with the signatures of portable.py and adjoint.py."""

import functools

import torch
from torch import Tensor

from kdfast._core import extension

from . import adjoint
from .adjoint import Moments, Pulled
from .geometry import Gradients, Problem, blocks, damping, row_tiles
from .portable import Schedule, Solution, effective_epsilon

#: What normalize takes: sixteen such matrices and their gradients stay in L2.
NORMALIZED_ENTRIES = 4096
#: Nats up to which rows and columns of a plan are rescaled; beyond, relaxed rows hold so little mass that they take maxima of their own.
RESCALED = 30.0
#: Entries n m up to which gradients through iterations form the cost of points: in float32 256 MiB, and as much for the gradient in it.
#: Formed anew tile by tile they take 15 forwards in place of one, and glibc's heap fragments under the tiles: 4 n m more an iteration.
FORMED = 2**26


def missing() -> str | None:
    """Why the kernels are not on this machine (None: they are)."""
    return extension.missing_cpu()


def refuses(*, device_type: str = "cpu", **_facts) -> str | None:
    """Why they cannot serve a call on this device type (None: they can)."""
    return None if device_type == "cpu" else f"it runs on CPU tensors, these are on {device_type}"


def solve(p: Problem, g: Tensor, schedule: Schedule, history: bool) -> Solution:
    """Run `schedule` on every problem from column potentials g [B, m]. Weights below 1.2e-38 (2.2e-308) count as zero."""
    return Solution(*torch.ops.kdfast.sinkhorn_solve(*_fields(p), g.contiguous(), *schedule, history))


def iterate(p: Problem, g: Tensor, schedule: Schedule, history: bool) -> tuple[Tensor, ...]:
    """(f, g, done, history_f, history_g) of solve, without tolerance: what the potentials make is left to `marginals`."""
    iterations, _, *rest = schedule
    return torch.ops.kdfast.sinkhorn_iterate(*_fields(p), g.contiguous(), iterations, *rest, history)


def marginals(p: Problem, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row, col, transport, error) of a Solution with potentials f [B, n] and g [B, m], in one pass over the cost."""
    return torch.ops.kdfast.sinkhorn_marginals(*_fields(p), f.contiguous(), g.contiguous())


def costs(p: Problem, begin: int, end: int) -> Tensor:
    """C[:, begin:end] [B, r, m] of points, to the bit as every kernel forms it."""
    return torch.ops.kdfast.sinkhorn_plan(*_fields(p), None, None, None, None, False, begin, end)[0]


def plan_gradient(p: Problem, f: Tensor, g: Tensor, w0: Tensor, w1: Tensor | None) -> Moments:
    """adjoint.plan_gradient, in one pass over the cost."""
    if p.cost is not None:
        gradient, *moments = _plan(p, f, g, w0, w1, 0, p.a.shape[1], total=p.cost.dim() == 2)
        return Moments(gradient.to(p.cost.dtype), p.a.new_empty(0), p.a.new_empty(0), *moments)
    arguments = (None if t is None else t.contiguous() for t in (f, g, w0, w1))
    return Moments(p.a.new_empty(0), *torch.ops.kdfast.sinkhorn_pull(*_fields(p), *arguments))


def plan(p: Problem, f: Tensor, g: Tensor) -> Tensor:
    """adjoint.plan."""
    return _plan(p, f, g, torch.ones_like(p.epsilon), None, 0, p.a.shape[1])[0]


def apply_plan(p: Problem, f: Tensor, g: Tensor, v: Tensor, transpose: bool) -> Tensor:
    """adjoint.apply_plan."""
    out = v.new_zeros(*(p.b if transpose else p.a).shape, v.shape[-1])
    with torch.autocast("cpu", enabled=False):
        for block, rows, plan in _plan_tiles(p, f, g):
            if transpose:
                out[block] += plan.mT @ v[block, rows]
            else:
                out[block, rows] = plan @ v[block]
    return out


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
    """adjoint.replay, of points where their cost may be formed."""
    per_problem = (g0, history_f, history_g, done, to_f, to_g)
    if p.cost is None and p.a.shape[1] * p.b.shape[1] > FORMED:
        return adjoint.replay(p, *per_problem, to_epsilon, schedule)
    if p.cost is None or p.cost.dim() == 3:
        pulled = Pulled(*_replayed(p, *per_problem, to_epsilon, schedule))
        return pulled if p.cost is None else pulled._replace(cost=pulled.cost.to(p.cost.dtype))
    parts, pieces = Gradients(p), []
    for lo, hi in blocks(p):
        block = slice(lo, hi)
        given = p.part(lo, hi)._replace(cost=p.cost.expand(hi - lo, *p.cost.shape))
        w, _, _, *rest = _replayed(given, *(t[block] for t in per_problem), to_epsilon, schedule)
        with torch.autocast("cpu", enabled=False):
            parts.add(p, block, slice(None), w, p.cost)
        pieces.append(rest)
    return Pulled(*parts.outputs(p), *(torch.cat(part) for part in zip(*pieces, strict=True)))


def implicit(p: Problem, f: Tensor, g: Tensor, done: Tensor, to_f: Tensor, to_g: Tensor, to_epsilon: bool, schedule: Schedule) -> Pulled:
    """adjoint.implicit by one pass over the cost a step of conjugate gradients, all problems at once."""
    epsilon = effective_epsilon(p, schedule, done)
    q, once = p._replace(epsilon=epsilon), Schedule(1, None, "log", None, None)
    # from g alone: with its potentials over lambda, rows and columns sum to 1 in this precision
    f_new, g_new, _, history_f, history_g = iterate(q, g, once, True)
    damp_b, g_hat = damping(p.rho_b, epsilon), g_new / damping(p.rho_b, epsilon)
    # A is B with its rows and columns rescaled
    rows, columns = (f_new / damping(p.rho_a, epsilon) - f_new) / epsilon[:, None], (g - g_hat) / epsilon[:, None]
    relaxed = p.rho_a is not None or p.rho_b is not None
    if relaxed and not (p.readable and _within(rows) and _within(columns)):
        return adjoint.implicit(p, f, g, done, to_f, to_g, to_epsilon, schedule)
    row_factor, col_factor = rows.exp(), p.b * columns.exp()

    def through(y: Tensor, plus: Tensor | None, _active: Tensor | None) -> Tensor:
        plus, weight = (torch.zeros_like(p.a), p.a) if plus is None else (plus, -damp_b * p.a)
        return col_factor * _product(q, f_new, g_hat, y, row_factor * plus, row_factor * weight)

    with torch.autocast("cpu", enabled=False):
        y = adjoint.conjugate_gradients(q, epsilon, g, g_hat, to_f, to_g, through)
    pulled = replay(q, g, history_f, history_g, torch.ones_like(done), to_f, y, to_epsilon, once)
    return pulled._replace(epsilon=pulled.epsilon * (epsilon / p.epsilon))


def _within(nats: Tensor) -> bool:
    return nats.numel() == 0 or bool(nats.abs().max() <= RESCALED)


def _product(p: Problem, f: Tensor, g: Tensor, *arguments: Tensor) -> Tensor:
    """sum_i E_ij (plus_i + factor_i sum_j E_ij v_j) [B, m] for v [B, m], plus and factor [B, n], E at potentials f and g."""
    return torch.ops.kdfast.sinkhorn_product(*_fields(p), f, g, *(t.contiguous() for t in arguments))


def _replayed(p: Problem, *arguments) -> tuple[Tensor, ...]:
    *tensors, to_epsilon, schedule = arguments
    return torch.ops.kdfast.sinkhorn_replay(*_fields(p), *(t.contiguous() for t in tensors), to_epsilon, *schedule)


def assign_pass(scores: Tensor, v: Tensor | None, inverse: Tensor, *, codes: bool) -> Tensor:
    """One pass of assign.py over scores [B, N, K], v [B, K], inverse []."""
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    return torch.ops.kdfast.sinkhorn_assign(scores, v, inverse, codes)


def assign(scores: Tensor, inverse: Tensor, iters: int) -> Tensor:
    """assign.py's codes of one process, every pass in one call: from stored exponentials where their range allows."""
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    return torch.ops.kdfast.sinkhorn_codes(scores, inverse, iters)


def normalize(logits: Tensor, gradient: Tensor | None, iters: int, eps: float) -> Tensor:
    """normalize.py's iterations on logits [B, n, n], or their gradient in the logits from `gradient` [B, n, n]."""
    return torch.ops.kdfast.sinkhorn_normalize(logits.contiguous(), None if gradient is None else gradient.contiguous(), iters, eps)


def _plan_tiles(p: Problem, f: Tensor, g: Tensor):
    """(problems, rows, the plan there) in pieces that stay in cache."""
    for lo, hi in blocks(p):
        block, q = slice(lo, hi), p.part(lo, hi)
        for rows in row_tiles(q):
            yield block, rows, _plan(q, f[block], g[block], torch.ones_like(q.epsilon), None, rows.start, rows.stop)[0]


def _plan(
    p: Problem,
    f: Tensor,
    g: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    begin: int,
    end: int,
    *,
    total: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of (weight + slope C) P [B, r, m], or their sum over the problems [r, m]; with a slope then
    the moments of adjoint.Moments over these rows."""
    arguments = (None if t is None else t.contiguous() for t in (f, g, weight, slope))
    return torch.ops.kdfast.sinkhorn_plan(*_fields(p), *arguments, total, begin, end)


def _fields(p: Problem) -> tuple:
    cost = p.cost if p.cost is None or p.cost.stride(-1) == 1 else p.cost.contiguous()
    return cost, *(None if t is None else t.contiguous() for t in p[1:8]), p.metric, p.rho_a, p.rho_b


def _solve_shapes(cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b, g, iterations, *schedule_and_history):
    steps = iterations if schedule_and_history[-1] else 0
    count = torch.empty_like(epsilon, dtype=torch.int64)
    histories = (s.new_empty(s.shape[0], steps, s.shape[1]) for s in (a, b))
    return (*(torch.empty_like(s) for s in (a, b, a, b, epsilon, epsilon)), count, *histories)


def _iterate_shapes(*args):
    f, g, *_, count, history_f, history_g = _solve_shapes(*args)
    return f, g, count, history_f, history_g


def _marginals_shapes(cost, x, y, a, b, epsilon, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(s) for s in (a, b, epsilon, epsilon))


def _plan_shapes(cost, x, y, a, b, epsilon, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slope, total, begin, end = rest[-4:]
    moments = ((b.shape[0], end - begin), b.shape, epsilon.shape)
    return (
        b.new_empty(*(() if total else b.shape[:1]), end - begin, b.shape[1]),
        *(b.new_empty(0 if slope is None else shape) for shape in moments),
    )


def _product_shapes(cost, x, y, a, b, *rest) -> Tensor:
    return torch.empty_like(b)


def _pulled_shapes(x: Tensor | None, y: Tensor | None, a: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(a.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, y))


def _pull_shapes(cost, x, y, a, b, epsilon, *rest) -> tuple[Tensor, ...]:
    moments = (t.new_empty(0 if rest[-1] is None else t.shape) for t in (a, b, epsilon))
    return *_pulled_shapes(x, y, a), *moments


def _replay_shapes(cost, x, y, a, b, epsilon, *rest) -> tuple[Tensor, ...]:
    to_cost = a.new_empty(0) if cost is None else a.new_empty(*a.shape, b.shape[1])
    return to_cost, *_pulled_shapes(x, y, a), torch.empty_like(a), torch.empty_like(b), torch.empty_like(epsilon)


def assign_shapes(scores: Tensor, v, inverse: Tensor, codes: bool) -> Tensor:
    batch, n, k = scores.shape
    return inverse.new_empty((batch, n, k) if codes else (batch, k))


def _codes_shapes(scores: Tensor, inverse: Tensor, iterations: int) -> Tensor:
    return inverse.new_empty(scores.shape)


def normalize_shapes(logits: Tensor, gradient, iterations: int, eps: float) -> Tensor:
    return torch.empty_like(logits)


def fold_normalize(op, info, in_dims, logits: Tensor, gradient: Tensor | None, iterations: int, eps: float):
    """The vmap rule: V batches of B matrices are V B matrices."""
    sources = [
        t if t is None else (t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0))
        for t, dim in zip((logits, gradient), in_dims, strict=False)
    ]
    shape = sources[0].shape
    folded = (None if t is None else t.reshape(shape[0] * shape[1], *shape[2:]) for t in sources)
    return op(*folded, iterations, eps).reshape(shape), 0


if missing() is None:
    torch.library.register_fake("kdfast::sinkhorn_solve", _solve_shapes)
    torch.library.register_fake("kdfast::sinkhorn_iterate", _iterate_shapes)
    torch.library.register_fake("kdfast::sinkhorn_marginals", _marginals_shapes)
    torch.library.register_fake("kdfast::sinkhorn_plan", _plan_shapes)
    torch.library.register_fake("kdfast::sinkhorn_product", _product_shapes)
    torch.library.register_fake("kdfast::sinkhorn_pull", _pull_shapes)
    torch.library.register_fake("kdfast::sinkhorn_replay", _replay_shapes)
    torch.library.register_fake("kdfast::sinkhorn_assign", assign_shapes)
    torch.library.register_fake("kdfast::sinkhorn_codes", _codes_shapes)
    torch.library.register_fake("kdfast::sinkhorn_normalize", normalize_shapes)
    torch.library.register_vmap("kdfast::sinkhorn_normalize", functools.partial(fold_normalize, normalize))
