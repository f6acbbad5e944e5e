"""Exact nearest neighbours of unit rows by cosine: the k smallest distances of every query."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import peers
from ..registry import Call, Case, Peer, octaves

_CHUNK = 512  # queries whose scores a plain form holds at a time


class Inputs(NamedTuple):
    query: Tensor  # [N, D], unit rows, as the bank's
    bank: Tensor  # [M, D]
    k: int


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    n, m, d, k = shape
    generator = torch.Generator().manual_seed(0)
    query, bank = (F.normalize(torch.randn(rows, d, generator=generator), dim=-1).to(dtype) for rows in (n, m))
    return Inputs(query, bank, k)


def plain(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, ...]:
    """`_CHUNK` queries at a time: their distances, and the k smallest of them."""
    return (torch.cat([(1 - rows @ bank.T).topk(k, largest=False).values for rows in query.split(_CHUNK)]).float(),)


def reference(x: Inputs) -> tuple[Tensor, ...]:
    return (torch.cat([(1 - rows @ x.bank.double().T).topk(x.k, largest=False).values for rows in x.query.double().split(_CHUNK)]),)


def kdfast(precision: str | None) -> Callable[[Inputs], Call]:
    def build(x: Inputs) -> Call:
        from kdfast.ops import knn

        return lambda: knn(x.query, x.bank, x.k, precision=precision)[:1]

    return build


def faiss(x: Inputs) -> Call:
    import faiss

    index = faiss.IndexFlatIP(x.bank.shape[1])
    index.add(x.bank.numpy())

    def call() -> tuple[Tensor, ...]:
        faiss.omp_set_num_threads(torch.get_num_threads())
        return (1 - torch.from_numpy(index.search(x.query.numpy(), x.k)[0]),)

    return call


SEARCH = Case(
    shapes={
        "quick": ((512, 8_192, 128, 5),),
        "default": ((4_096, 65_536, 128, 5), (4_096, 65_536, 128, 100)),
        "full": ((4_096, 65_536, 128, 5), (4_096, 65_536, 128, 100), (4_096, 65_536, 512, 5), (1_024, 1_000_000, 128, 1_024)),
        "cuda": ((4_096, 1_000_000, 128, 10), (4_096, 65_536, 128, 10)),
    },
    axes="N M D k",
    dtypes=(torch.float32,),
    inputs=inputs,
    reference=reference,
    flop=lambda shape: 2 * shape[0] * shape[1] * shape[2],
    peers=(
        Peer("kdfast", kdfast(None)),
        Peer("chunks, topk", lambda x: partial(plain, *x)),
        Peer("kdfast, bf16x3", kdfast("bf16x3")),
        Peer("kdfast, bf16", kdfast("bf16")),
        Peer("faiss-cpu", faiss, missing=peers.installed("faiss", "faiss-cpu"), dtypes=(torch.float32,), device="cpu"),
    ),
)
GROWTH = SEARCH._replace(
    shapes={
        "quick": octaves((256, 4_096, 64, 5), entries=(0, 1, 2), count=1),
        "default": octaves((512, 16_384, 64, 5), entries=(0, 1, 2, 3)),
        "full": octaves((1_024, 65_536, 64, 5), entries=(0, 1, 2, 3)),
        "cuda": octaves((2_048, 65_536, 64, 5), entries=(0, 1, 2, 3)),
    },
    peers=SEARCH.peers[:2],
)
CASES = {"search": SEARCH, "growth": GROWTH}
