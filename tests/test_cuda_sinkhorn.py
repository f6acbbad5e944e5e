"""The CUDA Sinkhorn kernels against the float64 reference: on a GPU, elsewhere emulated on the CPU."""

import functools

import cuda_emulation
import pytest
import torch
from cuda_kernels import DEVICE, EMULATED, cuda, moved  # noqa: F401  the fixture serves every test
from sinkhorn_gpu_cases import check, check_padding, check_relaxed_and_alone, weights

from kdfast._core import cuda_runtime
from kdfast.ops import sinkhorn

check = functools.partial(check, impl="cuda", moved=moved)

# every team of threads, filled and nearly empty: 4, 8, 32, 64, 128 columns, 256 columns, blocks of a cluster
SIZES = [(1, 1), (4, 3), (7, 8), (17, 33), (40, 64), (65, 128), (3, 129), (130, 100), (257, 256)]


@pytest.mark.parametrize("method", ["log", "proximal"])
@pytest.mark.parametrize(("n", "m"), SIZES, ids=str)
def test_ragged_sizes(method, n, m):
    check(torch.rand(2, n, m), weights(2, n), weights(2, m), 0.1, 5, method=method)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 3), (7, 8), (17, 33), (40, 64), (65, 128), (130, 100)], ids=str)
def test_half_precision(dtype, n, m):
    cost = torch.rand(2, n, m).to(dtype)
    check(cost.float(), weights(2, n), weights(2, m), 0.1, 5, source={"cost": cost})
    odd = torch.rand(2, n, m + 3).to(dtype)[..., 1 : m + 1]  # rows that begin at no multiple of four bytes
    check(odd.float(), weights(2, n), weights(2, m), 0.1, 5, source={"cost": odd})


def test_many_small_problems():
    """More than a block of teams, the last one not full."""
    check(torch.rand(70, 4, 4), weights(70, 4), weights(70, 4), 0.1, 12)
    check(torch.rand(9, 8, 5), weights(9, 8), weights(9, 5), 0.1, 12)


@pytest.mark.parametrize("rho", [(0.5, 0.5), (None, 2.0), (0.05, None)])
def test_relaxed_marginals(rho):
    for n, m in ((4, 4), (12, 20), (130, 40)):
        check(torch.rand(2, n, m), weights(2, n), weights(2, m), 0.1, 6, rho=rho)


@pytest.mark.parametrize(("n", "m"), [(4, 3), (7, 8), (17, 33), (40, 64), (65, 128), (20, 256), (130, 100)], ids=str)
def test_relaxed_and_alone(n, m):
    check_relaxed_and_alone(n, m, impl="cuda", moved=moved)


def test_annealing():
    check(torch.rand(2, 12, 20), weights(2, 12), weights(2, 20), 0.1, 8, anneal=(1.0, 0.5))


@pytest.mark.parametrize(("n", "m"), [(20, 20), (60, 50), (140, 30)], ids=str)
def test_a_large_range(n, m):
    """exp(-C / eps) is 0 everywhere in float32: whole columns of the first iteration are, and the matrix on chip is formed anew."""
    check(1 + 50 * torch.rand(2, n, m), weights(2, n), weights(2, m), 0.05, 12)
    apart = torch.cdist(torch.randn(1, n, 3), torch.randn(1, m, 3) + 4).square()
    check(apart, weights(1, n), weights(1, m), 0.1, 12)


def test_where_to_start():
    cost, a, b, g = map(moved, (torch.rand(2, 10, 12), weights(2, 10), weights(2, 12), 3 * torch.randn(2, 12)))
    found = [sinkhorn(cost, a=a, b=b, epsilon=0.1, max_iters=3, init=(a, g), impl=impl) for impl in ("cuda", "torch")]
    torch.testing.assert_close(found[0].g, found[1].g, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0].value, found[1].value, rtol=1e-5, atol=1e-6)


def test_forbidden_pairs():
    cost = torch.rand(2, 12, 14)
    cost[0, 3, 4:9] = torch.inf
    cost[1, 5], cost[1, :, 7] = torch.inf, torch.inf  # a row and a column without any mass
    ours, want = (sinkhorn(moved(cost), epsilon=0.1, max_iters=20, impl=impl) for impl in ("cuda", "torch"))
    torch.testing.assert_close(ours.transport_cost, want.transport_cost, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.f, want.f, rtol=1e-5, atol=1e-6)
    assert (ours.plan()[0, 3, 4:9] == 0).all()


def test_shared_transposed_and_strided_costs():
    a, b = weights(3, 30), weights(3, 20)
    cost = torch.rand(20, 30)
    check(cost.mT.expand(3, -1, -1), a, b, 0.1, 4, source={"cost": cost.mT})
    wide = torch.rand(3, 30, 50)
    ours = sinkhorn(moved(wide)[:, :, 7:27], a=moved(a), b=moved(b), epsilon=0.1, max_iters=4, impl="cuda")
    want = sinkhorn(moved(wide[:, :, 7:27].contiguous()), a=moved(a), b=moved(b), epsilon=0.1, max_iters=4, impl="cuda")
    assert torch.equal(ours.f, want.f) and torch.equal(ours.g, want.g)


@pytest.mark.parametrize(("n", "m"), [(20, 40), (4, 4), (135, 70)], ids=str)
def test_padding(n, m):
    lengths = torch.tensor([n - 1, n, 2]), torch.tensor([m, m // 2, 1])
    check_padding(torch.rand(3, n, m), lengths, impl="cuda", moved=moved)


def test_nothing_but_padding():
    nobody = torch.tensor([0, 3])
    ours = sinkhorn(moved(torch.rand(2, 5, 6)), epsilon=0.1, max_iters=3, lengths=(moved(nobody), moved(torch.tensor([4, 0]))), impl="cuda")
    assert all(x.isfinite().all() for x in (ours.f, ours.g, ours.value, ours.transport_cost))


def test_zero_weights():
    a, b = weights(2, 10), weights(2, 12)
    a[0, 5], b[0, 3], b[1, 7] = 0, 0, 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    cost = 5 * torch.rand(2, 10, 12)
    ours = check(cost, a, b, 0.1, 8)
    assert ours.f.isfinite().all() and ours.g.isfinite().all() and (ours.plan()[0, 5] == 0).all()


def test_nan_stays_in_its_problem():
    cost = torch.rand(3, 9, 9)
    cost[1, 2, 3] = torch.nan
    ours = sinkhorn(moved(cost), epsilon=0.1, max_iters=5, impl="cuda")
    assert ours.value[1].isnan() and ours.value[::2].isfinite().all()


@pytest.mark.parametrize(("n", "m"), [(4, 4), (16, 16), (70, 40), (136, 40)], ids=str)
@pytest.mark.parametrize("anneal", [None, (0.4, 0.7)], ids=["", "annealed"])
def test_tolerance_stops_each_problem(n, m, anneal):
    cost = torch.rand(3, n, m) * torch.tensor([0.01, 1.0, 1.0])[:, None, None]
    options = {"epsilon": 0.1, "max_iters": 40, "tol": 1e-4, "anneal": anneal}
    ours, want = (sinkhorn(moved(cost), **options, impl=impl) for impl in ("cuda", "torch"))
    assert ours.converged.all() and ours.iterations[0] < 10
    assert (ours.iterations - want.iterations).abs().max() <= 1
    torch.testing.assert_close(ours.value, want.value, rtol=1e-4, atol=1e-4)
    again = sinkhorn(moved(cost[:1]), **{**options, "tol": None, "max_iters": int(ours.iterations[0])}, impl="cuda")
    if anneal is None:  # a problem that has stopped is as if it had been told to
        assert torch.equal(again.f, ours.f[:1]) and torch.equal(again.g, ours.g[:1])


@pytest.mark.parametrize("grad", ["envelope", "implicit", "unrolled"])
def test_gradients_are_the_portable_ones(grad):
    cost, a = torch.rand(2, 10, 12), weights(2, 10)
    found = []
    for impl in ("cuda", "torch"):
        leaves = [moved(t).requires_grad_() for t in (cost, a)]
        out = sinkhorn(leaves[0], a=leaves[1], epsilon=0.2, max_iters=20, grad=grad, impl=impl)
        found.append((out.value, *torch.autograd.grad(out.value.sum(), leaves)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_history_of_problems_that_stop():
    cost = torch.rand(2, 9, 70) * torch.tensor([0.01, 1.0])[:, None, None]
    found = []
    for impl in ("cuda", "torch"):
        leaf = moved(cost).requires_grad_()
        out = sinkhorn(leaf, epsilon=0.1, max_iters=30, tol=1e-5, grad="unrolled", impl=impl)
        found.append(torch.autograd.grad(out.f.square().sum() + out.transport_cost.sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_compile_and_vmap():
    cost = moved(torch.rand(2, 9, 11))

    def value(c):
        return sinkhorn(c, epsilon=0.2, max_iters=3, impl="cuda").value.sum()

    torch.testing.assert_close(torch.compile(value, backend="aot_eager", fullgraph=True)(cost), value(cost))
    torch.testing.assert_close(torch.func.vmap(value)(cost), torch.stack([value(cost[0]), value(cost[1])]))


def test_an_empty_batch():
    ours = sinkhorn(moved(torch.rand(0, 5, 6)), epsilon=0.1, impl="cuda")
    assert ours.f.shape == (0, 5) and ours.value.shape == (0,)


@pytest.mark.parametrize(
    ("cost", "options", "reason"),
    [
        (torch.rand(1, 3, 3, dtype=torch.float64), {}, "float64"),
        (torch.rand(1, 1, 65537), {}, "65536 columns"),
        (torch.rand(1, 3, 3), {"method": "proximal", "tol": 0.1}, "no tol"),
    ],
    ids=["dtype", "columns", "tolerance of proximal steps"],
)
def test_what_is_refused(cost, options, reason):
    with pytest.raises(ValueError, match=reason):
        sinkhorn(moved(cost), impl="cuda", **options)
    with pytest.raises(ValueError, match="not points"):
        sinkhorn(x=moved(torch.rand(3, 2)), y=moved(torch.rand(3, 2)), impl="cuda")


def test_fewer_rows_without_clusters_and_cooperation(monkeypatch):
    monkeypatch.setattr(cuda_runtime, "has_cooperative_launches", lambda: False)
    for cost in (torch.rand(1, 3, 257), torch.rand(1, 1025, 3), torch.rand(1, 3, 257).bfloat16()):
        with pytest.raises(ValueError, match="1024 x 256"):
            sinkhorn(moved(cost), impl="cuda")
    monkeypatch.setattr(cuda_runtime, "has_clusters", lambda: False)
    with pytest.raises(ValueError, match="128 x 256"):
        sinkhorn(moved(torch.rand(1, 129, 3)), impl="cuda")


def test_a_slow_drift():
    """Mass that can hardly cross moves potentials by log 1.5 an iteration: what is on chip must be formed anew on the way."""
    check(torch.tensor([[[0.0, 90.0], [90.0, 0.0]]]), torch.tensor([[0.6, 0.4]]), torch.tensor([[0.4, 0.6]]), 1.0, 200)


@pytest.mark.skipif(not EMULATED, reason="the emulator counts what threads do together")
@pytest.mark.parametrize(("n", "m", "most"), [(3, 3, 12), (30, 31, 80), (60, 50, 170), (120, 100, 320)], ids=str)
def test_an_iteration_scales_what_is_on_chip(n, m, most):
    """An iteration that could not would be exact, right too, and take twice as many shuffles as one that does."""
    counts = []
    for iterations in (20, 40):
        before = cuda_emulation.meetings()
        sinkhorn(torch.rand(1, n, m), epsilon=0.5, max_iters=iterations, impl="cuda")
        counts.append(cuda_emulation.meetings() - before)
    assert (counts[1] - counts[0]) / 20 <= most


@pytest.mark.skipif(not EMULATED, reason="the emulator's order of threads")
@pytest.mark.filterwarnings("ignore:sinkhorn")
@pytest.mark.parametrize(("n", "m"), SIZES, ids=str)
def test_threads_in_any_order(n, m, monkeypatch):
    """The same bits, whichever thread runs first between two barriers: none is missing."""
    cost = torch.rand(2, n, m)
    options = {"epsilon": 0.05, "max_iters": 6, "tol": 1e-7, "anneal": (0.1, 0.5), "impl": "cuda"}
    forward = sinkhorn(cost, **options)
    for order in ("warps", "lanes"):
        monkeypatch.setenv("KDFAST_EMULATE_BACKWARD", order)
        backward = sinkhorn(cost, **options)
        for name in ("f", "g", "value", "transport_cost", "error", "iterations"):
            assert torch.equal(getattr(forward, name), getattr(backward, name)), name
