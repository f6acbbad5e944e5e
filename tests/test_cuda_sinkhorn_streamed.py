"""The CUDA Sinkhorn kernels for costs that do not fit on chip, against the float64 reference: on a GPU, elsewhere emulated on the CPU."""

import functools

import pytest
import torch
from cuda_kernels import DEVICE, EMULATED, cuda, moved  # noqa: F401  the fixture serves every test
from sinkhorn_gpu_cases import check, check_padding, check_relaxed_and_alone, weights

from kdfast.ops import sinkhorn

check = functools.partial(check, impl="cuda", moved=moved)
HALF = torch.bfloat16  # costs in 16 bits are read once an iteration whatever their size


# a warp, a block, blocks of a cluster; one pair of rows a block or many
@pytest.mark.parametrize(("n", "m"), [(1, 257), (7, 300), (260, 270), (33, 8200)], ids=str)
def test_ragged_sizes(n, m):
    check(torch.rand(2, n, m), weights(2, n), weights(2, m), 0.1, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 3), (300, 20)], ids=str)
def test_half_precision(dtype, n, m):
    cost = torch.rand(2, n, m).to(dtype)
    check(cost.float(), weights(2, n), weights(2, m), 0.1, 5, source={"cost": cost})


@pytest.mark.parametrize("rho", [(0.5, 0.5), (None, 2.0)])
def test_relaxed_marginals_and_annealing(rho):
    cost = torch.rand(2, 12, 20).to(HALF)
    check(cost.float(), weights(2, 12), weights(2, 20), 0.1, 6, rho=rho, source={"cost": cost})
    check(cost.float(), weights(2, 12), weights(2, 20), 0.1, 6, anneal=(1.0, 0.5), source={"cost": cost})


@pytest.mark.parametrize(("n", "m", "dtype"), [(20, 270, torch.float32), (9, 8200, torch.float32), (12, 20, HALF)], ids=str)
def test_relaxed_and_alone(n, m, dtype):
    check_relaxed_and_alone(n, m, impl="cuda", moved=moved, dtype=dtype)


def test_a_large_range():
    """Whole columns of the first iteration underflow: their sums are taken anew."""
    cost = (1 + 50 * torch.rand(2, 20, 30)).to(HALF)
    check(cost.float(), weights(2, 20), weights(2, 30), 0.05, 8, source={"cost": cost})


def test_padding_zero_weights_and_forbidden_pairs():
    check_padding(torch.rand(2, 20, 40).to(HALF), (torch.tensor([13, 20]), torch.tensor([40, 25])), impl="cuda", moved=moved)
    a, b = weights(2, 10), weights(2, 12)
    a[0, 5], b[0, 3] = 0, 0
    cost = torch.rand(2, 10, 12).to(HALF)
    ours = check(cost.float(), a, b, 0.1, 5, source={"cost": cost})
    assert (ours.plan()[0, 5] == 0).all()
    cost[0, 3, 4:9], cost[1, 5] = torch.inf, torch.inf
    ours, want = (sinkhorn(moved(cost), epsilon=0.1, max_iters=9, impl=impl) for impl in ("cuda", "torch"))
    torch.testing.assert_close(ours.transport_cost, want.transport_cost, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.f, want.f, rtol=1e-5, atol=1e-6)


def test_shared_costs_and_nan():
    cost = torch.rand(300, 20)
    check(cost.mT.expand(3, -1, -1), weights(3, 20), weights(3, 300), 0.1, 4, source={"cost": cost.mT})
    cost = torch.rand(3, 9, 9).to(HALF)
    cost[1, 2, 3] = torch.nan
    ours = sinkhorn(moved(cost), epsilon=0.1, max_iters=4, impl="cuda")
    assert ours.value[1].isnan() and ours.value[::2].isfinite().all()


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
@pytest.mark.parametrize(("n", "m"), [(300, 270), (40, 8200)], ids=str)
def test_threads_in_any_order(n, m, monkeypatch):
    cost = torch.rand(1, n, m)
    forward = sinkhorn(cost, epsilon=0.1, max_iters=2, impl="cuda")
    for order in ("warps", "lanes"):
        monkeypatch.setenv("KDFAST_EMULATE_BACKWARD", order)
        backward = sinkhorn(cost, epsilon=0.1, max_iters=2, impl="cuda")
        for name in ("f", "g", "value", "transport_cost", "error"):
            assert torch.equal(getattr(forward, name), getattr(backward, name)), name
