"""Methods that score a queue: BINGO, SEED, CompRess."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import QueueBank
from kdfast.distill import BINGO, SEED, CompRess

from .step import case, unit

TAU, TEACHER_TAU = 0.2, 0.05


class Queued(NamedTuple):
    student: Tensor  # [N, D]
    member: Tensor  # [N, D], the student's too
    teacher: Tensor  # [N, D]
    keys: Tensor  # [M, D] unit rows
    other_keys: Tensor  # [M, D]


def queued(shape: tuple[int, int, int], dtype: torch.dtype) -> Queued:
    n, m, d = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (n, d), (n, d), (n, d), (m, d), (m, d)
    return Queued(*(F.normalize(torch.randn(size, generator=generator), dim=-1).to(dtype) for size in sizes))


def bingo_formula(student: Tensor, member: Tensor, teacher: Tensor, keys: Tensor, _: Tensor) -> Tensor:
    key = unit(teacher)

    def intra(query: Tensor) -> Tensor:
        query = unit(query)
        logits = torch.cat([(query * key).sum(-1, keepdim=True), query @ keys.T], 1) / TAU  # [N, 1 + M]
        return -logits.log_softmax(1)[:, 0].mean()

    return intra(student) + intra(member)


def seed_formula(student: Tensor, _: Tensor, teacher: Tensor, keys: Tensor, __: Tensor) -> Tensor:
    query, key = unit(student), unit(teacher)
    own = torch.cat([(query * key).sum(-1, keepdim=True), query @ keys.T], 1) / TAU
    target = torch.cat([(key * key).sum(-1, keepdim=True), key @ keys.T], 1) / TEACHER_TAU
    return -(target.softmax(1) * own.log_softmax(1)).sum(1).mean()


def compress_formula(student: Tensor, _: Tensor, teacher: Tensor, keys: Tensor, other_keys: Tensor) -> Tensor:
    log_t = (unit(teacher) @ keys.T / TEACHER_TAU).log_softmax(1)
    log_s = (unit(student) @ other_keys.T / TAU).log_softmax(1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def queue_of(keys: Tensor) -> QueueBank:
    with keys.device:
        bank = QueueBank(*keys.shape, dtype=keys.dtype, normalize=False)
    bank.push(keys)
    return bank


def bingo(x: Queued) -> Callable[..., Tensor]:
    loss = BINGO(temperature=TAU, bank=queue_of(x.keys), push=False)
    return lambda student, member, teacher, *_: loss({"a": student, "p": member}, {"a": teacher})


def seed(x: Queued) -> Callable[..., Tensor]:
    loss = SEED(queue_of(x.keys), student_temperature=TAU, teacher_temperature=TEACHER_TAU, projector=None, push=False)
    return lambda student, _, teacher, *__: loss(student, teacher)


def compress(x: Queued) -> Callable[..., Tensor]:
    temperatures = {"student_temperature": TAU, "teacher_temperature": TEACHER_TAU}
    loss = CompRess(queue_of(x.keys), queue_of(x.other_keys), push=False, **temperatures)
    return lambda student, _, teacher, *__: loss(student, teacher)


_queue = {
    "shapes": {
        "quick": ((64, 4096, 64),),
        "default": ((256, 65_536, 128),),
        "full": ((256, 65_536, 128), (256, 128_000, 128)),
        "cuda": ((256, 65_536, 128),),
    },
    "axes": "N M D",
    "dtypes": (torch.float32, torch.bfloat16),
    "inputs": queued,
    "flop": lambda shape: 8 * math.prod(shape),
}
BINGO_STEP = case(bingo, bingo_formula, leaves=2, **_queue)
SEED_STEP = case(seed, seed_formula, **_queue)
_large = dict.fromkeys(("default", "cuda"), ((256, 128_000, 128),))
COMPRESS_STEP = case(compress, compress_formula, **{**_queue, "shapes": {**_queue["shapes"], **_large}})
