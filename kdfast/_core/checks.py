"""Argument checks. Each raises ValueError or TypeError naming the argument, what was given and what is needed."""

import math
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGRAL = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def floating(name: str, x, *, ndim: int | None = None, min_ndim: int = 0) -> Tensor:
    """`x` is a tensor of a supported floating dtype with `ndim` (or at least `min_ndim`) dimensions."""
    _tensor(name, x, ndim, min_ndim)
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    return x


def rows(name: str, x, *, ndim: int | None = None) -> Tensor:
    """`x` holds rows [..., N, D] of a supported floating dtype, D >= 1, with `ndim` (or at least 2) dimensions."""
    floating(name, x, ndim=ndim, min_ndim=2)
    if x.shape[-1] == 0:
        raise ValueError(f"{name} must have at least 1 column, got shape {tuple(x.shape)}")
    return x


def integral(name: str, x, *, shape: tuple[int, ...] | None = None, device: torch.device | None = None) -> Tensor:
    """`x` is an integer tensor of exactly `shape` on `device`; returned as int64."""
    _tensor(name, x, None, 0)
    if x.dtype not in INTEGRAL:
        raise TypeError(f"{name} must have an integer dtype, got {x.dtype}")
    if shape is not None:
        exact_shape(name, x, shape)
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")
    return x.long()


def real(name: str, x, *, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`x` is a tensor of real numbers of exactly `shape` on `device`."""
    _tensor(name, x, None, 0)
    if x.is_complex():
        raise TypeError(f"{name} must be real, got {x.dtype}")
    exact_shape(name, x, shape)
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")
    return x


def _tensor(name: str, x, ndim: int | None, min_ndim: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested or x.is_quantized:
        kind = "a nested one" if x.is_nested else "a quantized one" if x.is_quantized else f"one of {x.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
    if x.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")
    if ndim is not None and x.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(x.shape)}")
    if x.dim() < min_ndim:
        raise ValueError(f"{name} must have at least {min_ndim} dimensions, got shape {tuple(x.shape)}")


def exact_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")


def alike(name: str, x: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """`x` and `other` are on one device and, unless `dtype` is False or autocast is on, share a dtype."""
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {x.device}")
    if dtype and x.dtype != other.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name} must have the dtype of {other_name} ({other.dtype}), got {x.dtype}")


def same_width(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape[-1] != other.shape[-1]:
        raise ValueError(f"{name} must have the width of {other_name} ({other.shape[-1]}), got {x.shape[-1]} (shape {tuple(x.shape)})")


def positive_number(name: str, x) -> None:
    """`x` is a float > 0, or a floating tensor (whose values are not read: that would synchronise)."""
    number(name, x)
    if not isinstance(x, Tensor) and not 0 < x < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {x}")


def nonnegative_number(name: str, x) -> None:
    """`x` is a finite float >= 0, or a 0-d floating tensor (whose value is not read)."""
    scalar(name, x)
    if isinstance(x, Real) and not (x >= 0 and math.isfinite(x)):
        raise ValueError(f"{name} must be a finite number >= 0, got {x}")


def weights(**given) -> None:
    """Each, by its name, is the weight of a term: a `nonnegative_number`, which may be 0."""
    for name, x in given.items():
        nonnegative_number(name, x)


def finite_number(name: str, x) -> None:
    """`x` is a float that is not infinite nor NaN."""
    if isinstance(x, Tensor):
        raise TypeError(f"{name} must be a float, got a Tensor")
    number(name, x)
    if not math.isfinite(x):
        raise ValueError(f"{name} must be finite, got {x}")


def in_range(name: str, x: float, dtype: torch.dtype) -> None:
    """The number `x`, where it is finite, stays so in `dtype`."""
    if math.isfinite(x) and abs(x) > torch.finfo(dtype).max:
        raise ValueError(f"{name} must be in the range of {dtype}, got {x}")


def number(name: str, x) -> None:
    """`x` is a real number or a floating tensor."""
    if isinstance(x, Tensor):
        _tensor(name, x, None, 0)
        if x.dtype not in FLOATING:
            raise TypeError(f"{name} must be a float or a floating tensor, got a tensor of {x.dtype}")
    elif type(x) is not float and (isinstance(x, bool) or not isinstance(x, Real)):  # of a float at once: Real's own test takes longer
        raise TypeError(f"{name} must be a float or a floating tensor, got {type(x).__name__}")
    elif isinstance(x, Integral) and abs(x) >= 2**63:
        raise ValueError(f"{name} must be a float where an int does not fit in 64 bits, got one of {int(x).bit_length()} bits")


def flag(name: str, x) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be a bool, got {type(x).__name__}")


def fraction(name: str, x) -> None:
    """`x` is a number in [0, 1)."""
    if isinstance(x, bool) or not isinstance(x, Real):
        raise TypeError(f"{name} must be a float, got {type(x).__name__}")
    if not 0 <= x < 1:
        raise ValueError(f"{name} must be in [0, 1), got {x}")


def scalar(name: str, x) -> None:
    """`x` is a number other than NaN, or a 0-d floating tensor (whose value is not read)."""
    number(name, x)
    if isinstance(x, Tensor):
        exact_shape(name, x, ())
    elif math.isnan(x):
        raise ValueError(f"{name} must be a number, got {x}")


def class_labels(labels, logits: Tensor) -> Tensor:
    """`labels` of logits [N, C], as cross-entropy takes them: classes [N], of which -100 is left out, or probabilities [N, C]."""
    _tensor("labels", labels, None, 1)
    if labels.is_floating_point():
        return real("labels", labels, shape=tuple(logits.shape), device=logits.device)
    labels = integral("labels", labels, shape=tuple(logits.shape[:1]), device=logits.device)
    index_range("labels", labels, logits.shape[1], lowest=-100)
    return labels


def count(name: str, x, *, minimum: int = 1) -> int:
    if isinstance(x, bool) or not isinstance(x, Integral):
        raise TypeError(f"{name} must be an int, got {type(x).__name__}")
    if x < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {x}")
    if x >= 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {x}")
    return int(x)


def choice(name: str, x, options: tuple) -> None:
    if not isinstance(x, (str, int, type(None))) or x not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {x!r}")


def index_range(name: str, index: Tensor, size: int, *, lowest: int = 0) -> None:
    """Every index is in [lowest, size). Read on the CPU only: elsewhere it would synchronise."""
    if index.device.type != "cpu" or index.numel() == 0 or torch.compiler.is_compiling() or not readable(index):
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < lowest or high >= size:
        raise IndexError(f"{name} must lie in [{lowest}, {size}), got values from {low} to {high}")


def own_rows(own_index: "bool | Tensor | None", shape: tuple[int, ...], size: int, device: torch.device) -> Tensor | None:
    """`own_index` as int64 of `shape` [*B, N] (-1: none) into `size` rows; True is 0 ... N - 1, None and False leave nothing out."""
    if own_index is None or own_index is False:
        return None
    if own_index is True:
        if shape[-1] > size:
            raise ValueError(f"own_index=True needs a row for each query: {shape[-1]} queries, {size} rows")
        return torch.arange(shape[-1], device=device).expand(shape)
    own = integral("own_index", own_index, shape=shape, device=device)
    index_range("own_index", own, size, lowest=-1)
    return own


def prefix(name: str, valid: "int | Tensor", size: int, device: torch.device, batch: tuple[int, ...] = ()) -> "int | Tensor":
    """`valid` counts rows from the first, of `size`: an int, or an integer tensor, 0-d or of shape `batch`, returned as int64."""
    if isinstance(valid, Tensor):
        valid = integral(name, valid, shape=batch if valid.dim() else (), device=device)
        index_range(name, valid, size + 1)
        return valid
    if isinstance(valid, bool) or not isinstance(valid, Integral):
        raise TypeError(f"{name} must be an int or an integer tensor, got {type(valid).__name__}")
    if not 0 <= valid <= size:
        raise ValueError(f"{name} must lie in [0, {size}], got {valid}")
    return valid


def readable(x: Tensor) -> bool:
    """Whether values may be read: not inside vmap, and not a fake tensor."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)
