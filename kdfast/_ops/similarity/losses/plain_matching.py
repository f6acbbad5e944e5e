"""The short way of a plain call of losses of matching rows (plain.py)."""

import functools

import torch
from torch import Tensor

from ...._core import extension
from .. import cpu
from ..plain import PRODUCTS, number_of, plain, reducible, scalar, usual
from ..unit_length import unit_length
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


def batched_loss(
    x: Tensor,
    y: Tensor | None,
    temperature: float | Tensor,
    labels: Tensor | None,
    smoothing: float,
    normalize: bool,
    reduction: str,
) -> Tensor | None:
    """`paired_rows` of few pairs in each of the problems x and y [*B, N, D], reduced. labels: [*B, N]. None where it is not plain."""
    if y is None or not (plain(x, y, batched=True) and y.shape == x.shape and reducible(reduction, None, len(x)) and 0 <= smoothing < 1):
        return None
    rows, width = x.shape[-2:]
    if (x.dtype is torch.bfloat16 and reduction == "none") or not extension.load("_C")[0].few_pairs(rows, rows, width):
        return None
    if labels is not None and (smoothing or type(labels) is not Tensor or not labels.is_cpu or labels.layout is not torch.strided):
        return None
    if labels is not None and (labels.dtype is not torch.int64 or labels.shape != x.shape[:-1]):
        return None
    number = number_of(temperature)
    if not usual(number):
        return None
    shape = x.shape[:-1]
    if normalize:
        x, y = unit_length(x), unit_length(y)
    if x.dim() > 3:
        x, y, labels = x.flatten(0, -3), y.flatten(0, -3), None if labels is None else labels.flatten(0, -2)
    losses = paired_loss(x, y, number, temperature, labels, smoothing, True, None, "mean" if reduction == "sum" else reduction)
    if reduction == "sum":
        return losses * shape.numel()
    return losses if reduction == "mean" or losses.shape == shape else losses.view(shape)


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
