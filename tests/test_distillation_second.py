"""The second derivative of similarity distillation's fused losses in closed form, against the float64 formula differentiated twice."""

import pytest
import torch
import torch.nn.functional as F
from similarity_cases import assert_as_good_as

from kdfast._core import extension
from kdfast._ops.similarity.losses import distillation_second
from kdfast.functional import similarity_distillation

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def definition(student, bank, tau, *, teacher, teacher_bank, divergence, reduction, weight=None, own_index=None, bank_valid=None):
    teacher, teacher_bank = teacher.to(student.dtype), teacher_bank.to(student.dtype)
    z, u = student @ bank.T / (tau[:, None] if tau.dim() else tau), teacher @ teacher_bank.T / 0.15
    column = torch.arange(len(bank))
    if own_index is not None:
        z, u = (x.masked_fill(column == own_index[:, None], -1e30) for x in (z, u))
    if bank_valid is not None:
        z, u = (x.masked_fill(column >= bank_valid, -1e30) for x in (z, u))
    log_q, log_p = z.log_softmax(1), u.log_softmax(1)
    losses = (log_p.exp() * ((log_p - log_q) if divergence == "kl" else -log_q)).sum(1)
    share = torch.ones_like(losses) if weight is None else weight.to(losses.dtype)
    return {"none": losses * share, "sum": (losses * share).sum(), "mean": (losses * share).sum() / share.sum()}[reduction]


def ours(student, bank, tau, *, teacher, teacher_bank, **given):
    return similarity_distillation(student, teacher, bank, teacher_bank, student_temperature=tau, teacher_temperature=0.15, **given)


@pytest.mark.parametrize("shape", [(20, 40, 24), (30, 1500, 17), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("by_row", [False, True], ids=["0-d", "by row"])
@pytest.mark.parametrize("frozen", [False, True], ids=["bank with gradient", "frozen bank"])
@pytest.mark.parametrize(
    ("divergence", "reduction", "chosen"),
    [
        ("kl", "mean", None),
        ("ce", "none", None),
        ("ce", "mean", "weight"),
        ("kl", "sum", "own"),
        ("kl", "mean", "valid"),
        ("ce", "none", "own"),
    ],
)
def test_second_derivatives(monkeypatch, shape, by_row, frozen, divergence, reduction, chosen):
    rows, columns, width = shape
    used = []
    gradients = distillation_second.gradients
    monkeypatch.setattr(distillation_second, "gradients", lambda *args: used.append(1) or gradients(*args))
    leaves = [unit(rows, width), unit(columns, width), 0.2 + 0.1 * torch.rand(rows) if by_row else torch.tensor(0.2)]
    given = dict(teacher=unit(rows, width), teacher_bank=unit(columns, width), divergence=divergence, reduction=reduction)
    given |= {"weight": {"weight": torch.rand(rows)}, "own": {"own_index": torch.randint(columns, (rows,))}}.get(chosen, {})
    if chosen == "valid" and frozen:
        given["bank_valid"] = columns - 2
    g = torch.randn(rows) if reduction == "none" else torch.tensor(0.7)
    along = [torch.randn_like(x) for x in leaves]

    def second(loss, dtype):
        at = [x.to(dtype).requires_grad_(not (frozen and i == 1)) for i, x in enumerate(leaves)]
        upstream = g.to(dtype).requires_grad_()
        wanted = [x for x in at if x.requires_grad]
        first = torch.autograd.grad(loss(*at, **given), wanted, upstream, create_graph=True)
        directions = [u.to(dtype) for x, u in zip(at, along, strict=True) if x.requires_grad]
        return torch.autograd.grad(first, [upstream, *wanted], directions)

    found = second(ours, torch.float32)
    assert used
    for got, its, wanted in zip(found, second(definition, torch.float32), second(definition, torch.float64), strict=True):
        close = its if got.dim() else its + 1e-5 * (1 + wanted.abs())  # one number's rounding may be 0 by chance
        assert_as_good_as(got, close, wanted)


def test_a_third_derivative_is_refused():
    student, bank, teacher = unit(20, 8).requires_grad_(), unit(40, 8), unit(20, 8)
    loss = ours(student, bank, torch.tensor(0.2), teacher=teacher, teacher_bank=None, divergence="kl", reduction="mean")
    (first,) = torch.autograd.grad(loss, student, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="third"):
        torch.autograd.grad(second.square().sum(), student)
