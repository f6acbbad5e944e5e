"""Losses that subtract levels of one origin from levels of another form both from the operands as autocast rounds them.

At a temperature of 0.01 levels are about 100: were one side rounded to bfloat16 and the other not, a loss near 0 would be off by 0.1.
"""

import pytest
import torch
import torch.nn.functional as F

from kdfast.functional import info_nce, similarity_distillation, sup_con

N, M, D, TAU = 33, 65, 32, 0.01
BF16 = torch.bfloat16


def rows():
    """Queries [N, D], each near the bank row [M, D] of its own place and class."""
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(M, D, generator=generator))
    return F.normalize(bank[:N] + 0.02 * torch.randn(N, D, generator=generator)), bank, torch.arange(N), torch.arange(M)


def class_loss(impl, **options):
    query, bank, labels, bank_labels = rows()
    return info_nce(
        query, bank=bank, query_labels=labels, bank_labels=bank_labels, same_class="positive", reduction="none", impl=impl, **options
    )


def queued(impl, **options):
    query, bank, labels, bank_labels = rows()
    return sup_con(query, labels, bank=bank, bank_labels=bank_labels, normalize=False, reduction="none", impl=impl, **options)


def in_batch(impl, **options):
    query, bank, labels, _ = rows()
    return sup_con(torch.cat([query, bank[:N]]), labels.repeat(2), normalize=False, reduction="none", impl=impl, **options)


def distilled(divergence, impl, temperature, **options):
    query, bank, *_ = rows()
    return similarity_distillation(
        query, query, bank, student_temperature=temperature, teacher_temperature=temperature,
        divergence=divergence, reduction="none", impl=impl, **options,
    )  # fmt: skip


LOSSES = {
    "info_nce": class_loss,
    "sup_con-bank": queued,
    "sup_con": in_batch,
    "cross-entropy": lambda *args, **options: distilled("ce", *args, **options),
    "kl": lambda *args, **options: distilled("kl", *args, **options),
}


def near_zero(name, impl):
    with torch.autocast("cpu", BF16):
        losses = LOSSES[name](impl, temperature=TAU)
    assert losses.abs().max() < 64 * torch.finfo(torch.float32).eps / TAU  # of the rounded operands it is 0 to far more digits
    losses = LOSSES[name](impl, temperature=TAU, precision="bf16")
    assert losses.abs().max() < 64 * torch.finfo(torch.float32).eps / TAU


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_near_zero_is_near_zero_by_kernels(name, isa):
    near_zero(name, "cpu")


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_near_zero_is_near_zero(name):
    near_zero(name, "torch")
