"""Scores of sampled bank rows and, from given upstream gradients, those of the queries; of a bank that needs one, its too."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops import gather_similarity

from ... import peers
from ...registry import Call, Case, Peer
from . import crd
from .crd import CRD, TAU


class Inputs(NamedTuple):
    query: Tensor  # [N, D], unit rows, as the bank's
    bank: Tensor  # [M, D]
    index: Tensor  # [N, 1 + K]
    upstream: Tensor  # [N, 1 + K]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    x = crd.inputs(shape, dtype)
    return Inputs(*x, torch.rand(x.index.shape, generator=torch.Generator().manual_seed(1)))


def step(scores: Callable[..., Tensor], x: Inputs, leaves: int) -> tuple[Tensor, ...]:
    wanted = [t.detach().requires_grad_() for t in x[:leaves]]
    z = scores(*wanted, *x[leaves:3])
    return z.detach(), *torch.autograd.grad(z, wanted, x.upstream.to(z.dtype))


def compiled(leaves: int, x: Inputs) -> Call:
    torch._dynamo.reset()
    return partial(step, torch.compile(crd.scores, dynamic=False), x, leaves)


def reference(leaves: int, x: Inputs) -> tuple[Tensor, ...]:
    """A query at a time: less memory."""
    bank = x.bank.double()
    of_bank, parts = torch.zeros_like(bank), []
    for query, index, upstream in zip(*(t.split(1) for t in (x.query.double(), x.index, x.upstream.double())), strict=True):
        parts.append(step(crd.scores, Inputs(query, bank, index, upstream), 1))
        of_bank.index_add_(0, index[0], upstream.T @ query / TAU)
    return (*map(torch.cat, zip(*parts, strict=True)), of_bank)[: 1 + leaves]


def case(leaves: int, units: int) -> Case:
    fused = partial(gather_similarity, scale=1 / TAU)
    return CRD._replace(
        shapes={
            "quick": ((64, 5_000, 128, 256),),
            "default": ((64, 256, 128, 64), (64, 50_000, 128, 16_384), (256, 1_000_000, 128, 1_024)),
            "full": ((64, 256, 128, 64), (64, 50_000, 128, 16_384), (256, 1_000_000, 128, 1_024), (1024, 50_000, 512, 256)),
            "cuda": ((64, 50_000, 128, 16_384),),
        },
        inputs=inputs,
        reference=partial(reference, leaves),
        flop=lambda shape: units * shape[0] * shape[2] * (1 + shape[3]),
        peers=(
            Peer("kdfast", lambda x: partial(step, fused, x, leaves)),
            Peer("index_select + bmm", lambda x: partial(step, crd.scores, x, leaves)),
            Peer("torch.compile", partial(compiled, leaves), missing=peers.no_compiler, quick=False),
        ),
    )


SCORES = case(1, 4)
SCORES_BANK = case(2, 6)
