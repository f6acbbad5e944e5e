"""InfoNCE against a bank that needs gradient: loss and the gradients of queries, positives and bank in one step."""

import math
from functools import partial

import torch

from kdfast.functional import info_nce

from ... import peers
from .info_nce import INFO_NCE, TAU, Inputs, formula


def reference(x: Inputs) -> tuple[torch.Tensor, ...]:
    return peers.step(formula, *(t.double() for t in x), leaves=3)


BANK_GRADIENT = INFO_NCE._replace(
    shapes={
        "quick": ((64, 256, 128), (256, 4096, 128)),
        "default": ((64, 256, 128), (1024, 16384, 128)),
        "full": ((64, 256, 128), (1024, 65536, 128), (4096, 16384, 256)),
        "cuda": ((4096, 65536, 128), (8192, 32768, 512)),
    },
    reference=reference,
    flop=lambda shape: 8 * math.prod(shape),
    peers=(
        peers.steps("kdfast", partial(info_nce, temperature=TAU), leaves=3),
        peers.steps("eager", formula, leaves=3),
        peers.compiled(formula, leaves=3),
        *peers.bare_mm(peers.gradient_products, lambda x: (x.query, x.bank)),
    ),
)
