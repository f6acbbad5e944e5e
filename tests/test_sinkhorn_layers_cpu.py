"""The C++ kernels of assignments and of doubly stochastic normalisation, under every instruction set of this machine."""

import pytest
import torch

from kdfast import functional as F
from kdfast._core import extension
from kdfast._ops.sinkhorn import normalize
from kdfast.bench.cases.sinkhorn import layers

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))


# Columns beside a vector (7, 17, 65); rows beside a group of 4.
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 17), (66, 65), (2, 300, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_assign(isa, shape, dtype):
    scores = torch.randn(shape, dtype=torch.float64).to(dtype)
    ours, truth = (F.sinkhorn_assign(s, epsilon=0.5, impl=impl) for s, impl in ((scores, "cpu"), (scores.double(), "torch")))
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-12 if dtype == torch.float64 else 3e-5, atol=1e-12)


def test_assign_of_apart_rows_and_extreme_scores(isa):
    wide = torch.randn(40, 90) * 1000
    for scores in (wide[:, 3:50], wide.T, wide[:1].expand(9, 90)):
        ours, truth = (F.sinkhorn_assign(s, iters=4, impl=impl) for s, impl in ((scores, "cpu"), (scores.double(), "torch")))
        torch.testing.assert_close(ours.double(), truth, rtol=2e-2, atol=1e-6)  # scores of 20,000 nats
        torch.testing.assert_close(ours.sum(-1), torch.ones(len(ours)))


@pytest.mark.parametrize("shape", [(0, 4, 3), (0, 3), (2, 0, 3), (2, 4, 0)], ids=str)
def test_assign_of_nothing(shape):
    """Whose strides are as they are: nothing is contiguous already."""
    for scores in (torch.rand(shape), torch.rand(*shape[:-1], 1).expand(shape)):
        assert F.sinkhorn_assign(scores, impl="cpu").shape == shape


def test_assign_of_few_columns_whose_largest_comes_late(isa):
    """Their sums over later chunks of rows are far from 1 at the largest scores of the rows before."""
    scores = torch.rand(600, 70, dtype=torch.float64)
    scores[300:310, 5] = 3.0
    scores[400, 69] = 2.5
    scores[:128, 20] = 4.0
    expected = F.sinkhorn_assign(scores, epsilon=0.05, impl="torch")
    torch.testing.assert_close(F.sinkhorn_assign(scores.float(), epsilon=0.05, impl="cpu").double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(F.sinkhorn_assign(scores, epsilon=0.05, impl="cpu"), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("n, k", [(256, 300), (33, 65), (2048, 130)], ids=str)
def test_assign_is_as_exact_as_the_loop(isa, n, k):
    """At an epsilon of 0.05, where scores are twenty nats: potentials are kept as differences, and long columns summed in chunks."""
    scores = (torch.randn(n, k) * 0.2).clamp(-1, 1)
    truth, naive = (layers.published_assign(s, 3) for s in (scores.double(), scores))
    error, allowed = ((codes.double() - truth).abs().max() for codes in (F.sinkhorn_assign(scores, epsilon=0.05, impl="cpu"), naive))
    assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * truth.max()


@pytest.mark.parametrize("row, column", [(slice(6, 7), slice(None)), (slice(None), slice(5, 6)), (slice(20, 30), slice(40, 50))], ids=str)
@pytest.mark.parametrize("offset", [-1.2, -4.3, -6.0, 6.0])
@pytest.mark.parametrize("iters", [1, 3])
def test_assign_of_a_row_or_column_far_from_the_others(isa, row, column, offset, iters):
    """By 35 bits at an epsilon of 0.05, more than stored exponentials are trusted with; 124, where a float holds some; 173, where none."""
    scores = torch.rand(33, 70, dtype=torch.float64)
    scores[row, column] += offset
    single, double, expected = (
        F.sinkhorn_assign(s, epsilon=0.05, iters=iters, impl=impl)
        for s, impl in ((scores.float(), "cpu"), (scores, "cpu"), (scores, "torch"))
    )
    torch.testing.assert_close(single.double(), expected, rtol=5e-5, atol=1e-7)
    torch.testing.assert_close(double, expected, rtol=1e-10, atol=1e-14)


def test_assign_of_low_scores_and_many_iterations(isa):
    """Exponentials relative to 0 would all vanish; sums that grew with every iteration would leave their range."""
    for shape in ((9, 70), (300, 7)):
        scores = torch.rand(shape, dtype=torch.float64) - 100
        ours, truth = (F.sinkhorn_assign(s, iters=40, impl=impl) for s, impl in ((scores.float(), "cpu"), (scores, "torch")))
        torch.testing.assert_close(ours.double(), truth, rtol=5e-4, atol=1e-7)  # scores of 2000 nats


def test_assign_threads(isa, threads):
    scores = torch.randn(900, 700)
    ours, again, truth = (F.sinkhorn_assign(s, impl=impl) for s, impl in ((scores, "cpu"), (scores, "cpu"), (scores.double(), "torch")))
    assert torch.equal(ours, again)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-9)


def test_nan_stays_in_its_batch_entry(isa):
    scores = torch.randn(2, 5, 6)
    scores[0, 1, 2] = torch.nan
    codes = F.sinkhorn_assign(scores, impl="cpu")
    assert codes[0].isnan().all() and codes[1].isfinite().all()
    logits = torch.randn(3, 4, 4)
    logits[1, 0, 0] = torch.nan
    assert F.sinkhorn_normalize(logits, impl="cpu").isnan().flatten(1).any(1).tolist() == [False, True, False]


# Sizes: the one the compiler knows (4) and others; batches beside a vector of lanes and a task of 64.
@pytest.mark.parametrize("n", [1, 3, 4, 7, 64])
@pytest.mark.parametrize("batch", [1, 17, 65])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_normalize(isa, n, batch, dtype):
    logits = (2 * torch.randn(batch, n, n, dtype=dtype)).requires_grad_()
    weight, double = torch.randn(batch, n, n, dtype=dtype), logits.detach().double().requires_grad_()
    iters = 3 if n == 64 else 20
    ours, truth = F.sinkhorn_normalize(logits, iters=iters, impl="cpu"), normalize.plain(double, iters, 1e-6)
    scale = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ours.double(), truth, rtol=scale, atol=scale)
    gradients = (torch.autograd.grad((y * weight).sum(), x)[0].double() for y, x in ((ours, logits), (truth, double)))
    torch.testing.assert_close(*gradients, rtol=scale, atol=4 * scale)


def test_normalize_vmap(isa):
    logits, weight = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.randn(2, 4, 4, dtype=torch.float64)
    loss = lambda x: (F.sinkhorn_normalize(x, iters=3, impl="cpu") * weight).sum()
    torch.testing.assert_close(torch.vmap(loss)(logits), torch.stack([loss(x) for x in logits]))
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(logits), torch.stack([torch.func.grad(loss)(x) for x in logits]))


def test_matrices_beyond_the_cache_take_the_other_form():
    logits = torch.randn(1, 65, 65)
    torch.testing.assert_close(F.sinkhorn_normalize(logits), F.sinkhorn_normalize(logits, impl="torch"))
    with pytest.raises(ValueError, match="at most 4096 entries"):
        F.sinkhorn_normalize(logits, impl="cpu")


def test_operators():
    scores, v, inverse = torch.rand(2, 3, 5), torch.rand(2, 5), torch.tensor(2.0)
    for arguments in ((scores, None, inverse, False), (scores, v, inverse, False), (scores, v, inverse, True)):
        torch.library.opcheck(torch.ops.kdfast.sinkhorn_assign.default, arguments)
    torch.library.opcheck(torch.ops.kdfast.sinkhorn_codes.default, (scores, inverse, 2))
    logits = torch.rand(2, 3, 3)
    for gradient in (None, torch.rand(2, 3, 3)):
        torch.library.opcheck(torch.ops.kdfast.sinkhorn_normalize.default, (logits, gradient, 3, 1e-6))
    for call, message in (
        (lambda: torch.ops.kdfast.sinkhorn_assign(scores, None, inverse, True), "codes need v"),
        (lambda: torch.ops.kdfast.sinkhorn_assign(scores, v[:1], inverse, True), "v has size"),
        (lambda: torch.ops.kdfast.sinkhorn_assign(scores[0], v, inverse, True), "3 dimensions"),
        (lambda: torch.ops.kdfast.sinkhorn_codes(scores[0], inverse, 2), "3 dimensions"),
        (lambda: torch.ops.kdfast.sinkhorn_codes(scores, inverse, 0), "iterations must be"),
        (lambda: torch.ops.kdfast.sinkhorn_normalize(scores, None, 3, 0.0), "logits has size"),
        (lambda: torch.ops.kdfast.sinkhorn_normalize(logits, None, 0, 0.0), "iterations must be"),
        (lambda: torch.ops.kdfast.sinkhorn_normalize(logits, logits.double(), 1, 0.0), "gradient has dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
