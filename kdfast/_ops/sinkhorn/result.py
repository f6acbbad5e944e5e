"""What a solve returns."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast._core import checks

from . import autograd, library
from .geometry import Problem

_REFUSALS = {
    "envelope": "grad='envelope' differentiates `value` alone; `{}` needs grad='implicit' or 'unrolled' (or .detach())",
    "detached": "grad='detached' differentiates `transport_cost` alone; `{}` needs grad='implicit' or 'unrolled' (or .detach())",
}


class PlanState(NamedTuple):
    """What the plan is made from; B is the flattened batch."""

    problem: Problem  # at the epsilon of the last iteration
    f: Tensor  # [B, n], as differentiable as `grad` makes it
    g: Tensor  # [B, m]
    batch: tuple[int, ...]
    grad: str
    tol: float | None
    inside: tuple[Tensor | None, Tensor | None]  # rows [B, n] and columns [B, m] that are not padding; None: all


class SinkhornResult(NamedTuple):
    """The plan is P_ij = a_i b_j exp((f_i + g_j - C_ij)/epsilon); potentials are free up to one constant a problem when balanced.

    Statistics are float32 (float64 for float64 inputs). What is differentiable is said by `grad` of kdfast.ops.sinkhorn.
    """

    f: Tensor  #: [*B, n], in units of the cost, finite at zero weights, 0 at padding
    g: Tensor  #: [*B, m]
    value: Tensor  #: [*B], the dual; with method="proximal" the transport cost
    transport_cost: Tensor  #: [*B], <P, C>
    epsilon: Tensor  #: [*B], that of the last iteration
    iterations: Tensor  #: [*B] int64, done
    error: Tensor  #: [*B], L1 error of the row marginal
    converged: Tensor | None  #: [*B] bool, error within tol; None without tol
    state: PlanState  #: for plan(), apply(), apply_t()

    def plan(self) -> Tensor:
        """P [*B, n, m]; this is where a tensor of that size is made."""
        p, f, g, batch, grad, _, (kept_rows, kept_cols) = self.state
        if grad in ("implicit", "unrolled") and autograd.followed(f, g, *p[:6]):
            plan = autograd.dense_plan(p, f, g)
        else:
            plan = library.plan(*(None if t is None else t.detach() for t in p[:8]), *p[8:], f.detach(), g.detach())
            if grad == "envelope":
                (plan,) = autograd.refuse((plan,), (refusal(grad, "plan()"),), p[:6])
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
                    f"sinkhorn: {failed} of {self.converged.numel()} problems did not reach tol={self.state.tol:g} in "
                    f"{int(self.iterations.max())} iterations (largest error {worst:.2g}): raise max_iters, tol or epsilon",
                    RuntimeWarning,
                    stacklevel=stacklevel,
                )
        return self

    def _product(self, v: Tensor, *, transpose: bool) -> Tensor:
        p, f, g, batch, grad, _, inside = self.state
        checks.alike("v", checks.floating("v", v), "the plan", p.a, dtype=False)
        size = (p.a if transpose else p.b).shape[1]
        vector = v.dim() == len(batch) + 1
        if v.shape[: len(batch) + 1] != (*batch, size) or v.dim() > len(batch) + 2:
            raise ValueError(f"v must have shape {(*batch, size)} or {(*batch, size, 'd')}, got {tuple(v.shape)}")
        columns = v.reshape(p.a.shape[0], size, 1 if vector else v.shape[-1]).to(p.a.dtype)
        kept_rows, kept_cols = reversed(inside) if transpose else inside
        columns = zero_outside(kept_cols, columns)
        follows = autograd.followed(f, g, *p[:6])
        if follows and grad in ("implicit", "unrolled"):
            plan = autograd.dense_plan(p, f, g)
            product = (plan.mT if transpose else plan) @ columns
        else:
            fixed = (None if t is None else t.detach() for t in (f, g, *p[:8]))
            product = autograd.applied(autograd.PlanProduct, columns, *fixed, p[8:], transpose)
            if follows and grad == "envelope":
                (product,) = autograd.refuse((product,), (refusal(grad, "apply()"),), p[:6])
        product = zero_outside(kept_rows, product)  # zero as it is, but upstream gradients there may be NaN
        return product.reshape(*batch, product.shape[1], *v.shape[len(batch) + 1 :])


def refusal(grad: str, name: str) -> str:
    return _REFUSALS[grad].format(name)


def zero_outside(kept: Tensor | None, t: Tensor) -> Tensor:
    """t [B, n] or [B, n, d], 0 where `kept` [B, n] is False, whatever stands there."""
    if kept is None:
        return t
    return torch.where(kept if t.dim() == 2 else kept[..., None], t, torch.zeros_like(t))
