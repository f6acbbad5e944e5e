"""Iterations on a stored kernel, by factors; potentials are formed where asked for. Under every instruction set of this machine."""

import pytest
import torch
from sinkhorn_cases import weights

from kdfast._core import extension
from kdfast._ops.sinkhorn import cpu, reference
from kdfast._ops.sinkhorn.geometry import Problem
from kdfast._ops.sinkhorn.portable import Schedule
from kdfast.ops import sinkhorn

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))
METHODS = pytest.mark.parametrize("method", ["log", "kernel"])
# Columns that stay in registers and that do not; rows beside a group of 16 and beside chunks of 128.
SIZES = pytest.mark.parametrize(
    "n, m", [(1, 1), (7, 5), (18, 31), (35, 64), (130, 65), (261, 20), (19, 128), (37, 150)], ids=lambda v: str(v)
)


def agree(cost, a, b, epsilon, iterations, method, **options):
    """With float64 iterations that form every potential, to `options`' tolerance; truncated, so that every iteration counts."""
    ours = sinkhorn(cost, a=a.to(cost.dtype), b=b.to(cost.dtype), epsilon=epsilon, max_iters=iterations, method=method, impl="cpu")
    truth = reference.sinkhorn(cost.double(), a, b, epsilon, iterations)
    for name in ("f", "g", "value"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(truth, name), msg=lambda m, name=name: f"{name}: {m}", **options)


@METHODS
@SIZES
def test_truncated(isa, method, n, m):
    cost, a, b = torch.rand(2, n, m, dtype=torch.float64), weights(2, n), weights(2, m)
    agree(cost, a, b, 0.1, 7, method, rtol=1e-11, atol=1e-12)
    agree(cost.float(), a, b, 0.1, 7, method, rtol=1e-5, atol=2e-6)


@METHODS
@pytest.mark.parametrize("m", [24, 150])
def test_rows_and_columns_without_weight(isa, method, m):
    cost, a, b = torch.rand(1, 33, m, dtype=torch.float64), weights(1, 33), weights(1, m)
    a[:, 3:7] = 0
    b[:, 5:9] = 0
    agree(cost, a, b, 0.1, 6, method, rtol=1e-11, atol=1e-12)


@METHODS
@pytest.mark.parametrize("n, m", [(40, 24), (40, 150)], ids=lambda v: str(v))
@pytest.mark.parametrize("iterations", [9, 40])
def test_potentials_that_keep_moving(isa, method, n, m, iterations):
    """By more than a stored kernel serves, in small steps: iterations go on from factors whose potentials had not been formed."""
    x, y = torch.rand(1, n, 1, dtype=torch.float64), torch.rand(1, m, 1, dtype=torch.float64) * 3
    agree((x - y.mT) ** 2, weights(1, n), weights(1, m), 0.01, iterations, method, rtol=1e-10, atol=1e-10)


@METHODS
@pytest.mark.filterwarnings("ignore:.*did not reach tol")
def test_annealed(isa, method):
    cost, a, b = torch.rand(1, 20, 30, dtype=torch.float64), weights(1, 20), weights(1, 30)
    given = {"a": a, "b": b, "epsilon": 0.05, "max_iters": 9, "anneal": (0.2, 0.5)}
    formed = sinkhorn(cost, **given, impl="torch")
    for tol in (None, 0.0):
        ours = sinkhorn(cost, **given, method=method, tol=tol, impl="cpu")
        torch.testing.assert_close(ours.f, formed.f, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(ours.g, formed.g, rtol=1e-11, atol=1e-12)


@METHODS
@SIZES
def test_history(isa, method, n, m):
    """Potentials of every iteration, formed from factors, for the unrolled gradient."""
    cost, a, b = torch.rand(2, n, m, dtype=torch.float64), weights(2, n), weights(2, m)
    p = Problem(cost, None, None, a, b, torch.full((2,), 0.1, dtype=torch.float64), None, None, "given", None, None, "cpu")
    f, g, _, every_f, every_g = cpu.iterate(p, torch.zeros_like(b), Schedule(7, None, method, None, None), True)
    for t in range(7):
        truth = reference.sinkhorn(cost, a, b, 0.1, t + 1)
        torch.testing.assert_close(every_f[:, t], truth.f, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(every_g[:, t], truth.g, rtol=1e-11, atol=1e-12)
    assert torch.equal(f, every_f[:, -1]) and torch.equal(g, every_g[:, -1])


@METHODS
@pytest.mark.parametrize("m", [24, 150])
@pytest.mark.parametrize("rho", [None, (0.7, None), 0.4], ids=str)
def test_tolerance(isa, method, m, rho):
    """Problems stop where those that form every potential do, with potentials of the same iteration."""
    cost, a, b = torch.rand(4, 33, m, dtype=torch.float64), weights(4, 33), weights(4, m)
    a[1, 3:7], b[2, 5:9] = 0, 0
    epsilon = torch.tensor([0.5, 0.2, 0.1, 0.05], dtype=torch.float64)
    a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    given = {"a": a, "b": b, "epsilon": epsilon, "rho": rho, "max_iters": 500, "tol": 1e-6}
    ours, formed = sinkhorn(cost, **given, impl="cpu", method=method), sinkhorn(cost, **given, impl="torch", method="log")
    assert torch.equal(ours.iterations, formed.iterations) and int(ours.iterations.max()) > int(ours.iterations.min())
    for name in ("f", "g", "error", "value"):
        torch.testing.assert_close(getattr(ours, name), getattr(formed, name), rtol=1e-9, atol=1e-11)


@METHODS
@pytest.mark.parametrize("rho", [(0.7, None), (None, 0.3), 0.4], ids=str)
def test_relaxed(isa, method, rho):
    """On stored exponentials, with weights of every row formed from its potential."""
    cost, a, b = torch.rand(2, 37, 70, dtype=torch.float64), weights(2, 37), weights(2, 70)
    ours, formed = (sinkhorn(cost, a=a, b=b, epsilon=0.05, rho=rho, max_iters=9, method=method, impl=impl) for impl in ("cpu", "torch"))
    for name in ("f", "g", "value"):
        torch.testing.assert_close(getattr(ours, name), getattr(formed, name), rtol=1e-11, atol=1e-12)


@METHODS
def test_lengths(isa, method):
    """A problem that fits where the longest of the batch does not, and problems without rows or columns."""
    n = torch.tensor([300, 20, 0, 5]), torch.tensor([260, 30, 4, 0])
    cost = torch.rand(4, 300, 260)
    ours = sinkhorn(cost, epsilon=0.1, max_iters=5, lengths=n, method=method, impl="cpu")
    for i in range(2):
        rows, columns = int(n[0][i]), int(n[1][i])
        alone = sinkhorn(cost[i, :rows, :columns].contiguous(), epsilon=0.1, max_iters=5, method=method, impl="cpu")
        torch.testing.assert_close(ours.f[i, :rows], alone.f.reshape(-1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.g[i, :columns], alone.g.reshape(-1), rtol=1e-5, atol=1e-6)
