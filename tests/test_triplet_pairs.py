"""Losses over all pairs: multi-similarity, margin, contrastive, angular, against the float64 reference."""

import pytest
import torch

from kdfast._ops.triplet import blocks, reference
from kdfast.functional import angular_loss, contrastive_loss, margin_loss, multi_similarity_loss, triplet_loss

LOSSES = (multi_similarity_loss, margin_loss, contrastive_loss, angular_loss)


@pytest.fixture(params=[2**19, 40], ids=["one_block", "many_blocks"])
def budget(request, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BUDGET", request.param)


@pytest.fixture(params=[False, True], ids=["in_batch", "bank"])
def problem(request, budget):
    """x, y, label and mask tensors, the leaves, and the arguments that say so."""
    n, m = 9, 13
    x = torch.randn(n, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3, 9])  # 9: no positive
    if not request.param:
        return x, x, labels, reference.sides(labels, labels, torch.arange(n)), (x,), {}
    y = torch.randn(m, 4, dtype=torch.float64, requires_grad=True)
    ref_labels, own = torch.randint(0, 4, (m,)), torch.arange(n) - 1
    sides = reference.sides(labels, ref_labels, own, 11)
    return x, y, labels, sides, (x, y), dict(ref=y, ref_labels=ref_labels, own_index=own, ref_valid=11)


def agree(got, want, leaves):
    grad = torch.randn_like(want)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    pairs = zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad, retain_graph=True), strict=True)
    for g, e in pairs:
        torch.testing.assert_close(g, e, rtol=0, atol=1e-10)


def reduced(parts, valid, reduction):
    """parts: losses per pair or triplet, each [N, ...]; one quotient over all of them."""
    if reduction == "none":
        return sum(p.flatten(1).sum(1) for p in parts)
    total = sum(p.sum() for p in parts)
    return total / {"sum": 1, "mean": valid, "mean_nonzero": sum((p > 0).sum() for p in parts)}[reduction]


@pytest.mark.parametrize("epsilon", [0.1, None])
@pytest.mark.parametrize("normalize", [True, False])
def test_multi_similarity(problem, epsilon, normalize):
    x, y, labels, sides, leaves, given = problem
    s = 1 - reference.distances(x, y, "cosine") if normalize else x @ y.mT
    rows = reference.multi_similarity_loss(s, *sides, epsilon=epsilon, base=0.4)
    for reduction, want in (("none", rows), ("sum", rows.sum()), ("mean", rows.mean())):
        got = multi_similarity_loss(x, labels, epsilon=epsilon, base=0.4, normalize=normalize, reduction=reduction, **given)
        agree(got, want, leaves)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("reduction", ["mean_nonzero", "mean", "sum", "none"])
def test_margin(problem, metric, reduction):
    x, y, labels, (positive, negative), leaves, given = problem
    d = reference.distances(x, y, metric)
    beta = torch.rand(10, dtype=torch.float64, requires_grad=True)
    parts = reference.margin_loss(d, positive, negative, beta[labels])
    want = reduced(parts, reference.every(positive, negative).sum(), reduction)
    agree(margin_loss(x, labels, beta=beta, metric=metric, reduction=reduction, **given), want, (*leaves, beta))
    one = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    want = reduced(reference.margin_loss(d, positive, negative, one.expand(9)), reference.every(positive, negative).sum(), reduction)
    agree(margin_loss(x, labels, beta=one, metric=metric, reduction=reduction, **given), want, (*leaves, one))


@pytest.mark.parametrize("reduction", ["mean_nonzero", "mean", "sum", "none"])
def test_contrastive(problem, reduction):
    x, y, labels, (positive, negative), leaves, given = problem
    pull, push = reference.contrastive_loss(reference.distances(x, y), positive, negative, pos_margin=0.2, neg_margin=1.1)
    want = reduced([pull], positive.sum(), reduction) + reduced([push], negative.sum(), reduction)
    agree(contrastive_loss(x, labels, pos_margin=0.2, neg_margin=1.1, reduction=reduction, **given), want, leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_angular(problem, reduction):
    x, y, labels, sides, leaves, given = problem
    pairs = reference.angular_loss(*(1 - reference.distances(a, y, "cosine") for a in (x, y)), *sides, alpha=38.0)
    agree(angular_loss(x, labels, alpha=38.0, reduction=reduction, **given), reduced([pairs], sides[0].sum(), reduction), leaves)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_gradients_and_compile(loss):
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    labels, ref_labels = torch.tensor([0, 1, 0, 1, 2]), torch.tensor([0, 1, 1, 0, 2, 0])

    def against_bank(x, y):
        return loss(x, labels, ref=y, ref_labels=ref_labels)

    def in_batch(x):
        return loss(x, labels)

    assert torch.autograd.gradcheck(against_bank, (x, y), fast_mode=True)
    assert torch.autograd.gradgradcheck(against_bank, (x, y), fast_mode=True)
    torch._dynamo.reset()
    (want,) = torch.autograd.grad(in_batch(x), x)
    (got,) = torch.autograd.grad(torch.compile(in_batch, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.func.grad(in_batch)(x.detach()), want)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [0, 1, 3, 65])
def test_ragged_sizes_in_lower_precision(loss, size):
    x, labels = torch.randn(size, 7).bfloat16().requires_grad_(), torch.arange(size) % 5
    value = loss(x, labels)
    assert value.dtype == torch.float32 and value.isfinite()
    torch.testing.assert_close(value.double(), loss(x.detach().double(), labels), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(value, x)
    assert grad.dtype == torch.bfloat16 and grad.isfinite().all()
    if size < 2:
        assert value == 0


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_nan_reaches_its_anchors_only(loss):
    x, y = torch.randn(4, 3), torch.randn(6, 3)
    x[1] = torch.nan
    rows = loss(x, torch.tensor([0, 1, 0, 1]), ref=y, ref_labels=torch.arange(6) % 2, reduction="none")
    assert rows.isnan().tolist() == [False, True, False, False]


def test_multi_similarity_at_extreme_scales():
    x, labels = torch.randn(8, 4), torch.arange(8) % 2
    loss = multi_similarity_loss(x, labels, alpha=1000.0, beta=5000.0)
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("loss", "given", "message"),
    [
        (multi_similarity_loss, dict(alpha=0.0), "alpha must be a finite number > 0"),
        (multi_similarity_loss, dict(beta="x"), "beta must be a float"),
        (multi_similarity_loss, dict(epsilon=-0.1), "epsilon must be"),
        (multi_similarity_loss, dict(reduction="mean_nonzero"), "reduction must be one of"),
        (margin_loss, dict(beta=torch.ones(2, 2)), "beta must be a float, a 0-d tensor or"),
        (margin_loss, dict(beta=torch.ones(1)), "labels must lie in"),
        (margin_loss, dict(margin=-1.0), "margin must be"),
        (contrastive_loss, dict(pos_margin=None), "pos_margin must be a float"),
        (angular_loss, dict(alpha=90.0), "alpha must be an angle"),
        (angular_loss, dict(max_positives=0), "max_positives must be"),
        (angular_loss, dict(embeddings=[torch.ones(4, 3)]), "embeddings must be a Tensor"),
        (contrastive_loss, dict(impl="gpu"), "impl must be None"),
    ],
)
def test_wrong_arguments_are_named(loss, given, message):
    embeddings = given.pop("embeddings", torch.randn(4, 3))
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        loss(embeddings, torch.arange(4) % 2, **given)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", (*LOSSES, triplet_loss), ids=lambda loss: loss.__name__)
def test_no_anchors_leave_a_graph_to_the_references(loss, reduction):
    """As an empty batch does to the bank of the other losses."""
    x, y = torch.empty(0, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    value = loss(x, torch.empty(0, dtype=torch.int64), ref=y, ref_labels=torch.arange(4), reduction=reduction)
    assert value.sum() == 0
    dx, dy = torch.autograd.grad(value.sum(), (x, y))
    assert dx.shape == x.shape and not dy.any()
