"""info_nce under vmap, as a loss of several batches: values and derivatives are those of each by itself, whatever is mapped."""

import pytest
import torch
from torch.func import grad, vmap

from kdfast._ops.similarity.losses import matching
from kdfast.functional import info_nce

S, N, M, D = 3, 7, 11, 5
MAPPED = (0, 0, None), (1, 2, None), (None, 0, 1), (0, None, 0), (-1, None, None), (None, None, 2)
DIMENSIONS = pytest.mark.parametrize("dims", MAPPED, ids=str)


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def mapped(dims, *shapes) -> list:
    """Tensors of these shapes, with a further dimension where `dims` says."""
    made = [unit(*shape) if d is None else unit(S, *shape) for d, shape in zip(dims, shapes, strict=True)]
    return [(x if d is None else x.movedim(0, d)).contiguous().requires_grad_() for x, d in zip(made, dims, strict=True)]


def apart(loss, dims, tensors):
    """One by one."""
    return torch.stack([loss(*(x if d is None else x.select(d, i) for x, d in zip(tensors, dims, strict=True))) for i in range(S)])


def agree(loss, dims, tensors):
    ours, each = vmap(loss, in_dims=dims)(*tensors), apart(loss, dims, tensors)
    torch.testing.assert_close(ours, each)
    g = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, tensors, g), torch.autograd.grad(each, tensors, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@DIMENSIONS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"label_smoothing": 0.3}, {"temperature": torch.tensor(0.4)}], ids=str)
def test_each_is_by_itself(dims, reduction, options):
    loss = lambda q, k, bank: info_nce(2 * q, k, bank, reduction=reduction, **options)
    agree(loss, dims, mapped(dims, (N, D), (N, D), (M, D)))
    if dims[:2] != (None, None):
        within = lambda q, k: info_nce(2 * q, k, reduction=reduction, **options)
        agree(within, dims[:2], mapped(dims[:2], (N, D), (N, D)))


@pytest.mark.parametrize("shape", [(N, D), (2, N, D)], ids=str)
def test_no_operation_is_mapped(shape, monkeypatch):
    seen, run = [], matching.MatchingLoss.run
    monkeypatch.setattr(matching.MatchingLoss, "run", lambda call, x, *rest: seen.append(tuple(x.shape)) or run(call, x, *rest))
    agree(info_nce, (0, 0), mapped((0, 0), shape, shape))
    inner = (S, N, D) if len(shape) == 2 else (S * 2, N, D)
    assert seen[0] == inner and len(seen) == 1 + S


def test_around_and_inside_other_transforms():
    q, k, bank = unit(2, S, N, D), unit(2, S, N, D), unit(M, D)
    for loss in (info_nce, lambda q, k: info_nce(q, k, bank)):
        each = torch.stack([torch.stack([loss(q[i, j], k[i, j]) for j in range(S)]) for i in range(2)])
        torch.testing.assert_close(vmap(vmap(loss))(q, k), each)
        leaf = q.clone().requires_grad_()
        total = sum(loss(leaf[i, j], k[i, j]) for i in range(2) for j in range(S))
        (expected,) = torch.autograd.grad(total, leaf)
        whole = lambda q, loss=loss: vmap(vmap(loss))(q, k).sum()
        torch.testing.assert_close(grad(whole)(q), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(vmap(vmap(grad(loss)))(q, k), expected, rtol=1e-4, atol=1e-6)
        direction = torch.randn_like(q)
        second = grad(lambda q, whole=whole, v=direction: (grad(whole)(q) * v).sum())(q)
        leaf = q.clone().requires_grad_()
        total = sum(loss(leaf[i, j], k[i, j]) for i in range(2) for j in range(S))
        first = torch.autograd.grad(total, leaf, create_graph=True)[0]
        torch.testing.assert_close(second, torch.autograd.grad((first * direction).sum(), leaf)[0], rtol=1e-3, atol=1e-5)


def test_a_temperature_for_each():
    """It is mapped too, so that the general way takes it."""
    q, k, t = *mapped((0, 0), (N, D), (N, D)), torch.tensor([0.1, 0.3, 1.0], requires_grad=True)
    agree(lambda q, k, t: info_nce(q, k, temperature=t), (0, 0, 0), [q, k, t])


def test_bad_arguments_are_named():
    q = unit(S, N, D)
    for name, value in (("reduction", "most"), ("temperature", -1.0), ("label_smoothing", 1.0)):
        loss = lambda x, name=name, value=value: info_nce(x, x, **{name: value})
        with pytest.raises(ValueError, match=name):
            vmap(loss)(q)
    with pytest.raises(ValueError, match="positive must have shape"):
        vmap(lambda x: info_nce(x, x[:3]))(q)
