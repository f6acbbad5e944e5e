"""InfoNCE with a leading batch dimension: each batch over its own bank, or all over one, which is never copied."""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.functional import info_nce

from ... import peers
from ...registry import Case
from .info_nce import TAU


class Inputs(NamedTuple):
    query: Tensor  # [B, N, D], unit rows, as the others
    positive: Tensor  # [B, N, D]
    bank: Tensor  # [B, M, D] or [M, D]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, *, shared: bool) -> Inputs:
    b, n, m, d = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (b, n, d), (b, n, d), (m, d) if shared else (b, m, d)
    query, noise, bank = (F.normalize(torch.randn(size, generator=generator), dim=-1) for size in sizes)
    return Inputs(query.to(dtype), F.normalize(query + noise, dim=-1).to(dtype), bank.to(dtype))


def formula(query: Tensor, positive: Tensor, bank: Tensor) -> Tensor:
    logits = torch.cat([(query * positive).sum(-1, keepdim=True), query @ bank.mT], dim=-1) / TAU  # [B, N, 1 + M]
    return F.cross_entropy(logits.flatten(0, 1), torch.zeros(query.shape[:-1].numel(), dtype=torch.long, device=query.device))


fused = partial(info_nce, temperature=TAU)


def mapped(query: Tensor, positive: Tensor, bank: Tensor) -> Tensor:
    """The same by vmap of the loss of one batch."""
    return torch.func.vmap(fused, (0, 0, None if bank.dim() == 2 else 0))(query, positive, bank).mean()


def case(shared: bool) -> Case:
    return Case(
        shapes={
            "quick": ((4, 32, 256, 64),),
            "default": ((4, 32, 256, 64), (16, 128, 8192, 128)),
            "full": ((4, 32, 256, 64), (16, 128, 8192, 128), (256, 64, 256, 64)),
        },
        axes="B N M D",
        dtypes=(torch.float32, torch.bfloat16),
        inputs=partial(inputs, shared=shared),
        reference=lambda x: peers.step(formula, *(t.double() for t in x)),
        flop=lambda shape: 4 * math.prod(shape),
        peers=(
            peers.steps("kdfast", fused),
            peers.steps("eager", formula),
            peers.steps("kdfast, vmap", mapped),
            peers.compiled(formula),
            *peers.bare_mm(peers.attention_products, lambda x: (x.query.flatten(0, 1), x.bank) if shared else (x.query, x.bank)),
        ),
    )


BATCHED = case(shared=False)
SHARED_BANK = case(shared=True)
