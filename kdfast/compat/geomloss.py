"""geomloss's SamplesLoss (0.2, 0.3) with loss="sinkhorn"."""

import math

import torch
from torch import Tensor, nn

from .._core import checks
from ..functional import sinkhorn_divergence, sinkhorn_loss

_AT_BLUR = 20  # iterations at the target blur, after annealing


class SamplesLoss(nn.Module):
    """`loss(x, y)` or `loss(a, x, b, y)`: points [N, D], [M, D] -> 0-d, or [B, N, D], [B, M, D] -> [B]; a, b weights, default uniform.

    Entropic optimal transport for the cost |x - y|^p / p at epsilon = blur^p, marginals relaxed by reach^p, annealed from the
    diameter by `scaling`: the original's schedule, then 20 iterations more at the target, so that values are nearer to
    convergence than the original's at the same `scaling`.

    Args:
        loss: "sinkhorn". p: 1 or 2. blur, reach, diameter, scaling, debias: as there, with its defaults.
        cost: None, or a callable (x [B, N, D], y [B, M, D]) -> [B, N, M], evaluated once.
        backend: accepted: "auto", "tensorized", "online" and "multiscale" are one streamed solver here (with N M numbers for `cost`
            only). truncate, cluster_scale, verbose: accepted, without effect. kernel, potentials: refused.

    Differs: with `reach` the gradient is that of the value (the original's is not: some 15 % off the difference quotients of its own
    value); memory grows with N + M; the state of autograd is left as it was (the original switches gradients on); a weight of 0
    gives no NaN; without `debias` and with `reach`, weights that do not sum to 1 keep the dual's constant
    epsilon (sum a sum b - (sum a + sum b) / 2), which the original leaves out.

    Raises: ValueError, TypeError naming the argument. diameter=None reads the points' extent on the host, as the original does.
    """

    def __init__(
        self,
        loss="sinkhorn",
        p=2,
        blur=0.05,
        reach=None,
        diameter=None,
        scaling=0.5,
        truncate=5,
        cost=None,
        kernel=None,
        cluster_scale=None,
        debias=True,
        potentials=False,
        verbose=False,
        backend="auto",
    ):
        super().__init__()
        checks.choice("loss", loss, ("sinkhorn",))
        checks.choice("p", p, (1, 2))
        checks.choice("backend", backend, ("auto", "tensorized", "online", "multiscale"))
        for name, value in (("blur", blur), ("reach", reach), ("diameter", diameter)):
            if value is not None or name == "blur":
                checks.finite_number(name, value)
                checks.positive_number(name, value)
                self._power(name, value, p)
        checks.fraction("scaling", scaling)
        if scaling**p == 0:
            raise ValueError(f"scaling ** p must be > 0, got scaling={scaling}")
        checks.flag("debias", debias)
        for name, value, served in (("kernel", kernel, None), ("potentials", potentials, False)):
            if value is not served:
                raise ValueError(f"{name} is not supported by kdfast.compat.geomloss.SamplesLoss, got {value!r}")
        if cost is not None and not callable(cost):
            raise ValueError(f"cost must be None or a callable (x, y) -> [B, N, M], got {type(cost).__name__}")
        self.loss, self.p, self.blur, self.reach, self.diameter, self.scaling = loss, p, blur, reach, diameter, scaling
        self.truncate, self.cost, self.kernel, self.cluster_scale = truncate, cost, kernel, cluster_scale
        self.debias, self.potentials, self.verbose, self.backend = debias, potentials, verbose, backend

    def forward(self, *args: Tensor) -> Tensor:
        if len(args) not in (2, 4):
            raise ValueError(f"a SamplesLoss takes (x, y) or (a, x, b, y), got {len(args)} arguments")
        a, x, b, y = args if len(args) == 4 else (None, args[0], None, args[1])
        for name, points in (("x", x), ("y", y)):
            checks.rows(name, points)
            if points.dim() > 3:
                raise ValueError(f"{name} must be [N, D] or [B, N, D], got shape {tuple(points.shape)}")
        checks.same_width("y", y, "x", x)
        if min(x.shape[-2], y.shape[-2]) == 0:
            raise ValueError(f"x and y must have at least one point, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
        a, b = (None if w is None else self._weights(name, w, points) for name, w, points in (("a", a, x), ("b", b, y)))
        function = sinkhorn_divergence if self.debias else sinkhorn_loss
        metric, factor = self._metric()
        rho = None if self.reach is None else factor * self.reach**self.p
        epsilon = factor * self.blur**self.p
        options = {"metric": metric, "epsilon": epsilon, "rho": rho, **self._schedule(x, y, factor)}
        return function(x, y, a=a, b=b, reduction="none", **options) / factor

    @staticmethod
    def _power(name: str, value: float, p: int) -> None:
        if not 0 < value * (value if p == 2 else 1) < math.inf:
            raise ValueError(f"{name} ** p must be a finite number > 0, got {name}={value}")

    @staticmethod
    def _weights(name: str, weights: Tensor, points: Tensor) -> Tensor:
        checks.floating(name, weights)
        if weights.numel() != points.shape[:-1].numel():
            raise ValueError(f"{name} must have a weight a point, {tuple(points.shape[:-1])}, got {tuple(weights.shape)}")
        return weights.reshape(points.shape[:-1])

    def _metric(self) -> tuple:
        """(metric, factor): the metric is `factor` times the cost |x - y|^p / p, and then so are epsilon and rho."""
        if self.cost is not None:
            return self._batched_cost, 1.0
        return ("sqeuclidean", 2.0) if self.p == 2 else ("euclidean", 1.0)

    def _batched_cost(self, x: Tensor, y: Tensor) -> Tensor:
        return self.cost(x, y) if x.dim() == 3 else self.cost(x[None], y[None])[0]

    def _schedule(self, x: Tensor, y: Tensor, factor: float) -> dict:
        diameter = self._extent(x, y) if self.diameter is None else self.diameter
        if diameter <= self.blur:
            return {"max_iters": _AT_BLUR}
        steps = math.ceil(math.log(self.blur / diameter) / math.log(self.scaling))
        return {"anneal": (factor * diameter**self.p, self.scaling**self.p), "max_iters": steps + _AT_BLUR}

    @staticmethod
    def _extent(x: Tensor, y: Tensor) -> float:
        """The diagonal of the box that holds all points."""
        with torch.no_grad():
            low, high = (torch.stack([f(t.flatten(0, -2), 0) for t in (x, y)]) for f in (torch.amin, torch.amax))
            extent = (high.amax(0) - low.amin(0)).norm().item()
        if not math.isfinite(extent):
            raise ValueError("x and y must be finite where diameter is None: it is read from them")
        return extent
