"""impl="triton" of the relations: kernels that return the value and the gradients from one pass over tiles of distances.

Scores and weighted sums are products of three bfloat16 parts, as in dense.py; a row's sums are added in float64.
"""

import torch
from torch import Tensor

from ...._core import triton_runtime as runtime
from .. import distances, relations, relations_cpu, triton
from ..fused import Fused
from . import dense as triton_dense

_GAUSSIANS, _DISTANCES, _RATIOS = range(3)  # as in relations_kernels
#: rows and columns of a tile of angles
ANGLES = (32, 32)
_SQUARED = 1  # chosen.METRICS: what squared lengths are for


def missing() -> str | None:
    return runtime.missing()


def refuses(**facts) -> str | None:
    """Why the kernels cannot serve a call (None: they can)."""
    return triton.refuses(**facts)


def mmd(wanted: tuple[bool, bool], x: Tensor, y: Tensor, sigmas: tuple[float, ...]) -> tuple[Tensor, ...]:
    """As relations_cpu.mmd."""
    return relations_cpu.mmd_of(torch.ops.kdfast_triton.gaussian_sums, wanted, x, y, sigmas)


def rkd_distance(wanted: tuple[bool, bool], student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """As relations_cpu.rkd_distance."""
    sides = (relations_cpu.centred(t) for t in (student, teacher))
    return relations_cpu.first(wanted, torch.ops.kdfast_triton.rkd_distance(*sides, wanted[0]))


def rkd_angle(wanted: tuple[bool, bool], student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """As relations_cpu.rkd_angle."""
    return relations_cpu.first(wanted, torch.ops.kdfast_triton.rkd_angle(student, teacher, wanted[0]))


MMD = Fused(mmd, relations.mmd)
DISTANCE = Fused(rkd_distance, relations.distance_loss)
ANGLE = Fused(rkd_angle, relations.angle_loss)


def gaussian_sums(x: Tensor, y: Tensor, sigmas: list[float], same: bool, gradient: bool) -> tuple[Tensor, Tensor]:
    """The sum of exp(-|x_i - y_j|^2 / 2 sigma^2) over all pairs and sigmas, float64, and its gradient in x where y stays (or [0])."""
    # filled, not copied from the host, which a graph could not capture
    rates = torch.cat([x.new_full((1,), 1 / (2 * sigma**2)) for sigma in sigmas])
    mine = _side(x)
    sums, found = _sums(_GAUSSIANS, mine, mine if same else _side(y), gradient, rates=rates)
    return sums[0], found


def distance_loss(student: Tensor, teacher: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Mean over all pairs of smooth_l1 of the distances over their means, and its gradient in student (or [0]). Rows are centred."""
    n = len(student)
    if n == 0:
        return student.new_zeros(()), student.new_zeros(student.shape if gradient else 0)
    x, t = _side(student), _side(teacher)
    (total, count), apart = _sums(_DISTANCES, x, x, gradient)
    mean, teacher_mean = _mean(total, count), _mean(*_sums(_DISTANCES, t, t, False)[0])
    (loss, pull), found = _sums(_RATIOS, x, x, gradient, teacher=t, mean=mean, teacher_mean=teacher_mean)
    # dl/dx_i = 2 / (N^2 mu) sum_j (w_ij - c) (x_i - x_j) / d_ij, c = sum w d / (mu count): the mean moves too
    share = (pull / (mean * count.clamp_min(1))).float()
    grad = (found - share * apart) * (2 / (n**2 * mean)).float() if gradient else found
    return (loss / n**2).float(), grad


def angle_loss(student: Tensor, teacher: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Mean over i, j, k of smooth_l1 of the cosines, and its gradient in student, float32 (or [0])."""
    from . import relations_kernels as kernels

    n = len(student)
    none = student.new_zeros(student.shape if gradient else 0, dtype=torch.float32)
    if n == 0:
        return none.new_zeros(()), none
    rows, unit, mine = _geometry(student)
    other = _geometry(teacher)[2]
    grid = -(-n // ANGLES[0]), -(-n // ANGLES[1])
    losses, (of_sides, of_bases) = mine.new_empty(grid, dtype=torch.float64), mine.new_empty((2, n, n) if gradient else (2, 1))
    options = {"GRADIENT": gradient, "ROWS": ANGLES[0], "COLUMNS": ANGLES[1], "num_warps": 4}
    kernels.angle_sums[grid](mine, other, of_sides, losses, n, APEX=True, **options)
    if gradient:
        kernels.angle_sums[grid](mine, other, of_bases, losses, n, APEX=False, **options)
        # dx_a = 2 sum_b (D_ab + D_ba) (x_a - x_b), D the slopes; q_ij and q_ik are two sides of an angle
        slopes = 2 * of_sides + of_bases
        weight = (slopes + slopes.T).double() * (2 / (unit * n**3))
        none = (weight.sum(1, keepdim=True) * rows - weight @ rows).float()
    return (losses.sum() / n**3).float(), none


def _geometry(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centred rows in float64, a power of two that no squared distance exceeds, and [3, N, N]: distances over it in two floats, and r.

    The first float is a multiple of 2^-22, so that sums of three are exact: the distances of near neighbours are not lost in far ones.
    """
    rows = relations.centred(x.double())
    square = rows.square().sum(1)
    q = distances.squared(rows @ rows.T, square[:, None], square).fill_diagonal_(0)
    most = q.amax()
    unit = torch.where(most > 0, torch.exp2(torch.ceil(torch.log2(most))), 1.0)
    q = q / unit
    coarse = (q * 2**22).round() / 2**22
    return rows, unit, torch.stack([coarse, q - coarse, torch.where(q > 0, (0.5 / q).sqrt(), 0.0)]).float()


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 0, total / count.clamp_min(1), 1.0)


def tiles(rule: int, width: int) -> runtime.ScoreTiles:
    """Of rows of `width` or more: by what the compiler spills, and two sides' scores in a tile are the most."""
    t = triton_dense.small_tiles(runtime.score_tiles(width, triton_dense.PARTS), True)
    return t._replace(depth=16) if rule == _RATIOS else t


def _side(x: Tensor) -> triton_dense.Side:
    x = x.contiguous()
    return triton_dense.side(x, _SQUARED, runtime.score_tiles(x.shape[1], triton_dense.PARTS).depth)


def _sums(rule: int, x, y, gradient: bool, *, rates=None, teacher=None, mean=None, teacher_mean=None) -> tuple[Tensor, Tensor]:
    """The two sums of relation_sums over all rows, float64 [2], and the gradient of the first in the rows of x, or [0]."""
    from . import relations_kernels as kernels

    t = tiles(rule, min(x.x.shape[1], (teacher or x).x.shape[1]))
    rows, columns, width = len(x.x), len(y.x), x.parts.shape[2]
    row_tiles, chunks = -(-rows // t.rows), -(-width // triton_dense.CHUNK) if gradient else 1
    parts = runtime.splits(row_tiles * chunks, columns, t.columns, x.x.device, gradient * runtime.SUMS // triton_dense.PRODUCTS)
    sums = x.x.new_empty((parts, 2, rows), dtype=torch.float64)
    out, total = x.x.new_empty((parts, rows, width) if gradient else 0), x.x.new_empty((parts, rows) if gradient else 0)
    other, like = teacher or x, x.square  # what a rule does not read takes any pointer
    rates, mean, teacher_mean = (like if t is None else t.float() for t in (rates, mean, teacher_mean))
    kernels.relation_sums[(row_tiles, parts, chunks)](
        x.parts, y.parts, x.square, y.square, other.parts, other.square, rates, mean, teacher_mean, out, total, sums,
        rows, columns, width, other.parts.shape[2], runtime.share(columns, parts, t.columns), RULE=rule, SAME=x is y,
        COUNT=rates.numel() if rule == _GAUSSIANS else 0, GRADIENT=gradient, CHUNK=min(triton_dense.CHUNK, runtime.power_of_two(width)),
        **t.options(triton_dense.PARTS),
    )  # fmt: skip
    if gradient:
        out = runtime.joined(out)[:, : x.x.shape[1]] - runtime.joined(total)[:, None] * x.x
    return sums.sum((0, 2)), out


def _gaussian_sums_fake(x, y, sigmas, same, gradient):
    return x.new_empty((), dtype=torch.float64), x.new_empty(x.shape if gradient else (0,))


def _distance_fake(student, teacher, gradient):
    return student.new_empty(()), student.new_empty(student.shape if gradient else (0,))


runtime.register("gaussian_sums", gaussian_sums, _gaussian_sums_fake)
runtime.register("rkd_distance", distance_loss, _distance_fake)
runtime.register("rkd_angle", angle_loss, lambda *given: tuple(t.float() for t in _distance_fake(*given)))
