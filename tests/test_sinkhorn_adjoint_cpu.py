"""Gradients through iterations on stored exponentials, and their way to points, under every instruction set of this machine."""

import pytest
import torch
from sinkhorn_cases import weights

from kdfast._core import extension
from kdfast._ops.sinkhorn import adjoint, cpu, reference
from kdfast._ops.sinkhorn.geometry import Problem
from kdfast.ops import sinkhorn

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))
METRICS = pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])


def close(ours, truth, tolerance):
    for u, v in zip(ours, truth, strict=True):
        torch.testing.assert_close(u.double(), v, rtol=tolerance, atol=tolerance * float(v.abs().max()))


def unrolled(cost, a, b, to_f, to_g, **options):
    leaves = [t.detach().requires_grad_() for t in (cost, a, b)]
    r = sinkhorn(leaves[0], a=leaves[1], b=leaves[2], grad="unrolled", **options)
    return torch.autograd.grad([r.f, r.g], leaves, [to_f, to_g])


# Rows beside 4 taken together and groups of 16; columns beside a vector and a panel. Of 45 iterations the product is formed in two parts.
@pytest.mark.parametrize("n, m", [(1, 1), (3, 5), (18, 31), (35, 64), (130, 65), (19, 150)], ids=lambda v: str(v))
@pytest.mark.parametrize("iterations", [1, 2, 9, 45])
def test_unrolled(isa, n, m, iterations):
    cost, a, b = torch.rand(2, n, m, dtype=torch.float64), weights(2, n), weights(2, m)
    given = (cost, a, b, torch.randn(2, n, dtype=torch.float64), torch.randn(2, m, dtype=torch.float64))
    truth = unrolled(*given, epsilon=0.1, max_iters=iterations, impl="torch")
    close(unrolled(*given, epsilon=0.1, max_iters=iterations, impl="cpu"), truth, 1e-9)
    close(unrolled(*(t.float() for t in given), epsilon=0.1, max_iters=iterations, impl="cpu"), truth, 1e-4)


def test_unrolled_of_method_kernel_is_stored_whatever_its_size(isa):
    """More than a megabyte: rows to come are fetched, four are added beside four that are summed."""
    cost, a, b = torch.rand(1, 527, 530, dtype=torch.float64), weights(1, 527), weights(1, 530)
    given = (cost, a, b, torch.randn(1, 527, dtype=torch.float64), torch.randn(1, 530, dtype=torch.float64))
    options = {"epsilon": 0.1, "max_iters": 6, "method": "kernel"}
    truth = unrolled(*given, **options, impl="torch")
    close(unrolled(*given, **options, impl="cpu"), truth, 1e-9)
    close(unrolled(*(t.float() for t in given), **options, impl="cpu"), truth, 1e-4)


def test_unrolled_rounds_no_worse_than_autograd(isa):
    """Weights' gradients are sums over forty steps: factors of rows and columns that do not cancel had them five times as far off."""
    cost, a, b = torch.rand(16, 64, 64, dtype=torch.float32), *(weights(16, 64, dtype=torch.float32) for _ in range(2))
    given = (cost, a, b, *torch.randn(2, 16, 64).unbind())
    truth = unrolled(*(t.double() for t in given), epsilon=0.05, max_iters=40, impl="torch")
    leaves = [t.detach().requires_grad_() for t in given[:3]]
    f, g = logsumexp(*leaves, 0.05, 40)
    naive, ours = torch.autograd.grad([f, g], leaves, given[3:]), unrolled(*given, epsilon=0.05, max_iters=40, impl="cpu")
    for u, v, t in zip(ours, naive, truth, strict=True):
        assert (u - t).norm() <= 2 * (v - t).norm() + 4 * torch.finfo(u.dtype).eps * t.norm()


def logsumexp(cost, a, b, epsilon, iterations):
    g = torch.zeros_like(b)
    for _ in range(iterations):
        f = -epsilon * torch.logsumexp((g[:, None] - cost) / epsilon + b.log()[:, None], -1)
        g = -epsilon * torch.logsumexp((f[..., None] - cost) / epsilon + a.log()[..., None], -2)
    return f, g


@pytest.mark.parametrize("change", ["far", "annealed", "tol", "weightless", "relaxed columns"])
def test_unrolled_where_stored_exponentials_do_not_serve(isa, change):
    """Potentials that move on, beyond what was stored or within a step; another epsilon; rows without weight."""
    n, m = 40, 37
    cost = (torch.rand(2, n, 1, dtype=torch.float64) - 3 * torch.rand(2, 1, m, dtype=torch.float64)) ** 2
    a, b = weights(2, n), weights(2, m)
    options = {"epsilon": 0.01 if change == "far" else 0.1, "max_iters": 30}
    options |= {"annealed": {"anneal": (0.8, 0.8)}, "tol": {"tol": 0.05}, "relaxed columns": {"rho": (None, 0.5)}}.get(change, {})
    if change == "weightless":
        a[:, 3:5] = 0
    given = (cost, a, b, torch.randn(2, n, dtype=torch.float64) * (a > 0), torch.randn(2, m, dtype=torch.float64))
    ours, truth = (unrolled(*given, **options, impl=impl) for impl in ("cpu", "torch"))
    close(ours, truth, 1e-7)


@METRICS
@pytest.mark.parametrize("n, m, width", [(1, 1, 2), (7, 5, 3), (33, 200, 6), (300, 70, 17), (66, 65, 64)], ids=lambda v: str(v))
@pytest.mark.parametrize("output", ["value", "transport_cost", "potentials"])
def test_points(isa, metric, n, m, width, output):
    leaves = [torch.randn(2, k, width, dtype=torch.float64) for k in (n, m)]
    up = [torch.randn(2, k, dtype=torch.float64) for k in (n, m)]

    def gradients(impl, dtype):
        x, y = (t.to(dtype).requires_grad_() for t in leaves)
        grad = "envelope" if output == "value" else "unrolled"
        r = sinkhorn(x=x, y=y, metric=metric, epsilon=float(width), max_iters=5, grad=grad, impl=impl)
        if output == "potentials":
            return torch.autograd.grad([r.f, r.g], (x, y), [t.to(dtype) for t in up])
        return torch.autograd.grad(getattr(r, output).sum(), (x, y))

    truth = gradients("torch", torch.float64)
    close(gradients("cpu", torch.float64), truth, 1e-10)
    close(gradients("cpu", torch.float32), truth, 1e-4)


@METRICS
def test_threads_of_points(isa, metric):
    """Problems on threads of their own are the same to the bit, one cut by rows the same for equal thread counts."""
    before, results = torch.get_num_threads(), []
    clouds = [[torch.randn(batch, k, 9) for k in (n, m)] for batch, n, m in ((5, 200, 150), (1, 900, 700))]
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append([])
        for x, y in clouds:
            for grad in ("envelope", "unrolled"):
                x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
                r = sinkhorn(x=x, y=y, metric=metric, epsilon=3.0, max_iters=4, grad=grad, impl="cpu")
                results[-1] += torch.autograd.grad((r.value if grad == "envelope" else r.transport_cost).sum(), (x, y))
    torch.set_num_threads(before)
    single, first, second = results
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, single[:4], first[:4]))
    for u, v in zip(single[4:], first[4:], strict=True):
        torch.testing.assert_close(u, v, rtol=1e-4, atol=1e-4 * float(u.abs().max()))


@METRICS
@pytest.mark.parametrize("slope", [False, True])
def test_moments_of_points(isa, threads, metric, slope):
    """Those of the definition, with problems on threads and rows of one divided among them."""
    for batch, n in ((3, 40), (1, 900)):
        m, double = 300, torch.float64
        x, y = torch.randn(batch, n, 5, dtype=double), torch.randn(batch, m, 5, dtype=double)
        a, b, f, g = weights(batch, n), weights(batch, m), torch.randn(batch, n, dtype=double), torch.randn(batch, m, dtype=double)
        if metric == "cosine":
            x, y = (torch.nn.functional.normalize(t, dim=-1) for t in (x, y))
        p = Problem(
            None, x, y, a, b, torch.full((batch,), 4.0, dtype=double), None, None, {"cosine": "dot"}.get(metric, metric), None, None, "cpu"
        )
        given = (f, g, torch.randn(batch, dtype=double), torch.randn(batch, dtype=double) if slope else None)
        for u, v in zip(cpu.plan_gradient(p, *given), adjoint.plan_gradient(p._replace(impl="torch"), *given), strict=True):
            torch.testing.assert_close(u, v, rtol=1e-9, atol=1e-12)


def test_the_operators():
    """Shapes without values, and what is refused."""
    x, y, a, b = torch.rand(1, 3, 2), torch.rand(1, 4, 2), torch.rand(1, 3), torch.rand(1, 4)
    for cost, points in ((torch.rand(1, 3, 4), (None, None)), (None, (x, y))):
        problem = (cost, *points, a, b, torch.ones(1), None, None, "given" if points[0] is None else "sqeuclidean", None, None)
        history = (torch.rand(1, 2, 3), torch.rand(1, 2, 4), torch.full((1,), 2), torch.rand(1, 3), torch.rand(1, 4))
        schedule = (False, 2, None, "log", None, None)
        torch.library.opcheck(torch.ops.kdfast.sinkhorn_replay.default, (*problem, b, *history, *schedule))
        for slope in (None, torch.ones(1)):
            potentials = (torch.rand(1, 3), torch.rand(1, 4), torch.ones(1), slope)
            if cost is None:
                torch.library.opcheck(torch.ops.kdfast.sinkhorn_pull.default, (*problem, *potentials))
                continue
            with pytest.raises(RuntimeError, match="points must be given"):
                torch.ops.kdfast.sinkhorn_pull(*problem, *potentials)


def test_agrees_with_the_definition(isa):
    """Not with another tiling of the same equations: autograd through the reference."""
    cost, a, b = torch.rand(1, 20, 30, dtype=torch.float64), weights(1, 20), weights(1, 30)
    leaves = [t.requires_grad_() for t in (cost, a, b)]
    truth = reference.sinkhorn(*leaves, 0.1, 12)
    expected = torch.autograd.grad(truth.f.square().sum() + truth.g.exp().sum(), leaves)
    ours = sinkhorn(cost, a=a, b=b, epsilon=0.1, max_iters=12, grad="unrolled", impl="cpu")
    close(torch.autograd.grad(ours.f.square().sum() + ours.g.exp().sum(), leaves), expected, 1e-9)
