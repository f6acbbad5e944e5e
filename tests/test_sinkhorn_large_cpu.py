"""Sinkhorn's C++ kernels where arrays leave the caches: scratch that is kept, results written past the caches."""

import resource
import threading

import pytest
import torch

from kdfast import functional
from kdfast._core import extension
from kdfast._ops.sinkhorn import cpu, reference
from kdfast.bench import measure
from kdfast.bench.cases.sinkhorn import layers
from kdfast.ops import sinkhorn

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)
WHY = "a tensor on memory that it gives back takes PyTorch 2.11"


def solve(cost, iterations=3, method="kernel", **options):
    return sinkhorn(cost, epsilon=0.1, max_iters=iterations, method=method, impl="cpu", **options)


def test_scratch_is_kept_and_released():
    cost = torch.rand(1050, 1010)
    _C.release_scratch()
    first = solve(cost)
    held = _C.release_scratch()
    assert 4 * cost.numel() <= held <= 64 << 20
    assert _C.release_scratch() == 0
    for again in (solve(cost), solve(cost)):  # in fresh scratch, and in what that call left there
        assert torch.equal(first.f, again.f) and torch.equal(first.value, again.value)
    _C.release_scratch()
    solve(cost[:700, :700])
    assert _C.release_scratch() == 0  # small scratch is not kept


@pytest.mark.parametrize("grad", ["envelope", "unrolled"])
def test_the_log_form_takes_no_scratch_as_large_as_the_cost(grad):
    cost, x, y = torch.rand(1050, 1010, requires_grad=True), torch.rand(1050, 2), torch.rand(1010, 2)
    _C.release_scratch()
    solve(cost, method="log", grad=grad)
    sinkhorn(x=x, y=y, epsilon=0.1, max_iters=3, method="log", grad=grad, impl="cpu")
    assert _C.release_scratch() == 0


@pytest.mark.skipif(OLD, reason=WHY)
@pytest.mark.parametrize("grad", ["envelope", "unrolled"])
def test_large_gradients_lie_in_kept_memory(grad):
    """Which a second gradient does not share, and which serves again once they are gone, without a page to fault in."""
    cost = torch.rand(1, 1050, 1010, requires_grad=True)
    r = solve(cost, method="log", grad=grad)
    value = r.value if grad == "envelope" else r.f.sum()
    take = lambda: torch.autograd.grad(value, cost, retain_graph=True)[0]
    _C.release_scratch()
    first = take()
    expected, at = first.clone(), first.data_ptr()
    second = take()
    assert at % 2**21 == 0 and second.data_ptr() != at and _C.release_scratch() == 0
    assert torch.equal(first, second) and first.is_contiguous() and first.untyped_storage().nbytes() == 4 * cost.numel()
    second.zero_()
    assert torch.equal(first, expected)
    del first, second
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        assert torch.equal(take(), expected)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000  # a gradient has 1036 pages
    assert _C.release_scratch() >= 4 * cost.numel()


@pytest.mark.skipif(OLD, reason=WHY)
def test_results_do_not_hold_scratch_many_times_their_size():
    cost, scores = torch.rand(1050, 2100), torch.rand(700, 1010)
    solve(cost)
    codes = functional.sinkhorn_assign(scores)
    assert codes.data_ptr() % 2**21 == 0 and _C.release_scratch() >= 4 * cost.numel()


@pytest.mark.skipif(OLD, reason=WHY)
def test_codes_lie_in_kept_memory():
    scores = torch.rand(1050, 1010)
    _C.release_scratch()
    codes = functional.sinkhorn_assign(scores)
    torch.testing.assert_close(codes.sum(-1), torch.ones(1050))
    del codes
    assert _C.release_scratch() >= 4 * scores.numel()


# Rows that begin at any element of a line, where only every 16th begins at the same, and at whole lines; rows left beside groups of these.
@pytest.mark.parametrize("n, k, iters", [(2150, 1001, 3), (1043, 2064, 1), (1043, 2064, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
def test_large_codes(isa, dtype, n, k, iters):
    """Whose exponentials are stored past the caches, as a thread has more than 8 MB of them, and used from either end."""
    scores = (torch.randn(n, k, dtype=torch.float64) * 0.2).clamp(-1, 1).to(dtype)
    with measure.threads(1):
        codes, again = (functional.sinkhorn_assign(scores, iters=iters, impl="cpu") for _ in range(2))
    truth = layers.published_assign(scores.double(), iters)
    if dtype == torch.float64:
        torch.testing.assert_close(codes, truth, rtol=1e-12, atol=0)
    else:
        naive = layers.published_assign(scores.float(), iters).double()
        ulps = 12 if isa == "base" else 4  # exponents, up to 30, are rounded twice there, once in the formula
        assert (codes.double() - truth).abs().max() <= 2 * (naive - truth).abs().max() + ulps * torch.finfo(torch.float32).eps * truth.max()
    assert torch.equal(codes, again)


def test_scratch_of_calls_at_once():
    costs = torch.rand(3, 1050, 1010)
    expected = [solve(c) for c in costs]
    found = [None] * len(costs)

    def run(i):
        for _ in range(3):
            found[i] = solve(costs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(costs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for want, got in zip(expected, found, strict=True):
        assert torch.equal(want.g, got.g) and torch.equal(want.transport_cost, got.transport_cost)


@pytest.mark.parametrize("n, m", [(1050, 1001), (1032, 1024)], ids=str)  # rows that begin at any element of a line, and at whole lines
def test_a_large_gradient(isa, n, m):
    cost = torch.rand(n, m).requires_grad_()
    result = solve(cost, method="log")
    (gradient,) = torch.autograd.grad(result.value, cost)
    plan = ((result.f[:, None].double() + result.g.double() - cost.double()) / 0.1).exp() / (n * m)
    torch.testing.assert_close(gradient.double(), plan, rtol=2e-5, atol=0)


@pytest.mark.parametrize("method", ["log", "kernel"])
def test_large_and_small_problems_agree_with_the_reference(isa, method):
    cost = torch.rand(1, 600, 700)
    a, b = torch.full((1, 600), 1 / 600), torch.full((1, 700), 1 / 700)
    ours = solve(cost, 5, method)
    truth = reference.sinkhorn(cost.double(), a.double(), b.double(), 0.1, 5)
    torch.testing.assert_close(ours.f.double(), truth.f, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.transport_cost.double(), truth.transport_cost, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("batch, n, m", [(1, 1, 1), (3, 3, 17), (2, 33, 65), (1, 257, 130)], ids=str)
def test_product(isa, threads, dtype, batch, n, m):
    p, arguments = _product_problem(batch, n, m, dtype)
    f, g, v, plus, factor = (t.double() for t in arguments)
    e = ((f[..., None] + g[:, None] - p.cost.double()) / p.epsilon[:, None, None].double()).exp()
    weights = plus + factor * (e @ v[..., None])[..., 0]
    expected = (e.mT @ weights[..., None])[..., 0]
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    found = cpu._product(p, *arguments)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert torch.equal(found, cpu._product(p, *arguments))


def test_product_of_points_and_padding(isa):
    x, y = torch.randn(2, 19, 6), torch.randn(2, 23, 6)
    p, arguments = _product_problem(2, 19, 23, torch.float32)
    points = p._replace(cost=None, x=x, y=y, metric="sqeuclidean", epsilon=torch.full((2,), 9.0))
    given = points._replace(cost=cpu.costs(points, 0, 19), x=None, y=None, metric="given")
    torch.testing.assert_close(cpu._product(points, *arguments), cpu._product(given, *arguments))

    rows, cols = torch.tensor([19, 5]), torch.tensor([7, 23])
    inside = (torch.arange(19) < rows[:, None])[..., None] & (torch.arange(23) < cols[:, None])[:, None]
    padded = given._replace(cost=torch.where(inside, given.cost, torch.nan), rows=rows, cols=cols)
    found = cpu._product(padded, *arguments)
    for i in range(2):
        n, m = int(rows[i]), int(cols[i])
        one = given.part(i, i + 1)._replace(cost=given.cost[i : i + 1, :n, :m], a=given.a[i : i + 1, :n], b=given.b[i : i + 1, :m])
        f, g, v, plus, factor = (t[i : i + 1, :size] for t, size in zip(arguments, (n, m, m, n, n), strict=True))
        torch.testing.assert_close(found[i : i + 1, :m], cpu._product(one, f.contiguous(), g.contiguous(), v, plus, factor))
        assert not found[i, m:].any()


def test_product_operator():
    p, arguments = _product_problem(2, 3, 4, torch.float32)
    torch.library.opcheck(torch.ops.kdfast.sinkhorn_product.default, (*cpu._fields(p), *arguments))
    with pytest.raises(RuntimeError, match="factor"):
        cpu._product(p, *arguments[:-1], arguments[-1][:1])


def _product_problem(batch, n, m, dtype):
    """A problem with a given cost in `dtype`, and f, g, v, plus, factor of the product."""
    low = torch.float64 if dtype == torch.float64 else torch.float32
    problem = solve(torch.rand(batch, n, m).to(dtype), 1).state.problem
    return problem, tuple(torch.rand(batch, size, dtype=low) for size in (n, m, m, n, n))
