"""What a caller changes in place between forward and backward: gradients are the loss's, or autograd refuses; and what is reported."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast.distill import KD, Distiller, Term
from kdfast.functional import info_nce, similarity_distillation, wasserstein_dependency
from kdfast.ops import SameLabel, similarity_softmax


def matrices(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_the_wasserstein_dependency_may_change_before_the_backward(reduction):
    query, positive, bank = leaves = matrices((9, 6), (9, 6), (17, 6))
    weight = torch.rand(9)
    loss = wasserstein_dependency(query, positive, bank, temperature=0.2, weight=weight, reduction=reduction).sum()
    before = torch.autograd.grad(loss, leaves, retain_graph=True)
    weight.zero_()
    assert all(map(torch.equal, before, torch.autograd.grad(loss, leaves)))


@pytest.mark.parametrize("name", ["query_labels", "key_labels"])
def test_changed_classes_of_a_softmax_are_noticed(name):
    query, keys = matrices((9, 6), (17, 6))
    labels = SameLabel(torch.arange(9) % 3, torch.arange(17) % 4)
    lse, pooled = similarity_softmax(query, keys, scale=3.0, exclude=(labels,))
    getattr(labels, name).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (lse.sum() + pooled.sum()).backward()


LOSSES = {
    "wasserstein": lambda q, p, b, t: wasserstein_dependency(q, p, b, temperature=t),
    "info_nce": lambda q, p, b, t: info_nce(q, p, b, temperature=t),
    "distillation": lambda q, p, b, t: similarity_distillation(q, p.detach(), b, student_temperature=t, teacher_temperature=0.1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_may_be_divided_in_place(name):
    query, positive, bank = matrices((9, 6), (9, 6), (17, 6))
    inputs = query, positive, bank, torch.tensor(0.2, requires_grad=True)
    whole = torch.autograd.grad(LOSSES[name](*inputs), inputs, allow_unused=True)
    loss = LOSSES[name](*inputs)
    loss /= 2
    for half, one in zip(torch.autograd.grad(loss, inputs, allow_unused=True), whole, strict=True):
        assert one is half is None or torch.allclose(2 * half, one)


def test_what_a_loss_of_one_term_reports_is_its_own():
    student, teacher = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5)
    criterion = KD(T=2)
    loss = criterion(student, teacher)
    value = loss.item()
    loss /= 2
    assert criterion.last["kd"].item() == value
    distiller = Distiller(nn.Linear(6, 5), nn.Linear(6, 5), {"kd": Term(KD(T=2))})
    x = torch.randn(8, 6)
    distiller.build(x)(x)
    loss, parts = distiller.loss()
    value = loss.item()
    loss += F.mse_loss(student, teacher)
    assert parts["kd"].item() == value
