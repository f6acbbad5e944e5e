"""The Triton Sinkhorn half steps against the float64 reference: on a GPU, or where there is none under Triton's interpreter,
in a process that has TRITON_INTERPRET=1 from its start (make test)."""

import functools

import pytest
import torch
from sinkhorn_gpu_cases import check, check_padding, check_relaxed_and_alone, weights

from kdfast._core import triton_runtime
from kdfast._ops.sinkhorn import reference
from kdfast.ops import sinkhorn

if triton_runtime.missing() is not None:
    pytest.skip(f"{triton_runtime.missing()}, and TRITON_INTERPRET is not 1", allow_module_level=True)
DEVICE = "cpu" if triton_runtime.INTERPRETED else "cuda"


def moved(x):
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


check = functools.partial(check, impl="triton", moved=moved)


@pytest.mark.parametrize("method", ["log", "proximal"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 7), (17, 33), (40, 65)], ids=str)
def test_ragged_sizes(method, n, m):
    check(torch.rand(2, n, m), weights(2, n), weights(2, m), 0.2, 4, method=method)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_costs_in_half_precision_transposed_and_shared(dtype):
    check(torch.rand(2, 20, 30).to(dtype).float(), weights(2, 20), weights(2, 30), 0.1, 4)
    cost = torch.rand(30, 20).to(dtype)
    check(cost.float().mT.expand(3, -1, -1), weights(3, 20), weights(3, 30), 0.1, 4, source={"cost": cost.mT})


@pytest.mark.parametrize("rho", [(0.5, 0.5), (None, 2.0)])
def test_relaxed_marginals_and_annealing(rho):
    check(torch.rand(2, 12, 20), weights(2, 12), weights(2, 20), 0.1, 4, rho=rho)
    check(torch.rand(2, 12, 20), weights(2, 12), weights(2, 20), 0.1, 5, anneal=(1.0, 0.5))


@pytest.mark.parametrize(("n", "m"), [(4, 3), (20, 70)], ids=str)
def test_relaxed_and_alone(n, m):
    check_relaxed_and_alone(n, m, impl="triton", moved=moved)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("width", [3, 20])
def test_points(metric, width):
    x, y = torch.randn(2, 20, width), torch.randn(2, 40, width)
    cost = reference.cost_matrix(x.double(), y.double(), metric)
    epsilon = 0.1 * float(cost.mean())
    check(cost, weights(2, 20), weights(2, 40), epsilon, 4, source={"x": x, "y": y, "metric": metric})


def test_a_large_range_and_forbidden_pairs():
    """exp(-C / eps) is 0 everywhere in float32, and a pair at infinity has no mass."""
    check(1 + 50 * torch.rand(1, 20, 20), weights(1, 20), weights(1, 20), 0.05, 6)
    cost = torch.rand(1, 12, 14)
    cost[0, 3, 4:9] = torch.inf
    ours = sinkhorn(moved(cost), epsilon=0.1, max_iters=30, impl="triton")
    want = sinkhorn(moved(cost), epsilon=0.1, max_iters=30, impl="torch")
    torch.testing.assert_close(ours.transport_cost, want.transport_cost, rtol=1e-5, atol=1e-6)
    assert (ours.plan()[0, 3, 4:9] == 0).all()


def test_padding_and_zero_weights():
    cost = torch.rand(2, 20, 40)
    check_padding(cost, (torch.tensor([13, 20]), torch.tensor([40, 25])), impl="triton", moved=moved)
    a = weights(1, 20)
    a[0, 5] = 0
    a /= a.sum()
    ours = sinkhorn(moved(cost[:1].nan_to_num()), a=moved(a), epsilon=0.1, max_iters=5, impl="triton")
    assert ours.f.isfinite().all() and ours.g.isfinite().all() and (ours.plan()[0, 5] == 0).all()


def test_tolerance_stops_each_problem():
    cost = torch.rand(3, 16, 16) * torch.tensor([0.01, 1.0, 1.0])[:, None, None]
    ours = sinkhorn(moved(cost), epsilon=0.1, max_iters=40, tol=1e-4, impl="triton")
    want = sinkhorn(moved(cost), epsilon=0.1, max_iters=40, tol=1e-4, impl="torch")
    assert ours.converged.all() and ours.iterations[0] < 10
    assert (ours.iterations - want.iterations).abs().max() <= 1
    torch.testing.assert_close(ours.value, want.value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", ["envelope", "implicit", "unrolled"])
def test_gradients_are_the_portable_ones(grad):
    x, y = torch.randn(2, 10, 6), torch.randn(2, 12, 6)
    found = []
    for impl in ("triton", "torch"):
        leaves = [moved(t).requires_grad_() for t in (x, y)]
        out = sinkhorn(x=leaves[0], y=leaves[1], epsilon=3.0, max_iters=20, grad=grad, impl=impl)
        found.append((out.value, *torch.autograd.grad(out.value.sum(), leaves)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_compile_and_vmap():
    cost = moved(torch.rand(2, 9, 11))

    def value(c):
        return sinkhorn(c, epsilon=0.2, max_iters=3, impl="triton").value.sum()

    torch.testing.assert_close(torch.compile(value, backend="aot_eager", fullgraph=True)(cost), value(cost))
    torch.testing.assert_close(torch.func.vmap(value)(cost), torch.stack([value(cost[0]), value(cost[1])]))


def test_float64_is_refused():
    with pytest.raises(ValueError, match="float64"):
        sinkhorn(moved(torch.rand(1, 3, 3, dtype=torch.float64)), impl="triton")
