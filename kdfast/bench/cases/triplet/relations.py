"""Losses on relations between samples: relational distillation by angles and by distances, kernel two-sample distance."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdfast.functional import mmd_rbf, rkd_angle, rkd_distance

from ... import peers
from ...registry import Case
from . import batch

SIGMAS = (8.0, 16.0, 32.0)  # about typical distances of the rows, and either side
_TRIPLES = 2**25  # angles of one side that the formula by parts holds


class Pair(NamedTuple):
    student: Tensor  # [N, D]
    teacher: Tensor  # [N, D], no gradient


class Clouds(NamedTuple):
    x: Tensor  # [N, D]
    y: Tensor  # [M, D]


def pair(shape: tuple[int, int], dtype: torch.dtype) -> Pair:
    generator = torch.Generator().manual_seed(0)
    teacher, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    return Pair((teacher + noise).to(dtype), teacher.to(dtype))


def clouds(shape: tuple[int, int, int], dtype: torch.dtype) -> Clouds:
    n, m, d = shape
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, d, generator=generator) for rows in (n, m))
    return Clouds(x.to(dtype), (y + 0.25).to(dtype))


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def angles(x: Tensor, at: Tensor) -> Tensor:
    """cos of the angles at rows `at` [R, D] between all pairs of x: [R, N, N]."""
    direction = F.normalize(x[None] - at[:, None], dim=-1)
    return direction @ direction.mT


def angle_losses(student: Tensor, student_rows: Tensor, teacher: Tensor, teacher_rows: Tensor) -> Tensor:
    return F.smooth_l1_loss(angles(student, student_rows), angles(teacher, teacher_rows), reduction="sum")


def angle_formula(student: Tensor, teacher: Tensor, *, by_parts: bool = False) -> Tensor:
    """`by_parts`: a few rows' angles at a time, evaluated again by the backward pass."""
    student, teacher = wide(student), wide(teacher)
    n = len(student)
    if not by_parts:
        return angle_losses(student, student, teacher, teacher) / n**3
    rows = zip(*(t.split(max(1, _TRIPLES // n**2)) for t in (student, teacher)), strict=True)
    return sum(checkpoint(angle_losses, student, s, teacher, t, use_reentrant=False) for s, t in rows) / n**3


def distance_formula(student: Tensor, teacher: Tensor) -> Tensor:
    def relative(x: Tensor) -> Tensor:
        d = torch.where(torch.eye(len(x), dtype=torch.bool, device=x.device), 0, batch.distances(x, x))
        return d / d[d > 0].mean()

    return F.smooth_l1_loss(relative(wide(student)), relative(wide(teacher)))


def kernel_mean(x: Tensor, y: Tensor) -> Tensor:
    sq = batch.distances(x, y).square()
    return sum((sq / (-2 * sigma**2)).exp().mean() for sigma in SIGMAS)


def mmd_formula(x: Tensor, y: Tensor) -> Tensor:
    x, y = wide(x), wide(y)
    return kernel_mean(x, x) + kernel_mean(y, y) - 2 * kernel_mean(x, y)


def in_double(formula: Callable[..., Tensor], x: NamedTuple, **options) -> tuple[Tensor, ...]:
    return peers.step(formula, *(t.double() for t in x), **options)


RKD_ANGLE = Case(
    shapes={
        "quick": ((64, 128),),
        "default": ((256, 128), (512, 128)),
        "full": ((256, 128), (512, 128), (1024, 128)),
        "cuda": ((1024, 128),),
    },
    axes="N D",
    dtypes=(torch.float32,),
    inputs=pair,
    reference=partial(in_double, partial(angle_formula, by_parts=True)),
    flop=None,
    peers=(
        peers.steps("kdfast", rkd_angle),
        peers.steps("eager, by parts", partial(angle_formula, by_parts=True)),
        peers.steps("eager", angle_formula),
        peers.compiled(angle_formula),
    ),
)
RKD_DISTANCE = Case(
    shapes={
        "quick": ((256, 128),),
        "default": ((1024, 128), (4096, 128)),
        "full": ((1024, 128), (4096, 128), (8192, 512)),
        "cuda": ((8192, 128),),
    },
    axes="N D",
    dtypes=(torch.float32,),
    inputs=pair,
    reference=partial(in_double, distance_formula),
    flop=lambda shape: 12 * shape[0] ** 2 * shape[1],
    peers=(peers.steps("kdfast", rkd_distance), peers.steps("eager", distance_formula), peers.compiled(distance_formula)),
)
MMD_RBF = Case(
    shapes={
        "quick": ((256, 256, 128),),
        "default": ((4096, 4096, 128),),
        "full": ((1024, 1024, 128), (4096, 4096, 128), (8192, 8192, 512)),
        "cuda": ((8192, 8192, 128),),
    },
    axes="N M D",
    dtypes=(torch.float32,),
    inputs=clouds,
    reference=partial(in_double, mmd_formula, leaves=2),
    flop=lambda shape: (4 * shape[0] ** 2 + 4 * shape[1] ** 2 + 6 * shape[0] * shape[1]) * shape[2],
    peers=(
        peers.steps("kdfast", partial(mmd_rbf, sigmas=SIGMAS), leaves=2),
        peers.steps("eager", mmd_formula, leaves=2),
        peers.compiled(mmd_formula, leaves=2),
    ),
)
