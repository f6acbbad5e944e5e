"""Entropic optimal transport: batched Sinkhorn iterations, differentiable in four ways. README.md has the mathematics."""

import torch
from torch import Tensor

from kdfast._core import checks, impls
from kdfast._core import precision as precisions
from kdfast._core.dtypes import full_precision

from . import arguments, cpu, cuda, triton
from .autograd import Potentials
from .envelope import EnvelopeValue
from .geometry import Problem
from .graph import applied, followed
from .portable import effective_epsilon
from .result import PlanState, SinkhornResult

__all__ = ["SinkhornResult", "sinkhorn"]

GRADS = ("envelope", "implicit", "unrolled", "detached")

_HERE = (("cpu", cpu), ("cuda", cuda), ("triton", triton))
impls.register("sinkhorn", *(impls.Implementation(name, m.missing, m.refuses) for name, m in _HERE))


def sinkhorn(
    cost: Tensor | None = None,
    *,
    x: Tensor | None = None,
    y: Tensor | None = None,
    metric="sqeuclidean",
    a: Tensor | None = None,
    b: Tensor | None = None,
    epsilon: float | Tensor = 0.05,
    max_iters: int = 100,
    tol: float | None = None,
    rho=None,
    lengths: tuple[Tensor, Tensor] | None = None,
    init: tuple[Tensor, Tensor] | None = None,
    anneal: tuple[float, float] | None = None,
    method: str = "auto",
    grad: str = "envelope",
    precision: str | None = None,
    impl: str | None = None,
) -> SinkhornResult:
    """Solve min_P <P, C> + epsilon KL(P | a b^T) with marginals a and b, for a batch of problems.

    The plan is P_ij = a_i b_j exp((f_i + g_j - C_ij)/epsilon); value is the dual, for fixed marginals
    <f, a> + <g, b> - epsilon (sum P - sum a sum b), so that dvalue/dC = P, dvalue/da = f and dvalue/db = g up to one
    constant a problem. One iteration updates f, then g. Works in float32 (float64 for float64), under autocast too.

    Args:
        cost: [*B, n, m], or [n, m] shared by all problems. +inf forbids a pair; a fixed marginal with weight needs one that is allowed.
        x, y: points [*B, n, D] and [*B, m, D] in place of `cost`, of one dtype (any under autocast); memory then grows with (n + m) D,
            but on the CPU grad="implicit" and "unrolled" form costs of n m <= 2^26.
        metric: "sqeuclidean" (|x - y|^2, no 1/2), "euclidean" (gradient 0 at distance 0), "cosine" (1 - cos), or a
            callable (x, y) -> cost, which is evaluated once.
        a, b: weights [*B, n], [*B, m] >= 0, by default uniform. Zeros are allowed; potentials are finite there. Fixed
            marginals of unequal mass have no solution; this is not checked.
        epsilon: float or tensor [*B], in units of the cost. With method="proximal" IPOT's beta.
        max_iters: iterations, exactly this many when `tol` is None.
        tol: stop a problem when the L1 error of its row marginal is at most this. On the CPU the loop ends when all
            problems have stopped, and a RuntimeWarning counts those that did not; on a GPU nothing synchronises: call
            result.check() to be warned.
        rho: None for fixed marginals; a float, or (rho_a, rho_b) with None on either side, relaxes them by rho KL
            (Chizat et al. 2018).
        lengths: (n_i, m_i), integer tensors [*B]: the rest of each problem is padding, neither read nor given gradient.
        init: (f, g) [*B, n], [*B, m] to start from (g is what matters), without gradient.
        anneal: (epsilon_start, factor): iteration t runs at max(epsilon, epsilon_start factor^t), the last at epsilon.
        method: "log" (no n x m buffer for a given cost, on the CPU none beyond 256 KiB; the last iteration is of the
            cost itself); "kernel" (one n x m scratch, quicker; on the CPU at most 64 MiB of it stay for the next call,
            kdfast._C.release_scratch() frees them); "auto" ("kernel" where the scratch fits in cache); "proximal"
            (IPOT, Xie et al. 2020: one Sinkhorn iteration a step at epsilon/step, which tends to unregularised
            transport; value is the transport cost).
        grad: "envelope": `value` only, exact at convergence; the other outputs raise RuntimeError in backward.
            "implicit": every output, by the fixed point's linear system, exact at convergence. "unrolled": every
            output, exact for any number of iterations. "detached": `transport_cost` with P taken as constant.
            Second derivatives: those of `value` under "envelope", exact at convergence alone; all others raise
            RuntimeError.
        precision: "bf16" rounds the centred points. Otherwise their products are as exact as float32's in the compiled kernels;
            impl="torch" makes them as PyTorch's matmuls are set to on a GPU (TF32 costs about 1e-3 of the cost's range), in
            float32 on the CPU.
        impl: None, "cpu", "cuda", "triton" or "torch".

    Returns: SinkhornResult: f, g, value, transport_cost, epsilon, iterations, error, converged, plan(), apply(v),
        apply_t(v), check(). On the CPU transport_cost and error take a pass over the cost, made when one of them is first read.

    Raises: ValueError, TypeError naming the argument.

    Source: Cuturi 2013; the log-domain form of Schmitzer 2019; derivatives: README.md of this family.
    """
    checks.choice("grad", grad, GRADS)
    schedule = arguments.schedule(max_iters, tol, method, anneal)
    rho = arguments.marginal_penalties(rho, method)
    arguments.source(cost, x, y, metric)
    y, b = _apart(x, y), _apart(a, b)
    device_type = (cost if cost is not None else x).device.type
    impl = impls.choose("sinkhorn", impl, **_facts(cost, x, y, metric, method, tol))
    precision = precisions.resolve(precision, device_type)
    with full_precision(x if cost is None else cost):
        p, batch, inside = arguments.problem(cost, x, y, metric, a, b, epsilon, rho, lengths, precision, impl)
        g0 = _start(init, p, batch, inside[1], method)
        result = _solve(p, g0, schedule, grad, batch, inside)
    if tol is not None and device_type == "cpu" and not torch.compiler.is_compiling() and checks.readable(result.error.detach()):
        result.check(stacklevel=3)
    return result


def _apart(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """`second`, as a tensor of its own: Dynamo takes none twice as an input of one autograd Function."""
    return second.view_as(second) if second is first and isinstance(second, Tensor) else second


def _facts(cost, x, y, metric, method: str, tol) -> dict:
    """What the choice of an implementation looks at."""
    first = cost if cost is not None else x
    facts = {"device_type": first.device.type, "dtype": first.dtype, "points": cost is None and not callable(metric)}
    facts["size"] = tuple(cost.shape[-2:]) if cost is not None else (x.shape[-2], y.shape[-2])
    return {**facts, "method": method, "tol": tol}


def _start(init, p: Problem, batch: tuple[int, ...], inside: Tensor | None, method: str) -> Tensor:
    """Column potentials [B, m] to start from: an iteration recomputes f from g."""
    if init is None:
        return torch.zeros_like(p.b)
    if method == "proximal":
        raise ValueError("init must be None with method='proximal'")
    if not isinstance(init, (tuple, list)) or len(init) != 2:
        raise TypeError(f"init must be a pair of potentials (f, g), got {type(init).__name__}")
    for name, potential, size in (("init[0]", init[0], p.a.shape[1]), ("init[1]", init[1], p.b.shape[1])):
        checks.exact_shape(name, checks.floating(name, potential), (*batch, size))
        checks.alike(name, potential, "the cost", p.b, dtype=False)
    g = init[1].detach().to(p.b).reshape(p.b.shape)
    return g if inside is None else torch.where(inside, g, torch.zeros_like(g))


def _solve(p: Problem, g0: Tensor, schedule, grad: str, batch: tuple[int, ...], inside) -> SinkhornResult:
    if grad in ("implicit", "unrolled") and p.cost is not None and followed(p.cost):
        p = p._replace(cost=p.cost.to(p.a.dtype))  # its gradient has parts that cancel: they are added before they are rounded
    value = None
    if grad == "envelope":
        value, f, g, done, *marginals = applied(EnvelopeValue, *p.split, g0, tuple(schedule))
    else:
        source = p.detached if grad == "detached" else p
        unrolled = grad == "unrolled" and followed(*p[:6])
        f, g, done, _, _, *marginals = applied(Potentials, *source.split, g0, tuple(schedule), unrolled)
    p = p._replace(epsilon=effective_epsilon(p, schedule, done))
    return SinkhornResult(PlanState(p, f, g, batch, grad, inside, schedule, done), value, tuple(marginals))
