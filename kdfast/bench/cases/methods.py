"""A step of a distillation method, value and the student's gradient, beside the same in plain PyTorch. Banks are not pushed.

RKD's and RGAL's terms are in the triplet family: rkd_distance, rkd_angle, distance_weighted.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import QueueBank
from kdfast.distill import BINGO, CRD, SEED, CompRess

from .. import peers
from ..registry import Case, Peer

TAU, TEACHER_TAU, CRD_TAU, NOISE_EPS = 0.2, 0.05, 0.07, 1e-7


class Queued(NamedTuple):
    student: Tensor  # [N, D]
    member: Tensor  # [N, D], the student's too
    teacher: Tensor  # [N, D]
    keys: Tensor  # [M, D] unit rows
    other_keys: Tensor  # [M, D]


class Sampled(NamedTuple):
    student: Tensor  # [N, D]
    teacher: Tensor  # [N, D]
    student_map: Tensor  # [128, D]
    teacher_map: Tensor  # [128, D]
    student_rows: Tensor  # [M, 128] unit rows
    teacher_rows: Tensor  # [M, 128]
    index: Tensor  # [N, 1 + K], the sample's own row first


def queued(shape: tuple[int, int, int], dtype: torch.dtype) -> Queued:
    n, m, d = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (n, d), (n, d), (n, d), (m, d), (m, d)
    return Queued(*(F.normalize(torch.randn(size, generator=generator), dim=-1).to(dtype) for size in sizes))


def sampled(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Sampled:
    n, m, d, k = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (n, d), (n, d), (128, d), (128, d), (m, 128), (m, 128)
    tensors = (F.normalize(torch.randn(size, generator=generator), dim=-1).to(dtype) for size in sizes)
    return Sampled(*tensors, torch.randint(m, (n, 1 + k), generator=generator))


def unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)


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


def crd_formula(
    student: Tensor, teacher: Tensor, student_map: Tensor, teacher_map: Tensor, student_rows: Tensor, teacher_rows: Tensor, index: Tensor
) -> Tensor:
    def side(query: Tensor, bank: Tensor) -> Tensor:
        rows = bank.index_select(0, index.flatten()).view(*index.shape, -1)  # [N, 1 + K, 128]
        x = (torch.bmm(rows, query[:, :, None])[..., 0] / CRD_TAU).exp()
        x = x / (len(bank) * x.detach().mean())
        noise = (index.shape[1] - 1) / len(bank)
        positive, negatives = x[:, 0], x[:, 1:]
        return -(
            torch.log(positive / (positive + noise + NOISE_EPS)).sum() + torch.log(noise / (negatives + noise + NOISE_EPS)).sum()
        ) / len(x)

    return side(unit(student @ student_map.T), teacher_rows) + side(unit(teacher @ teacher_map.T), student_rows)


def queue_of(keys: Tensor) -> QueueBank:
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


class _Fixed:
    """Draws the same rows every time."""

    def __init__(self, index: Tensor) -> None:
        self.index = index

    def draw(self, rows: Tensor, positive: bool) -> Tensor:
        return self.index


def crd(x: Sampled) -> Callable[..., Tensor]:
    dims = {"student_dim": x.student.shape[1], "teacher_dim": x.teacher.shape[1]}
    loss = CRD(len(x.student_rows), sampler=_Fixed(x.index), temperature=CRD_TAU, push=False, **dims)
    with torch.no_grad():
        for embedding, given in ((loss.student_embedding, x.student_map), (loss.teacher_embedding, x.teacher_map)):
            embedding.weight.copy_(given)
            embedding.bias.zero_()
        loss.student_bank.storage.copy_(x.student_rows)
        loss.teacher_bank.storage.copy_(x.teacher_rows)
    return lambda student, teacher, *_: loss(student, teacher, index=x.index[:, 0])


def _case(method: Callable, formula: Callable[..., Tensor], leaves: int = 1, **fields) -> Case:
    def fused(inputs) -> Callable[[], tuple[Tensor, ...]]:
        return partial(peers.step, method(inputs), *inputs, leaves=leaves)

    def reference(inputs) -> tuple[Tensor, ...]:
        wide = (x.double() if x.is_floating_point() else x for x in inputs)
        return peers.step(formula, *wide, leaves=leaves)

    return Case(reference=reference, peers=(Peer("kdfast", fused), peers.steps("plain", formula, leaves=leaves)), **fields)


_queue = {
    "shapes": {"quick": ((64, 4096, 64),), "default": ((256, 65_536, 128),), "full": ((256, 65_536, 128), (256, 128_000, 128))},
    "axes": "N M D",
    "dtypes": (torch.float32, torch.bfloat16),
    "inputs": queued,
}
CASES = {
    "bingo": _case(bingo, bingo_formula, leaves=2, flop=lambda s: 8 * s[0] * s[1] * s[2], **_queue),
    "seed": _case(seed, seed_formula, flop=lambda s: 8 * s[0] * s[1] * s[2], **_queue),
    "compress": _case(
        compress,
        compress_formula,
        flop=lambda s: 8 * s[0] * s[1] * s[2],
        **{**_queue, "shapes": {**_queue["shapes"], "default": ((256, 128_000, 128),)}},
    ),
    "crd": _case(
        crd,
        crd_formula,
        flop=lambda s: 8 * s[0] * 128 * (1 + s[3]),
        shapes={"quick": ((32, 5_000, 64, 1_024),), "default": ((64, 50_000, 256, 16_384),), "full": ((64, 50_000, 256, 16_384),)},
        axes="N M D K",
        dtypes=(torch.float32,),
        inputs=sampled,
    ),
}
