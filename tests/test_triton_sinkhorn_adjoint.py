"""The Triton gradients of Sinkhorn's potentials against those of float64 operations: on a GPU, or where there is none under Triton's
interpreter, in a process that has TRITON_INTERPRET=1 from its start (make test)."""

import pytest
import torch
from sinkhorn_gpu_cases import weights

from kdfast._core import triton_runtime
from kdfast._ops.sinkhorn import adjoint, arguments, portable
from kdfast._ops.sinkhorn.triton import adjoint as triton_adjoint
from kdfast._ops.sinkhorn.triton import plan as triton_plan
from kdfast.functional import log_optimal_transport
from kdfast.ops import sinkhorn

if triton_runtime.missing() is not None:
    pytest.skip(f"{triton_runtime.missing()}, and TRITON_INTERPRET is not 1", allow_module_level=True)
DEVICE = "cpu" if triton_runtime.INTERPRETED else "cuda"


def moved(x):
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def problem(source, dtype, *, a=None, b=None, epsilon=0.3, rho=(None, None), lengths=None, metric="sqeuclidean"):
    def of(x):
        return x.to(DEVICE, dtype)

    cost, x, y = (None if source.get(name) is None else of(source[name]) for name in ("cost", "x", "y"))
    a, b = (None if w is None else of(w) for w in (a, b))
    epsilon = of(epsilon) if isinstance(epsilon, torch.Tensor) else epsilon
    lengths = None if lengths is None else tuple(map(moved, lengths))
    impl = "triton" if dtype == torch.float32 else "torch"
    return arguments.problem(cost, x, y, metric, a, b, epsilon, rho, lengths, "ieee", impl)[0]


def schedule(iterations=5, tol=None, method="log", anneal=(None, None)):
    return portable.Schedule(iterations, tol, method, *anneal)


def check(source, plan=None, *, slack=1.0, only=(adjoint.replay, adjoint.implicit), **options):
    """Replayed and implicit gradients of ours in float32 and of adjoint.py in float64, from the same solution, rounded."""
    plan = plan or schedule()
    ours, exact = (problem(source, dtype, **options) for dtype in (torch.float32, torch.float64))
    assert triton_plan.serves(ours) and not triton_plan.serves(exact)
    g0 = torch.zeros_like(exact.b)
    truth = portable.solve(exact, g0, plan, True)
    to_f, to_g = (torch.randn(t.shape, device=DEVICE) for t in (ours.a, ours.b))
    if ours.rho_a is None and ours.rho_b is None:  # potentials have a free constant: what is asked of them has no part along it
        to_g -= (to_f.sum(-1) + to_g.sum(-1))[:, None] / to_g.shape[1]
    for name in ("replay", "implicit"):
        if getattr(adjoint, name) not in only:
            continue
        states = (truth.history_f, truth.history_g) if name == "replay" else (truth.f, truth.g)
        arguments = ((g0, *states) if name == "replay" else states), truth.done, (to_f, to_g)
        got = getattr(triton_adjoint, name)(ours, *(t.float() for t in arguments[0]), arguments[1], *arguments[2], True, plan)
        want = getattr(adjoint, name)(exact, *arguments[0], arguments[1], *(t.double() for t in arguments[2]), True, plan)
        for field, x, y in zip(adjoint.Pulled._fields, got, want, strict=True):
            assert x.shape == y.shape, (name, field)
            if y.numel():
                at_most = 3e-5 * slack * max(float(y.abs().max()), 0.1)
                assert float((x.double() - y).abs().max()) <= at_most, (name, field)


NEAR = torch.rand(1, 19, 7)
SOURCES = {
    "cost": {"cost": torch.rand(1, 19, 37)},
    "one row": {"cost": torch.rand(2, 1, 3)},
    "one cost for all": {"cost": torch.rand(19, 37)},
    "transposed": {"cost": torch.rand(1, 37, 19).mT},
    "sqeuclidean": {"x": torch.rand(1, 19, 7), "y": torch.rand(1, 37, 7)},
    "euclidean": {"x": torch.rand(1, 19, 7), "y": torch.rand(1, 37, 7), "metric": "euclidean"},
    "nearly meeting": {"x": NEAR, "y": torch.cat((NEAR + 1e-4 * torch.randn(1, 19, 7), torch.rand(1, 18, 7)), 1), "metric": "euclidean"},
    "few dimensions": {"x": torch.rand(1, 19, 2), "y": torch.rand(1, 37, 2)},
    "wide": {"x": 0.2 * torch.rand(1, 19, 70), "y": 0.2 * torch.rand(1, 37, 70)},
    "cosine": {"x": torch.randn(1, 19, 7), "y": torch.randn(1, 37, 7), "metric": "cosine"},
}


@pytest.mark.parametrize("name", SOURCES)
def test_as_float64_from_every_source(name):
    source = dict(SOURCES[name])
    metric = source.pop("metric", "sqeuclidean")
    n, m = (source["x"].shape[1], source["y"].shape[1]) if "x" in source else source["cost"].shape[-2:]
    check(source, schedule(3), a=weights(1, n), b=weights(1, m), metric=metric, slack=4.0)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 70), (17, 33)], ids=str)
def test_ragged_sizes(n, m):
    check({"cost": torch.rand(1, n, m)}, schedule(3), slack=2.0)


PLANS = {
    "proximal": (schedule(6, method="proximal"), {}),
    "annealed": (schedule(5, anneal=(1.0, 0.5)), {}),
    "one iteration": (schedule(1), {}),
    "each its own end": (schedule(12, tol=1e-2), {"epsilon": torch.tensor([0.05, 0.5])}),
    "relaxed": (schedule(4), {"rho": (0.7, 0.7)}),
    "relaxed columns": (schedule(4), {"rho": (None, 2.0)}),
    "relaxed, annealed": (schedule(4, anneal=(1.0, 0.5)), {"rho": (0.5, None)}),
}


@pytest.mark.parametrize("name", PLANS)
def test_every_schedule(name):
    plan, options = PLANS[name]
    # implicit derivatives are those of a fixed point, which truncated potentials of these are not in any precision
    only = (adjoint.replay,) if name in ("proximal", "annealed", "one iteration") else (adjoint.replay, adjoint.implicit)
    check({"cost": torch.rand(2, 12, 20)}, plan, a=weights(2, 12), b=weights(2, 20), only=only, slack=8.0, **options)


def test_zero_weights_padding_and_forbidden_pairs():
    cost = torch.rand(2, 12, 20)
    cost[0, 3, 4:9] = torch.inf
    cost[1, 9:], cost[1, :, 15:] = torch.nan, torch.nan
    lengths = torch.tensor([12, 9]), torch.tensor([20, 15])
    found = []
    for impl, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        for grad in ("unrolled", "implicit"):
            leaf = moved(cost.to(dtype)).requires_grad_()
            a = moved(torch.ones(2, 12, dtype=dtype) / 12)
            a[0, 5] = 0
            a.requires_grad_()
            out = sinkhorn(leaf, a=a, epsilon=0.2, max_iters=8, grad=grad, lengths=tuple(map(moved, lengths)), rho=1.0, impl=impl)
            found.append(torch.autograd.grad(out.transport_cost.sum() + out.value.sum(), (leaf, a)))
            assert (found[-1][0][1, 9:] == 0).all() and (found[-1][0][1, :, 15:] == 0).all() and (found[-1][0][0, 3, 4:9] == 0).all()
    for got, want in zip(found[:2], found[2:], strict=True):
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("name", ["cost", "sqeuclidean"])
def test_programs_of_problems_that_have_converged_end_at_once(name):
    p = problem({key: x.expand(2, -1, -1) for key, x in SOURCES[name].items()}, torch.float32)
    step, v = triton_adjoint.Step(p), torch.rand_like(p.b)
    both, first, none = (
        triton_adjoint._sums(step, step.rows, step.columns, torch.ones_like(p.a), torch.zeros_like(p.a), torch.zeros_like(p.b), v, active)
        for active in (None, *(torch.tensor(flags, device=DEVICE) for flags in ([True, False], [False, False])))
    )
    assert (both > 0).all() and torch.equal(first[0], both[0]) and (first[1] == 0).all() and (none == 0).all()


@pytest.mark.parametrize("name", ["wide", "nearly meeting", "cosine"])
def test_costs_of_points_are_those_of_float64(name):
    source = dict(SOURCES[name])
    metric = source.pop("metric", "sqeuclidean")
    ours, exact = (problem(source, dtype, metric=metric) for dtype in (torch.float32, torch.float64))
    got = torch.ops.kdfast_torch.sinkhorn_costs(*ours, 2, 17)
    want = 1 - exact.x @ exact.y.mT if metric == "cosine" else torch.cdist(exact.x, exact.y) ** (2 if metric == "sqeuclidean" else 1)
    torch.testing.assert_close(got.double(), want[:, 2:17], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("balanced", [True, False])
def test_conjugate_gradients_take_the_steps_of_the_portable_form(balanced):
    """Of four problems: one with two numbers, one of curvature below 0, one that is done."""
    c = torch.rand(4, 70) + 0.1
    c[0, 2:] = 0
    over_c, share = torch.where(c > 0, 1 / c, 0.0), c / c.sum(-1, keepdim=True)
    system = adjoint.System(c, over_c, share if balanced else None, 1.0 if balanced else torch.tensor([[0.5], [0.9], [0.7], [1.0]]))
    factor = torch.rand(4, 70, 70) / 70
    matrix = factor @ factor.mT * c[:, :, None]
    matrix[2] += 5 * torch.eye(70)
    residual = system.project(torch.where(c > 0, torch.randn(4, 70), 0.0))
    residual[3] = 0

    def through(v, _plus, active):
        found = (matrix.to(v) @ v[..., None])[..., 0]
        return found if active is None else torch.where(active[:, None], found, torch.nan)

    for steps in (1, 3, 6):
        want = adjoint.descended(system, residual, steps, True, through)
        moved_system = adjoint.System(*map(moved, system))
        got = triton_adjoint.descended(moved_system, moved(residual), steps, True, through)
        torch.testing.assert_close(got.cpu(), torch.where(want.isnan(), 0.0, want), rtol=1e-4, atol=1e-5)


def test_a_large_range_loses_no_digits_over_iterations():
    """exp(-C / eps) is 0 everywhere in float32; sums that were off 1 by rounding would be added up by the steps."""
    source, plan = {"cost": 1 + 20 * torch.rand(1, 20, 24)}, schedule(10)
    check(source, plan, epsilon=0.05, only=(adjoint.replay,), slack=60.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad", ["unrolled", "implicit"])
def test_a_gradient_has_the_dtype_of_its_cost(dtype, grad):
    leaf = moved(torch.rand(2, 8, 12).to(dtype)).requires_grad_()
    found = sinkhorn(leaf, epsilon=0.5, max_iters=8, grad=grad, impl="triton").f.square().sum()
    (found,) = torch.autograd.grad(found, leaf)
    wide = leaf.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(sinkhorn(wide, epsilon=0.5, max_iters=8, grad=grad, impl="torch").f.square().sum(), wide)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), want, rtol=2e-2, atol=2e-3 * float(want.abs().max()))


def test_nan_of_a_problem_reaches_its_own_gradient_alone():
    cost = torch.rand(2, 6, 8)
    cost[1, 2, 3] = torch.nan
    leaf = moved(cost).requires_grad_()
    sinkhorn(leaf, epsilon=0.5, max_iters=3, grad="unrolled", impl="triton").f.sum().backward()
    assert leaf.grad[0].isfinite().all() and leaf.grad[1].isnan().any()


def test_points_in_slabs_of_rows(monkeypatch):
    """A gradient in the cost that is larger than a tile, of points: as in one piece."""
    x, y = (torch.rand(2, size, 6, device=DEVICE).requires_grad_() for size in (17, 20))
    found = []
    for tile in (2**25, 17 * 20, 7 * 20):
        monkeypatch.setattr("kdfast._ops.sinkhorn.geometry.TILE", {"cpu": tile})
        monkeypatch.setattr("kdfast._ops.sinkhorn.geometry.TILE_ELSEWHERE", tile)
        out = sinkhorn(x=x, y=y, epsilon=0.4, max_iters=2, grad="unrolled", impl="triton")
        found.append(torch.autograd.grad(out.transport_cost.sum(), (x, y)))
    for other in found[1:]:
        for u, v in zip(found[0], other, strict=True):
            torch.testing.assert_close(u, v, rtol=1e-5, atol=1e-6)


def test_layers_and_a_graph_kept(monkeypatch):
    """SuperGlue's dustbins through the public function; a second backward of the same graph has the same bits."""
    scores, alpha = torch.randn(2, 7, 9), torch.tensor(0.3)
    found = []
    for impl in ("triton", "torch"):
        leaves = tuple(moved(t).requires_grad_() for t in (scores, alpha))
        monkeypatch.setattr("kdfast._core.impls.DEFAULT", impl)
        out = log_optimal_transport(*leaves, iters=6).exp().square().sum()
        first, second = torch.autograd.grad(out, leaves, retain_graph=True), torch.autograd.grad(out, leaves)
        assert all(torch.equal(u, v) for u, v in zip(first, second, strict=True))
        found.append(first)
    for u, v in zip(*found, strict=True):
        torch.testing.assert_close(u, v, rtol=1e-4, atol=1e-6)


def test_an_empty_batch_and_vmap():
    p, plan = problem({"cost": torch.rand(0, 3, 5)}, torch.float32), schedule(2)
    none = p.a.new_zeros(0, 2, 3), p.a.new_zeros(0, 2, 5)
    pulled = triton_adjoint.replay(p, p.b, *none, p.epsilon.long(), p.a, p.b, True, plan)
    assert pulled.cost.shape == (0, 3, 5) and pulled.a.shape == (0, 3) and pulled.epsilon.shape == (0,)
    cost = moved(torch.rand(3, 5, 7))

    def value(c):
        return sinkhorn(c, epsilon=0.3, max_iters=3, grad="unrolled", impl="triton").f.square().sum()

    folded = torch.func.vmap(torch.func.grad(value))(cost)
    torch.testing.assert_close(folded[1], torch.func.grad(value)(cost[1]))
