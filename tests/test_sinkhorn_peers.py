"""kdfast.ops.sinkhorn against POT, geomloss, OTT-JAX and lightly: the rows of the table in docs/optimal-transport.md, where installed."""

import math

import numpy as np
import pytest
import torch
from sinkhorn_cases import F64, close, weights

from kdfast import functional as F
from kdfast._ops.sinkhorn import arguments, reference
from kdfast.ops import sinkhorn

# ---- POT --------------------------------------------------------------------------------------------------------------

TIGHT = {"stopThr": 1e-13, "numItermax": 5000}


@pytest.fixture
def ot():
    return pytest.importorskip("ot", reason="POT is not installed")


@pytest.fixture
def given():
    """(cost, a, b, epsilon, our solution)"""
    cost, a, b, eps = torch.rand(8, 9, dtype=F64), weights(8), weights(9), 0.1
    return cost, a, b, eps, sinkhorn(cost, a=a, b=b, epsilon=eps, max_iters=1000)


def entropies(a, b, eps):
    return eps * (torch.xlogy(a, a).sum() + torch.xlogy(b, b).sum())


def same_up_to_a_constant(u, v):
    close(u - u.mean(), v - v.mean())


def test_pot_plan_and_cost(ot, given):
    cost, a, b, eps, r = given
    close(r.plan(), ot.sinkhorn(a, b, cost, eps, **TIGHT))
    close(r.transport_cost, ot.sinkhorn2(a, b, cost, eps, **TIGHT))


@pytest.mark.parametrize("iterations", [1, 4])
def test_pot_iterates_of_the_transposed_problem(ot, given, iterations):
    cost, a, b, eps, _ = given
    """Its first scaling is 1, weights folded in."""
    theirs = ot.sinkhorn(b, a, cost.T, eps, method="sinkhorn_log", numItermax=iterations, stopThr=0, warn=False)
    start = torch.zeros_like(a), -eps * b.log()
    close(sinkhorn(cost, a=a, b=b, epsilon=eps, max_iters=iterations, init=start).plan(), theirs.T)


def test_pot_solve(ot, given):
    cost, a, b, eps, r = given
    theirs = ot.solve(cost, a, b, reg=eps, reg_type="KL", max_iter=5000, tol=1e-13)
    close(r.value, theirs.value)
    close(r.transport_cost, theirs.value_linear)
    same_up_to_a_constant(r.f / eps + a.log(), theirs.potentials[0])
    theirs = ot.solve(cost, a, b, reg=eps, reg_type="entropy", max_iter=5000, tol=1e-13)
    close(r.value + entropies(a, b, eps), theirs.value)
    close(r.plan(), theirs.plan)


def test_pot_batch(ot, given):
    cost, a, b, eps, r = given
    batch = {"a": a[None], "b": b[None], "reg": eps, "max_iter": 5000, "tol": 1e-13}
    close(r.value, ot.solve_batch(cost[None], reg_type="kl", **batch).value[0])
    close(r.value + entropies(a, b, eps), ot.solve_batch(cost[None], reg_type="entropy", **batch).value[0])


def test_pot_log_scalings(ot, given):
    cost, a, b, eps, r = given
    _, log = ot.sinkhorn(a, b, cost, eps, method="sinkhorn_log", log=True, **TIGHT)
    same_up_to_a_constant(r.f / eps + a.log(), log["log_u"])
    same_up_to_a_constant(r.g / eps + b.log(), log["log_v"])


@pytest.mark.parametrize("rho", [0.4, (0.4, 0.9), (0.4, None)], ids=["alike", "differently", "one side fixed"])
def test_pot_unbalanced(ot, given, rho):
    cost, a, b, eps, _ = given
    b = b if isinstance(rho, tuple) and None in rho else 0.7 * b
    penalties = tuple(math.inf if r is None else r for r in rho) if isinstance(rho, tuple) else rho
    r = sinkhorn(cost, a=1.3 * a, b=b, epsilon=eps, rho=rho, max_iters=1000)
    close(r.plan(), ot.unbalanced.sinkhorn_unbalanced(1.3 * a, b, cost, eps, penalties, reg_type="kl", **TIGHT))
    theirs = ot.solve(cost, 1.3 * a, b, reg=eps, reg_type="KL", unbalanced=penalties, unbalanced_type="KL", max_iter=5000, tol=1e-13)
    close(r.transport_cost, theirs.value_linear)


# ---- geomloss -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def samples_loss():
    """SamplesLoss of blur 0.4 at a constant epsilon: 600 steps, from hardly more than the last."""
    geomloss = pytest.importorskip("geomloss", reason="geomloss is not installed")
    schedule = {"blur": 0.4, "diameter": 0.4 * 1.0001, "scaling": 1.0001 ** (-1 / 600)}
    return lambda **options: geomloss.SamplesLoss("sinkhorn", backend="tensorized", **schedule, **options)


@pytest.fixture
def clouds():
    return torch.randn(20, 3, dtype=F64), torch.randn(15, 3, dtype=F64) + 0.3


GEOMLOSS = {
    2: ("sqeuclidean", 2 * 0.4**2, 2 * 0.9**2, 2),
    1: ("euclidean", 0.4, 0.9, 1),
}  # by p: metric, epsilon, rho, our value over theirs


@pytest.mark.parametrize("reach", [None, 0.9], ids=["balanced", "unbalanced"])
@pytest.mark.parametrize("p", [2, 1])
@pytest.mark.parametrize("debias", [False, True], ids=["loss", "divergence"])
def test_geomloss(samples_loss, clouds, debias, p, reach):
    metric, eps, rho, factor = GEOMLOSS[p]
    ours = (F.sinkhorn_divergence if debias else F.sinkhorn_loss)(
        *clouds, metric=metric, epsilon=eps, rho=rho if reach else None, max_iters=1000
    )
    theirs = samples_loss(p=p, debias=debias, reach=reach)(*clouds)
    close(ours / factor, theirs, rtol=1e-3 if debias and p == 1 else 1e-6)  # it bounds distances below, by 1e-4


@pytest.mark.parametrize("debias", [False, True], ids=["loss", "divergence"])
def test_geomloss_masses(samples_loss, clouds, debias):
    """Its undebiased value takes the masses to be 1: it has (sum a + sum b)/2 where the dual has sum a sum b."""
    metric, eps, rho, factor = GEOMLOSS[2]
    a, b = torch.rand(20, dtype=F64), torch.rand(15, dtype=F64)
    options = {"a": a, "b": b, "metric": metric, "epsilon": eps, "rho": rho, "max_iters": 1000}
    ours = (F.sinkhorn_divergence if debias else F.sinkhorn_loss)(*clouds, **options)
    ours = ours if debias else ours + eps * ((a.sum() + b.sum()) / 2 - a.sum() * b.sum())
    close(ours / factor, samples_loss(p=2, debias=debias, reach=0.9)(a, clouds[0], b, clouds[1]), rtol=1e-6)


def test_geomloss_potentials(samples_loss, clouds):
    f, g = samples_loss(p=2, debias=False, potentials=True, reach=0.9)(*clouds)
    metric, eps, rho, factor = GEOMLOSS[2]
    r = sinkhorn(x=clouds[0], y=clouds[1], metric=metric, epsilon=eps, rho=rho, max_iters=1000)
    close(r.f / factor, f.squeeze(), atol=1e-5)
    close(r.g / factor, g.squeeze(), atol=1e-5)


def test_geomloss_annealing():
    """The epsilons themselves: its iterations average the two updates, so that only their ends can be compared."""
    inside = pytest.importorskip("geomloss._legacy.sinkhorn_divergence", reason="geomloss is not installed, or another version")
    first, *theirs, last = (2 * eps for eps in inside.epsilon_schedule(2, 6.0, 0.3, 0.9))
    ours = arguments.schedule(len(theirs) + 1, None, "log", (2 * 6.0**2, 0.9**2))
    epsilon = torch.tensor([2 * 0.3**2], dtype=F64)
    close(torch.cat([ours.epsilon(epsilon, t + 1) for t in range(len(theirs) + 1)]), [*theirs, last])
    assert first == theirs[0]


# ---- OTT-JAX --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ott():
    """(cost, a, b, epsilon, tau) -> its solution, in float64."""
    pytest.importorskip("ott", reason="ott-jax is not installed")
    import jax
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)

    def solve(cost, a, b, eps, tau=(1.0, 1.0)):
        cost, a, b = (jax.numpy.asarray(t.numpy()) for t in (cost, a, b))
        problem = LinearProblem(Geometry(cost, epsilon=eps), a, b, tau_a=tau[0], tau_b=tau[1])
        return Sinkhorn(threshold=1e-12, max_iterations=5000)(problem)

    yield solve
    jax.config.update("jax_enable_x64", before)


def tensor(array):
    return torch.from_numpy(np.array(array))


def test_ott(ott, given):
    cost, a, b, eps, r = given
    theirs = ott(cost, a, b, eps)
    close(r.plan(), tensor(theirs.matrix))
    same_up_to_a_constant(r.f + eps * a.log(), tensor(theirs.f))
    same_up_to_a_constant(r.g + eps * b.log(), tensor(theirs.g))
    close(r.value, tensor(theirs.reg_ot_cost))
    close(r.transport_cost, tensor(theirs.primal_cost))
    close(r.value + entropies(a, b, eps), tensor(theirs.ent_reg_cost))


@pytest.mark.parametrize("tau", [(0.8, 0.8), (0.8, 0.6), (1.0, 0.8)], ids=["alike", "differently", "one side fixed"])
def test_ott_unbalanced(ott, given, tau):
    """It penalises the plan's entropy, not its divergence from a b^T: those differ by a term that is linear in the plan."""
    cost, a, b, eps, _ = given
    a, b = (1.3 * a, 0.7 * b) if 1.0 not in tau else (a, b)
    rho = tuple(None if t == 1 else eps * t / (1 - t) for t in tau)
    r = sinkhorn(cost + eps * (a.log()[:, None] + b.log()), a=a, b=b, epsilon=eps, rho=rho, max_iters=1000)
    close(r.plan(), tensor(ott(cost, a, b, eps, tau).matrix))


def test_ott_points_and_divergence(ott, clouds):
    import jax
    from ott.geometry.pointcloud import PointCloud
    from ott.tools.sinkhorn_divergence import sinkhorn_divergence

    x, y = (jax.numpy.asarray(t.numpy()) for t in clouds)
    close(reference.cost_matrix(*clouds, "sqeuclidean"), tensor(PointCloud(x, y).cost_matrix))
    theirs, _ = sinkhorn_divergence(PointCloud, x, y, epsilon=0.5, solve_kwargs={"threshold": 1e-12, "max_iterations": 5000})
    close(F.sinkhorn_divergence(*clouds, epsilon=0.5, max_iters=1000), tensor(theirs), rtol=1e-6)


# ---- SwAV -----------------------------------------------------------------------------------------------------------------


def test_swav_codes_of_lightly():
    swav = pytest.importorskip("lightly.loss.swav_loss", reason="lightly is not installed", exc_type=ImportError)
    scores = torch.rand(33, 7) * 2 - 1
    torch.testing.assert_close(F.sinkhorn_assign(scores, epsilon=0.05, iters=3), swav.sinkhorn(scores, iterations=3, epsilon=0.05))
