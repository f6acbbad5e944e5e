"""The CUDA Sinkhorn kernels for costs that do not fit on chip, against the float64 reference: on a GPU, elsewhere emulated on the CPU."""

import functools

import pytest
import torch
from cuda_kernels import DEVICE, EMULATED, cuda, moved  # noqa: F401  the fixture serves every test
from sinkhorn_gpu_cases import check, check_padding, check_relaxed_and_alone, weights

from kdfast.ops import sinkhorn

check = functools.partial(check, impl="cuda", moved=moved)
HALF = torch.bfloat16


@pytest.fixture
def resident(monkeypatch):
    """Sets how many blocks, or clusters, the emulator has at work at a time."""
    return lambda count: monkeypatch.setenv("KDFAST_EMULATE_RESIDENT", str(count))


# a warp, a block, blocks of a cluster; one pair of rows a block or many
@pytest.mark.parametrize("method", ["log", "proximal"])
@pytest.mark.parametrize(("n", "m"), [(1, 257), (7, 300), (260, 270), (33, 8200)], ids=str)
def test_ragged_sizes(n, m, method):
    check(torch.rand(2, n, m), weights(2, n), weights(2, m), 0.1, 4, method=method)


@pytest.mark.parametrize(("batch", "count"), [(3, 1), (5, 2), (3, 7)], ids=str)
def test_more_problems_than_blocks(batch, count, resident):
    """They take turns; a block may have a problem, a share of one, or share all of them."""
    resident(count)
    cost = torch.rand(batch, 26, 530).to(HALF)
    check(cost.float(), weights(batch, 26), weights(batch, 530), 0.1, 5, source={"cost": cost})


def test_turns_of_clusters(resident):
    resident(2)
    check(torch.rand(3, 9, 8200), weights(3, 9), weights(3, 8200), 0.1, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 257), (5, 301), (1030, 20)], ids=str)
def test_half_precision(dtype, n, m):
    cost = torch.rand(2, n, m).to(dtype)
    check(cost.float(), weights(2, n), weights(2, m), 0.1, 5, source={"cost": cost})


@pytest.mark.parametrize("rho", [(0.5, 0.5), (None, 2.0)])
def test_relaxed_marginals_and_annealing(rho):
    cost = torch.rand(2, 12, 260).to(HALF)
    check(cost.float(), weights(2, 12), weights(2, 260), 0.1, 6, rho=rho, source={"cost": cost})
    check(cost.float(), weights(2, 12), weights(2, 260), 0.1, 6, anneal=(1.0, 0.5), source={"cost": cost})


@pytest.mark.parametrize(("n", "m", "dtype"), [(20, 270, torch.float32), (9, 8200, torch.float32), (12, 260, HALF)], ids=str)
def test_relaxed_and_alone(n, m, dtype):
    check_relaxed_and_alone(n, m, impl="cuda", moved=moved, dtype=dtype)


def test_a_large_range():
    """Whole columns of the first iteration underflow: their sums are taken anew."""
    for n, m in ((20, 260), (70, 300)):
        cost = (1 + 50 * torch.rand(2, n, m)).to(HALF)
        check(cost.float(), weights(2, n), weights(2, m), 0.05, 8, source={"cost": cost})


def test_padding_zero_weights_and_forbidden_pairs():
    check_padding(torch.rand(2, 20, 300).to(HALF), (torch.tensor([13, 20]), torch.tensor([300, 25])), impl="cuda", moved=moved)
    a, b = weights(2, 10), weights(2, 270)
    a[0, 5], b[0, 3] = 0, 0
    cost = torch.rand(2, 10, 270).to(HALF)
    ours = check(cost.float(), a, b, 0.1, 5, source={"cost": cost})
    assert (ours.plan()[0, 5] == 0).all()
    cost[0, 3, 4:9], cost[1, 5] = torch.inf, torch.inf
    ours, want = (sinkhorn(moved(cost), epsilon=0.1, max_iters=9, impl=impl) for impl in ("cuda", "torch"))
    torch.testing.assert_close(ours.transport_cost, want.transport_cost, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.f, want.f, rtol=1e-5, atol=1e-6)


def test_shared_costs_and_nan():
    cost = torch.rand(300, 20)
    check(cost.mT.expand(3, -1, -1), weights(3, 20), weights(3, 300), 0.1, 4, source={"cost": cost.mT})
    cost = torch.rand(3, 9, 270).to(HALF)
    cost[1, 2, 3] = torch.nan
    ours = sinkhorn(moved(cost), epsilon=0.1, max_iters=4, impl="cuda")
    assert ours.value[1].isnan() and ours.value[::2].isfinite().all()


@pytest.mark.parametrize(("n", "m", "dtype"), [(9, 260, HALF), (70, 300, torch.float32), (9, 8200, torch.float32)], ids=str)
@pytest.mark.parametrize("anneal", [None, (0.4, 0.7)], ids=["", "annealed"])
def test_tolerance_stops_each_problem(n, m, dtype, anneal):
    cost = (torch.rand(3, n, m) * torch.tensor([0.01, 1.0, 1.0])[:, None, None]).to(dtype)
    options = {"epsilon": 0.1, "max_iters": 40, "tol": 1e-4, "anneal": anneal}
    ours, want = (sinkhorn(moved(cost), **options, impl=impl) for impl in ("cuda", "torch"))
    assert ours.converged.all() and ours.iterations[0] < ours.iterations[1]
    assert (ours.iterations - want.iterations).abs().max() <= 1
    torch.testing.assert_close(ours.value, want.value, rtol=1e-4, atol=1e-4)
    for i, steps in enumerate(ours.iterations.tolist() if anneal is None else ()):  # as if it had been told to stop there
        again = sinkhorn(moved(cost), **{**options, "tol": None, "max_iters": steps}, impl="cuda")
        assert torch.equal(again.f[i], ours.f[i]) and torch.equal(again.g[i], ours.g[i])
        torch.testing.assert_close(again.error[i], ours.error[i], rtol=1e-2, atol=1e-6)


@pytest.mark.filterwarnings("ignore:sinkhorn")
def test_a_tolerance_that_is_not_met():
    cost = moved(torch.rand(2, 20, 300))
    ours = sinkhorn(cost, epsilon=0.05, max_iters=4, tol=0.0, impl="cuda")
    again = sinkhorn(cost, epsilon=0.05, max_iters=4, impl="cuda")
    assert (ours.iterations == 4).all() and not ours.converged.any()
    assert torch.equal(again.f, ours.f) and torch.equal(again.g, ours.g) and torch.equal(again.error, ours.error)


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_histories_have_what_unrolled_gradients_need(tol):
    """Columns without weight in every iteration, padding, and of problems that stop what they stopped at."""
    cost = torch.rand(2, 12, 280) * torch.tensor([0.01, 1.0])[:, None, None]
    lengths, found = (torch.tensor([12, 9]), torch.tensor([271, 280])), []
    a, b = (weights(2, size) * (torch.arange(size) < length[:, None]) for size, length in zip((12, 280), lengths, strict=True))
    b[:, 3] = 0
    a, b = (x / x.sum(-1, keepdim=True) for x in (a, b))
    for impl in ("cuda", "torch"):
        leaf = moved(cost.to(HALF)).requires_grad_()
        out = sinkhorn(
            leaf, a=moved(a), b=moved(b), lengths=tuple(map(moved, lengths)), epsilon=0.1, max_iters=25, tol=tol, grad="unrolled", impl=impl
        )
        found.append(torch.autograd.grad(out.f.square().sum() + out.g.square().sum() + out.transport_cost.sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("grad", ["envelope", "unrolled"])
def test_gradients_are_the_portable_ones(grad):
    cost, a, found = torch.rand(2, 10, 270), weights(2, 10), []
    for impl in ("cuda", "torch"):
        leaves = [moved(t).requires_grad_() for t in (cost, a)]
        out = sinkhorn(leaves[0], a=leaves[1], epsilon=0.2, max_iters=8, grad=grad, impl=impl)
        found.append((out.value, *torch.autograd.grad(out.value.sum(), leaves)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not EMULATED, reason="the emulator's order of threads")
@pytest.mark.filterwarnings("ignore:sinkhorn")
@pytest.mark.parametrize("options", [{"tol": 1e-7}, {"method": "proximal"}], ids=["log", "proximal"])
@pytest.mark.parametrize(("batch", "n", "m", "count"), [(3, 60, 270, 6), (2, 20, 530, 64), (2, 9, 8200, 2)], ids=str)
def test_threads_in_any_order(batch, n, m, count, options, resident, monkeypatch):
    """The same bits, whichever block or thread runs first between two barriers: none is missing."""
    resident(count)
    cost = torch.rand(batch, n, m)
    forward = sinkhorn(cost, epsilon=0.1, max_iters=4, **options, impl="cuda")
    for order in ("warps", "lanes"):
        monkeypatch.setenv("KDFAST_EMULATE_BACKWARD", order)
        backward = sinkhorn(cost, epsilon=0.1, max_iters=4, **options, impl="cuda")
        for name in ("f", "g", "value", "transport_cost", "error", "iterations"):
            assert torch.equal(getattr(forward, name), getattr(backward, name)), name
