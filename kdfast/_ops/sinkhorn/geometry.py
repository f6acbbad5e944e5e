"""A batch of transport problems, its cost in row tiles, and the pullback of a gradient in the cost to its source."""

from typing import NamedTuple

import torch
from torch import Tensor

#: Cost entries held at once: within a CPU core's L2 cache, or enough to fill a GPU.
TILE = {"cpu": 2**18}
TILE_ELSEWHERE = 2**25

#: Squared distances in so few dimensions, where points nearly meet, are made from differences, as distances are in any number.
DIRECT = 16

#: Times rho, the potential of a relaxed row or column that nothing is summed for (it is allowed no pair, or the other side has no
#: mass): in place of infinity, exp(-this) of its weight is no mass, and exp(this) does not overflow.
ALONE = 40.0

#: Device types whose values may be looked at without stalling a queue of work.
READABLE = ("cpu",)

#: Largest exponent taken. Only pairs of zero (or absurdly small) weight exceed it; clamped, 0 * exp stays 0.
MAX_EXPONENT = 80.0


class Problem(NamedTuple):
    """B problems. Everything but `cost` is float32 or float64, the working dtype."""

    cost: Tensor | None  # [B, n, m] or shared [n, m], any floating dtype; None: from points
    x: Tensor | None  # [B, n, D], centred unless `direct`
    y: Tensor | None  # [B, m, D]
    a: Tensor  # [B, n]
    b: Tensor  # [B, m]
    epsilon: Tensor  # [B]
    rows: Tensor | None  # [B] int64: rows that are not padding (given costs only: padded points are zero)
    cols: Tensor | None  # [B]
    metric: str  # "given", "sqeuclidean", "euclidean", "dot" (1 - x.y)
    rho_a: float | None
    rho_b: float | None
    impl: str  # "cpu", "triton" or "torch"

    @property
    def readable(self) -> bool:
        return self.a.device.type in READABLE

    @property
    def direct(self) -> bool:
        """Whether costs of points and gradients in them are made from differences."""
        return self.x is not None and from_differences(self.metric, self.x.shape[-1])

    @property
    def split(self) -> tuple:
        """The eight tensors, then the rest as one tuple: how an autograd Function takes a problem."""
        return *self[:8], self[8:]

    @property
    def detached(self) -> "Problem":
        return Problem(*(None if t is None else t.detach() for t in self[:8]), *self[8:])

    def part(self, lo: int, hi: int) -> "Problem":
        """Problems lo ... hi - 1."""
        cut = [None if t is None else t[lo:hi] for t in self[:8]]
        if self.cost is not None and self.cost.dim() == 2:
            cut[0] = self.cost
        return Problem(*cut, *self[8:])


def from_differences(metric: str, width: int) -> bool:
    """Whether differences of points make costs and gradients: exact where these nearly meet, where products round as the points do."""
    return metric == "euclidean" or (metric == "sqeuclidean" and width <= DIRECT)


def damping(rho: float | None, eps: Tensor) -> Tensor | float:
    """lambda = rho / (rho + eps), as [B, 1]."""
    return 1.0 if rho is None else rho / (rho + eps[:, None])


def conjugate(rho: float | None, potential: Tensor) -> Tensor:
    """What a unit of weight adds to the dual: f, or rho (1 - exp(-f/rho)) under rho KL; finite, so that no weight adds nothing."""
    return potential if rho is None else (-rho * torch.expm1(-potential / rho)).clamp_min(torch.finfo(potential.dtype).min)


def conjugate_slope(rho: float | None, potential: Tensor) -> Tensor:
    """Its derivative: the marginal over the weight that optimality asks for."""
    return torch.ones_like(potential) if rho is None else torch.exp(-potential / rho).clamp_max(torch.finfo(potential.dtype).max)


def blocks(p: Problem):
    """(lo, hi) ranges of whole problems that fit in one tile (at least one problem each; an empty batch is one range)."""
    (batch, n), m = p.a.shape, p.b.shape[1]
    step = max(1, TILE.get(p.a.device.type, TILE_ELSEWHERE) // (n * m))
    for lo in range(0, max(batch, 1), step):
        yield lo, min(lo + step, batch)


def row_tiles(p: Problem):
    """Slices of rows of a block of problems, one tile each."""
    batch, n = p.a.shape
    step = min(n, max(1, TILE.get(p.a.device.type, TILE_ELSEWHERE) // max(1, batch * p.b.shape[1])))
    for lo in range(0, n, step):
        yield slice(lo, min(lo + step, n))


class Tiles:
    """Iterates over (rows, cost [B, r, m] or [r, m]) of a block; the cost is kept when it is one tile, else formed anew."""

    def __init__(self, p: Problem):
        self.problem, self.slices = p, list(row_tiles(p))
        self.whole = cost_tile(p, self.slices[0]) if len(self.slices) == 1 else None

    def __iter__(self):
        if self.whole is not None:
            yield self.slices[0], self.whole
            return
        for rows in self.slices:
            yield rows, cost_tile(self.problem, rows)


def cost_tile(p: Problem, rows: slice) -> Tensor:
    """C[:, rows] [B, r, m] (a shared cost: [r, m]) in the working dtype, 0 at padding."""
    if p.metric == "given":
        c = p.cost[..., rows, :].to(p.a.dtype)
        if p.rows is None:
            return c
        row = torch.arange(p.a.shape[1], device=c.device)[rows]
        col = torch.arange(p.b.shape[1], device=c.device)
        inside = (row < p.rows[:, None])[..., None] & (col < p.cols[:, None])[:, None]
        return torch.where(inside, c, torch.zeros_like(c))
    x, y = p.x[:, rows], p.y
    if p.impl != "torch":
        begin, end, _ = rows.indices(p.x.shape[1])
        exact = torch.ops.kdfast_torch.sinkhorn_costs(*(None if t is None else t.detach() for t in p[:8]), *p[8:], begin, end)
        if not torch.is_grad_enabled():
            return exact
        c = _point_costs(p, x, y)
        return c + (exact - c).detach()  # what the kernels see, to the bit: a plan is as exact as its cost is consistent
    return _point_costs(p, x, y)


def _point_costs(p: Problem, x: Tensor, y: Tensor) -> Tensor:
    """C [B, r, m] between x [B, r, D] and y [B, m, D], differentiable."""
    if p.metric == "dot":
        return 1 - x @ y.mT
    if p.direct:
        distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return distance if p.metric == "euclidean" else distance.square()
    squares = x.square().sum(-1)[..., None] + y.square().sum(-1)[:, None]
    return torch.baddbmm(squares, x, y.mT, alpha=-2).clamp_min(0)


def pull(p: Problem, rows: slice, w: Tensor, c: Tensor, *, graph: bool = False) -> tuple[Tensor, Tensor]:
    """(dx [B, r, D], dy [B, m, D]) of sum_ij w_ij C_ij over a tile, w [B, r, m], c its cost.

    With `graph` by what autograd differentiates, which would hold a tile for each coordinate: of many, by products.
    """
    x, y = p.x[:, rows], p.y
    if p.metric == "dot":
        return -(w @ y), -(w.mT @ x)
    if p.direct and not graph and x.device.type == "cpu":  # the backward of torch.cdist, which elsewhere forms [B, r, m, D]
        distance, w = (c, w) if p.metric == "euclidean" else (c.sqrt(), 2 * w * c.sqrt())
        dx = torch.ops.aten._cdist_backward(w.contiguous(), x, y, 2.0, distance)
        return dx, torch.ops.aten._cdist_backward(w.mT.contiguous(), y, x, 2.0, distance.mT.contiguous())
    scale = 2
    if p.metric == "euclidean":  # grad |x - y| = (x - y)/|x - y|, taken as 0 at 0
        apart, scale = c > 0, 1
        w = torch.where(apart, w / torch.where(apart, c, torch.ones_like(c)), torch.zeros_like(w))
    if p.direct and (x.shape[-1] <= DIRECT or not graph):
        return scale * by_coordinates(w, x, y), scale * by_coordinates(w.mT, y, x)
    return scale * (w.sum(-1)[..., None] * x - w @ y), scale * (w.sum(-2)[..., None] * y - w.mT @ x)


def by_coordinates(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """sum_j w_ij (x_i - y_j) [B, r, D] of w [B, r, m], a coordinate at a time."""
    return torch.stack([(w * (a[..., None] - b[:, None])).sum(-1) for a, b in zip(x.unbind(-1), y.unbind(-1), strict=True)], -1)


class Gradients:
    """Accumulates gradients in the cost's source over tiles and blocks: (dcost, None, None) or (None, dx, dy)."""

    def __init__(self, p: Problem):
        self.cost = None if p.cost is None else torch.zeros_like(p.cost, dtype=p.a.dtype, memory_format=torch.contiguous_format)
        self.x = None if p.x is None else torch.zeros_like(p.x, memory_format=torch.contiguous_format)
        self.y = None if p.y is None else torch.zeros_like(p.y, memory_format=torch.contiguous_format)

    def add(self, p: Problem, block: slice, rows: slice, w: Tensor, c: Tensor) -> None:
        """w [B, r, m] is d/dC over `rows` of the problems `block`, which `p` holds."""
        if self.cost is None:
            dx, dy = pull(p, rows, w, c)
            self.x[block, rows] += dx
            self.y[block] += dy
        elif self.cost.dim() == 2:
            self.cost[rows] += w.sum(0)
        else:
            self.cost[block, rows] += w

    def outputs(self, p: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """(dcost in the cost's dtype, dx, dy), with an empty tensor for what the problem has not."""
        nothing = p.a.new_empty(0)
        return (
            nothing if self.cost is None else self.cost.to(p.cost.dtype),
            nothing if self.x is None else self.x,
            nothing.clone() if self.y is None else self.y,
        )
