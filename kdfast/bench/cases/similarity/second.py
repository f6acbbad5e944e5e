"""Second derivatives along a direction, of a graph that is kept: what a double backward takes beyond the first passes. Of InfoNCE, and
of an upstream gradient's product with what the primitive pools.

With the bank's probabilities at hand it is a product for the direction's scores and one for their sum, 4 N M D; formed anew, so that
nothing of size N x M is kept, 6 N M D. A bank with gradient has a direction too, and takes all products on both sides; pooled, it is the
values as well, whose slopes and their change are two products more, and whose gradient is another.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.functional import info_nce
from kdfast.ops import similarity_softmax

from ... import peers
from ...registry import Call, Case, Peer
from . import info_nce as first
from .info_nce import TAU, formula


class Inputs(NamedTuple):
    query: Tensor  # [N, D]
    bank: Tensor  # [M, D]
    positive: Tensor  # [N, D]
    direction: Tensor  # [N, D], unit rows
    bank_direction: Tensor  # [M, D], unit rows


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    x = first.inputs(shape, dtype)
    generator = torch.Generator().manual_seed(1)
    directions = (F.normalize(torch.randn(t.shape, generator=generator), dim=-1).to(dtype) for t in (x.query, x.bank))
    return Inputs(x.query, x.bank, x.positive, *directions)


def double_backward(loss: Callable[..., Tensor], x: Inputs, leaves: int = 1) -> Call:
    """`leaves`: 1 for the queries, 2 for the bank too. The graph is scaled by N: the loss is a mean over rows."""
    wanted = [t.detach().requires_grad_() for t in x[:leaves]]
    query, bank = *wanted, *x[leaves:2]
    gradients = torch.autograd.grad(loss(query, x.positive, bank) * len(query), wanted, create_graph=True)
    return partial(torch.autograd.grad, gradients, wanted, x[3 : 3 + leaves], retain_graph=True)


def query_products(mm: Callable, query: Tensor, keys: Tensor, direction: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return mm(query, keys.mT), mm(mm(direction, keys.mT), keys)


def products(mm: Callable, query: Tensor, keys: Tensor, direction: Tensor, keys_direction: Tensor) -> tuple[Tensor, ...]:
    """zdot has two products, and each side's gradient one with A and one with B."""
    scores, rates = mm(query, keys.mT), mm(direction, keys.mT)
    moved = mm(query, keys_direction.mT)
    return mm(rates, keys), mm(scores, keys_direction), mm(moved.mT, query), mm(scores.mT, direction)


def pooled_products(mm: Callable, query: Tensor, keys: Tensor, direction: Tensor, keys_direction: Tensor) -> tuple[Tensor, ...]:
    """With the slopes h.k and their change; an upstream gradient takes as long as a direction."""
    slopes, change = mm(direction, keys.mT), mm(direction, keys_direction.mT)
    return *products(mm, query, keys, direction, keys_direction), mm(change.mT, direction), slopes


def pooled_formula(query: Tensor, upstream: Tensor, bank: Tensor) -> Tensor:
    return ((query @ bank.T / TAU).softmax(-1) @ bank * upstream).sum() / len(query)


def pooled(query: Tensor, upstream: Tensor, bank: Tensor) -> Tensor:
    return (similarity_softmax(query, bank, scale=1 / TAU)[1] * upstream).sum() / len(query)


def case(leaves: int, units: int, floor, fused: Callable[..., Tensor], formula: Callable[..., Tensor]) -> Case:
    return Case(
        shapes={
            "quick": ((64, 256, 128), (256, 2048, 64)),
            "default": ((64, 256, 128), (1024, 16384, 128)),
            "full": ((64, 256, 128), (1024, 16384, 128), (4096, 4096, 256)),
            "cuda": ((4096, 16384, 128),),
        },
        axes="N M D",
        dtypes=(torch.float32, torch.bfloat16),
        inputs=inputs,
        reference=lambda x: double_backward(formula, Inputs(*(t.double() for t in x)), leaves)(),
        flop=lambda shape: units * math.prod(shape),
        peers=(
            Peer("kdfast", lambda x: double_backward(fused, x, leaves)),
            Peer("eager", lambda x: double_backward(formula, x, leaves)),
            *peers.bare_mm(floor, lambda x: (x.query, x.bank, x.direction, x.bank_direction)),
        ),
    )


INFO_NCE = partial(info_nce, temperature=TAU), formula
SECOND = case(1, 6, query_products, *INFO_NCE)
SECOND_BANK = case(2, 14, products, *INFO_NCE)
POOLED_SECOND = case(2, 20, pooled_products, pooled, pooled_formula)
