"""impl="cpu" of the relations: C++ kernels (csrc/cpu/relations) that return the value and the gradients from one pass."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..._core import extension
from . import distances, relations
from .fused import Fused

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def missing() -> str | None:
    """Why the kernels are not on this machine (None: they are)."""
    return extension.missing_cpu()


def refuses(*, device_type: str = "cpu", dtype: torch.dtype = torch.float32, **_facts) -> str | None:
    """Why they cannot serve a call on this device type and dtype (None: they can)."""
    if device_type != "cpu":
        return f"it runs on CPU tensors, these are on {device_type}"
    return None if dtype in DTYPES else f"it takes float32, bfloat16 or float16, not {dtype}"


def mmd(wanted: tuple[bool, bool], x: Tensor, y: Tensor, sigmas: tuple[float, ...]) -> tuple[Tensor, ...]:
    """The value, and its gradients in x [N, D] and y [M, D], those wanted."""
    return mmd_of(torch.ops.kdfast.gaussian_sums, wanted, x, y, sigmas)


def mmd_of(op: Callable, wanted: tuple[bool, bool], x: Tensor, y: Tensor, sigmas: tuple[float, ...]) -> tuple[Tensor, ...]:
    """`mmd` by an op that is given (x, y, sigmas, whether y is x, whether a gradient is wanted)."""

    def sums(x: Tensor, y: Tensor | None, gradient: bool) -> tuple[Tensor, Tensor]:
        """The sum of kernels over all pairs, float64, and its gradient in x where y stays; y None: of x with itself."""
        return op(x.contiguous(), (x if y is None else y).contiguous(), sigmas, y is None, gradient)

    n, m = x.shape[0], y.shape[0]
    x, y = relations.ready(x), relations.ready(y)
    moved = distances.centred(x, y)  # by the middle of y
    value_x, of_x = sums(relations.centred(x), None, wanted[0])
    value_y, of_y = sums(moved[1], None, wanted[1])
    value, of_x_y = sums(*moved, wanted[0])
    gradients = []
    if wanted[0]:
        gradients.append(of_x * (2 / n**2) - of_x_y * (2 / (n * m)))
    if wanted[1]:
        gradients.append(of_y * (2 / m**2) - sums(*reversed(moved), True)[1] * (2 / (n * m)))
    return (value_x / n**2 + value_y / m**2 - 2 * value / (n * m)).float(), *gradients


def rkd_distance(wanted: tuple[bool, bool], student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """The value, and its gradient in student [N, D] where wanted[0]."""
    return first(wanted, torch.ops.kdfast.rkd_distance(*(centred(t) for t in (student, teacher)), wanted[0]))


def rkd_angle(wanted: tuple[bool, bool], student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """The same of angles."""
    return first(wanted, torch.ops.kdfast.rkd_angle(_rows(student), _rows(teacher), wanted[0]))


def first(wanted: tuple[bool, bool], found: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return found if wanted[0] else found[:1]


def _rows(x: Tensor) -> Tensor:
    return (x if x.dtype in DTYPES else x.float()).contiguous()


def centred(x: Tensor) -> Tensor:
    return relations.centred(x.float()).contiguous() if x.shape[0] else x.float()


MMD = Fused(mmd, relations.mmd)
DISTANCE = Fused(rkd_distance, relations.distance_loss)
ANGLE = Fused(rkd_angle, relations.angle_loss)


def _rkd_fake(student: Tensor, teacher: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    shape = student.shape if gradient else (0,)
    return student.new_empty((), dtype=torch.float32), student.new_empty(shape, dtype=torch.float32)


def _gaussian_sums_fake(x: Tensor, y: Tensor, sigmas, same: bool, gradient: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty((), dtype=torch.float64), x.new_empty(x.shape if gradient else (0,))


if missing() is None:
    torch.library.register_fake("kdfast::gaussian_sums", _gaussian_sums_fake)
    torch.library.register_fake("kdfast::rkd_distance", _rkd_fake)
    torch.library.register_fake("kdfast::rkd_angle", _rkd_fake)
