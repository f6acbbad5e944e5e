"""impl="triton": the iterations of portable.py, each half of one a launch: logsumexp with true maxima, batched, by rows then by columns.

A cost that is given is read twice an iteration, one of points is made again from products as exact as float32's; nothing n x m is stored.
The plan, its products and the value's gradient are kernels too (plan.py), and so are gradients of potentials (adjoint.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast._core import triton_runtime as runtime

from .. import portable
from ..geometry import MAX_EXPONENT, Problem
from ..portable import Schedule, Solution

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARTS = 3


def missing() -> str | None:
    return runtime.missing()


def refuses(*, device_type: str = "cuda", dtype: torch.dtype = torch.float32, **_facts) -> str | None:
    """Why the kernels cannot serve a call (None: they can)."""
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 or float16, not {dtype}"
    return runtime.refuses_device(device_type)


def tiles(given: bool, along_rows: bool, width: int) -> runtime.ScoreTiles:
    """A given cost is read along its rows, whichever dimension the sums run over; points take a tile of products."""
    if runtime.INTERPRETED:
        return runtime.ScoreTiles(16, 32, 16, 4, 1)
    if given:
        return runtime.ScoreTiles(*((16, 256) if along_rows else (64, 64)), 16, 4, 1)
    return runtime.ScoreTiles(64, 64, min(32, runtime.power_of_two(width)), 4, 3)


class Side(NamedTuple):
    """What a half step over the other side's points sums for."""

    size: int
    points: Tensor | None  # [B, size, D], or in parts [B, PARTS, size, D']
    square: Tensor | None  # [B, size]
    log_weight: Tensor  # [B, size]
    count: Tensor | None  # [B]
    stride: int  # of a given cost
    rho: float | None


class Step:
    """One iteration, as portable.Step has it."""

    def __init__(self, p: Problem):
        self.p, self.given = p, p.cost is not None
        self.flags = {
            "GIVEN": self.given, "DIRECT": p.direct, "ROOT": p.metric == "euclidean", "DOT": p.metric == "dot",
            "PADDED": self.given and p.rows is not None,
        }  # fmt: skip
        strides = p.cost.stride()[-2:] if self.given else (0, 0)
        self.rows, self.columns = (
            self._side(*of) for of in ((p.x, p.a, p.rows, strides[0], p.rho_a), (p.y, p.b, p.cols, strides[1], p.rho_b))
        )

    def _side(self, points: Tensor | None, weight: Tensor, count: Tensor | None, stride: int, rho: float | None) -> Side:
        square = None
        if points is not None:
            if self.flags["DIRECT"]:
                points = square = points.contiguous()  # of no use there
            else:
                points, square = runtime.split(points, PARTS, tiles(False, True, points.shape[2]).depth)
        count = None if count is None else count.contiguous()
        return Side(weight.shape[1], points, square, weight.log().contiguous(), count, stride, rho)

    def __call__(self, f: Tensor, g: Tensor, eps: Tensor, *, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(new f, new g, LSE [B, n] at the old g)."""
        f, lse, _ = self.half(self.rows, self.columns, g, eps)
        return f, self.half(self.columns, self.rows, f, eps)[0], lse

    def marginals(self, f: Tensor, g: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(row [B, n], col [B, m], <P, C> [B]) as in portable.Solution."""
        _, lse, spent = self.half(self.rows, self.columns, g, eps, with_cost=True)
        lse_columns = self.half(self.columns, self.rows, f, eps)[1]
        row, col = (torch.exp((h / eps[:, None] + s).clamp_max(MAX_EXPONENT)) for h, s in ((f, lse), (g, lse_columns)))
        return row, col, (self.p.a * row * spent).sum(-1)

    def half(self, mine: Side, others: Side, potential: Tensor, eps: Tensor, *, with_cost: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(-lambda eps LSE, LSE, mean cost or nothing that is meant) [B, mine.size]."""
        from . import kernels

        p, batch = self.p, len(potential)
        out, lse, spent = (potential.new_empty(batch, mine.size) for _ in range(3))
        width = 0 if self.given else mine.points.shape[-1]
        t = tiles(self.given, others.stride == 1, width)
        points = (mine.points, others.points, mine.square, others.square)
        tensors = (p.cost, *points, others.log_weight, potential.contiguous(), eps.contiguous(), mine.count, others.count)
        if out.numel():
            with torch.cuda.device_of(out):
                kernels.half_step[(-(-mine.size // t.rows) * batch,)](
                    *(out if x is None else x for x in tensors), out, lse, spent, 0.0 if mine.rho is None else mine.rho,
                    p.cost.stride(0) if self.given and p.cost.dim() == 3 else 0, mine.stride, others.stride,
                    mine.size, others.size, width, **self.flags, RELAXED=mine.rho is not None, WITH_COST=with_cost, **t.options(PARTS),
                )  # fmt: skip
        return out, lse, spent


def costs(p: Problem, begin: int, end: int) -> Tensor:
    """C[:, begin:end] [B, r, m] of points, as the half steps form it, whatever PyTorch's matmuls are set to."""
    from . import kernels

    step, batch = Step(p), len(p.a)
    x, y = step.rows, step.columns
    out = p.a.new_empty(batch, end - begin, y.size)
    t = tiles(False, True, x.points.shape[-1])
    flags = {name: step.flags[name] for name in ("DIRECT", "ROOT", "DOT")}
    if out.numel():
        with torch.cuda.device_of(out):
            kernels.cost_rows[(-(-(end - begin) // t.rows) * -(-y.size // t.columns) * batch,)](
                x.points, y.points, x.square, y.square, out, begin, end, x.size, y.size, x.points.shape[-1], **flags, **t.options(PARTS)
            )
    return out


def solve(p: Problem, g: Tensor, schedule: Schedule, history: bool) -> Solution:
    """Run `schedule` on every problem from column potentials g [B, m]."""
    with torch.autocast(p.a.device.type, enabled=False):
        step = Step(p)
        return portable.iterate(p, g, schedule, history, step, step.marginals)
