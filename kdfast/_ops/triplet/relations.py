"""Relations between samples, streamed as block functions: kernel means, distance ratios, angles."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import dtypes
from . import distances
from .blocks import Block, budget, plan, row_sums, whole


class Kernel(NamedTuple):
    sigmas: tuple[float, ...]
    diagonal: bool  # the rows and the columns are the same samples


class Angles(NamedTuple):
    """Constants of rkd_angle's block function: none."""


def ready(x: Tensor) -> Tensor:
    return x.to(dtypes.accumulator(x.dtype))


def centred(x: Tensor) -> Tensor:
    return distances.centred(x, x)[0]


def mmd(x: Tensor, y: Tensor, sigmas: tuple[float, ...]) -> Tensor:
    """mean K_xx + mean K_yy - 2 mean K_xy."""
    x, y = ready(x), ready(y)
    return (kernel_mean(x, None, sigmas) + kernel_mean(y, None, sigmas) - 2 * kernel_mean(x, y, sigmas)).to(x.dtype)


def kernel_mean(x: Tensor, y: Tensor | None, sigmas: tuple[float, ...]) -> Tensor:
    """Mean over all pairs of sum_sigma exp(-d^2 / 2 sigma^2), in the sums' wide dtype; y None: of x with itself."""
    rows, columns = distances.centred(x, x if y is None else y)
    n, m = rows.shape[0], columns.shape[0]
    column = (torch.arange(n, device=x.device),)
    sums, _ = row_sums(
        _kernel, Kernel(sigmas, y is None), whole(n, 1, m, budget(x.device, columns.numel())), (rows,), (columns,), column, ()
    )
    return sums.sum() / n / m


def _kernel(s, block, rows, shared, fixed_rows, fixed):
    (x,), (y,), (row,) = rows, shared, fixed_rows
    sq = distances.tile(x, y, "sqeuclidean").to(distances.wide(x))
    if s.diagonal:  # exactly 0, which |x|^2 + |y|^2 - 2 x.y is not
        sq = torch.where(row[:, None] == torch.arange(y.shape[0], device=y.device), torch.zeros_like(sq), sq)
    total = sum((sq / (-2 * sigma**2)).exp().sum(-1) for sigma in s.sigmas)
    return total[:, None], torch.zeros_like(row)[:, None]


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all pairs of smooth_l1 of the distances, each side's over the mean of its nonzero ones."""
    n = student.shape[0]
    student, teacher = ready(student), ready(teacher)
    if n == 0:
        return student.sum()
    student, teacher = centred(student), centred(teacher)
    return distance_rows(student, teacher, mean_distance(student), mean_distance(teacher)).sum() / n**2


def mean_distance(x: Tensor) -> Tensor:
    """Mean of the nonzero distances between rows of x [N, D]; 1 where there is none."""
    rows = (torch.arange(x.shape[0], device=x.device),)
    sums, counts = row_sums(_distance_sum, Angles(), whole(x.shape[0], 1, x.shape[0], budget(x.device)), (x,), (x,), rows, ())
    count = counts.sum()
    return torch.where(count > 0, sums.sum() / count.clamp_min(1).to(sums.dtype), torch.ones((), dtype=sums.dtype, device=x.device))


def _off_diagonal(x: Tensor, y: Tensor, row: Tensor) -> Tensor:
    if x.shape[-1] == 1:  # from differences: many pairs are nearer than inner products tell, and the mean counts them
        return distances.root((x - y.mT).square())
    sq = distances.tile(x, y, "sqeuclidean")
    return distances.root(torch.where(row[:, None] == torch.arange(y.shape[0], device=y.device), torch.zeros_like(sq), sq))


def _distance_sum(s, block, rows, shared, fixed_rows, fixed):
    d = _off_diagonal(rows[0], shared[0], fixed_rows[0])
    return d.sum(-1, keepdim=True), (d > 0).sum(-1, keepdim=True)


def distance_rows(student: Tensor, teacher: Tensor, student_mean: Tensor, teacher_mean: Tensor) -> Tensor:
    """[N] sums over j of smooth_l1(d_ij / mean, d'_ij / mean')."""
    n = student.shape[0]
    row = torch.arange(n, device=student.device)
    shared = (student, student_mean)
    blocks = whole(n, 1, n, budget(student.device))
    return row_sums(_distance_loss, Angles(), blocks, (student,), shared, (teacher, row), (teacher, teacher_mean))[0][:, 0]


def _distance_loss(s, block, rows, shared, fixed_rows, fixed):
    (x,), (y, mean), (t, row), (u, teacher_mean) = rows, shared, fixed_rows, fixed
    loss = F.smooth_l1_loss(_off_diagonal(x, y, row) / mean, _off_diagonal(t, u, row) / teacher_mean, reduction="none")
    return loss.sum(-1, keepdim=True), torch.zeros_like(row)[:, None]


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over i, j, k of smooth_l1(cos of the angle at i between j and k)."""
    n = student.shape[0]
    student, teacher = ready(student), ready(teacher)
    if n == 0:
        return student.sum()
    return (angle_rows(centred(student), centred(teacher)).sum() / n**3).to(student.dtype)


def angle_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """[N] sums over j, k."""
    n = student.shape[0]
    side = max(1, int((budget(student.device) // max(n, 1)) ** 0.5))  # square blocks reuse the Gram tiles best
    blocks = tuple(b for i in range(0, max(n, 1), side) for b in _shifted(i, n, side))
    rows = (torch.arange(n, device=student.device),)
    return row_sums(_angle_loss, Angles(), blocks, (student,), (student,), (teacher, *rows), (teacher,))[0][:, 0]


def _shifted(start: int, n: int, side: int):
    return (b._replace(start=start, stop=min(start + side, n)) for b in plan(1, max(n, 1), 1, 1, side))


def _angle_loss(s, block, rows, shared, fixed_rows, fixed):
    """Angles at a block of anchors between j of first ... last - 1 and k >= first; those with k >= last stand for (k, j) too."""
    (x,), (y,), (t, row), (u,) = rows, shared, fixed_rows, fixed
    loss = F.smooth_l1_loss(_cosines(x, y, row, block), _cosines(t, u, row, block), reduction="none")
    sums = 2 * loss.sum((1, 2)) - loss[:, :, : block.last - block.first].sum((1, 2))
    return sums[:, None], torch.zeros_like(row)[:, None]


def _cosines(x: Tensor, y: Tensor, row: Tensor, block: Block) -> Tensor:
    """cos of the angle at x_i between y_j and y_k: (G_jk - G_ij - G_ik + G_ii) / (d_ij d_ik), 0 where a distance is -> [R, c, N - first].

    The Gram entries cancel for near neighbours, so up to their difference they are in the wide dtype.
    """
    dtype = x.dtype
    x, y = x.to(distances.wide(x)), y[block.first :].to(distances.wide(y))
    chosen = slice(0, block.last - block.first)
    gram = x @ y.mT  # [R, N - first]
    own = x.square().sum(-1, keepdim=True)  # [R, 1]
    sq = distances.squared(gram, own, y.square().sum(-1))
    column = torch.arange(block.first, block.first + y.shape[0], device=y.device)
    d = distances.root(torch.where(row[:, None] == column, torch.zeros_like(sq), sq))
    inverse = torch.where(d == 0, torch.zeros_like(d), 1 / torch.where(d == 0, torch.ones_like(d), d)).to(dtype)
    numerator = (y[chosen] @ y.mT - gram[:, chosen, None]) - (gram - own)[:, None, :]
    return numerator.to(dtype) * inverse[:, chosen, None] * inverse[:, None, :]
