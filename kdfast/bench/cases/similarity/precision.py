"""InfoNCE of float32 rows in each precision of products, beside PyTorch's two: what giving up digits buys, and how many they are."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kdfast.functional import info_nce

from ... import peers
from ...registry import Call, Peer
from .info_nce import INFO_NCE, TAU, Inputs, formula

ROUNDED = {"bf16x3": 1e-3, "bf16": 0.1}  # errors at TAU: scores of about 2^-16 and 2^-8, over it


def medium(x: Inputs) -> Call:
    return partial(peers.in_precision, "medium", peers.step, formula, *x)


def named(precision: str) -> Callable[..., Tensor]:
    return partial(info_nce, temperature=TAU, precision=precision)


PRECISION = INFO_NCE._replace(
    shapes={
        "quick": ((64, 256, 128), (256, 4096, 128)),
        "default": ((64, 256, 128), (1024, 65536, 128)),
        "full": ((64, 256, 128), (1024, 65536, 128), (4096, 16384, 512)),
        "cuda": ((4096, 65536, 128),),
    },
    dtypes=(torch.float32,),
    peers=(
        peers.steps("kdfast, ieee", named("ieee")),
        peers.steps("eager", formula),
        *(peers.steps(f"kdfast, {name}", named(name))._replace(allowance=error) for name, error in ROUNDED.items()),
        Peer("eager, medium", medium, allowance=ROUNDED["bf16"]),
        *peers.bare_mm(peers.attention_products, lambda x: (x.query, x.bank)),
    ),
)
