"""Methods that score rows drawn from a bank of all samples: CRD, WCoRD."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import IndexedBank
from kdfast.distill import CRD, WCoRD
from kdfast.distill.base import DistillLoss

from .step import case, unit

TAU, NOISE_EPS = 0.07, 1e-7
WIDTH = 128  # of the embeddings
GLOBAL, LOCAL, EPSILON, ITERATIONS = 0.8, 0.05, 0.05, 20  # WCoRD's terms


class Sampled(NamedTuple):
    student: Tensor  # [N, D]
    teacher: Tensor  # [N, D]
    student_map: Tensor  # [WIDTH, D], orthonormal rows (the last are 0 where D < WIDTH): its spectral norm is 1
    teacher_map: Tensor  # [WIDTH, D]
    student_rows: Tensor  # [M, WIDTH] unit rows
    teacher_rows: Tensor  # [M, WIDTH]
    index: Tensor  # [N, 1 + K], the sample's own row first


def sampled(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Sampled:
    n, m, d, k = shape
    generator = torch.Generator().manual_seed(0)
    features = (F.normalize(torch.randn(n, d, generator=generator), dim=-1).to(dtype) for _ in range(2))
    bases = (torch.linalg.qr(torch.randn(d, WIDTH, generator=generator)).Q.T for _ in range(2))
    maps = (F.pad(basis, (0, 0, 0, WIDTH - len(basis))).to(dtype) for basis in bases)
    rows = (F.normalize(torch.randn(m, WIDTH, generator=generator), dim=-1).to(dtype) for _ in range(2))
    return Sampled(*features, *maps, *rows, torch.randint(m, (n, 1 + k), generator=generator))


def scores(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """z_ik = q_i . bank[index_ik] / TAU, by the rows written out: [N, K]."""
    rows = bank.index_select(0, index.flatten()).view(*index.shape, -1)  # [N, K, WIDTH]
    return torch.bmm(rows, query[:, :, None])[..., 0] / TAU


def crd_formula(
    student: Tensor, teacher: Tensor, student_map: Tensor, teacher_map: Tensor, student_rows: Tensor, teacher_rows: Tensor, index: Tensor
) -> Tensor:
    def side(query: Tensor, bank: Tensor) -> Tensor:
        x = scores(query, bank, index).exp()
        x = x / (len(bank) * x.detach().mean())
        noise = (index.shape[1] - 1) / len(bank)
        positive, negatives = x[:, 0], x[:, 1:]
        return -(
            torch.log(positive / (positive + noise + NOISE_EPS)).sum() + torch.log(noise / (negatives + noise + NOISE_EPS)).sum()
        ) / len(x)

    return side(unit(student @ student_map.T), teacher_rows) + side(unit(teacher @ teacher_map.T), student_rows)


def transport(x: Tensor, y: Tensor) -> Tensor:
    """The value's dual at uniform weights, 1 - cosine; its gradient by the cost is the plan."""
    cost, size = 1 - x @ y.T, len(x)
    with torch.no_grad():
        g = torch.zeros_like(cost[0])
        for _ in range(ITERATIONS):
            f = -EPSILON * (((g - cost) / EPSILON).logsumexp(-1) - math.log(size))
            g = -EPSILON * (((f[:, None] - cost) / EPSILON).logsumexp(-2) - math.log(size))
        plan = ((f[:, None] + g - cost) / EPSILON).exp() / size**2
        dual = f.mean() + g.mean() - EPSILON * (plan.sum() - 1)
    linear = (plan * cost).sum()
    return dual + linear - linear.detach()


def wcord_formula(
    student: Tensor, teacher: Tensor, student_map: Tensor, teacher_map: Tensor, _: Tensor, teacher_rows: Tensor, index: Tensor
) -> Tensor:
    query, key = unit(student @ student_map.T), unit(teacher @ teacher_map.T)
    logits = torch.cat([(query * key).sum(-1, keepdim=True) / TAU, scores(query, teacher_rows, index[:, 1:])], 1)
    return GLOBAL * -logits.log_softmax(1)[:, 0].mean() + LOCAL * transport(query, key)


class _Fixed:
    """Draws the same rows every time."""

    def __init__(self, index: Tensor) -> None:
        self.index = index

    def draw(self, rows: Tensor, positive: bool = False) -> Tensor:
        return self.index if positive else self.index[:, 1:]


def with_maps(loss: DistillLoss, x: Sampled) -> Callable[..., Tensor]:
    """The loss with the inputs' embeddings, of the inputs' own rows."""
    with torch.no_grad():
        for embedding, given in ((loss.student_embedding, x.student_map), (loss.teacher_embedding, x.teacher_map)):
            embedding.weight.copy_(given)
            embedding.bias.zero_()
    return lambda student, teacher, *_: loss(student, teacher, index=x.index[:, 0])


def crd(x: Sampled) -> Callable[..., Tensor]:
    dims = {"student_dim": x.student.shape[1], "teacher_dim": x.teacher.shape[1]}
    with x.index.device:
        loss = CRD(len(x.student_rows), dim=WIDTH, sampler=_Fixed(x.index), temperature=TAU, push=False, **dims)
    loss.student_bank.storage.copy_(x.student_rows)
    loss.teacher_bank.storage.copy_(x.teacher_rows)
    return with_maps(loss, x)


def wcord(x: Sampled) -> Callable[..., Tensor]:
    weights = {"global_weight": GLOBAL, "local_weight": LOCAL, "epsilon": EPSILON, "iters": ITERATIONS}
    dims = {"student_dim": x.student.shape[1], "teacher_dim": x.teacher.shape[1]}
    with x.index.device:
        bank = IndexedBank(*x.teacher_rows.shape)
        loss = WCoRD(bank, dim=WIDTH, sampler=_Fixed(x.index), temperature=TAU, push=False, **weights, **dims)
    bank.storage.copy_(x.teacher_rows)
    return with_maps(loss, x)


_draws = {
    "shapes": {"quick": ((32, 5_000, 128, 1_024),), **dict.fromkeys(("default", "full", "cuda"), ((64, 50_000, 256, 16_384),))},
    "axes": "N M D K",
    "dtypes": (torch.float32,),
    "inputs": sampled,
}
CRD_STEP = case(crd, crd_formula, flop=lambda s: 8 * s[0] * WIDTH * (1 + s[3]), **_draws)
WCORD_STEP = case(wcord, wcord_formula, flop=lambda s: 4 * s[0] * WIDTH * s[3], **_draws)
