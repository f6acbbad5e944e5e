"""The value of InfoNCE alone, as in validation: one product with the bank."""

import math
from functools import partial

import torch

from kdfast.functional import info_nce

from ... import peers
from ...registry import Call, Peer
from .info_nce import INFO_NCE, TAU, Inputs, formula


def value(loss, x: Inputs) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return (loss(*x),)


def reference(x: Inputs) -> tuple[torch.Tensor, ...]:
    return (peers.in_chunks(formula, tuple(t.double() for t in x[:2]), x.bank.double())[0],)


def compiled(x: Inputs) -> Call:
    torch._dynamo.reset()
    return partial(value, torch.compile(formula, dynamic=False), x)


LSE = INFO_NCE._replace(
    shapes=INFO_NCE.shapes | {"cuda": ((4096, 65536, 128), (4096, 65536, 64))},
    reference=reference,
    flop=lambda shape: 2 * math.prod(shape),
    peers=(
        Peer("kdfast", lambda x: partial(value, partial(info_nce, temperature=TAU), x)),
        Peer("eager", lambda x: partial(value, formula, x)),
        Peer("torch.compile", compiled, missing=peers.no_compiler, quick=False),
        *peers.bare_mm(lambda mm, query, keys: (mm(query, keys.T),), lambda x: (x.query, x.bank)),
    ),
)
