"""What a solve returns."""

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast._core import checks

from . import autograd, graph, library
from .dual import dense_plan, dual
from .geometry import Problem
from .portable import Schedule

_REFUSALS = {
    "envelope": "grad='envelope' differentiates `value` alone; `{}` needs grad='implicit' or 'unrolled' (or .detach())",
    "detached": "grad='detached' differentiates `transport_cost` alone; `{}` needs grad='implicit' or 'unrolled' (or .detach())",
}


_FIELDS = ("f", "g", "value", "transport_cost", "epsilon", "iterations", "error", "converged", "state")


class PlanState(NamedTuple):
    """What the plan is made from; B is the flattened batch."""

    problem: Problem  # at the epsilon of the last iteration
    f: Tensor  # [B, n], as differentiable as `grad` makes it
    g: Tensor  # [B, m]
    batch: tuple[int, ...]
    grad: str
    inside: tuple[Tensor | None, Tensor | None]  # rows [B, n] and columns [B, m] that are not padding; None: all
    schedule: Schedule
    done: Tensor  # [B] int64


def _at_first_reading(make):
    """A property that make(self) gives when it is first read, with gradients if the solve had them."""

    @functools.wraps(make)
    def read(self):
        if make.__name__ not in self._made:
            with torch.set_grad_enabled(self._grad_enabled):
                self._made[make.__name__] = make(self)
        return self._made[make.__name__]

    return property(read)


class SinkhornResult:
    """The plan is P_ij = a_i b_j exp((f_i + g_j - C_ij)/epsilon); potentials are free up to one constant a problem when balanced.

    Statistics are float32 (float64 for float64 inputs). What is differentiable is said by `grad` of kdfast.ops.sinkhorn. plan(), apply(),
    apply_t(), and transport_cost and error when first read, take a pass over the cost: inputs or potentials that were changed in place by
    then raise RuntimeError. A sequence too, of f, g, value, transport_cost, epsilon, iterations, error, converged and state.
    """

    def __init__(self, state: PlanState, value: Tensor | None, marginals: tuple[Tensor, ...]):
        self.state = state  #: for plan(), apply(), apply_t()
        self._grad_enabled = torch.is_grad_enabled()
        self._versions = _versions(state)
        self._made = {}
        if value is not None:
            self._made["value"] = value if len(state.batch) == 1 else value.reshape(state.batch)
        if marginals:
            self._made["_marginals"] = marginals

    def __repr__(self) -> str:
        p, *_ = self.state
        return f"SinkhornResult({list(self.state.batch)} problems of {p.a.shape[1]} x {p.b.shape[1]}, grad={self.state.grad!r})"

    def __len__(self) -> int:
        return len(_FIELDS)

    def __getitem__(self, index: int | slice):
        names = _FIELDS[index]
        return getattr(self, names) if isinstance(names, str) else tuple(getattr(self, name) for name in names)

    @_at_first_reading
    def f(self) -> Tensor:
        """[*B, n], in units of the cost, finite at zero weights, 0 at padding."""
        return self._potential("f", self.state.f, self.state.inside[0])

    @_at_first_reading
    def g(self) -> Tensor:
        """[*B, m]."""
        return self._potential("g", self.state.g, self.state.inside[1])

    @_at_first_reading
    def value(self) -> Tensor:
        """[*B], the dual; with method="proximal" the transport cost."""
        p, f, g, batch, grad, *_ = self.state
        row, col, transport, _ = self._marginals
        if grad == "detached":
            found = transport if self._proximal else dual(p.detached, f, g, col)
            return self._refused("value", found).reshape(batch)
        if self._proximal:
            return self.transport_cost
        return graph.applied(autograd.DualValue, f, g, row, col, transport, *p.split).reshape(batch)

    @_at_first_reading
    def transport_cost(self) -> Tensor:
        """[*B], <P, C>."""
        p, f, g, batch, grad, *_ = self.state
        transport = self._marginals[2]
        if grad == "envelope":
            return self._refused("transport_cost", transport).reshape(batch)
        return graph.applied(autograd.TransportCost, f, g, transport, *p.split, grad == "detached").reshape(batch)

    @property
    def epsilon(self) -> Tensor:
        """[*B], that of the last iteration."""
        return self.state.problem.epsilon.detach().reshape(self.state.batch)

    @property
    def iterations(self) -> Tensor:
        """[*B] int64, done."""
        return self.state.done.reshape(self.state.batch)

    @property
    def error(self) -> Tensor:
        """[*B], L1 error of the row marginal."""
        return self._marginals[3].reshape(self.state.batch)

    @property
    def converged(self) -> Tensor | None:
        """[*B] bool, error within tol; None without tol."""
        schedule = self.state.schedule
        return None if schedule.tol is None else (self.error <= schedule.tol) | (self.iterations < schedule.iterations)

    def plan(self) -> Tensor:
        """P [*B, n, m]; this is where a tensor of that size is made."""
        self._unchanged("call plan()")
        p, f, g, batch, grad, (kept_rows, kept_cols), *_ = self.state
        if grad in ("implicit", "unrolled") and graph.followed(f, g, *p[:6]):
            plan = dense_plan(p, f, g)
        else:
            plan = library.plan(*(None if t is None else t.detach() for t in p[:8]), *p[8:], f.detach(), g.detach())
            if grad == "envelope":
                plan = self._refused("plan()", plan)
        if kept_rows is not None:  # zero as it is, but upstream gradients there may be NaN
            plan = torch.where(kept_rows[..., None] & kept_cols[:, None], plan, torch.zeros_like(plan))
        return plan.reshape(*batch, *plan.shape[1:])

    def apply(self, v: Tensor) -> Tensor:
        """P v [*B, n] or [*B, n, d] for v [*B, m] or [*B, m, d], in tiles; differentiable in v. Padding of v is not read.

        With grad="implicit" or "unrolled" also in what the plan depends on, for which the plan is formed; with
        "envelope" that raises in backward, with "detached" the plan is a constant.
        """
        return self._product(v, transpose=False)

    def apply_t(self, v: Tensor) -> Tensor:
        """P^T v [*B, m] or [*B, m, d] for v [*B, n] or [*B, n, d]; otherwise as apply."""
        return self._product(v, transpose=True)

    def check(self, stacklevel: int = 2) -> "SinkhornResult":
        """Warn (RuntimeWarning) about problems that did not reach `tol`. Reads `converged`: on a GPU this synchronises."""
        if self.converged is not None:
            failed = int((~self.converged).sum())
            if failed:
                worst = float(self.error.detach().max())
                warnings.warn(
                    f"sinkhorn: {failed} of {self.converged.numel()} problems did not reach tol={self.state.schedule.tol:g} in "
                    f"{int(self.iterations.max())} iterations (largest error {worst:.2g}): raise max_iters, tol or epsilon",
                    RuntimeWarning,
                    stacklevel=stacklevel,
                )
        return self

    @_at_first_reading
    def _marginals(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(row, col, transport, error) of a Solution, where the solver has not given them."""
        p, f, g, *_ = self.state
        self._unchanged("read its transport_cost and error")
        return graph.applied(autograd.Marginals, f, g, *p.split)

    def _unchanged(self, early: str) -> None:
        """Raises RuntimeError where something a pass reads is no longer what was solved; `early` is what to do before."""
        now = _versions(self.state)
        if None not in (now, self._versions) and now != self._versions:
            raise RuntimeError(f"inputs or potentials of the solve were changed in place: {early} before that")

    @property
    def _proximal(self) -> bool:
        return self.state.schedule.method == "proximal"

    def _potential(self, name: str, potential: Tensor, kept: Tensor | None) -> Tensor:
        potential = zero_outside(kept, self._refused(name, potential))
        return potential.reshape(*self.state.batch, potential.shape[1])

    def _refused(self, name: str, values: Tensor) -> Tensor:
        """`values`, whose use in a graph is an error where `grad` does not differentiate `name`."""
        if self.state.grad not in _REFUSALS:
            return values
        (values,) = graph.refuse((values,), (_REFUSALS[self.state.grad].format(name),), self.state.problem[:6])
        return values

    def _product(self, v: Tensor, *, transpose: bool) -> Tensor:
        self._unchanged("call apply_t()" if transpose else "call apply()")
        p, f, g, batch, grad, inside, *_ = self.state
        checks.alike("v", checks.floating("v", v), "the plan", p.a, dtype=False)
        size = (p.a if transpose else p.b).shape[1]
        vector = v.dim() == len(batch) + 1
        if v.shape[: len(batch) + 1] != (*batch, size) or v.dim() > len(batch) + 2:
            raise ValueError(f"v must have shape {(*batch, size)} or {(*batch, size, 'd')}, got {tuple(v.shape)}")
        columns = v.reshape(p.a.shape[0], size, 1 if vector else v.shape[-1]).to(p.a.dtype)
        kept_rows, kept_cols = reversed(inside) if transpose else inside
        columns = zero_outside(kept_cols, columns)
        follows = graph.followed(f, g, *p[:6])
        if follows and grad in ("implicit", "unrolled"):
            plan = dense_plan(p, f, g)
            product = (plan.mT if transpose else plan) @ columns
        else:
            fixed = (None if t is None else t.detach() for t in (f, g, *p[:8]))
            product = graph.applied(autograd.PlanProduct, columns, *fixed, p[8:], transpose)
            if follows and grad == "envelope":
                product = self._refused("apply()", product)
        product = zero_outside(kept_rows, product)  # zero as it is, but upstream gradients there may be NaN
        return product.reshape(*batch, product.shape[1], *v.shape[len(batch) + 1 :])


def _versions(state: PlanState) -> tuple[int, ...] | None:
    """How often the problem's tensors, f and g were written to, 0 where nobody counts; None in compiled code, which orders that itself."""
    if torch.compiler.is_compiling():
        return None
    return tuple(0 if t is None or t.is_inference() else t._version for t in (*state.problem[:8], state.f, state.g))


def zero_outside(kept: Tensor | None, t: Tensor) -> Tensor:
    """t [B, n] or [B, n, d], 0 where `kept` [B, n] is False, whatever stands there."""
    if kept is None:
        return t
    return torch.where(kept if t.dim() == 2 else kept[..., None], t, torch.zeros_like(t))
