"""Shared pieces of the contrastive losses: unit rows, the inverse of a temperature, each sample's own row."""

import torch
from torch import Tensor

from .._core import checks, dtypes
from .._ops.similarity.unit_length import unit_length


def normalized(x: Tensor | None) -> Tensor | None:
    """Rows of unit length, the norm taken in float32 (float64 for float64)."""
    return None if x is None else unit_length(x)


def inverse(name: str, temperature: float | Tensor, query: Tensor) -> Tensor | float:
    """1 / temperature, after its checks; a tensor in the accumulator dtype of `query`, never cast by autocast."""
    checks.positive_number(name, temperature)
    if not isinstance(temperature, Tensor):
        if temperature * torch.finfo(dtypes.accumulator(query.dtype)).max < 1:
            raise ValueError(f"{name} must be so large that 1 / {name} is finite, got {temperature}")
        return 1.0 / temperature
    rows = tuple(query.shape[:-1])
    if temperature.dim() and tuple(temperature.shape) != rows:
        raise ValueError(f"{name} must be a float, 0-d or have shape {rows}, got {tuple(temperature.shape)}")
    return temperature.to(device=query.device, dtype=dtypes.accumulator(query.dtype)).reciprocal()


def own_columns(own_index: "bool | Tensor | None", query: Tensor, count: int) -> Tensor | None:
    """`own_index` as integers [*B, N] (-1: none) into `count` bank rows."""
    return checks.own_rows(own_index, tuple(query.shape[:-1]), count, query.device)
