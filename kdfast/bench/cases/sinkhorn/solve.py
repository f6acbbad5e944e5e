"""Entropic optimal transport for given costs: the value after T iterations, forward only."""

from functools import partial

import torch
from torch import Tensor

from kdfast.ops import sinkhorn

from ... import peers
from ...registry import Call, Case, Peer, octaves
from . import problem
from .problem import EPSILON

Inputs = tuple[Tensor, int]


def reference(x: Inputs) -> tuple[Tensor, ...]:
    return (problem.value(*problem.potentials(x[0].double(), x[1])),)


def kdfast(method: str, x: Inputs, impl: str | None = None) -> Call:
    return lambda: (sinkhorn(x[0], epsilon=EPSILON, max_iters=x[1], method=method, impl=impl).value,)


def log_domain(iteration, x: Inputs) -> Call:
    return lambda: (problem.value(*problem.potentials(*x, iteration)),)


def kernel_domain(iteration, x: Inputs) -> Call:
    return lambda: (problem.kernel_value(*x, iteration),)


def compiled(build, iteration, x: Inputs) -> Call:
    torch._dynamo.reset()
    return build(torch.compile(iteration, dynamic=False), x)


def pot(method: str, x: Inputs) -> Call:
    import ot

    options = {"reg": EPSILON, "reg_type": "kl", "method": method, "max_iter": x[1], "tol": 0.0}
    return lambda: (ot.solve_batch(x[0], **options).value,)


def ott(x: Inputs) -> Call:
    """Compiled by XLA, vectorised over the problems."""
    import jax
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    cost, iterations = jax.numpy.asarray(x[0].numpy()), x[1]
    solver = Sinkhorn(threshold=-1.0, inner_iterations=iterations, min_iterations=iterations, max_iterations=iterations)

    def value(cost):
        return solver(LinearProblem(Geometry(cost_matrix=cost, epsilon=EPSILON))).reg_ot_cost

    solve = jax.jit(jax.vmap(value))
    return lambda: (torch.from_numpy(jax.device_get(solve(cost)).copy()),)


def _compiled(name: str, build, iteration) -> Peer:
    return Peer(name, partial(compiled, build, iteration), missing=peers.no_compiler, quick=False)


SOLVE = Case(
    shapes={
        "quick": ((1, 400, 400, 20), (16, 64, 64, 20)),
        "default": ((1, 2000, 2000, 20), (64, 128, 128, 20)),
        "full": ((1, 2000, 2000, 20), (64, 128, 128, 20), (256, 256, 256, 50), (1, 5000, 5000, 100)),
        "cuda": ((256, 256, 256, 50), (1, 10_000, 10_000, 20), (100_000, 4, 4, 20), (1024, 64, 64, 50), (1024, 128, 128, 50)),
    },
    axes="B N M T",
    dtypes=problem.DTYPES,
    inputs=problem.costs,
    reference=reference,
    flop=None,
    peers=(
        Peer("kdfast", partial(kdfast, "log")),
        Peer("eager", partial(log_domain, problem.log_iteration)),
        Peer("kdfast, kernel", partial(kdfast, "kernel")),
        Peer("kdfast, triton", partial(kdfast, "log", impl="triton"), device="cuda"),
        Peer("eager, kernel", partial(kernel_domain, problem.kernel_iteration)),
        _compiled("torch.compile", log_domain, problem.log_iteration),
        _compiled("torch.compile, kernel", kernel_domain, problem.kernel_iteration),
        Peer("POT", partial(pot, "log_sinkhorn"), missing=peers.installed("ot", "POT")),
        Peer("POT, kernel", partial(pot, "sinkhorn"), missing=peers.installed("ot", "POT")),
        Peer("OTT-JAX", ott, missing=peers.installed("ott", "ott-jax"), dtypes=(torch.float32,), device="cpu"),
    ),
)
GROWTH = SOLVE._replace(
    shapes={
        "quick": octaves((1, 200, 200, 20), entries=(1, 2, 3), count=1),
        "default": octaves((1, 500, 500, 20), entries=(1, 2, 3)),
        "full": octaves((4, 500, 500, 20), entries=(0, 1, 2, 3)),
        "cuda": octaves((4, 2_000, 2_000, 20), entries=(0, 1, 2, 3)),
    },
    peers=SOLVE.peers[:4],
)
