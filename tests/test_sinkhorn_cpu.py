"""The C++ Sinkhorn kernels against the float64 reference, under every instruction set of this machine."""

import pytest
import torch
from torch import Tensor

from kdfast._core import extension
from kdfast._ops.sinkhorn import reference
from kdfast.ops import sinkhorn

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
METHODS = pytest.mark.parametrize("method", ["log", "kernel", "proximal"])


def weights(*shape, dtype=torch.float64) -> Tensor:
    w = torch.rand(*shape, dtype=torch.float64) + 0.2
    return (w / w.sum(-1, keepdim=True)).to(dtype)


def check(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, iterations: int, *, method="log", rho=(None, None), **options) -> None:
    """Error at most twice that of plain logsumexp iterations in the same working dtype, 4 units in the last place, and one an iteration."""
    low = torch.float64 if cost.dtype == torch.float64 else torch.float32
    a, b = a.to(low), b.to(low)
    ours = sinkhorn(cost, a=a, b=b, epsilon=epsilon, max_iters=iterations, method=method, rho=rho, impl="cpu", **options)
    assert ours.f.dtype == ours.value.dtype == low
    truth, naive = (
        reference.sinkhorn(cost.to(t), a.to(t), b.to(t), epsilon, iterations, rho=rho, proximal=method == "proximal")
        for t in (torch.float64, low)
    )
    unit = torch.finfo(low).eps * float(truth.f.abs().max() + truth.g.abs().max() + cost.double().abs().max())
    least = epsilon / iterations if method == "proximal" else epsilon
    steep = max(1.0, float(cost.max()) / least)  # an error of the exponents is one of the plan
    for name, slack in (("f", 1.0), ("g", 1.0), ("value", steep), ("transport_cost", steep)):
        u, v, w = (getattr(r, name).double() for r in (ours, truth, naive))
        assert float((u - v).abs().max()) <= 2 * float((w - v).abs().max()) + (4 + iterations) * unit * slack, name
    torch.testing.assert_close(
        ours.error.double(), (ours.plan().sum(-1).double() - target(a, ours.f, rho[0])).abs().sum(-1), rtol=1e-3, atol=1e-5
    )


def target(a: Tensor, f: Tensor, rho: float | None) -> Tensor:
    return a.double() if rho is None else a.double() * torch.exp(-f.double() / rho)


# Columns beside a vector of 4 ... 16 elements and a panel of 64 (1, 3, 7, 17, 63, 65, 129); rows beside a group of 16 and a chunk of 128.
@DTYPES
@METHODS
@pytest.mark.parametrize("n, m", [(1, 1), (3, 7), (5, 17), (17, 3), (16, 63), (130, 65), (33, 129)], ids=lambda v: str(v))
def test_ragged_sizes(isa, dtype, method, n, m):
    check(torch.rand(2, n, m, dtype=torch.float64).to(dtype), weights(2, n), weights(2, m), 0.2, 12, method=method)


@METHODS
def test_long_rows(isa, method):
    """Beyond what a group of rows keeps in L1, and so many rows that columns are summed in chunks."""
    check(torch.rand(1, 300, 2100), weights(1, 300), weights(1, 2100), 0.05, 8, method=method)


@pytest.mark.parametrize("method", ["log", "kernel"])
@pytest.mark.parametrize("rho", [(None, 0.3), (0.3, None), (2.0, 0.01)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_relaxed(isa, method, rho, dtype):
    check(torch.rand(2, 9, 20, dtype=dtype), weights(2, 9), weights(2, 20), 0.05, 15, method=method, rho=rho)


@pytest.mark.parametrize("method", ["log", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_columns_that_underflow_are_redone(isa, method, dtype):
    """A column a thousand nats from every row but one: its sum over rows vanishes in the first iteration."""
    cost = torch.rand(1, 20, 21, dtype=dtype)
    cost[:, :, 5] += 60
    cost[:, 3] += 70
    check(cost, weights(1, 20), weights(1, 21), 0.05, 30, method=method)


@pytest.mark.parametrize("method", ["log", "kernel"])
def test_rows_apart_in_memory(isa, method):
    """A slice of a wider cost, a transposed one, and one expanded over the batch."""
    wide = torch.rand(3, 20, 40)
    for cost in (wide[:, 1:, 3:36], wide.mT, wide[:1].expand(4, 20, 40), wide[0]):
        given, plain = (sinkhorn(c, epsilon=0.1, max_iters=9, method=method, impl="cpu") for c in (cost, cost.contiguous()))
        for u, v in zip(given[:8], plain[:8], strict=True):
            assert u is v or torch.equal(u, v)


@pytest.mark.parametrize("method", ["log", "kernel", "proximal"])
@pytest.mark.parametrize("tol", [None, 0.02])
def test_threads(isa, method, tol):
    """Several problems, each on a thread, are the same to the bit; one, cut by rows, is the same for equal thread counts."""
    before = torch.get_num_threads()
    many, one = torch.rand(5, 300, 200), torch.rand(1, 900, 700)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append([sinkhorn(c, epsilon=0.1, max_iters=20, tol=tol, method=method, impl="cpu").f for c in (many, one)])
    torch.set_num_threads(before)
    single, first, second = results
    assert torch.equal(single[0], first[0]) and torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    torch.testing.assert_close(single[1], first[1], rtol=1e-5, atol=1e-6)


def test_denormals_are_flushed_on_the_way_only():
    """The kernels let denormals be zero while they run; the caller's arithmetic is as it was."""
    sinkhorn(torch.rand(8, 8), impl="cpu")
    assert float(torch.tensor(1e-20) * torch.tensor(1e-20)) > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cost": torch.rand(2, 3, 4)}, "cost has size"),
        ({"a": torch.rand(1, 3, dtype=torch.float64)}, "dtype"),
        ({"g": torch.zeros(1, 5)}, "g has size"),
        ({"metric": "manhattan"}, "unknown metric"),
        ({"method": "newton"}, "unknown method"),
        ({"iterations": 0}, "iterations must be >= 1"),
        ({"cost": None}, "a cost must be given"),
        ({"rows": torch.ones(1, dtype=torch.int64)}, "given together"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_the_operator_checks_its_arguments(change, message):
    arguments = {
        "cost": torch.rand(1, 3, 4),
        **dict.fromkeys(("x", "y")),
        "a": torch.rand(1, 3),
        "b": torch.rand(1, 4),
        "epsilon": torch.ones(1),
        **dict.fromkeys(("rows", "cols")),
        "metric": "given",
        **dict.fromkeys(("rho_a", "rho_b")),
        "g": torch.zeros(1, 4),
        "iterations": 3,
        "tol": None,
        "method": "log",
        **dict.fromkeys(("anneal_start", "anneal_factor")),
        "history": True,
    }
    torch.library.opcheck(torch.ops.kdfast.sinkhorn_solve.default, tuple(arguments.values()))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kdfast.sinkhorn_solve(**(arguments | change))
