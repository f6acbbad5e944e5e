"""A MoCo step at a small batch: loss and query gradient against a queue, then the new keys are pushed; in one dtype, and under autocast.

Features are raw: the loss scales queries and keys to unit length, and the queue what it is given. The correctness gate sees
the first step.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import QueueBank

from ... import peers
from ...registry import Call, Peer
from . import normalized
from .info_nce import INFO_NCE, Inputs
from .normalized import formula


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    x = normalized.inputs(shape, dtype)
    return x._replace(bank=2 * x.bank)


def stored(keys: Tensor) -> Tensor:
    """What a queue holds of `keys`: rounded once, after scaling in float32."""
    return F.normalize(keys.float(), dim=-1).to(keys.dtype)


def reference(x: Inputs) -> tuple[Tensor, ...]:
    return peers.in_chunks(formula, (x.query.double(), x.positive.double()), stored(x.bank).double())


def autocast(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(query: Tensor, *others) -> Tensor:
        with torch.autocast(query.device.type, torch.bfloat16):
            return loss(query, *others)

    return call


def kdfast(x: Inputs, loss: Callable[..., Tensor] = normalized.loss, **layout) -> Call:
    with x.bank.device:
        bank = QueueBank(*x.bank.shape, dtype=x.bank.dtype, **layout)
    bank.push(x.bank)

    def call() -> tuple[Tensor, ...]:
        result = peers.step(loss, x.query, x.positive, bank)
        bank.push(x.positive)
        return result

    return call


def plain(loss, x: Inputs) -> Call:
    """A tensor for the queue and a pointer into it, as MoCo keeps them."""
    queue, pointer = stored(x.bank), 0

    def call() -> tuple[Tensor, ...]:
        nonlocal pointer
        result = peers.step(loss, x.query, x.positive, queue)
        count = min(len(x.positive), len(queue) - pointer)
        queue[pointer : pointer + count] = stored(x.positive)[:count]
        pointer = (pointer + count) % len(queue)
        return result

    return call


def compiled(x: Inputs) -> Call:
    torch._dynamo.reset()
    return plain(torch.compile(formula, dynamic=False), x)


def lightly(x: Inputs) -> Call:
    from lightly.loss import NTXentLoss

    criterion = NTXentLoss(temperature=normalized.TAU, memory_bank_size=tuple(x.bank.shape))
    criterion.memory_bank.bank = stored(x.bank)
    return partial(peers.step, criterion, x.query, x.positive)


QUEUE = INFO_NCE._replace(
    shapes={
        "quick": ((32, 4096, 128), (64, 4096, 128)),
        "default": ((32, 65536, 128), (64, 65536, 128)),
        "full": ((32, 65536, 128), (64, 65536, 128), (32, 1_000_000, 128)),
        "cuda": ((256, 65536, 128),),
    },
    inputs=inputs,
    reference=reference,
    peers=(
        Peer("kdfast", kdfast),
        Peer("eager", partial(plain, formula)),
        Peer("kdfast, packed", partial(kdfast, layout="packed"), device="cpu"),
        Peer("lightly", lightly, missing=peers.installed("lightly", "lightly")),
        Peer("torch.compile", compiled, missing=peers.no_compiler, quick=False),
        *peers.bare_mm(peers.attention_products, lambda x: (x.query, stored(x.bank))),
    ),
)
QUEUE_AUTOCAST = QUEUE._replace(
    dtypes=(torch.float32,),
    peers=(
        Peer("kdfast", partial(kdfast, loss=autocast(normalized.loss))),
        Peer("eager", partial(plain, autocast(formula))),
        Peer("kdfast, packed", partial(kdfast, loss=autocast(normalized.loss), layout="packed"), device="cpu"),
    ),
)
