"""Similarity distillation: the student's scores over its bank against the teacher's over the teacher's, loss and student gradient."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.functional import similarity_distillation

from ... import peers
from ...registry import Case

STUDENT_TAU, TEACHER_TAU = 0.2, 0.07


class Inputs(NamedTuple):
    student: Tensor  # [N, Ds], unit rows, as the others
    teacher: Tensor  # [N, Dt]
    student_bank: Tensor  # [M, Ds]
    teacher_bank: Tensor  # [M, Dt]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    n, m, student, teacher = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (n, student), (n, teacher), (m, student), (m, teacher)
    return Inputs(*(F.normalize(torch.randn(size, generator=generator), dim=-1).to(dtype) for size in sizes))


def formula(student: Tensor, teacher: Tensor, student_bank: Tensor, teacher_bank: Tensor) -> Tensor:
    target = (teacher @ teacher_bank.T / TEACHER_TAU).softmax(-1)  # [N, M]
    return -(target * (student @ student_bank.T / STUDENT_TAU).log_softmax(-1)).sum(-1).mean()


def reference(x: Inputs) -> tuple[Tensor, ...]:
    student, teacher, *banks = (t.double() for t in x)
    return peers.in_chunks(formula, (student, teacher), *banks)


def products(mm: Callable, student: Tensor, teacher: Tensor, student_bank: Tensor, teacher_bank: Tensor) -> tuple[Tensor, ...]:
    return mm(mm(student, student_bank.T), student_bank), mm(mm(teacher, teacher_bank.T), student_bank)


def flop(shape: tuple[int, ...]) -> int:
    n, m, student, teacher = shape
    return (6 * student + 2 * teacher) * n * m


fused = partial(similarity_distillation, student_temperature=STUDENT_TAU, teacher_temperature=TEACHER_TAU)
DISTILLATION = Case(
    shapes={
        "quick": ((64, 1024, 32, 128),),
        "default": ((64, 256, 128, 128), (256, 65536, 128, 512)),
        "full": ((64, 256, 128, 128), (256, 65536, 128, 512), (1024, 65536, 128, 128)),
        "cuda": ((4096, 65536, 128, 256),),
    },
    axes="N M Ds Dt",
    dtypes=(torch.float32, torch.bfloat16),
    inputs=inputs,
    reference=reference,
    flop=flop,
    peers=(
        peers.steps("kdfast", fused),
        peers.steps("eager", formula),
        peers.compiled(formula),
        *peers.bare_mm(products, lambda x: x),
    ),
)
