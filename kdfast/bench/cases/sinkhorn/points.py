"""A Sinkhorn loss between point clouds: the gradient by the points of one, from T iterations and the plan."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.functional import sinkhorn_loss

from ... import peers
from ...registry import Call, Case, Peer
from . import problem
from .problem import EPSILON


class Inputs(NamedTuple):
    x: Tensor  # [B, N, D]
    y: Tensor  # [B, M, D]
    iterations: int


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    *sizes, iterations = shape
    return Inputs(*problem.points(*sizes, dtype), iterations)


def kdfast(x: Tensor, y: Tensor, iterations: int) -> Tensor:
    return sinkhorn_loss(x, y, epsilon=EPSILON, max_iters=iterations, reduction="sum")


def formula(x: Tensor, y: Tensor, iterations: int, iteration=problem.log_iteration) -> Tensor:
    """<P, C> with the plan P taken as constant has the gradient of the value."""
    cost = problem.squared_distances(x, y)
    with torch.no_grad():
        plan = problem.plan(cost, *problem.potentials(cost, iterations, iteration))
    return (plan * cost).sum()


def gradient(loss, inputs: Inputs) -> Call:
    return lambda: peers.step(loss, *inputs)[1:]


def compiled(inputs: Inputs) -> Call:
    torch._dynamo.reset()
    return gradient(partial(formula, iteration=torch.compile(problem.log_iteration, dynamic=False)), inputs)


def geomloss(inputs: Inputs) -> Call:
    """It halves the cost, and has no number of iterations: a schedule of T steps from hardly more than EPSILON."""
    from geomloss import SamplesLoss

    blur, start = (EPSILON / 2) ** 0.5, 1.0001
    schedule = {"diameter": start * blur, "scaling": start ** (-1 / (inputs.iterations - 2))}
    criterion = SamplesLoss("sinkhorn", p=2, blur=blur, **schedule, debias=False, backend="tensorized")
    return gradient(lambda x, y, iterations: 2 * criterion(x, y).sum(), inputs)


def flash_sinkhorn(inputs: Inputs) -> Call:
    """In float32 products, potentials updated by turns as ours are."""
    from flash_sinkhorn import SamplesLoss

    fixed = {"eps": EPSILON, "n_iters": inputs.iterations, "use_epsilon_scaling": False, "last_extrapolation": False}
    criterion = SamplesLoss("sinkhorn", backend="alternating", allow_tf32=False, **fixed)
    return gradient(lambda x, y, iterations: criterion(x, y).sum(), inputs)


def pot(inputs: Inputs) -> Call:
    import ot

    options = {"reg": EPSILON, "reg_type": "kl", "method": "log_sinkhorn", "tol": 0.0, "grad": "envelope"}
    return gradient(lambda x, y, iterations: ot.solve_sample_batch(x, y, max_iter=iterations, **options).value.sum(), inputs)


def ott(inputs: Inputs) -> Call:
    import jax
    from ott.geometry.pointcloud import PointCloud
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    x, y, iterations = jax.numpy.asarray(inputs.x.numpy()), jax.numpy.asarray(inputs.y.numpy()), inputs.iterations
    solver = Sinkhorn(threshold=-1.0, inner_iterations=iterations, min_iterations=iterations, max_iterations=iterations)

    def value(x, y):
        return solver(LinearProblem(PointCloud(x, y, epsilon=EPSILON))).reg_ot_cost

    solve = jax.jit(jax.vmap(jax.grad(value)))
    return lambda: (torch.from_numpy(jax.device_get(solve(x, y)).copy()),)


POINTS = Case(
    shapes={
        "quick": ((1, 400, 400, 64, 20), (16, 64, 64, 64, 20)),
        "default": ((1, 2000, 2000, 64, 20), (64, 128, 128, 64, 20)),
        "full": ((1, 2000, 2000, 64, 20), (1, 2000, 2000, 512, 20), (64, 128, 128, 64, 20), (1, 10_000, 10_000, 64, 20)),
        "cuda": ((1, 10_000, 10_000, 64, 100), (64, 128, 128, 64, 20)),
    },
    axes="B N M D T",
    dtypes=problem.DTYPES,
    inputs=inputs,
    reference=lambda x: gradient(formula, Inputs(x.x.double(), x.y.double(), x.iterations))(),
    flop=None,
    peers=(
        Peer("kdfast", partial(gradient, kdfast)),
        Peer("eager", partial(gradient, formula)),
        Peer("torch.compile", compiled, missing=peers.no_compiler, quick=False),
        Peer("POT", pot, missing=peers.installed("ot", "POT")),
        Peer("geomloss", geomloss, missing=peers.installed("geomloss", "geomloss"), allowance=1e-4),  # its steps end 2e-5 beside ours
        Peer("OTT-JAX", ott, missing=peers.installed("ott", "ott-jax"), dtypes=(torch.float32,), device="cpu"),
        Peer("flash-sinkhorn", flash_sinkhorn, missing=peers.installed("flash_sinkhorn", "flash-sinkhorn"), device="cuda", allowance=1e-4),
    ),
)
