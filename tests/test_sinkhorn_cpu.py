"""The C++ Sinkhorn kernels against the float64 reference, under every instruction set of this machine."""

import pytest
import torch
from torch import Tensor

from kdfast._core import extension
from kdfast._ops.sinkhorn import adjoint, cpu, reference
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


def test_threads_of_the_unrolled_gradient(isa):
    """As above, columns that moved far in the first steps and a row without weight among them."""
    before, leaves, results = torch.get_num_threads(), (torch.rand(5, 300, 200), torch.rand(1, 900, 700) * 3), []
    given = [weights(n, dtype=torch.float32).masked_fill(torch.arange(n) == 3, 0.0) for n in (300, 900)]
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append([])
        for cost, a in zip(leaves, given, strict=True):
            a, cost = (a / a.sum()).requires_grad_(), cost.requires_grad_()
            r = sinkhorn(cost, a=a, epsilon=0.05, max_iters=8, method="log", grad="unrolled", impl="cpu")
            results[-1] += torch.autograd.grad(r.f.square().sum() + r.g.exp().sum(), (cost, a))
    torch.set_num_threads(before)
    single, first, second = results
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, single[:2], first[:2]))
    for u, v in zip(single[2:], first[2:], strict=True):
        torch.testing.assert_close(u, v, rtol=1e-3, atol=1e-3 * float(u.abs().max()))


# Widths where squared distances are sums of differences (3), of products (5, 40), and where the cost is kept (100).
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("n, m, width", [(1, 1, 3), (5, 17, 5), (18, 63, 40), (7, 130, 100)], ids=lambda v: str(v))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_points(isa, metric, n, m, width, dtype):
    x, y = torch.randn(2, n, width, dtype=dtype).requires_grad_(), torch.randn(2, m, width, dtype=dtype).requires_grad_()
    r = sinkhorn(x=x, y=y, metric=metric, epsilon=2.0, max_iters=15, impl="cpu")
    u, v = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    truth = sinkhorn(reference.cost_matrix(u, v, metric), epsilon=2.0, max_iters=15, impl="torch")
    pairs = [(r.f, truth.f), (r.plan(), truth.plan()), (r.apply(y), truth.apply(v)), (r.apply_t(x), truth.apply_t(u))]
    pairs += zip(torch.autograd.grad(r.value.sum(), (x, y)), torch.autograd.grad(truth.value.sum(), (u, v)), strict=True)
    for ours, theirs in pairs:
        scale = float(theirs.detach().abs().max()) + float(r.f.detach().abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=(1e-5 if dtype == torch.float32 else 1e-13) * scale)


def test_points_by_tiles(isa, monkeypatch):
    """Neither kept by the solver nor formed at once by the gradients."""
    monkeypatch.setattr("kdfast._ops.sinkhorn.geometry.TILE", {"cpu": 900})
    x, y = torch.randn(1, 600, 6).requires_grad_(), torch.randn(1, 520, 6)
    given = sinkhorn(reference.cost_matrix(x.double(), y.double(), "sqeuclidean"), epsilon=1.0, max_iters=8, impl="torch")
    points = sinkhorn(x=x, y=y, epsilon=1.0, max_iters=8, method="log", impl="cpu")
    torch.testing.assert_close(points.f.double(), given.f, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(r.value.sum(), x) for r in (points, given)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("shape", [(2, 5, 17), (3, 33, 129), (9, 70)], ids=str)
def test_gradient_in_the_cost(isa, dtype, shape):
    """P, in the cost's dtype; of a shared cost the sum over its problems, of which two lengths differ."""
    cost = torch.rand(*shape, dtype=torch.float64).to(dtype).requires_grad_()
    n, m = shape[-2:]
    given = {"a": weights(3, n).to(dtype), "lengths": (torch.tensor([n, 1, n - 2]), torch.tensor([1, m, m - 1]))} if len(shape) == 2 else {}
    r = sinkhorn(cost, epsilon=0.1, max_iters=10, impl="cpu", **given)
    weight = torch.rand(r.value.shape, dtype=r.value.dtype)
    gradient = torch.autograd.grad((weight * r.value).sum(), cost)[0]
    wanted = (
        weight[:, None, None].double()
        * sinkhorn(
            cost.detach().double(),
            epsilon=0.1,
            max_iters=10,
            impl="torch",
            **{k: v if k == "lengths" else v.double() for k, v in given.items()},
        ).plan()
    )
    unit = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 20 * torch.finfo(dtype).eps
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), wanted.sum(0) if len(shape) == 2 else wanted, rtol=unit, atol=unit * 1e-2)


# The second and the third are cut by rows for two threads.
@pytest.mark.parametrize(
    "source, batch, n", [("given", 3, 200), ("given", 1, 3200), ("shared", 3, 1100), ("sqeuclidean", 3, 200), ("euclidean", 3, 200)]
)
def test_moments_of_the_plan(isa, source, batch, n):
    """P (w0 + w1 C) and the moments of C, with a forbidden pair, weights of zero and lengths."""
    m, given = 129, source in ("given", "shared")
    a, b = weights(batch, n, dtype=torch.float32), weights(batch, m, dtype=torch.float32)
    a[:, 2], b[:, 4] = 0, 0
    cost = torch.rand(*(() if source == "shared" else (batch,)), n, m)
    cost[..., 5, 7] = torch.inf
    points = {} if given else {"x": torch.randn(batch, n, 5), "y": torch.randn(batch, m, 5), "metric": source}
    lengths = (torch.tensor([n, 300, 1]), torch.tensor([m, 1, m - 1])) if source == "shared" else None
    r = sinkhorn(cost if given else None, **points, a=a, b=b, epsilon=0.5, max_iters=5, lengths=lengths, impl="cpu")
    p, f, g, *_ = r.state
    w0, w1 = torch.rand(batch), torch.rand(batch)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    ours = cpu.plan_gradient(p, f, g, w0, w1)
    torch.set_num_threads(before)
    high = p._replace(**{k: t.double() for k, t in p._asdict().items() if isinstance(t, Tensor) and t.is_floating_point()}, impl="torch")
    for u, v in zip(ours, adjoint.plan_gradient(high, f.double(), g.double(), w0.double(), w1.double()), strict=True):
        torch.testing.assert_close(u.double(), v, rtol=2e-5, atol=2e-5 * float(v.abs().max()) if v.numel() else 0)


@pytest.mark.parametrize(
    "options",
    [{}, {"epsilon": 0.01}, {"rho": (0.5, None)}, {"anneal": (1.0, 0.5)}, {"tol": 1e-3}, {"method": "proximal", "epsilon": 1.0}],
    ids=lambda o: "-".join(o) or "plain",
)
@pytest.mark.parametrize("n, m", [(5, 17), (18, 65)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_unrolled_gradient(isa, options, n, m, dtype):
    """Of everything, against the portable form in float64; epsilon 0.01 moves columns far in the first iterations."""
    leaves = [torch.rand(2, n, m, dtype=torch.float64), weights(2, n), weights(2, m)]
    leaves[1][0, 2] = 0
    leaves[1] /= leaves[1].sum(-1, keepdim=True)
    outputs = []
    for kind, impl in ((dtype, "cpu"), (torch.float64, "torch")):
        cost, a, b = (t.to(kind).requires_grad_() for t in leaves)
        epsilon = torch.full((2,), options.get("epsilon", 0.1), dtype=kind, requires_grad=True)
        r = sinkhorn(cost, a=a, b=b, max_iters=40, grad="unrolled", impl=impl, **(options | {"epsilon": epsilon}))
        outputs.append(torch.autograd.grad((r.value + r.transport_cost).sum(), (cost, a, b, epsilon)))
    slack = 1e-10 if dtype == torch.float64 else 2e-3
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=slack, atol=slack * float(theirs.abs().max()))


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
    without_tol = {name: value for name, value in arguments.items() if name != "tol"}
    torch.library.opcheck(torch.ops.kdfast.sinkhorn_iterate.default, tuple(without_tol.values()))
    potentials = (torch.rand(1, 3), torch.rand(1, 4))
    torch.library.opcheck(torch.ops.kdfast.sinkhorn_marginals.default, (*list(arguments.values())[:11], *potentials))
    for slope in (None, torch.ones(1)):
        rows = (torch.rand(1, 3), torch.rand(1, 4), torch.ones(1), slope, False, 1, 3)
        torch.library.opcheck(torch.ops.kdfast.sinkhorn_plan.default, (*list(arguments.values())[:11], *rows))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kdfast.sinkhorn_solve(**(arguments | change))
