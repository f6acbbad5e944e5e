"""Projectors: maps between the student's and the teacher's feature widths, which may be learned from the first batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrizations

from ._core import checks
from ._core.dtypes import full_precision

KINDS = ("linear", "mlp", "orthogonal", "spectral")
NORMS = ("none", "batch", "l2")


class Affine(nn.Module):
    """x W^T + b on the last dimension. Widths of None are filled in by `materialize`; the parameters exist from the start.

    constraint: None; "spectral": W divided by its largest singular value, tracked by one step of the power method a
    forward in training (Miyato et al. 2018); "orthogonal": W^T W = 1 or W W^T = 1, whichever has room. "spectral" needs
    `out_features` at construction and "orthogonal" both widths.
    """

    def __init__(self, in_features: int | None, out_features: int | None, bias: bool = True, constraint: str | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.constraint = in_features, out_features, constraint
        self.lazy = True  # a width is missing
        self.weight = UninitializedParameter()
        self.bias = UninitializedParameter() if bias else None
        if constraint == "spectral":
            self.register_buffer("direction", F.normalize(torch.randn(out_features), dim=0))  # [out], the left singular vector
        self.materialize()
        if constraint == "orthogonal":
            parametrizations.orthogonal(self)

    def materialize(self, in_features: int | None = None, out_features: int | None = None) -> None:
        """Fill in widths that were None, and draw the parameters (as nn.Linear does) once both are known."""
        self.in_features = in_features if self.in_features is None else self.in_features
        self.out_features = out_features if self.out_features is None else self.out_features
        if self._allocate(self.in_features, self.out_features):
            bound = self.in_features**-0.5
            nn.init.uniform_(self.weight, -bound, bound)
            if self.bias is not None:
                nn.init.uniform_(self.bias, -bound, bound)
            if self.constraint == "spectral":
                for _ in range(15):
                    self._singular_vectors(update=True)

    def _allocate(self, in_features: int | None, out_features: int | None) -> bool:
        if not self.lazy or in_features is None or out_features is None:
            return False
        self.in_features, self.out_features, self.lazy = in_features, out_features, False
        self.weight.materialize((out_features, in_features))
        if self.bias is not None:
            self.bias.materialize((out_features,))
        return True

    @torch.no_grad()
    def _singular_vectors(self, update: bool) -> tuple[Tensor, Tensor]:
        """Left and right vectors; `update` takes one step of the power method. Never the buffer itself: a graph may hold them."""
        left = self.direction.clone()
        right = F.normalize(self.weight.t() @ left, dim=0)
        if update:
            left = F.normalize(self.weight @ right, dim=0)
            right = F.normalize(self.weight.t() @ left, dim=0)
            self.direction.copy_(left)
        return left, right

    def effective_weight(self) -> Tensor:
        """[out, in], the constraint applied, computed outside autocast."""
        with full_precision(self.weight):
            if self.constraint != "spectral":
                return self.weight
            left, right = self._singular_vectors(self.training and torch.is_grad_enabled())
            return self.weight / (left @ (self.weight @ right))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have width {self.in_features}, got shape {tuple(x.shape)}")
        weight = self.effective_weight()
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(weight.dtype)
        return F.linear(x, weight, self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        if self.lazy:
            raise RuntimeError(f"{prefix}weight has no width yet: call build() before state_dict()")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        stored = state_dict.get(prefix + "weight")
        if stored is not None and self.lazy:
            out_features, in_features = stored.shape
            self._allocate(self.in_features or in_features, self.out_features or out_features)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, constraint={self.constraint}"
        )


class Projector(nn.Module):
    """Brings student and teacher features to one width: `student, teacher = projector(student, teacher)`.

    The student is mapped to the teacher's width or, with `invert`, the teacher to the student's. The map acts on
    dimension 1 of [N, C, H, W] and on the last dimension otherwise. Of two maps the larger is average-pooled to the
    smaller's height and width first; beside a vector a map is averaged to [N, C].

    Args:
        student_dim, teacher_dim: widths; None is read from the first features (or from `load_state_dict`). The
            parameters are registered at once, so an optimiser made before that holds them.
        kind: "linear"; "mlp": Linear, ReLU, Linear; "orthogonal": orthonormal rows or columns throughout training;
            "spectral": largest singular value 1. The last two need both widths.
        hidden: inner width of the mlp.
        bias: a bias in every map.
        norm: of both sides afterwards: "none"; "batch": batch statistics of each channel, no affine part, no running
            average; "l2": unit vectors.
        invert: map the teacher instead (Learning to Project, 2403.14494).

    Raises:
        ValueError: an unknown kind or norm, a width below 1, a missing width, features of another width than before.
    """

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        kind: str = "linear",
        *,
        hidden: int = 2048,
        bias: bool = True,
        norm: str = "none",
        invert: bool = False,
    ) -> None:
        super().__init__()
        checks.choice("kind", kind, KINDS)
        checks.choice("norm", norm, NORMS)
        checks.flag("bias", bias)
        checks.flag("invert", invert)
        for name, dim in (("student_dim", student_dim), ("teacher_dim", teacher_dim)):
            if dim is not None:
                checks.count(name, dim)
            elif kind in ("orthogonal", "spectral"):
                raise ValueError(f"{name} must be given for kind={kind!r}")
        source, target = (teacher_dim, student_dim) if invert else (student_dim, teacher_dim)
        if kind == "mlp":
            maps = [Affine(source, checks.count("hidden", hidden), bias), nn.ReLU(), Affine(hidden, target, bias)]
        else:
            maps = [Affine(source, target, bias, None if kind == "linear" else kind)]
        self.maps = nn.Sequential(*maps)
        self.norm, self.invert = norm, invert

    @property
    def source_dim(self) -> int | None:
        """Width of what is mapped."""
        return self.maps[0].in_features

    @property
    def target_dim(self) -> int | None:
        """Width of what it is mapped to."""
        return self.maps[-1].out_features

    def materialize(self, student: Tensor, teacher: Tensor) -> None:
        """Fill in widths that are not known yet from features; ValueError where known ones differ."""
        checks.floating("student", student, min_ndim=1)
        checks.floating("teacher", teacher, min_ndim=1)
        source, target = (teacher, student) if self.invert else (student, teacher)
        self.maps[0].materialize(in_features=width(source))
        self.maps[-1].materialize(out_features=width(target))
        for side, x, dim in (("source", source, self.source_dim), ("target", target, self.target_dim)):
            if width(x) != dim:
                name = "teacher" if (side == "source") == self.invert else "student"
                raise ValueError(f"{name} must have width {dim} ({name}_dim), got shape {tuple(x.shape)}")

    def map(self, x: Tensor) -> Tensor:
        """The learned map alone, on the side it maps."""
        return self.maps(x.movedim(1, -1)).movedim(-1, 1) if x.dim() == 4 else self.maps(x)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        self.materialize(student, teacher)
        student, teacher = same_size(student, teacher)
        if self.invert:
            teacher = self.map(teacher)
        else:
            student = self.map(student)
        return self._normalized(student), self._normalized(teacher)

    def _normalized(self, x: Tensor) -> Tensor:
        channels = 1 if x.dim() == 4 else -1
        if self.norm == "l2":
            return F.normalize(x, dim=channels)
        if self.norm == "batch":
            return F.batch_norm(x.movedim(channels, 1), None, None, training=True).movedim(1, channels)
        return x

    def extra_repr(self) -> str:
        return f"norm={self.norm}, invert={self.invert}"


def width(x: Tensor) -> int:
    """The number of channels of [N, C, H, W], the last dimension of anything else."""
    return x.shape[1] if x.dim() == 4 else x.shape[-1]


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps at the smaller's height and width, or both as vectors [N, C] where only one is a map."""
    if student.dim() == 4 and teacher.dim() == 4:
        size = tuple(min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
        return tuple(x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
    if student.dim() == 4 and teacher.dim() == 2:
        return student.mean((2, 3)), teacher
    if student.dim() == 2 and teacher.dim() == 4:
        return student, teacher.mean((2, 3))
    return student, teacher
