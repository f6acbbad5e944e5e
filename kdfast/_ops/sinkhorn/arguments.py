"""From the arguments of kdfast.ops.sinkhorn to a Problem and a Schedule, with their checks."""

import math
from numbers import Real

import torch
from torch import Tensor

from kdfast._core import checks, dtypes

from .geometry import Problem, from_differences
from .portable import Schedule

METRICS = ("sqeuclidean", "euclidean", "cosine")
METHODS = ("auto", "log", "kernel", "proximal")


def schedule(max_iters, tol, method, anneal) -> Schedule:
    checks.count("max_iters", max_iters)
    checks.choice("method", method, METHODS)
    if tol is not None:
        if isinstance(tol, bool) or not isinstance(tol, Real) or not tol >= 0:
            raise ValueError(f"tol must be None or a number >= 0, got {tol!r}")
        tol = float(tol)
    if anneal is None:
        return Schedule(max_iters, tol, method, None, None)
    if method == "proximal":
        raise ValueError("anneal must be None with method='proximal', which lowers epsilon by itself")
    if not isinstance(anneal, (tuple, list)) or len(anneal) != 2 or not all(isinstance(v, Real) for v in anneal):
        raise ValueError(f"anneal must be (epsilon_start, factor), two floats, got {anneal!r}")
    start, factor = map(float, anneal)
    if not (start > 0 and math.isfinite(start) and 0 < factor < 1):
        raise ValueError(f"anneal must have epsilon_start > 0 and 0 < factor < 1, got {anneal!r}")
    return Schedule(max_iters, tol, method, start, factor)


def marginal_penalties(rho, method: str) -> tuple[float | None, float | None]:
    pair = tuple(rho) if isinstance(rho, (tuple, list)) else (rho, rho)
    if len(pair) != 2:
        raise ValueError(f"rho must be None, a float or a pair of these, got {rho!r}")
    for value in pair:
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise TypeError(f"rho must be None, a float or a pair of these, got {rho!r}")
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"rho must be a finite number > 0 (None: a fixed marginal), got {rho!r}")
    if method == "proximal" and pair != (None, None):
        raise ValueError(f"rho must be None with method='proximal', got {rho!r}")
    return tuple(None if value is None else float(value) for value in pair)


def problem(cost, x, y, metric, a, b, epsilon, rho, lengths, precision, impl) -> tuple[Problem, tuple[int, ...], tuple]:
    """(the Problem over the flattened batch, the batch's shape, which rows [B, n] and columns [B, m] are not padding or None)."""
    n, m = (x.shape[-2], y.shape[-2]) if cost is None else cost.shape[-2:]
    if n == 0 or m == 0:
        raise ValueError(f"{'x and y' if cost is None else 'cost'} must have at least one row and one column, got {n} x {m}")
    if cost is None:
        wide = torch.promote_types(x.dtype, y.dtype)  # under autocast they may differ
        x, y = x.to(wide), y.to(wide)
    first = x if cost is None else cost
    dtype, device = dtypes.accumulator(first.dtype), first.device
    _weights("a", a, n, "rows", device)
    _weights("b", b, m, "columns", device)
    checks.positive_number("epsilon", epsilon)
    rows, cols = real_sizes(lengths, (n, m), device)
    if cost is not None:
        x, y, metric = None, None, "given"
    elif callable(metric):
        x, y = _zeroed(x, y, rows, cols)
        cost = checks.floating("metric(x, y)", metric(x, y), min_ndim=2)
        checks.exact_shape("metric(x, y)", cost, (*cost.shape[:-2], n, m))
        x, y, metric = None, None, "given"
    shapes = [cost.shape[:-2]] if cost is not None else [x.shape[:-2], y.shape[:-2]]
    shapes += [w.shape[:-1] for w in (a, b) if w is not None]
    shapes += [t.shape for t in (epsilon, rows, cols) if isinstance(t, Tensor)]
    batch = _batch(shapes)
    count = math.prod(batch)

    def flat(t: Tensor, own: int) -> Tensor:  # [*B', ...] -> [B, ...], `own` trailing dimensions kept
        tail = t.shape[t.dim() - own :]
        if len(batch) == 1 and t.shape == (count, *tail):
            return t
        return t.expand((*batch, *tail)).reshape((count, *tail))

    eps = flat(scalar("epsilon", epsilon, dtype, device, batch), 0)
    rows, cols = (None if t is None else flat(t, 0) for t in (rows, cols))
    inside = (None, None) if rows is None else (_inside(n, rows), _inside(m, cols))
    weights = []
    for w, size, length, kept in ((a, n, rows, inside[0]), (b, m, cols, inside[1])):
        w = _uniform(count, size, length, dtype, device) if w is None else flat(w.to(dtype), 1)
        weights.append(w if kept is None else torch.where(kept, w, torch.zeros_like(w)))
    if cost is not None:
        cost = cost if cost.dim() == 2 else flat(cost, 2)
    else:
        x, y = _points(flat(x.to(dtype), 2), flat(y.to(dtype), 2), rows, cols, metric, precision)
        metric = "dot" if metric == "cosine" else metric
        rows = cols = None  # padded points are zero and have no weight
    return Problem(cost, x, y, *weights, eps, rows, cols, metric, *rho, impl), batch, inside


def _batch(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    if shapes.count(shapes[0]) == len(shapes):
        return tuple(shapes[0])
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise ValueError(
            f"cost or x and y, a, b, epsilon and lengths must agree on the batch, got batch shapes {list(map(tuple, shapes))}"
        ) from None


def source(cost, x, y, metric) -> None:
    """Checks that there is either a cost or two sets of points and a metric."""
    if not callable(metric):
        checks.choice("metric", metric, METRICS)
    if cost is not None:
        if x is not None or y is not None:
            raise ValueError("cost must not be given together with x and y")
        checks.floating("cost", cost, min_ndim=2)
        return
    if x is None or y is None:
        raise ValueError("either cost or both x and y must be given")
    checks.rows("x", x)
    checks.rows("y", y)
    checks.alike("y", y, "x", x)
    checks.same_width("y", y, "x", x)


def _weights(name: str, w, size: int, side: str, device) -> None:
    if w is None:
        return
    checks.floating(name, w, min_ndim=1)
    if w.shape[-1] != size:
        raise ValueError(f"{name} must have one weight for each of the {size} {side}, got shape {tuple(w.shape)}")
    if w.device != device:
        raise ValueError(f"{name} must be on the device of the cost ({device}), got {w.device}")


def scalar(name: str, x: "float | Tensor", dtype: torch.dtype, device: torch.device, shape: tuple[int, ...] = ()) -> Tensor:
    """`x` as a tensor. A number, not 0 nor infinite there, is filled into `shape` on the device: to copy it would synchronise."""
    if isinstance(x, Tensor):
        return x.to(device, dtype)
    if math.isfinite(x) and x and not torch.finfo(dtype).tiny <= abs(x) <= torch.finfo(dtype).max:
        raise ValueError(f"{name} must be in the range of {dtype}, got {x}")
    return torch.full(shape, x, dtype=dtype, device=device)


def real_sizes(lengths, sizes: tuple[int, int], device) -> tuple[Tensor | None, Tensor | None]:
    """The numbers (n_i, m_i) of rows and columns that are not padding, int64 of any shape."""
    if lengths is None:
        return None, None
    if not isinstance(lengths, (tuple, list)) or len(lengths) != 2:
        raise TypeError(f"lengths must be a pair of integer tensors (rows, columns), got {type(lengths).__name__}")
    lengths = tuple(checks.integral(f"lengths[{i}]", t, device=device) for i, t in enumerate(lengths))
    for i, size in enumerate(sizes):
        checks.index_range(f"lengths[{i}]", lengths[i], size + 1)
    return lengths


def _inside(size: int, length: Tensor) -> Tensor:
    return torch.arange(size, device=length.device) < length[..., None]  # [*B, size]


def _zeroed(x: Tensor, y: Tensor, rows: Tensor | None, cols: Tensor | None) -> tuple[Tensor, Tensor]:
    """The points [*B, n, D], [*B, m, D] with padding made 0, through which no gradient passes."""
    if rows is None:
        return x, y
    return tuple(torch.where(_inside(p.shape[-2], k)[..., None], p, torch.zeros_like(p)) for p, k in ((x, rows), (y, cols)))


def _uniform(count: int, size: int, length: Tensor | None, dtype, device) -> Tensor:
    if length is None:
        return torch.full((count, size), 1 / size, dtype=dtype, device=device)
    return (1 / length.clamp_min(1).to(dtype))[:, None].expand(count, size)


def _points(x: Tensor, y: Tensor, rows, cols, metric: str, precision: str) -> tuple[Tensor, Tensor]:
    """The points with padding zeroed, normalised (cosine) or centred: no cost depends on the centre, its rounding does.

    Differences are as exact as the points, unless these were rounded once more.
    """
    x, y = _zeroed(x, y, rows, cols)
    if metric == "cosine":
        x, y = (torch.nn.functional.normalize(p, dim=-1) for p in (x, y))
    elif precision == "bf16" or not from_differences(metric, x.shape[-1]):
        centre = (_mean(x.detach(), rows) + _mean(y.detach(), cols)) / 2  # [B, 1, D]
        x, y = _zeroed(x - centre, y - centre, rows, cols)
    if precision == "bf16":
        x, y = x.bfloat16().to(x.dtype), y.bfloat16().to(y.dtype)
    return x, y


def _mean(points: Tensor, count: Tensor | None) -> Tensor:
    """[B, 1, D] of points [B, n, D], 0 at padding, of which `count` [B] are not."""
    if count is None:
        return points.mean(1, keepdim=True)
    return points.sum(1, keepdim=True) / count.clamp_min(1).to(points.dtype)[:, None, None]
