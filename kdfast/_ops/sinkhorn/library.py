"""What is done to a Problem, as operators of torch.ops.kdfast_torch: opaque to torch.compile, which would unroll the iterations.

Every operator takes the fields of a Problem first, of which the last chooses the implementation; those that iterate take a Schedule's last.
"""

import functools

import torch
from torch import Tensor

from . import adjoint, cpu, cuda, portable, triton
from .geometry import Problem
from .portable import Schedule
from .triton import adjoint as triton_adjoint
from .triton import plan as triton_plan

_PROBLEM = (
    "Tensor? cost, Tensor? x, Tensor? y, Tensor a, Tensor b, Tensor epsilon, Tensor? rows, Tensor? cols, "
    "str metric, float? rho_a, float? rho_b, str impl"
)
_SCHEDULE = "int iterations, float? tol, str method, float? anneal_start, float? anneal_factor"
_FIELDS = len(Problem._fields)

_library = torch.library.Library("kdfast_torch", "FRAGMENT")


def _define(name: str, arguments: str, outputs: int, run, shapes) -> None:
    returned = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    _library.define(f"{name}({arguments}) -> {returned}")
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kdfast_torch::{name}", shapes, lib=_library)
    torch.library.register_vmap(f"kdfast_torch::{name}", functools.partial(_fold, name), lib=_library)


def _fold(name: str, info, in_dims, *args):
    """The vmap rule: V batches of B problems are V B problems. A shared cost stays shared unless its gradient is wanted."""
    dims, size, batch = in_dims, info.batch_size, args[5].shape[0 if in_dims[5] is None else in_dims[5] - 1]
    shared = args[0] is not None and args[0].dim() - (dims[0] is not None) == 2
    pulls = name in ("sinkhorn_plan_gradient", "sinkhorn_replay", "sinkhorn_implicit")
    folded = []
    for i, (t, dim) in enumerate(zip(args, dims, strict=True)):
        if not isinstance(t, Tensor) or (i == 0 and shared and dim is None and not pulls):
            folded.append(t)
            continue
        t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        if i == 0 and shared:
            t = t[:, None].expand(size, batch, *t.shape[1:])
        folded.append(t.reshape(size * batch, *t.shape[2:]))
    outputs = getattr(torch.ops.kdfast_torch, name)(*folded)
    single = isinstance(outputs, Tensor)
    split = [
        t if t.dim() == 1 and t.numel() == 0 and size * batch else t.unflatten(0, (size, batch))
        for t in ((outputs,) if single else outputs)
    ]
    if pulls and shared:
        split[0] = split[0].sum(1)
    out_dims = tuple(None if t.dim() == 1 else 0 for t in split)
    return (split[0], out_dims[0]) if single else (tuple(split), out_dims)


def _solve(*args):
    p, g, schedule, history = Problem(*args[:_FIELDS]), args[_FIELDS], Schedule(*args[_FIELDS + 1 : -1]), args[-1]
    return tuple({"cpu": cpu, "cuda": cuda, "triton": triton}.get(p.impl, portable).solve(p, g, schedule, history))


def _iterate(*args):
    p, g, (iterations, method, start, factor), history = Problem(*args[:_FIELDS]), args[_FIELDS], args[_FIELDS + 1 : -1], args[-1]
    return tuple(cpu.iterate(p, g, Schedule(iterations, None, method, start, factor), history))


def _iterate_shapes(*args):
    f, g, *_, count, history_f, history_g = _solve_shapes(*args)
    return f, g, count, history_f, history_g


def _marginals(*args):
    return tuple(cpu.marginals(Problem(*args[:_FIELDS]), *args[_FIELDS:]))


def _marginals_shapes(*args):
    p = Problem(*args[:_FIELDS])
    return tuple(torch.empty_like(s) for s in (p.a, p.b, p.epsilon, p.epsilon))


def _costs(*args):
    p = Problem(*args[:_FIELDS])
    return (triton if p.impl == "triton" else cpu).costs(p, *args[_FIELDS:])


def _costs_shapes(*args):
    b, (begin, end) = args[4], args[-2:]
    return b.new_empty(b.shape[0], end - begin, b.shape[1])


def _solve_shapes(*args):
    p, length = Problem(*args[:_FIELDS]), args[_FIELDS + 1] if args[-1] else 0
    a, b, eps = p.a, p.b, p.epsilon
    count = torch.empty_like(eps, dtype=torch.int64)
    histories = (s.new_empty(s.shape[0], length, s.shape[1]) for s in (a, b))
    return (*(torch.empty_like(s) for s in (a, b, a, b, eps, eps)), count, *histories)


def _source_shapes(p: Problem) -> tuple[Tensor, ...]:
    return tuple(p.a.new_empty(0) if s is None else s.new_empty(s.shape) for s in (p.cost, p.x, p.y))


def _plans(p: Problem):
    """The module that makes plans of `p`."""
    return cpu if p.impl == "cpu" else triton_plan if triton_plan.serves(p) else adjoint


def _plan(*args):
    p = Problem(*args[:_FIELDS])
    return _plans(p).plan(p, *args[_FIELDS:])


def _plan_shapes(*args):
    p = Problem(*args[:_FIELDS])
    return p.a.new_empty(*p.a.shape, p.b.shape[1])


def _plan_gradient(*args):
    p = Problem(*args[:_FIELDS])
    return tuple(_plans(p).plan_gradient(p, *args[_FIELDS:]))


def _plan_gradient_shapes(*args):
    p = Problem(*args[:_FIELDS])
    return (*_source_shapes(p), *(s.new_empty(0 if args[-1] is None else s.shape) for s in (p.a, p.b, p.epsilon)))


def _apply_plan(*args):
    p = Problem(*args[:_FIELDS])
    return _plans(p).apply_plan(p, *args[_FIELDS:])


def _apply_plan_shapes(*args):
    p, v, transpose = Problem(*args[:_FIELDS]), args[-2], args[-1]
    return p.a.new_empty(*(p.b if transpose else p.a).shape, v.shape[-1])


def _adjoints(p: Problem):
    """The module that takes gradients of potentials of `p`."""
    return cpu if p.impl == "cpu" else triton_adjoint if triton_plan.serves(p) else adjoint


def _replay(*args):
    p = Problem(*args[:_FIELDS])
    return tuple(_adjoints(p).replay(p, *args[_FIELDS:-5], Schedule(*args[-5:])))


def _implicit(*args):
    p = Problem(*args[:_FIELDS])
    return tuple(_adjoints(p).implicit(p, *args[_FIELDS:-5], Schedule(*args[-5:])))


def _pulled_shapes(*args):
    p = Problem(*args[:_FIELDS])
    return (*_source_shapes(p), *(torch.empty_like(s) for s in (p.a, p.b, p.epsilon)))


_define("sinkhorn_solve", f"{_PROBLEM}, Tensor g, {_SCHEDULE}, bool history", 9, _solve, _solve_shapes)
_define(
    "sinkhorn_iterate",
    f"{_PROBLEM}, Tensor g, int iterations, str method, float? anneal_start, float? anneal_factor, bool history",
    5,
    _iterate,
    _iterate_shapes,
)
_define("sinkhorn_marginals", f"{_PROBLEM}, Tensor f, Tensor g", 4, _marginals, _marginals_shapes)
_define("sinkhorn_costs", f"{_PROBLEM}, int begin, int end", 1, _costs, _costs_shapes)
_define("sinkhorn_plan", f"{_PROBLEM}, Tensor f, Tensor g", 1, _plan, _plan_shapes)
_define("sinkhorn_plan_gradient", f"{_PROBLEM}, Tensor f, Tensor g, Tensor w0, Tensor? w1", 6, _plan_gradient, _plan_gradient_shapes)
_define("sinkhorn_apply_plan", f"{_PROBLEM}, Tensor f, Tensor g, Tensor v, bool transpose", 1, _apply_plan, _apply_plan_shapes)
_define(
    "sinkhorn_replay",
    f"{_PROBLEM}, Tensor g0, Tensor history_f, Tensor history_g, Tensor done, Tensor to_f, Tensor to_g, bool to_epsilon, {_SCHEDULE}",
    6,
    _replay,
    _pulled_shapes,
)
_define(
    "sinkhorn_implicit",
    f"{_PROBLEM}, Tensor f, Tensor g, Tensor done, Tensor to_f, Tensor to_g, bool to_epsilon, {_SCHEDULE}",
    6,
    _implicit,
    _pulled_shapes,
)

solve = torch.ops.kdfast_torch.sinkhorn_solve.default
iterate = torch.ops.kdfast_torch.sinkhorn_iterate.default
marginals = torch.ops.kdfast_torch.sinkhorn_marginals.default
plan = torch.ops.kdfast_torch.sinkhorn_plan.default
plan_gradient = torch.ops.kdfast_torch.sinkhorn_plan_gradient.default
apply_plan = torch.ops.kdfast_torch.sinkhorn_apply_plan.default
replay = torch.ops.kdfast_torch.sinkhorn_replay.default
implicit = torch.ops.kdfast_torch.sinkhorn_implicit.default


def run(cost, x, y, a, b, epsilon, rows, cols, static, g0, schedule, history: bool) -> tuple[Tensor, ...]:
    """(f, g, done, history_f, history_g) of a solve, and its (row, col, transport, error) unless these, which take a pass of their own,
    are to be had from `marginals` by those who need them."""
    problem, schedule = (cost, x, y, a, b, epsilon, rows, cols, *static), Schedule(*schedule)
    if static[-1] == "cpu" and schedule.tol is None and schedule.method != "proximal":
        return iterate(*problem, g0, schedule.iterations, schedule.method, schedule.anneal_start, schedule.anneal_factor, history)
    f, g, row, col, transport, error, *rest = solve(*problem, g0, *schedule, history)
    return f, g, *rest, row, col, transport, error
