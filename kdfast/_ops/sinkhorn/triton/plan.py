"""impl="triton" and "cuda": the plan, its products and its gradient, as adjoint.py has them, with nothing n x m but what is returned."""

import torch
from torch import Tensor

from kdfast._core import triton_runtime as runtime

from ..adjoint import Moments
from ..geometry import Problem
from . import PARTS, Side, Step, tiles

#: numbers of a row of products that a program makes
CHUNK = 64


def serves(p: Problem) -> bool:
    return (
        p.impl in ("triton", "cuda")
        and p.a.dtype == torch.float32
        and runtime.missing() is None
        and runtime.refuses_device(p.a.device.type) is None
    )


def product_tiles(width: int) -> runtime.ScoreTiles:
    """Weights, their three parts and the sums they are added to share the registers."""
    t = tiles(False, True, width)
    return t._replace(columns=min(32, t.columns), warps=8)


def plan(p: Problem, f: Tensor, g: Tensor) -> Tensor:
    """P [B, n, m]."""
    out = p.a.new_empty(*p.a.shape, p.b.shape[1])
    _Potentials(p, f, g).entries(out, torch.ones_like(p.epsilon), None)
    return out


def apply_plan(p: Problem, f: Tensor, g: Tensor, v: Tensor, transpose: bool) -> Tensor:
    """adjoint.apply_plan. A number that is not finite makes NaN of its whole column of products."""
    at = _Potentials(p, f, g)
    mine, others = (at.columns, at.rows) if transpose else (at.rows, at.columns)
    out, _ = at.products(mine, others, v.float(), torch.ones_like(p.epsilon), None)
    return out + (0 * v).sum(1, keepdim=True)


def plan_gradient(p: Problem, f: Tensor, g: Tensor, w0: Tensor, w1: Tensor | None) -> Moments:
    """adjoint.plan_gradient."""
    at, none = _Potentials(p, f, g), p.a.new_empty(0)
    if p.cost is not None:
        dcost, dx, dy = torch.empty_like(p.cost, memory_format=torch.contiguous_format), none, none.clone()
        at.entries(dcost, w0, w1)
    else:
        dcost, dx, dy = none, at.pulled(at.rows, at.columns, w0, w1), at.pulled(at.columns, at.rows, w0, w1)
    if w1 is None:
        return Moments(dcost, dx, dy, *(none.clone() for _ in range(3)))
    row, steepness = at.moments(at.rows, at.columns)
    return Moments(dcost, dx, dy, row, at.moments(at.columns, at.rows)[0], (p.a * steepness).sum(-1))


def from_products(metric: str, points: Tensor, product: Tensor, mass: Tensor) -> Tensor:
    """geometry.pull for one side's points [B, r, D], from W times the other's and W's sums [B, r]."""
    return -product if metric == "dot" else 2 * (mass[..., None] * points - product)


def from_differences(metric: str, product: Tensor) -> Tensor:
    """The same from sums of W times differences; with metric "euclidean" W over the cost."""
    return product if metric == "euclidean" else 2 * product


class _Potentials:
    """A problem at potentials f [B, n] and g [B, m]; a launch has one side's rows, and sums over the other's."""

    def __init__(self, p: Problem, f: Tensor, g: Tensor):
        self.p, self.step = p, Step(p)
        self.rows, self.columns = self.step.rows, self.step.columns
        self.of = {id(self.rows): (p.x, f.contiguous(), p.a.contiguous()), id(self.columns): (p.y, g.contiguous(), p.b.contiguous())}
        self.epsilon, self.width = p.epsilon.contiguous(), 0 if p.x is None else self.rows.points.shape[-1]
        self.batch_stride = p.cost.stride(0) if p.cost is not None and p.cost.dim() == 3 else 0

    def entries(self, out: Tensor, w0: Tensor, w1: Tensor | None) -> None:
        """(w0 + w1 C) P into out [B, n, m], or [n, m], the sum over the problems."""
        from . import plan_kernels as kernels

        mine, others, batch, total = self.rows, self.columns, len(self.p.a), out.dim() == 2
        t = tiles(self.step.given, others.stride == 1, self.width)
        programs = -(-mine.size // t.rows) * -(-others.size // t.columns) * (1 if total else batch)
        self._launch(
            kernels.plan_entries, programs, t, mine, others, (self._weight(mine), self._weight(others)), (w0, w1), (out,), (batch,),
            SLOPED=w1 is not None, TOTAL=total,
        )  # fmt: skip

    def moments(self, mine: Side, others: Side) -> tuple[Tensor, Tensor]:
        """sum_j b_j E_ij C_ij and sum_j b_j E_ij C_ij log E_ij [B, mine.size]."""
        from . import plan_kernels as kernels

        found = self.p.a.new_empty(2, len(self.p.a), mine.size)
        t = tiles(self.step.given, others.stride == 1, self.width)
        programs = -(-mine.size // t.rows) * len(self.p.a)
        self._launch(kernels.row_moments, programs, t, mine, others, (self._weight(others),), (), tuple(found), ())
        return found[0], found[1]

    def products(self, mine: Side, others: Side, v: Tensor, w0: Tensor, w1: Tensor | None, *, over_cost=False, apart=False):
        """sum_j W_ij v_j [B, mine.size, d] for v [B, others.size, d], and sum_j W_ij, with W as plan_products has it; or, `apart`, of
        the differences of points from v, those of `others`."""
        from . import plan_kernels as kernels

        batch, d = len(self.p.a), v.shape[-1]
        values = v if apart else runtime.split(v, PARTS, 16).parts
        out, mass = v.new_empty(batch, mine.size, values.shape[-1]), v.new_empty(batch, mine.size)
        t = product_tiles(self.width)
        chunk = min(CHUNK, runtime.power_of_two(values.shape[-1]))
        programs = -(-mine.size // t.rows) * -(-values.shape[-1] // chunk) * batch
        self._launch(
            kernels.plan_products, programs, t, mine, others, (self._weight(mine), self._weight(others)), (w0, w1),
            (values, out, mass), (values.shape[-1],), SLOPED=w1 is not None, OVER_COST=over_cost, APART=apart, CHUNK=chunk,
        )  # fmt: skip
        return out[..., :d], mass

    def pulled(self, mine: Side, others: Side, w0: Tensor, w1: Tensor | None) -> Tensor:
        """The gradient of sum_ij W_ij C_ij in the points of `mine`, as geometry.pull has it."""
        points, euclidean, apart = self.of[id(mine)][0], self.p.metric == "euclidean", self.p.direct
        made = self.products(mine, others, self.of[id(others)][0], w0, w1, over_cost=euclidean, apart=apart)
        return from_differences(self.p.metric, made[0]) if apart else from_products(self.p.metric, points, *made)

    def _weight(self, side: Side) -> Tensor:
        return self.of[id(side)][2]

    def _launch(self, kernel, programs, t, mine: Side, others: Side, weights, scales, outputs, sizes, **constants) -> None:
        p = self.p
        points = (mine.points, others.points, mine.square, others.square)
        scales = tuple(self.epsilon if s is None else s.contiguous() for s in scales)
        tensors = (p.cost, *points, *(self.of[id(side)][1] for side in (mine, others)), *weights, self.epsilon, mine.count, others.count)
        if programs:
            with torch.cuda.device_of(p.a):
                kernel[(programs,)](
                    *(self.epsilon if x is None else x for x in tensors), *scales, *outputs,
                    self.batch_stride, mine.stride, others.stride, mine.size, others.size, self.width, *sizes,
                    **self.step.flags, **constants, **t.options(PARTS),
                )  # fmt: skip
