"""The short way of a plain call of losses of matching rows (plain.py)."""

import functools

import torch
from torch import Tensor

from .. import cpu
from ..plain import PRODUCTS, plain, reducible, scalar, usual
from . import matching


def matching_loss(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    shift: float | Tensor | None,
    smoothing: float,
    weight: Tensor | None,
    reduction: str,
) -> Tensor | None:
    """`clip_rows` or, with a shift, `sigmoid_rows` of x and y [N, D], reduced."""
    numbers = (usual(scale) or scalar(scale)) and (shift is None or (type(shift) is float and abs(shift) <= 1e3) or scalar(shift))
    if not (numbers and plain(x, y) and x.shape == y.shape and reducible(reduction, weight, len(x))):
        return None
    return matching.fused_losses(_call(x, None, reduction, weight, smoothing, False), x, y, scale, shift)


def paired_loss(
    x: Tensor,
    y: Tensor,
    number: float,
    temperature: float | Tensor,
    labels: Tensor | None,
    smoothing: float,
    include: bool,
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """`paired_rows` of x and y [N, D] that are plain, reduced. `number`: the temperature's."""
    scale = None if number is temperature else temperature.reciprocal()
    labels = None if labels is None else labels.contiguous()
    call = _call(x, labels, reduction, weight, smoothing, True, include, 1.0 / number)
    return matching.MatchingLoss.run(call, x.contiguous(), y.contiguous(), scale, None)


def _call(
    x: Tensor,
    labels: Tensor | None,
    reduction: str,
    weight: Tensor | None,
    smoothing: float,
    rows_alone: bool,
    include: bool = True,
    factor: float = 1.0,
) -> matching.Call:
    call = _call_of(x.dtype, reduction, smoothing, torch.is_grad_enabled(), rows_alone, include, factor)
    return call if labels is None and weight is None else call._replace(labels=labels, weight=weight)


@functools.lru_cache
def _call_of(
    dtype: torch.dtype, reduction: str, smoothing: float, grad: bool, rows_alone: bool, include: bool, factor: float
) -> matching.Call:
    products = cpu.KERNELS.products[PRODUCTS[dtype]]
    return matching.Call(None, reduction, grad, None, None, cpu.KERNELS, products, rows_alone, smoothing, None, include, factor)
