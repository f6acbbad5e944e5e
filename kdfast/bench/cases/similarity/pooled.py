"""The pooled output of the primitive over values that are not the keys, as attention has it, and its own backward.

The loss is the distance of what is pooled from a target; the gradient that of the queries or, in `pooled_bank`, of keys and values too.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops import similarity_softmax

from ... import peers
from ...registry import Case, Peer

TAU = 0.07


class Inputs(NamedTuple):
    query: Tensor  # [N, D], unit rows
    keys: Tensor  # [M, D], unit rows
    values: Tensor  # [M, Dv]
    target: Tensor  # [N, Dv]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    n, m, width, value_width = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (n, width), (m, width), (m, value_width), (n, value_width)
    query, keys, values, target = (torch.randn(size, generator=generator) for size in sizes)
    return Inputs(*(x.to(dtype) for x in (F.normalize(query, dim=-1), F.normalize(keys, dim=-1), values, target)))


def distance(pooled: Tensor, target: Tensor) -> Tensor:
    wide = torch.promote_types(target.dtype, torch.float32)
    return F.mse_loss(pooled.to(wide), target.to(wide))


def formula(query: Tensor, keys: Tensor, values: Tensor, target: Tensor) -> Tensor:
    return distance((query @ keys.T / TAU).softmax(-1) @ values, target)


def fused(query: Tensor, keys: Tensor, values: Tensor, target: Tensor) -> Tensor:
    return distance(similarity_softmax(query, keys, values=values, scale=1 / TAU)[1], target)


def attention(query: Tensor, keys: Tensor, values: Tensor, target: Tensor) -> Tensor:
    q, k, v = (x[None, None] for x in (query, keys, values))
    return distance(F.scaled_dot_product_attention(q, k, v, scale=1 / TAU)[0, 0], target)


def query_products(mm, query: Tensor, keys: Tensor, values: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Scores, what they pool, the weights' gradient from the pooled rows', and the queries'."""
    return mm(mm(query, keys.mT), values), mm(mm(target, values.mT), keys)


def products(mm, query: Tensor, keys: Tensor, values: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    scores, slopes = mm(query, keys.mT), mm(target, values.mT)
    return mm(scores, values), mm(slopes, keys), mm(slopes.mT, query), mm(scores.mT, target)


def case(leaves: int, flop, floor) -> Case:
    return Case(
        shapes={
            "quick": ((64, 256, 128, 128), (256, 2048, 64, 32)),
            "default": ((64, 256, 128, 128), (1024, 16384, 128, 128)),
            "full": ((64, 256, 128, 128), (1024, 16384, 128, 128), (1024, 16384, 128, 512), (4096, 4096, 64, 64)),
            "cuda": ((4096, 16384, 128, 128),),
        },
        axes="N M D Dv",
        dtypes=(torch.float32, torch.bfloat16),
        inputs=inputs,
        reference=lambda x: peers.step(formula, *(t.double() for t in x), leaves=leaves),
        flop=flop,
        peers=(
            peers.steps("kdfast", fused, leaves=leaves),
            peers.steps("eager", formula, leaves=leaves),
            peers.compiled(formula, leaves=leaves),
            Peer("SDPA", lambda x: partial(peers.step, attention, *x, leaves=leaves)),
            *peers.bare_mm(floor, lambda x: x),
        ),
    )


POOLED = case(1, lambda shape: 4 * (shape[2] + shape[3]) * shape[0] * shape[1], query_products)
POOLED_BANK = case(3, lambda shape: 6 * (shape[2] + shape[3]) * shape[0] * shape[1], products)
