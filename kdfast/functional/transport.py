"""Losses and layers made of entropic optimal transport: kdfast.ops.sinkhorn as functions of points and scores."""

import math
from numbers import Real

import torch
from torch import Tensor

from kdfast._core import checks, collectives, dtypes
from kdfast._core import reduction as reductions
from kdfast._ops.sinkhorn import SinkhornResult, arguments, sinkhorn
from kdfast._ops.sinkhorn.assign import assign
from kdfast._ops.sinkhorn.normalize import normalize


def sinkhorn_loss(
    x: Tensor,
    y: Tensor,
    *,
    metric="sqeuclidean",
    a: Tensor | None = None,
    b: Tensor | None = None,
    epsilon: float | Tensor = 0.05,
    max_iters: int = 100,
    tol: float | None = None,
    rho=None,
    lengths: tuple[Tensor, Tensor] | None = None,
    anneal: tuple[float, float] | None = None,
    method: str = "auto",
    grad: str = "envelope",
    normalize: bool = False,
    reduction: str = "mean",
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """Entropic optimal transport between points x [*B, n, D] and y [*B, m, D], reduced over the problems *B.

    The value of kdfast.ops.sinkhorn, whose arguments these are (epsilon in units of the metric); with grad="detached"
    its transport cost, differentiated with the plan constant. `normalize` scales every point to length 1 first. Not zero
    at x = y: sinkhorn_divergence is. Twice differentiable with grad="envelope", at convergence.

    Returns: float32 (float64 for float64) scalar, or [*B] with reduction="none". Raises as kdfast.ops.sinkhorn.

    Source: Cuturi 2013.
    """
    options = _options(metric, epsilon, max_iters, tol, anneal, method, grad, precision, impl)
    x, y = _prepared(x, y, normalize)
    result = sinkhorn(x=x, y=y, a=a, b=b, rho=rho, lengths=lengths, **options)
    return reductions.reduce_rows(_cost(result, grad), reduction=reduction)


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    metric="sqeuclidean",
    a: Tensor | None = None,
    b: Tensor | None = None,
    epsilon: float | Tensor = 0.05,
    max_iters: int = 100,
    tol: float | None = None,
    rho: float | None = None,
    lengths: tuple[Tensor, Tensor] | None = None,
    anneal: tuple[float, float] | None = None,
    method: str = "auto",
    grad: str = "envelope",
    normalize: bool = False,
    reduction: str = "mean",
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """OT(x, y) - (OT(x, x) + OT(y, y))/2, which is 0 at equal measures and, at convergence, positive elsewhere.

    Arguments and returns as sinkhorn_loss; `rho` is one float (both marginals relaxed alike), and then
    (epsilon/2) (sum a - sum b)^2 is added. Three solves.

    Source: Feydy et al. 2019; unbalanced: Sejourne et al. 2019.
    """
    if rho is not None and (isinstance(rho, bool) or not isinstance(rho, Real)):
        raise TypeError(f"rho must be None or a float in a divergence, which relaxes both sides alike, got {rho!r}")
    options = _options(metric, epsilon, max_iters, tol, anneal, method, grad, precision, impl) | {"rho": rho}
    x, y = (p.to(dtypes.accumulator(p.dtype)) for p in _prepared(x, y, normalize))  # rounded once gradients are added, for they cancel
    between = sinkhorn(x=x, y=y, a=a, b=b, lengths=lengths, **options)
    rows, cols = (None, None) if lengths is None else lengths
    within_x = sinkhorn(x=x, y=x, a=a, b=a, lengths=None if rows is None else (rows, rows), **options)
    within_y = sinkhorn(x=y, y=y, a=b, b=b, lengths=None if cols is None else (cols, cols), **options)
    losses = _cost(between, grad) - (_cost(within_x, grad) + _cost(within_y, grad)) / 2
    if rho is not None:
        p = between.state.problem
        losses = losses + (p.epsilon / 2 * (p.a.sum(-1) - p.b.sum(-1)).square()).reshape(losses.shape)
    return reductions.reduce_rows(losses, reduction=reduction)


def _options(metric, epsilon, max_iters, tol, anneal, method, grad, precision, impl) -> dict:
    return {
        "metric": metric,
        "epsilon": epsilon,
        "max_iters": max_iters,
        "tol": tol,
        "anneal": anneal,
        "method": method,
        "grad": grad,
        "precision": precision,
        "impl": impl,
    }


def _prepared(x, y, normalize: bool) -> tuple[Tensor, Tensor]:
    checks.rows("x", x)
    checks.rows("y", y)
    checks.flag("normalize", normalize)
    if not normalize:
        return x, y
    return tuple(torch.nn.functional.normalize(p.to(dtypes.accumulator(p.dtype)), dim=-1) for p in (x, y))


def _cost(result: SinkhornResult, grad: str) -> Tensor:
    return result.transport_cost if grad == "detached" else result.value


def sinkhorn_assign(scores: Tensor, *, epsilon: float | Tensor = 0.05, iters: int = 3, group=None, impl: str | None = None) -> Tensor:
    """Codes that spread samples evenly over prototypes, from scores [*B, N, K] of N samples against K prototypes.

    exp(scores/epsilon) is normalised over samples per prototype, then over prototypes per sample, `iters` times, so that
    rows of the result sum to 1. Safe for any finite scores: no exponential overflows, unlike the published loops.

    Args:
        epsilon: float or 0-d tensor.
        group: None, or a torch.distributed group over which the samples are spread (each process its own rows, the
            same *B and K): K numbers a problem are all-reduced each iteration, and rows equal the single-process ones.

    Returns: [*B, N, K] float32 (float64 for float64), without gradient.

    Source: SwAV (Caron et al. 2020), the teacher's centring of DINOv2 (Oquab et al. 2023).
    """
    checks.floating("scores", scores, min_ndim=2)
    checks.positive_number("epsilon", epsilon)
    checks.count("iters", iters)
    collectives.check_group(group)
    if isinstance(epsilon, Tensor):
        checks.exact_shape("epsilon", epsilon, ())
        epsilon = epsilon.detach()
    epsilon = arguments.scalar("epsilon", epsilon, dtypes.accumulator(scores.dtype), scores.device)
    flat = scores.detach().reshape(math.prod(scores.shape[:-2]), *scores.shape[-2:])
    return assign(flat, epsilon, iters, group, impl).reshape(scores.shape)


def log_optimal_transport(
    scores: Tensor, alpha: float | Tensor, *, iters: int = 100, lengths: tuple[Tensor, Tensor] | None = None, impl: str | None = None
) -> Tensor:
    """Log of the partial assignment of n rows to m columns with a dustbin on each side, [*B, n + 1, m + 1].

    scores [*B, n, m] are extended by a row and a column of `alpha` (float or one-element tensor); every row and column
    has mass 1, the dustbins m and n; the result is the log of the plan after `iters` Sinkhorn iterations from zero,
    in that normalisation. Its gradient, in scores and alpha, is that of the iterations done, and stores no plans; second
    derivatives raise RuntimeError.

    Args:
        lengths: (n_i, m_i) integer tensors [*B]: the rest is padding, neither read nor given gradient; its log-plan is
            -inf. The dustbins stay in the last row and column; with neither rows nor columns they have no mass, and
            all is -inf.

    Returns: float32 (float64 for float64).

    Source: SuperGlue (Sarlin et al. 2020), section 3.2.
    """
    checks.floating("scores", scores, min_ndim=2)
    checks.number("alpha", alpha)
    checks.count("iters", iters)
    (*batch, n, m), dtype, device = scores.shape, dtypes.accumulator(scores.dtype), scores.device
    alpha = arguments.scalar("alpha", alpha, dtype, device)
    if alpha.numel() != 1:
        raise ValueError(f"alpha must be one number, got shape {tuple(alpha.shape)}")
    rows, cols = _counts(lengths, batch, (n, m), device)  # [*B, 1] or [1]
    real_rows, real_cols = (torch.arange(k, device=device) < count for k, count in ((n, rows), (m, cols)))
    scores = scores.to(dtype)
    if lengths is not None:
        scores = torch.where(real_rows[..., None] & real_cols[..., None, :], scores, torch.zeros_like(scores))
    couplings = torch.cat([scores, alpha.reshape(()).expand(*batch, n, 1)], -1)
    couplings = torch.cat([couplings, alpha.reshape(()).expand(*batch, 1, m + 1)], -2)
    total = (rows + cols).clamp_min(1).to(dtype)  # no mass at all is a plan of 0
    a = torch.cat([real_rows.to(dtype), cols.to(dtype)], -1) / total  # [*B, n + 1]
    b = torch.cat([real_cols.to(dtype), rows.to(dtype)], -1) / total
    a, b = a.expand(*batch, n + 1), b.expand(*batch, m + 1)
    start = torch.where(b > 0, -b.log(), torch.zeros_like(b))  # zero in its convention, where potentials carry log b
    init = (torch.zeros_like(a), start)
    result = sinkhorn(-couplings, a=a, b=b, epsilon=1.0, max_iters=iters, init=init, grad="unrolled", impl=impl)
    u, v = result.f + a.log(), result.g + b.log()
    return couplings + u[..., None] + v[..., None, :] + total.log()[..., None]


def _counts(lengths, batch, sizes: tuple[int, int], device) -> tuple[Tensor, Tensor]:
    if lengths is None:
        return tuple(torch.full((1,), size, device=device) for size in sizes)
    counts = arguments.real_sizes(lengths, sizes, device)
    for i, count in enumerate(counts):
        checks.exact_shape(f"lengths[{i}]", count, tuple(batch))
    return tuple(count[..., None] for count in counts)


def sinkhorn_normalize(logits: Tensor, *, iters: int = 20, eps: float = 1e-6, impl: str | None = None) -> Tensor:
    """Nearly doubly stochastic matrices from logits [*B, n, n]: softmax of the rows plus eps, then columns, then rows and columns.

    Every normalisation is x / (sum x + eps); columns are normalised `iters` times and last, rows iters - 1 times after
    the softmax. The gradient is that of these iterations; nothing is stored for it on the CPU, elsewhere (2 iters - 1) n
    numbers a matrix, not the matrices. Twice differentiable.

    Returns: [*B, n, n] float32 (float64 for float64).

    Source: the mixing matrices of manifold-constrained hyper-connections (Xie et al., arXiv 2512.24880).
    """
    checks.floating("logits", logits, min_ndim=2)
    if logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits must be square matrices [*B, n, n], got shape {tuple(logits.shape)}")
    checks.count("iters", iters)
    if isinstance(eps, Tensor):
        raise TypeError("eps must be a float, got a Tensor")
    checks.nonnegative_number("eps", eps)
    flat = logits.to(dtypes.accumulator(logits.dtype)).reshape(math.prod(logits.shape[:-2]), *logits.shape[-2:])
    return normalize(flat, iters, eps, impl).reshape(logits.shape)
