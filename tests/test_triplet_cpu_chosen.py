"""Losses of chosen triplets by kernels and their gradients, against the formula in float64."""

import itertools

import pytest
import torch

from kdfast._core import extension
from kdfast._ops.triplet import chosen, cpu, distances, mining, portable
from kdfast.functional import triplet_loss

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))
FORMS = list(itertools.product((False, True), (False, True), (1, -1)))


def case(n=30, m=50, d=37, each=3, dtype=torch.float32):
    """Rows, and triplets of which some are missing and many share a reference."""
    x, y = (torch.randn(k, d).to(dtype).requires_grad_() for k in (n, m))
    positive, negative = (torch.randint(-1, k, (n, each), dtype=torch.int32) for k in (m // 4, m))
    return x, y, positive, negative


def formula(s, x, y, positive, negative):
    x, y_p, y_n = (
        distances.prepare(t, s.metric, s.normalize)
        for t in (x[:, None], *(distances.gather(y, i.clamp_min(0)) for i in (positive, negative)))
    )
    return torch.where((positive >= 0) & (negative >= 0), portable.hinge_of_rows(s, x, y_p, y_n), 0)


def close(got, want, naive):
    """No further from float64 than twice the formula in float32, and 4 units of the largest value."""
    error, allowed = (got.double() - want).abs().max(), 2 * (naive.double() - want).abs().max()
    assert error <= allowed + 4 * torch.finfo(got.dtype).eps * want.abs().max()


def check(s, x, y, positive, negative):
    in_batch = y is None
    leaves = (x,) if in_batch else (x, y)
    g = torch.randn(positive.shape)

    def run(f, *rows):
        loss = f(s, rows[0], rows[-1] if f is formula else (None if in_batch else rows[1]), positive, negative)
        return loss, *torch.autograd.grad(loss, rows, g.to(loss.dtype))

    wide = tuple(t.detach().double().requires_grad_() for t in leaves)
    for got, want, naive in zip(run(chosen.losses, *leaves), run(formula, *wide), run(formula, *leaves), strict=True):
        assert got.dtype == naive.dtype
        close(got, want, naive)


@pytest.mark.parametrize("metric", chosen.METRICS)
@pytest.mark.parametrize("normalize", [False, True])
def test_losses_and_gradients(metric, normalize, isa):
    for soft, swap, sign in FORMS:
        s = mining.Settings("batch_hard", metric, normalize, margin=0.4, soft=soft, swap=swap, sign=sign)
        x, y, positive, negative = case()
        check(s, x, y, positive, negative)
        check(s, x, None, positive % 30, negative % 30)


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 65, 63, 2), (65, 3, 257, 1)], ids=str)
def test_dtypes_and_ragged_sizes(dtype, sizes, isa):
    check(mining.Settings("batch_hard", "euclidean", margin=0.4), *case(*sizes, dtype=dtype))


def test_second_derivatives():
    for soft, swap, in_batch, metric in itertools.product((False, True), (False, True), (False, True), chosen.METRICS):
        s = mining.Settings("batch_hard", metric, margin=0.6, soft=soft, swap=swap)
        x, y, positive, negative = case(9, 12, 5)
        if in_batch:
            y, positive, negative = x, positive % 9, negative % 9

        def second(f, x, y, g, s=s, positive=positive, negative=negative):
            loss = f(s, x, y, positive, negative)
            leaves = (x,) if y is None or y is x else (x, y)
            first = torch.autograd.grad(loss, leaves, g, create_graph=True)
            return torch.autograd.grad(sum(t.sin().sum() for t in first), (g, *leaves))

        g = torch.rand(positive.shape).requires_grad_()
        got = second(chosen.losses, x, None if in_batch else y, g)
        wide = x.detach().double().requires_grad_()
        want = second(formula, wide, wide if in_batch else y.detach().double().requires_grad_(), g.detach().double().requires_grad_())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_coinciding_and_zero_rows_have_gradient_zero_and_finite(isa):
    x, y = torch.randn(3, 4), torch.randn(4, 4)
    x[1], y[2] = y[1], 0
    x.requires_grad_(), y.requires_grad_()
    index = torch.tensor([[1], [1], [1]], dtype=torch.int32), torch.tensor([[2], [3], [2]], dtype=torch.int32)
    for normalize in (False, True):
        s = mining.Settings("batch_hard", "euclidean", normalize, margin=9.0)
        loss = chosen.losses(s, x, y, *index)
        assert all(t.isfinite().all() for t in torch.autograd.grad(loss.sum(), (x, y)))
    check(mining.Settings("batch_hard", "euclidean", False, margin=9.0), x, y, *index)


@pytest.mark.parametrize("soft", [False, True])
def test_an_infinite_distance_makes_an_infinite_loss_and_nan_nan(soft, isa):
    x, y = torch.zeros(2, 3), torch.tensor([[torch.inf, 0, 0], [1.0, 0, 0], [torch.nan, 0, 0]])
    index = torch.tensor([[0], [2]], dtype=torch.int32), torch.tensor([[1], [1]], dtype=torch.int32)
    loss = chosen.losses(mining.Settings("batch_hard", "euclidean", False, soft=soft), x, y, *index)
    assert loss[0].item() == torch.inf and loss[1].isnan()


@pytest.mark.parametrize("name", mining.PER_ANCHOR)
def test_the_loss_is_that_of_the_portable_path(name, isa):
    x, y = torch.randn(40, 30, requires_grad=True), torch.randn(90, 30, requires_grad=True)
    labels, ref_labels = torch.randint(0, 9, (40,)), torch.randint(0, 9, (90,))
    for reduction in ("mean_nonzero", "mean", "sum", "none"):
        for given in ({}, dict(ref=y, ref_labels=ref_labels)):
            leaves = (x, y) if given else (x,)
            got, want = (triplet_loss(x, labels, mining=name, reduction=reduction, impl=impl, **given) for impl in ("cpu", "torch"))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_layers_share_the_triplets_mined_on_another_tensor():
    layers, on = [torch.randn(50, d, requires_grad=True) for d in (5, 8)], torch.randn(50, 6)
    labels = torch.arange(50) % 13
    for swap, reduction in itertools.product((False, True), ("mean_nonzero", "none")):
        how = dict(sample_on=on, margin=0.6, swap=swap, reduction=reduction)
        got, want = (triplet_loss(layers, labels, impl=impl, **how) for impl in ("cpu", "torch"))
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got.sum(), layers), torch.autograd.grad(want.sum(), layers), strict=True):
            torch.testing.assert_close(a, b)


def test_graphs_may_be_kept_and_upstream_gradients_expanded(isa):
    x, y, positive, negative = case()
    loss = chosen.losses(mining.Settings("batch_hard", "euclidean"), x, y, positive, negative)
    kept = [torch.autograd.grad(loss, (x, y), torch.ones(()).expand(loss.shape), retain_graph=True) for _ in range(2)]
    assert all(a.equal(b) for a, b in zip(*kept, strict=True))
    (only,) = torch.autograd.grad(loss, y, torch.ones_like(loss))
    assert only.equal(kept[0][1])


def test_the_same_bits_for_any_number_of_threads(isa):
    x, y, positive, negative = case(700, 900, 128, 40)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = chosen.losses(mining.Settings("batch_hard", "euclidean", swap=True), x, y, positive, negative)
            found.append((loss, *torch.autograd.grad(loss.sum(), (x, y))))
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_compiles_whole(bank):
    x, labels = torch.randn(20, 6, requires_grad=True), torch.arange(20) % 5
    given = dict(ref=torch.randn(30, 6), ref_labels=torch.arange(30) % 5) if bank else {}

    def loss(x):
        return triplet_loss(x, labels, impl="cpu", **given)

    torch._dynamo.reset()
    (want,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.func.grad(lambda x: triplet_loss(x, labels, **given))(x.detach()), want)


def test_opcheck():
    for swap, in_batch, normalize in itertools.product((False, True), repeat=3):
        x, y, positive, negative = (t.detach() for t in case())
        rows = (x, None if in_batch else y, positive % 30, negative % 30)
        form = normalize, 0, 0.2, 1.0, False, swap
        torch.library.opcheck(torch.ops.kdfast.triplet_chosen.default, (*rows, *form))
        loss, *left = torch.ops.kdfast.triplet_chosen(*rows, *form)
        back = (torch.randn_like(loss), *left, *rows, normalize, 0, True, not in_batch)
        torch.library.opcheck(torch.ops.kdfast.triplet_chosen_grad.default, back)


def test_an_index_outside_is_refused():
    x, y, positive, negative = case()
    positive[2, 1] = 50
    with pytest.raises(RuntimeError, match="positive must lie in"):
        chosen.losses(mining.Settings("batch_hard", "euclidean"), x, y, positive, negative)
