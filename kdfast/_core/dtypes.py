"""Dtypes: what is accumulated in what, and what autocast asks for."""

import contextlib

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything smaller."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype that it is accumulated in. (A tensor that has it is not asked to take it, which is 1 us.)"""
    dtype = accumulator(x.dtype)
    return x if x.dtype == dtype else x.to(dtype)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, the tensors in its dtype (float64 is left alone, as PyTorch's matmul does); otherwise unchanged."""
    first = next(t for t in tensors if t is not None)
    if not torch.is_autocast_enabled(first.device.type):
        return tensors
    target = torch.get_autocast_dtype(first.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(target) for t in tensors)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off where `x` is, for what keeps the precision of its inputs, or is to have it backward too, whatever autocast says.

    Outside autocast it is nothing: torch.autocast's own context takes 10 us.
    """
    device_type = x.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else contextlib.nullcontext()
