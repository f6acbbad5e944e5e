"""Losses on the relations between samples, streamed: kernel two-sample distance, relational distillation by distance and by angle."""

from collections.abc import Sequence
from numbers import Real

import torch.nn.functional as F
from torch import Tensor

from .._core import checks
from .._core.dtypes import full_precision
from .._ops import triplet as op
from .._ops.triplet import fused, relations, relations_cpu
from .._ops.triplet.triton import relations as relations_triton


def mmd_rbf(x: Tensor, y: Tensor, *, sigmas: Sequence[float], normalize: bool = False, impl: str | None = None) -> Tensor:
    """Squared maximum mean discrepancy under a sum of Gaussian kernels: mean K_xx + mean K_yy - 2 mean K_xy.

    K = sum over sigmas of exp(-d^2 / 2 sigma^2); diagonals are included, so the value is >= 0 (the biased estimate).

    Args:
        x: [N, D], y: [M, D], N, M >= 1, floating, one dtype. Both get gradients.
        sigmas: widths > 0, in the units of the rows.
        normalize: unit rows first. Default False.

    Returns: 0-d, float32 (float64 for float64). O((N + M)^2 D) time, memory of a block of rows.
    Raises: ValueError, TypeError naming the argument. Source: Gretton et al. 2012, eq. 5.
    """
    for name, t in (("x", x), ("y", y)):
        checks.rows(name, t, ndim=2)
        if t.shape[0] == 0:
            raise ValueError(f"{name} must have at least 1 row, got shape {tuple(t.shape)}")
    checks.alike("y", y, "x", x)
    checks.same_width("y", y, "x", x)
    if not isinstance(sigmas, Sequence) or len(sigmas) == 0 or not all(isinstance(sigma, Real) for sigma in sigmas):
        raise ValueError(f"sigmas must be a sequence of at least one float, got {sigmas!r}")
    for sigma in sigmas:
        checks.positive_number("sigmas", sigma)
    sigmas = tuple(float(sigma) for sigma in sigmas)
    checks.flag("normalize", normalize)
    impl = op.choose("mmd_rbf", impl, x, width=x.shape[1])
    with full_precision(x):
        if normalize:
            x, y = (F.normalize(relations.ready(t), dim=-1) for t in (x, y))
        if impl != "torch":
            return fused.loss((relations_cpu if impl == "cpu" else relations_triton).MMD, (sigmas,), x, y)
        return relations.mmd(x, y, sigmas)


def rkd_distance(student: Tensor, teacher: Tensor, *, impl: str | None = None) -> Tensor:
    """Smooth L1 between the distances of all pairs, each side's divided by the mean of its nonzero ones; mean over all N^2.

    Args:
        student: [N, D]. teacher: [N, D'], detached; the widths may differ. Rows are taken as they are.

    Returns: 0-d, float32 (float64 for float64); 0 for N < 2. O(N^2 (D + D')) time, memory of a block of rows.
    Raises: ValueError, TypeError naming the argument. Source: Park et al. 2019, eq. 5-7.
    """
    _pair(student, teacher)
    impl = op.choose("rkd_distance", impl, student, others=(teacher.dtype,), width=min(student.shape[1], teacher.shape[1]))
    with full_precision(student):
        if impl != "torch":
            return fused.loss((relations_cpu if impl == "cpu" else relations_triton).DISTANCE, (), student, teacher.detach())
        return relations.distance_loss(student, teacher.detach())


def rkd_angle(student: Tensor, teacher: Tensor, *, impl: str | None = None) -> Tensor:
    """Smooth L1 between the cosines of the angles of all triples (at i, between j and k); mean over all N^3.

    The cosine is 0 where j or k coincides with i. Never N^3 numbers, and N^3 operations rather than N^3 D: with the
    Gram matrix G of centred rows, (x_j - x_i).(x_k - x_i) = G_jk - G_ij - G_ik + G_ii. On a CPU seven N x N matrices of floats, by
    Triton about 18.

    Args:
        student: [N, D]. teacher: [N, D'], detached; the widths may differ. Rows are taken as they are.

    Returns: 0-d, float32 (float64 for float64); 0 for N < 2. Gram entries are formed in float64 where the device has it.
    Raises: ValueError, TypeError naming the argument. Source: Park et al. 2019, eq. 8-10.
    """
    _pair(student, teacher)
    impl = op.choose("rkd_angle", impl, student, others=(teacher.dtype,), width=min(student.shape[1], teacher.shape[1]))
    with full_precision(student):
        if impl != "torch":
            return fused.loss((relations_cpu if impl == "cpu" else relations_triton).ANGLE, (), student, teacher.detach())
        return relations.angle_loss(student, teacher.detach())


def _pair(student: Tensor, teacher: Tensor) -> None:
    checks.rows("student", student, ndim=2)
    checks.rows("teacher", teacher, ndim=2)
    if teacher.device != student.device:
        raise ValueError(f"teacher must be on the device of student ({student.device}), got {teacher.device}")
    if teacher.shape[0] != student.shape[0]:
        raise ValueError(f"teacher must have the rows of student ({student.shape[0]}), got {teacher.shape[0]}")
