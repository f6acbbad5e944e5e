"""kdfast.ops.sinkhorn, forward: the reference, robustness, bad input. test_sinkhorn_truth.py has what is known without it."""

import re
import warnings

import pytest
import torch
from sinkhorn_cases import F64, weights
from sinkhorn_impls import every_impl  # noqa: F401

from kdfast._ops.sinkhorn import reference
from kdfast.ops import SinkhornResult, sinkhorn

RELAXED = {
    "balanced": (None, None),
    "relaxed": (0.7, 0.4),
    "strongly relaxed": (0.01, 0.01),
    "rows only": (0.5, None),
    "columns only": (None, 0.5),
}


def agree(r, q, **tolerance):
    for name in ("f", "g", "value", "transport_cost"):
        torch.testing.assert_close(getattr(r, name).double(), getattr(q, name), msg=lambda m, name=name: f"{name}: {m}", **tolerance)
    torch.testing.assert_close(r.plan().double(), q.plan, **tolerance)


@pytest.mark.parametrize("tile", [None, 40], ids=["whole", "row tiles"])
@pytest.mark.parametrize("rho", RELAXED.values(), ids=RELAXED)
@pytest.mark.parametrize("method", ["log", "kernel", "auto"])
def test_iterations_are_the_reference(method, rho, tile, monkeypatch):
    if tile:
        monkeypatch.setattr("kdfast._ops.sinkhorn.geometry.TILE", {"cpu": tile})
    cost, a, b = torch.rand(3, 9, 7, dtype=F64), weights(3, 9), weights(3, 7)
    eps = torch.tensor([0.5, 0.05, 0.01], dtype=F64)
    agree(sinkhorn(cost, a=a, b=b, epsilon=eps, max_iters=17, rho=rho, method=method), reference.sinkhorn(cost, a, b, eps, 17, rho=rho))


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("tile", [None, 40], ids=["whole", "row tiles"])
def test_points(metric, tile, monkeypatch):
    if tile:
        monkeypatch.setattr("kdfast._ops.sinkhorn.geometry.TILE", {"cpu": tile})
    x, y, a, b = torch.randn(2, 9, 3, dtype=F64), torch.randn(2, 7, 3, dtype=F64), weights(2, 9), weights(2, 7)
    y[:, :2] = x[:, :2]  # distance 0
    cost = reference.cost_matrix(x, y, metric)
    q = reference.sinkhorn(cost, a, b, 0.1, 12)
    agree(sinkhorn(x=x, y=y, metric=metric, a=a, b=b, epsilon=0.1, max_iters=12), q)
    agree(sinkhorn(x=x, y=y, metric=lambda x, y: reference.cost_matrix(x, y, metric), a=a, b=b, epsilon=0.1, max_iters=12), q)


# 1: a single point; 3, 63, 65, 257: around vector and tile widths
@pytest.mark.parametrize("n, m", [(1, 1), (1, 5), (3, 63), (65, 3), (65, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sizes_and_dtypes(n, m, dtype):
    cost = torch.rand(2, n, m).to(dtype)
    r = sinkhorn(cost, epsilon=0.1, max_iters=20)
    assert r.f.dtype == r.value.dtype == r.plan().dtype == torch.float32
    uniform = torch.full((2, n), 1 / n, dtype=F64), torch.full((2, m), 1 / m, dtype=F64)
    agree(r, reference.sinkhorn(cost.double(), *uniform, 0.1, 20), rtol=1e-5, atol=3e-6)


def test_batch_shared_cost_and_loop():
    cost, a, b = torch.rand(6, 5, dtype=F64), weights(2, 3, 6), weights(3, 5)
    eps = torch.tensor([[0.1], [0.3]], dtype=F64)
    r = sinkhorn(cost, a=a, b=b, epsilon=eps, max_iters=9)
    assert r.f.shape == (2, 3, 6) and r.plan().shape == (2, 3, 6, 5) and r.value.shape == r.iterations.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = sinkhorn(cost, a=a[i, j], b=b[j], epsilon=float(eps[i, 0]), max_iters=9)
            assert alone.value.shape == ()
            for name in ("f", "g", "value", "transport_cost", "error"):
                torch.testing.assert_close(getattr(r, name)[i, j], getattr(alone, name), rtol=1e-12, atol=1e-13)
    assert sinkhorn(torch.rand(0, 4, 5)).value.shape == (0,) and sinkhorn(torch.rand(0, 4, 5)).plan().shape == (0, 4, 5)


def test_layouts():
    cost = torch.rand(7, 6, 4, dtype=F64)
    plain = sinkhorn(cost.mT.contiguous().permute(1, 0, 2).permute(1, 0, 2).contiguous(), epsilon=0.2)
    torch.testing.assert_close(sinkhorn(cost.mT, epsilon=0.2).f, plain.f)
    a = weights(4).expand(7, 4)
    torch.testing.assert_close(sinkhorn(cost.mT, a=a, epsilon=0.2).f, sinkhorn(cost.mT.contiguous(), a=a.contiguous(), epsilon=0.2).f)
    expanded = cost[:1].expand(7, 6, 4)
    torch.testing.assert_close(sinkhorn(expanded).f, sinkhorn(cost[0]).f.expand(7, 6))


def test_ragged_equals_one_by_one():
    """Padding is NaN in every input: never read."""
    x, y, a = torch.randn(3, 8, 2), torch.randn(3, 6, 2), weights(3, 8, dtype=torch.float32)
    lengths = torch.tensor([8, 3, 1]), torch.tensor([2, 6, 5], dtype=torch.int32)
    cost = reference.cost_matrix(x, y, "sqeuclidean")
    for i in range(3):
        n, m = lengths[0][i], lengths[1][i]
        x[i, n:] = y[i, m:] = a[i, n:] = cost[i, n:] = cost[i, :, m:] = torch.nan
    a = a / a.nansum(-1, keepdim=True)
    start = torch.zeros(3, 8), torch.zeros(3, 6)
    for potential, kept in zip(start, lengths, strict=True):
        potential[torch.arange(potential.shape[1]) >= kept[:, None]] = torch.nan
    for source in ({"cost": cost}, {"x": x, "y": y}, {"x": x, "y": y, "metric": "euclidean"}, {"x": x, "y": y, "metric": "cosine"}):
        r = sinkhorn(**source, a=a, epsilon=0.3, max_iters=10, lengths=lengths, init=start)
        assert r.f.isfinite().all() and r.plan().isfinite().all()
        for i in range(3):
            n, m = lengths[0][i], lengths[1][i]
            cut = {"cost": (slice(n), slice(m)), "x": slice(n), "y": slice(m)}
            kw = {k: t[i][cut[k]] if k in cut else t for k, t in source.items()}
            alone = sinkhorn(**kw, a=a[i, :n], epsilon=0.3, max_iters=10)
            for ours, theirs in (
                (r.f[i, :n], alone.f),
                (r.g[i, :m], alone.g),
                (r.value[i], alone.value),
                (r.plan()[i, :n, :m], alone.plan()),
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            assert not r.f[i, n:].any() and not r.g[i, m:].any() and not r.plan()[i, n:].any() and not r.plan()[i, :, m:].any()


@pytest.mark.parametrize("method", ["log", "kernel", "proximal"])
def test_zero_weights(method):
    """Rows and columns without weight take no mass, have finite potentials, and change nothing else, however near each other."""
    cost, a, b = torch.rand(6, 7), weights(6, dtype=torch.float32), weights(7, dtype=torch.float32)
    cost[2], cost[:, 3] = 40.0, 50.0
    cost[2, 3] = 0.0  # both without weight, and very close: exp(90 / 0.05) must not turn into 0 * inf
    a[2] = b[3] = 0
    a, b = a / a.sum(), b / b.sum()
    r = sinkhorn(cost, a=a, b=b, max_iters=40, method=method)
    assert r.f.isfinite().all() and r.g.isfinite().all()
    rows, cols = [0, 1, 3, 4, 5], [0, 1, 2, 4, 5, 6]
    alone = sinkhorn(cost[rows][:, cols], a=a[rows], b=b[cols], max_iters=40, method=method)
    torch.testing.assert_close(r.plan()[rows][:, cols], alone.plan())
    torch.testing.assert_close(r.value, alone.value)
    assert not r.plan()[2].any() and not r.plan()[:, 3].any()
    if method != "proximal":
        agree(r, reference.sinkhorn(cost.double(), a.double(), b.double(), 0.05, 40), rtol=1e-4, atol=1e-4)


def test_minute_weights_fall_back_to_the_exact_form():
    a, b = weights(5, dtype=torch.float32), weights(6, dtype=torch.float32)
    a[1], b[4] = 1e-36, 1e-37
    cost = torch.rand(5, 6) * 20
    agree(
        sinkhorn(cost, a=a, b=b, method="log"), reference.sinkhorn(cost.double(), a.double(), b.double(), 0.05, 100), rtol=1e-4, atol=1e-3
    )


def test_forbidden_pairs():
    cost = torch.rand(5, 5, dtype=F64)
    cost[0, 1:4] = torch.inf
    r = sinkhorn(cost, epsilon=0.1, max_iters=200)
    assert r.value.isfinite() and r.transport_cost.isfinite() and r.error < 1e-6
    assert not r.plan()[0, 1:4].any()


def test_nan_spoils_its_own_problem_only():
    cost = torch.rand(3, 4, 4)
    cost[1, 2, 2] = torch.nan
    value = sinkhorn(cost).value
    assert value[1].isnan() and value[[0, 2]].isfinite().all()


GEOMETRIES = {
    "sphere": lambda n: [torch.nn.functional.normalize(torch.randn(n, 16, dtype=F64), dim=-1) for _ in range(2)],
    "gauss": lambda n: [torch.randn(n, 16, dtype=F64) for _ in range(2)],
    "shifted": lambda n: [torch.randn(n, 3, dtype=F64), torch.randn(n, 3, dtype=F64) + 4],
    "clusters": lambda n: [torch.randn(n, 3, dtype=F64) * 0.1 + torch.randint(0, 4, (n, 1)) * 2.0 for _ in range(2)],
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("method", ["log", "kernel"])
def test_thousand_nats_in_float32(geometry, method):
    """Plain kernels give NaN or a plan without mass here."""
    x, y = GEOMETRIES[geometry](80)
    cost = reference.cost_matrix(x, y, "sqeuclidean")
    cost = cost - cost.min()
    eps = float(cost.max()) / 1000
    uniform = torch.full((80,), 1 / 80, dtype=F64)
    q = reference.sinkhorn(cost, uniform, uniform, eps, 100)
    r = sinkhorn(cost.float(), epsilon=eps, max_iters=100, method=method)
    for ours, theirs in ((r.f, q.f), (r.g, q.g)):
        assert (ours.double() - theirs).abs().max() / eps < 5e-3
    assert abs(float(r.plan().sum()) - 1) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source", ["cost", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("method", ["log", "kernel"])
def test_thousand_nats_of_half_precision_inputs(source, method, dtype):
    """Inputs are rounded, the iterations are not: as near to float64 on the same rounded numbers as float32 inputs are."""
    x, y = ((t / 4).to(dtype) for t in GEOMETRIES["shifted"](80))
    metric = "sqeuclidean" if source == "cost" else source
    cost = reference.cost_matrix(x.double(), y.double(), metric)
    given = {"x": x, "y": y, "metric": metric}
    if source == "cost":
        given = {"cost": cost.to(dtype)}
        cost = given["cost"].double()
    eps, uniform = float(cost.max() - cost.min()) / 1000, torch.full((80,), 1 / 80, dtype=F64)
    q = reference.sinkhorn(cost, uniform, uniform, eps, 50)
    r = sinkhorn(**given, epsilon=eps, max_iters=50, method=method)
    assert r.f.dtype == r.value.dtype == torch.float32
    for ours, theirs in ((r.f, q.f), (r.g, q.g)):
        assert (ours.double() - theirs).abs().max() / eps < 5e-3
    assert abs(float(r.plan().sum()) - 1) < 1e-3
    torch.testing.assert_close(r.value.double(), q.value, rtol=1e-5, atol=eps / 1000)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_moving_both_clouds_changes_nothing(metric):
    x, y = torch.randn(50, 8), torch.randn(40, 8) + 1
    value, moved = (sinkhorn(x=x + s, y=y + s, metric=metric, epsilon=0.5, max_iters=50).value for s in (0.0, 100.0))
    assert abs(moved - value) < 1e-4 * value


@pytest.mark.parametrize("method", ["log", "kernel", "proximal"])
def test_tolerance_freezes_each_problem(method):
    cost, eps = torch.rand(3, 8, 8, dtype=F64), torch.tensor([0.03, 0.1, 1.0], dtype=F64)
    eps = eps * 5 if method == "proximal" else eps
    r = sinkhorn(cost, epsilon=eps, max_iters=2000, tol=1e-4, method=method)
    assert r.converged.all() and (r.error <= 1e-4).all() and len(set(r.iterations.tolist())) > 1
    for i in range(3):
        for count, same in ((int(r.iterations[i]), True), (int(r.iterations[i]) - 1, False)):
            alone = sinkhorn(cost[i], epsilon=float(eps[i]), max_iters=count, method=method)
            assert (alone.error <= 1e-4) == same
            if same:
                torch.testing.assert_close(r.f[i], alone.f)
                torch.testing.assert_close(r.error[i], (r.plan()[i].sum(-1) - 1 / 8).abs().sum())


def test_tolerance_warns_on_the_cpu():
    cost = torch.rand(3, 8, 8)
    with pytest.warns(RuntimeWarning, match="2 of 3 problems"):
        r = sinkhorn(cost, epsilon=torch.tensor([0.01, 0.01, 10.0]), max_iters=5, tol=1e-6)
    assert r.converged.tolist() == [False, False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        r = sinkhorn(cost, epsilon=1.0, max_iters=5)
        assert r.converged is None and r.check() is r and r.iterations.tolist() == [5, 5, 5]


def test_relaxed_tolerance_is_about_its_own_optimum():
    r = sinkhorn(torch.rand(8, 9, dtype=F64), epsilon=0.1, rho=0.3, tol=1e-9, max_iters=500)
    assert r.converged and r.iterations < 500
    torch.testing.assert_close(r.plan().sum(-1), torch.exp(-r.f / 0.3) / 8)


def test_warm_start_and_anneal():
    cost = torch.rand(2, 12, 12, dtype=F64)
    long = sinkhorn(cost, epsilon=0.05, max_iters=60)
    resumed = sinkhorn(cost, epsilon=0.05, max_iters=20, init=(sinkhorn(cost, epsilon=0.05, max_iters=40)[:2]))
    torch.testing.assert_close(resumed.f, long.f)
    uniform = torch.full((2, 12), 1 / 12, dtype=F64)
    for iterations in (1, 3, 15):
        annealed = sinkhorn(cost, epsilon=0.01, max_iters=iterations, anneal=(1.0, 0.5))
        agree(annealed, reference.sinkhorn(cost, uniform, uniform, 0.01, iterations, anneal=(1.0, 0.5)))
        assert (annealed.iterations == iterations).all()
    cold, annealed = (sinkhorn(cost, epsilon=0.005, max_iters=20, anneal=anneal).error for anneal in (None, (1.0, 0.7)))
    assert (annealed < cold).all()


def test_apply_and_marginals():
    cost, a, b = torch.rand(2, 6, 5, dtype=F64), weights(2, 6), weights(2, 5)
    r = sinkhorn(cost, a=a, b=b, epsilon=0.1, max_iters=300)
    v, w = torch.randn(2, 5, 3, dtype=F64), torch.randn(2, 6, dtype=F64)
    torch.testing.assert_close(r.apply(v), r.plan() @ v)
    torch.testing.assert_close(r.apply_t(w), (r.plan().mT @ w[..., None])[..., 0])
    torch.testing.assert_close(r.apply(torch.ones(2, 5, dtype=F64)), a)
    torch.testing.assert_close(r.apply_t(torch.ones(2, 6, dtype=F64)), b)
    torch.testing.assert_close(r.transport_cost, (r.plan() * cost).sum((-2, -1)))
    assert isinstance(r, SinkhornResult)


# ---- autocast, arguments -----------------------------------------------------------------------------------


def test_autocast_changes_nothing():
    x, y = torch.randn(9, 8, requires_grad=True), torch.randn(7, 8)
    plain = torch.autograd.grad(sinkhorn(x=x, y=y).value, x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        r = sinkhorn(x=x, y=y)
        ours = torch.autograd.grad(r.value, x)[0]
        assert r.apply(y).dtype == torch.float32
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("metric", ["sqeuclidean", lambda x, y: torch.cdist(x, y)], ids=["points", "callable"])
def test_autocast_lets_dtypes_differ(metric):
    """Features of a layer under autocast beside stored ones."""
    x, y = torch.randn(9, 8).bfloat16().requires_grad_(), torch.randn(7, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for pair in ((x, y), (y, x)):
            value = sinkhorn(x=pair[0], y=pair[1], metric=metric).value
            assert torch.equal(value, sinkhorn(x=pair[0].float(), y=pair[1].float(), metric=metric).value)
            assert torch.autograd.grad(value, x)[0].dtype == torch.bfloat16


BAD = {
    "neither": ({}, ValueError, "either cost or both x and y"),
    "both": ({"cost": torch.rand(3, 4), "x": torch.rand(3, 2), "y": torch.rand(4, 2)}, ValueError, "cost must not be given together"),
    "rank": ({"cost": torch.rand(3)}, ValueError, "cost must have at least 2"),
    "integers": ({"cost": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "cost must be float16"),
    "list": ({"cost": [[1.0]]}, TypeError, "cost must be a Tensor"),
    "empty": ({"cost": torch.rand(0, 4)}, ValueError, "at least one row and one column"),
    "width": ({"x": torch.rand(3, 2), "y": torch.rand(4, 3)}, ValueError, "y must have the width of x (2), got 3"),
    "dtypes": ({"x": torch.rand(3, 2), "y": torch.rand(4, 2).double()}, TypeError, "y must have the dtype of x"),
    "devices": ({"cost": torch.rand(3, 4), "a": torch.rand(3, device="meta")}, ValueError, "a must hold values"),
    "metric beside a cost": ({"cost": torch.rand(3, 4), "metric": "l7"}, ValueError, "metric must be one of"),
    "metric": ({"x": torch.rand(3, 2), "y": torch.rand(4, 2), "metric": "l7"}, ValueError, "metric must be one of"),
    "weights": ({"cost": torch.rand(3, 4), "b": torch.rand(3)}, ValueError, "b must have one weight for each of the 4 columns"),
    "batch": ({"cost": torch.rand(2, 3, 4), "a": torch.rand(5, 3)}, ValueError, "agree on the batch"),
    "epsilon": ({"cost": torch.rand(3, 4), "epsilon": -0.1}, ValueError, "epsilon must be a finite number > 0, got -0.1"),
    "epsilon of float32": ({"cost": torch.rand(3, 4), "epsilon": 1e-300}, ValueError, "epsilon must be in the range of torch.float32"),
    "epsilon type": ({"cost": torch.rand(3, 4), "epsilon": "x"}, TypeError, "epsilon must be a float"),
    "iterations": ({"cost": torch.rand(3, 4), "max_iters": 0}, ValueError, "max_iters must be >= 1"),
    "endless": ({"cost": torch.rand(3, 4), "max_iters": 2**70}, ValueError, "max_iters must fit in 64 bits"),
    "sparse": ({"cost": torch.eye(3).to_sparse()}, TypeError, "cost must be a dense tensor"),
    "method of arrays": ({"cost": torch.rand(3, 4), "method": torch.ones(3)}, ValueError, "method must be one of"),
    "tol": ({"cost": torch.rand(3, 4), "tol": -1.0}, ValueError, "tol must be None or a number >= 0"),
    "rho": ({"cost": torch.rand(3, 4), "rho": 0.0}, ValueError, "rho must be a finite number > 0"),
    "rho triple": ({"cost": torch.rand(3, 4), "rho": (1.0, 2.0, 3.0)}, ValueError, "rho must be None, a float or a pair"),
    "rho type": ({"cost": torch.rand(3, 4), "rho": "x"}, TypeError, "rho must be None"),
    "rho proximal": ({"cost": torch.rand(3, 4), "rho": 1.0, "method": "proximal"}, ValueError, "rho must be None with method='proximal'"),
    "lengths": ({"cost": torch.rand(2, 3, 4), "lengths": torch.tensor([1, 2])}, TypeError, "lengths must be a pair"),
    "lengths type": (
        {"cost": torch.rand(2, 3, 4), "lengths": (torch.rand(2), torch.rand(2))},
        TypeError,
        "lengths[0] must have an integer",
    ),
    "lengths range": (
        {"cost": torch.rand(1, 3, 4), "lengths": (torch.tensor([4]), torch.tensor([4]))},
        IndexError,
        "lengths[0] must lie in [0, 4), got values from 4",
    ),
    "init": ({"cost": torch.rand(3, 4), "init": torch.rand(3)}, TypeError, "init must be a pair"),
    "init shape": ({"cost": torch.rand(3, 4), "init": (torch.rand(4), torch.rand(4))}, ValueError, "init[0] must have shape (3,)"),
    "init proximal": (
        {"cost": torch.rand(3, 4), "init": (torch.rand(3), torch.rand(4)), "method": "proximal"},
        ValueError,
        "init must be None",
    ),
    "anneal": ({"cost": torch.rand(3, 4), "anneal": (1.0, 1.5)}, ValueError, "anneal must have epsilon_start > 0 and 0 < factor < 1"),
    "anneal type": ({"cost": torch.rand(3, 4), "anneal": 1.0}, ValueError, "anneal must be (epsilon_start, factor)"),
    "anneal proximal": ({"cost": torch.rand(3, 4), "anneal": (1.0, 0.5), "method": "proximal"}, ValueError, "anneal must be None"),
    "method": ({"cost": torch.rand(3, 4), "method": "exact"}, ValueError, "method must be one of"),
    "grad": ({"cost": torch.rand(3, 4), "grad": "full"}, ValueError, "grad must be one of"),
    "precision": ({"cost": torch.rand(3, 4), "precision": "fp8"}, ValueError, "precision must be one of"),
    "impl": ({"cost": torch.rand(3, 4), "impl": "abacus"}, ValueError, "impl must be None or one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=re.escape(message)):
        sinkhorn(**arguments)


def test_bad_apply():
    with pytest.raises(ValueError, match=re.escape("v must have shape (5,)")):
        sinkhorn(torch.rand(4, 5)).apply(torch.rand(4))
    with pytest.raises(TypeError, match="v must be a Tensor"):
        sinkhorn(torch.rand(4, 5)).apply_t([1.0] * 4)
