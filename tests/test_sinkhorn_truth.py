"""kdfast.ops.sinkhorn against what is known without it: closed forms, linear programming, the textbook IPOT.

And all its modes at once, at the edge of float32. test_sinkhorn_peers.py has the other libraries.
"""

import itertools
import math
import random
import warnings

import pytest
import torch
from sinkhorn_cases import F64, close, weights
from sinkhorn_impls import every_impl  # noqa: F401

from kdfast import functional as F
from kdfast._ops.sinkhorn import reference
from kdfast.ops import sinkhorn

# ---- closed forms -----------------------------------------------------------------------------------------------------


def gauss_value(s, t, distance, eps):
    """(value, covariance of the plan) between N(., s^2) and N(., t^2), cost (x - y)^2, in one dimension (Janati et al. 2020).

    The plan is Gaussian; its covariance c minimises -2c - (eps/2) log(1 - c^2/(s t)^2), so c^2 + (eps/2) c = (s t)^2, and
    value = distance^2 + s^2 + t^2 - 2c + eps KL with KL = -log(1 - c^2/(s t)^2)/2.
    """
    c = -eps / 4 + math.sqrt(eps**2 / 16 + s**2 * t**2)
    return distance**2 + s**2 + t**2 - 2 * c - eps / 2 * math.log(1 - c**2 / (s * t) ** 2), c


def grid(mean, s, points=400):
    x = torch.linspace(mean - 6 * s, mean + 6 * s, points, dtype=F64)
    w = torch.exp(-((x - mean) ** 2) / (2 * s**2))
    return x[:, None], w / w.sum()


@pytest.mark.parametrize("eps", [0.2, 2.0])
def test_gaussians(eps):
    (x, a), (y, b) = grid(0.0, 0.7), grid(1.5, 1.1)
    r = sinkhorn(x=x, y=y, a=a, b=b, epsilon=eps, max_iters=120)
    value, covariance = gauss_value(0.7, 1.1, 1.5, eps)
    assert abs(float(r.value) - value) < 1e-6
    assert abs(float((r.apply((y - 1.5)[..., 0]) * x[:, 0]).sum()) - covariance) < 1e-6


def gauss_half_step(g, mass, mean, s, eps, lam):
    """Coefficients (2nd, 1st, 0th) of f(x) = -lam eps log int exp((g(y) - (x - y)^2)/eps) d mass N(mean, s^2)(y) for quadratic g.

    The exponent is -A y^2 + (2 x/eps + B) y + const - x^2/eps with A = (1 - g2)/eps + 1/(2 s^2), B = g1/eps + mean/s^2, and
    int exp(-A y^2 + z y) dy = sqrt(pi/A) exp(z^2/(4 A)).
    """
    a = (1 - g[0]) / eps + 1 / (2 * s**2)
    b = g[1] / eps + mean / s**2
    constant = (
        g[2] / eps - mean**2 / (2 * s**2) + math.log(mass / (s * math.sqrt(2 * math.pi))) + b**2 / (4 * a) + math.log(math.pi / a) / 2
    )
    return lam * (1 - 1 / (a * eps)), -lam * b / a, -lam * eps * constant


@pytest.mark.parametrize("rho", [2.0, (0.5, 3.0), (1.0, None)], ids=["alike", "differently", "one side fixed"])
def test_unbalanced_gaussians(rho):
    """The potentials stay quadratic: three numbers each, iterated to their fixed point. Rows then have mass a exp(-f/rho_a)."""
    eps, (mass_a, s, mean_b, mass_b, t) = 0.5, (1.3, 0.7, 0.8, 0.6, 1.1)
    rho_a, rho_b = rho if isinstance(rho, tuple) else (rho, rho)
    damping = [1.0 if r is None else r / (r + eps) for r in (rho_a, rho_b)]
    g = (0.0, 0.0, 0.0)
    for _ in range(500):
        f = gauss_half_step(g, mass_b, mean_b, t, eps, damping[0])
        g = gauss_half_step(f, mass_a, 0.0, s, eps, damping[1])
    (x, a), (y, b) = grid(0.0, s), grid(mean_b, t)
    r = sinkhorn(x=x, y=y, a=mass_a * a, b=mass_b * b, epsilon=eps, rho=rho, max_iters=300)
    for ours, (second, first, zeroth), at in ((r.f, f, x[:, 0]), (r.g, g, y[:, 0])):
        bulk = (at - at.mean()).abs() < 2
        close(ours[bulk], (second * at**2 + first * at + zeroth)[bulk], rtol=0, atol=1e-6)
    curvature, slope = 1 / s**2 + 2 * f[0] / rho_a, -f[1] / rho_a  # exponent of a exp(-f/rho_a): -curvature x^2/2 + slope x - f0/rho_a
    mass = mass_a / (s * math.sqrt(curvature)) * math.exp(slope**2 / (2 * curvature) - f[2] / rho_a)
    close(r.plan().sum(), mass, rtol=1e-7)
    if rho_a == rho_b:  # the optimal plan times a factor is stationary at 1
        close(r.value, rho_a * (mass_a + mass_b) + eps * mass_a * mass_b - (2 * rho_a + eps) * mass, rtol=1e-7)


@pytest.mark.parametrize("rho", [(None, None), (0.5, 0.5), (0.3, 2.0), (None, 0.5)], ids=str)
def test_value_is_the_primal_objective(rho):
    cost, a, b = torch.rand(6, 7, dtype=F64), weights(6), weights(7)
    a, b = (a, b) if None in rho else (1.3 * a, 0.7 * b)
    r = sinkhorn(cost, a=a, b=b, epsilon=0.2, rho=rho, max_iters=500)
    plan = r.plan()
    total = (plan * cost).sum() + 0.2 * kl(plan, a[:, None] * b)
    for penalty, marginal, wanted in zip(rho, (plan.sum(1), plan.sum(0)), (a, b), strict=True):
        total = total + (0 if penalty is None else penalty * kl(marginal, wanted))
    close(r.value, total)


def kl(p, q):
    return (p * (p / q).log() - p + q).sum()


def test_diracs():
    """One point to one point; then, unbalanced, the scalar optimum of m C + eps KL(m | ab) + rho KL(m | a) + rho KL(m | b)."""
    c, eps, rho = 1.7, 0.3, 0.9
    a, b, cost = torch.tensor([0.8], dtype=F64), torch.tensor([1.5], dtype=F64), torch.tensor([[c]], dtype=F64)
    close(sinkhorn(cost, epsilon=eps).value, c)
    r = sinkhorn(cost, a=a, b=b, epsilon=eps, rho=rho, max_iters=200)
    mass = torch.exp((-c + eps * (a * b).log() + rho * a.log() + rho * b.log()) / (eps + 2 * rho))
    close(r.plan()[0], mass)
    close(r.value, mass.sum() * c + eps * kl(mass, a * b) + rho * (kl(mass, a) + kl(mass, b)))


@pytest.mark.parametrize("method", ["log", "kernel", "proximal"])
def test_recovers_a_permutation(method):
    y = torch.randn(30, 5, dtype=F64)
    order = torch.randperm(30)
    x = y[order] + 0.01 * torch.randn(30, 5, dtype=F64)
    r = sinkhorn(x=x, y=y, epsilon=2.0 if method == "proximal" else 0.01, max_iters=200, method=method)
    torch.testing.assert_close(30 * r.plan(), torch.nn.functional.one_hot(order, 30).double(), rtol=0, atol=1e-4)
    assert abs(float(r.transport_cost) - float((x - y[order]).square().sum(-1).mean())) < 1e-4


# ---- linear programming -------------------------------------------------------------------------------------------------

TO_THE_OPTIMUM = {
    "log": {"method": "log", "epsilon": 1e-3, "max_iters": 3000, "anneal": (1.0, 0.9)},
    "kernel": {"method": "kernel", "epsilon": 1e-3, "max_iters": 3000, "anneal": (1.0, 0.9)},
    "proximal": {"method": "proximal", "epsilon": 0.2, "max_iters": 2000},
}


@pytest.mark.parametrize("method", TO_THE_OPTIMUM)
def test_best_of_all_permutations(method):
    """With uniform weights the vertices are permutation matrices (Birkhoff): all 720 are tried."""
    cost = torch.rand(6, 6, dtype=F64)
    exact = min(float(cost[range(6), list(order)].mean()) for order in itertools.permutations(range(6)))
    cost_found = float(sinkhorn(cost, **TO_THE_OPTIMUM[method]).transport_cost)
    assert exact - 1e-4 < cost_found < exact * 1.002


@pytest.mark.parametrize("method", TO_THE_OPTIMUM)
def test_linear_programme(method):
    optimize = pytest.importorskip("scipy.optimize", reason="scipy comes with scikit-learn")
    cost, a, b = torch.rand(6, 5, dtype=F64), weights(6), weights(5)
    rows, cols = torch.kron(torch.eye(6), torch.ones(1, 5)), torch.kron(torch.ones(1, 6), torch.eye(5))
    exact = optimize.linprog(cost.flatten().numpy(), A_eq=torch.cat([rows, cols]).numpy(), b_eq=torch.cat([a, b]).numpy()).fun
    r = sinkhorn(cost, a=a, b=b, **TO_THE_OPTIMUM[method])
    assert abs(float(r.transport_cost) - exact) < 2e-3 * exact and float(r.transport_cost) > exact - 1e-4


# ---- the published loop ----------------------------------------------------------------------------------------------------


def test_proximal_is_the_textbook_ipot():
    """The usual program (Xie et al. 2020, algorithm 1, one inner iteration); some copies of it return the uniform plan."""
    cost, beta, steps = torch.rand(6, 7, dtype=F64), 0.5, 25
    kernel, plan, sigma = torch.exp(-cost / beta), torch.ones(6, 7, dtype=F64), torch.full((7,), 1 / 7, dtype=F64)
    for _ in range(steps):
        q = kernel * plan
        delta = (1 / 6) / (q @ sigma)
        sigma = (1 / 7) / (q.mT @ delta)
        plan = delta[:, None] * q * sigma
    r = sinkhorn(cost, method="proximal", epsilon=beta, max_iters=steps)
    close(r.plan(), plan)
    close(r.value, (plan * cost).sum())
    close(r.epsilon, beta / steps)
    assert (r.plan() - 1 / 42).abs().max() > 0.05


# ---- all modes together -------------------------------------------------------------------------------------------------

SOURCES = ("cost", "shared", "sqeuclidean", "euclidean", "cosine", "callable")
MODES = list(
    itertools.product(
        SOURCES,
        ("log", "kernel", "auto"),
        ((None, None), (0.7, 0.4), (None, 0.4)),  # rho
        (None, (1.0, 0.6)),  # anneal
        (None, 1e-3),  # tol
        (False, True),  # warm start
        (False, True),  # zero weights
        (False, True),  # ragged
    )
)
MODES += [(source, "proximal", (None, None), None, tol, False, *flags) for source in SOURCES for tol, *flags in
          itertools.product((None, 1e-3), (False, True), (False, True))]  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_modes_together(dtype, seed):
    """Twelve random ones of the 900 combinations, each problem of a batch against the reference alone at its own size and epsilon."""
    for mode in random.Random(seed).sample(MODES, 12):
        _compare_modes(dtype, *mode)


def _compare_modes(dtype, source, method, rho, anneal, tol, warm, zeros, ragged):
    batch, n, m = 3, 7, 6
    a, b = torch.rand(batch, n, dtype=F64) + 0.2, torch.rand(batch, m, dtype=F64) + 0.2
    rows, cols = (torch.tensor([7, 4, 5]), torch.tensor([3, 6, 5])) if ragged else (torch.full((3,), n), torch.full((3,), m))
    if zeros:
        a[:, 2] = b[:, 1] = 0
    for w, kept in ((a, rows), (b, cols)):
        w[torch.arange(w.shape[1]) >= kept[:, None]] = 0
        w /= w.sum(-1, keepdim=True)
    eps = torch.tensor([0.5, 0.2, 0.1], dtype=F64) * (5 if method == "proximal" else 1)
    x, y, g = torch.randn(batch, n, 3, dtype=F64) / 2, torch.randn(batch, m, 3, dtype=F64) / 2, 0.1 * torch.randn(batch, m, dtype=F64)
    squares = lambda x, y: reference.cost_matrix(x, y, "sqeuclidean")
    cost = reference.cost_matrix(x, y, source) if source in ("euclidean", "cosine") else squares(x, y)
    cost = cost[:1].expand_as(cost) if source == "shared" else cost
    given = {
        "cost": {"cost": cost},
        "shared": {"cost": cost[0]},
        "callable": {"x": x, "y": y, "metric": squares},
    }.get(source, {"x": x, "y": y, "metric": source})
    given |= {"a": a, "b": b, "epsilon": eps} | ({"init": (torch.zeros_like(a), g)} if warm else {})
    cast = lambda v: v.to(dtype) if torch.is_tensor(v) else tuple(map(cast, v)) if isinstance(v, tuple) else v
    options = {"max_iters": 12, "method": method, "rho": rho, "anneal": anneal, "tol": tol, "lengths": (rows, cols) if ragged else None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # not all reach tol
        r = sinkhorn(**{name: cast(v) for name, v in given.items()}, **options)
    tolerance = {"rtol": 0, "atol": 1e-9 if dtype == F64 else 3e-5}
    for i in range(batch):
        k, q = rows[i], cols[i]
        alone = reference.sinkhorn(
            cost[i, :k, :q], a[i, :k], b[i, :q], eps[i], int(r.iterations[i]),
            rho=rho, g=g[i, :q] if warm else None, anneal=anneal, proximal=method == "proximal",
        )  # fmt: skip
        ours = r.f[i, :k], r.g[i, :q], r.plan()[i, :k, :q], r.value[i], r.transport_cost[i]
        for u, v in zip(ours, alone, strict=True):
            close(u.double(), v, **tolerance)


# ---- gradients and numbers at the edge ------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
def test_detached_pulls_the_plan_back_to_the_points(metric):
    x, y = torch.randn(2, 5, 3, dtype=F64, requires_grad=True), torch.randn(2, 4, 3, dtype=F64, requires_grad=True)
    r = sinkhorn(x=x, y=y, metric=metric, epsilon=0.5, max_iters=7, grad="detached")
    constant = (reference.cost_matrix(x, y, metric) * r.plan()).sum()
    for u, v in zip(*(torch.autograd.grad(total, (x, y)) for total in (r.transport_cost.sum(), constant)), strict=True):
        close(u, v)


def test_gradient_of_the_closed_form():
    """The value of two Gaussians moved apart by d grows as 2 d; its derivative in epsilon is that of gauss_value."""
    (x, a), (y, b) = grid(0.0, 0.7), grid(1.5, 1.1)
    x, eps = x.requires_grad_(), torch.tensor(0.8, dtype=F64, requires_grad=True)
    value = sinkhorn(x=x, y=y, a=a, b=b, epsilon=eps, max_iters=200).value
    by_points, by_epsilon = torch.autograd.grad(value, (x, eps))
    close(by_points.sum(), -2 * 1.5, rtol=1e-6)
    h = 1e-4
    close(by_epsilon, (gauss_value(0.7, 1.1, 1.5, 0.8 + h)[0] - gauss_value(0.7, 1.1, 1.5, 0.8 - h)[0]) / (2 * h), rtol=1e-6)


@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize("given_zeros", [False, True], ids=["", "zero weights"])
def test_second_derivative_of_the_value_of_points(ragged, given_zeros):
    x, y = torch.randn(2, 4, 2, dtype=F64, requires_grad=True), torch.randn(2, 5, 2, dtype=F64)
    a = torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=F64) if given_zeros else None
    lengths = (torch.tensor([3, 4]), torch.tensor([5, 2])) if ragged else None
    assert torch.autograd.gradgradcheck(lambda x: sinkhorn(x=x, y=y, a=a, epsilon=0.7, lengths=lengths).value, (x,), fast_mode=True)


@pytest.mark.parametrize("rho", [None, 1.0], ids=["balanced", "unbalanced"])
@pytest.mark.parametrize("method", ["log", "kernel"])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
def test_thousand_nats_of_points_in_float32(metric, method, rho):
    x, y = (torch.randn(80, 16).double() for _ in range(2))  # exact in float32
    cost = reference.cost_matrix(x, y, metric)
    eps, uniform = float(cost.max() - cost.min()) / 1000, torch.full((80,), 1 / 80, dtype=F64)
    truth = reference.sinkhorn(cost, uniform, uniform, eps, 50, rho=(rho, rho))
    r = sinkhorn(x=x.float(), y=y.float(), metric=metric, epsilon=eps, max_iters=50, method=method, rho=rho)
    for ours, theirs in ((r.f, truth.f), (r.g, truth.g)):
        close(ours.double() / eps, theirs / eps, rtol=0, atol=5e-3)
    close(r.plan().sum().double(), truth.plan.sum(), rtol=1e-3)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_moving_clouds_changes_no_gradient_and_no_divergence(metric):
    """One problem of a ragged batch far from the other, too: each has its own centre, without its padding."""
    x, y = torch.randn(2, 50, 8), torch.randn(2, 40, 8) + 1
    far = torch.tensor([0.0, 100.0])[:, None, None]
    options = {"metric": metric, "epsilon": 0.5, "lengths": (torch.tensor([50, 20]), torch.tensor([40, 30])), "max_iters": 50}
    values, gradients, divergences = [], [], []
    for shift in (0 * far, far):
        leaf = (x + shift).requires_grad_()
        values.append(sinkhorn(x=leaf, y=y + shift, **options).value)
        gradients.append(torch.autograd.grad(values[-1].sum(), leaf)[0])
        divergences.append(F.sinkhorn_divergence(x + shift, y + shift, reduction="none", **options))
    close(values[1], values[0], rtol=1e-4, atol=0)
    close(divergences[1], divergences[0], rtol=1e-4, atol=0)
    assert (gradients[1] - gradients[0]).norm() < 1e-4 * gradients[0].norm()
