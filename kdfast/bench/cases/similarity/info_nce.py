"""InfoNCE against a memory bank that needs no gradient: loss and query gradient in one step."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.functional import info_nce

from ... import peers
from ...registry import Call, Case, Peer, octaves

TAU = 0.07
aten = torch.ops.aten


class Inputs(NamedTuple):
    query: Tensor  # [N, D], unit rows, as the others
    positive: Tensor  # [N, D]
    bank: Tensor  # [M, D]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    n, m, d = shape
    generator = torch.Generator().manual_seed(0)
    query, noise, bank = (F.normalize(torch.randn(rows, d, generator=generator), dim=-1) for rows in (n, n, m))
    positive = F.normalize(query + noise, dim=-1)  # cosine of a pair: about 0.7
    return Inputs(query.to(dtype), positive.to(dtype), bank.to(dtype))


def formula(query: Tensor, positive: Tensor, bank: Tensor) -> Tensor:
    logits = torch.cat([(query * positive).sum(-1, keepdim=True), query @ bank.T], dim=1) / TAU  # [N, 1 + M]
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def reference(x: Inputs) -> tuple[Tensor, ...]:
    query, positive, bank = (t.double() for t in x)
    return peers.in_chunks(formula, (query, positive), bank)


def attention(attend: Callable[..., tuple], x: Inputs) -> Call:
    """Attention with K = V returns lse and the pooled row, from which loss and gradient follow in closed form."""

    def call() -> tuple[Tensor, ...]:
        q, k = x.query[None, None], x.bank[None, None]
        pooled, lse, *_ = attend(q, k, k)
        z = (x.query.float() * x.positive.float()).sum(-1) / TAU
        total = torch.logaddexp(lse.reshape(-1).float(), z)
        negative = -torch.expm1(z - total)[:, None]  # 1 - p(positive)
        gradient = negative * (pooled[0, 0].float() - x.positive.float()) / (TAU * len(z))
        return (total - z).mean(), gradient.to(q.dtype)

    return call


INFO_NCE = Case(
    shapes={
        "quick": ((64, 256, 128), (256, 8192, 128)),
        "default": ((64, 256, 128), (1024, 65536, 128)),
        "full": ((64, 256, 128), (1024, 65536, 128), (4096, 16384, 256)),
        "cuda": (
            *((4096, 65536, 128), (8192, 65536, 256), (32768, 1_048_576, 128)),
            *((256, 65536, 128), (4096, 65536, 64), (4096, 65536, 1024)),
        ),
    },
    axes="N M D",
    dtypes=(torch.float32, torch.bfloat16),
    inputs=inputs,
    reference=reference,
    flop=lambda shape: 4 * math.prod(shape),
    peers=(
        peers.steps("kdfast", partial(info_nce, temperature=TAU)),
        peers.steps("eager", formula),
        peers.compiled(formula),
        Peer("SDPA, K = V", partial(attention, partial(aten._scaled_dot_product_flash_attention_for_cpu, scale=1 / TAU)), device="cpu"),
        Peer(
            "SDPA, K = V, FlashAttention",
            partial(attention, partial(aten._scaled_dot_product_flash_attention, scale=1 / TAU)),
            dtypes=(torch.bfloat16,),
            device="cuda",
        ),
        Peer(
            "SDPA, K = V, cuDNN",
            partial(attention, lambda q, k, v: aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=1 / TAU)),
            dtypes=(torch.bfloat16,),
            device="cuda",
        ),
        peers.steps("kdfast, Triton", partial(info_nce, temperature=TAU, impl="triton"))._replace(dtypes=(torch.bfloat16,), device="cuda"),
        *peers.bare_mm(peers.attention_products, lambda x: (x.query, x.bank)),
    ),
)
_WIDTHS = (1, 7, 17, 31, 33, 63, 100)  # around and between the vector widths
ODD_SIZES = INFO_NCE._replace(
    shapes={
        "quick": ((64, 512, 1), (64, 512, 17), (1, 4096, 128), (8, 4096, 128), (4096, 16, 64)),
        "default": (
            *((256, 8192, width) for width in _WIDTHS),
            (64, 4096, 4096),
            *((queries, 65536, 128) for queries in (1, 4, 8, 16)),
            (100_000, 64, 64),
            (100_000, 1, 64),
            (16, 1_000_000, 64),
        ),
        "full": (*((256, 8192, width) for width in (*_WIDTHS, 2, 3, 5, 9, 15, 23, 47, 49, 65)), (64, 16384, 4096), (8, 10_000_000, 32)),
    },
    peers=INFO_NCE.peers[:2],
)
GROWTH = INFO_NCE._replace(
    shapes={
        "quick": octaves((64, 512, 32), entries=(0, 1, 2), count=1),
        "default": octaves((512, 8192, 128), entries=(0, 1, 2)),
        "full": octaves((1024, 16384, 128), entries=(0, 1, 2)),
        "cuda": octaves((2048, 32768, 64), entries=(0, 1, 2)),
    },
    peers=INFO_NCE.peers[:2],
)
