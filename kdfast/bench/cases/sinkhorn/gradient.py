"""Gradients by a given cost: of the value (the plan itself), and of the transport cost, through the iterations or at their fixed point.

"kdfast, backward alone" is the backward pass of a graph that is kept. With t its time and s that of forward and backward, an
iteration takes (s - t)/T.
"""

from functools import partial

import torch
from torch import Tensor

from kdfast.ops import sinkhorn

from ... import peers
from ...registry import Call, Case, Peer
from . import problem
from .problem import EPSILON
from .solve import SOLVE, Inputs


def total(grad: str, cost: Tensor, iterations: int) -> Tensor:
    result = sinkhorn(cost, epsilon=EPSILON, max_iters=iterations, method="log", grad=grad)
    return (result.value if grad == "envelope" else result.transport_cost).sum()


def through_iterations(cost: Tensor, iterations: int) -> Tensor:
    """The transport cost, by autograd through every logsumexp."""
    return (problem.plan(cost, *problem.potentials(cost, iterations)) * cost).sum()


def gradient(loss, x: Inputs) -> Call:
    return lambda: peers.step(loss, *x)[1:]


def compiled(loss, x: Inputs) -> Call:
    torch._dynamo.reset()
    return gradient(torch.compile(loss, dynamic=False), x)


def backward_alone(loss, x: Inputs) -> Call:
    cost = x[0].detach().requires_grad_()
    value = loss(cost, x[1])
    return lambda: torch.autograd.grad(value, cost, retain_graph=True)


def plan(iteration, x: Inputs) -> Call:
    """By the envelope theorem: nothing to differentiate."""
    return lambda: (problem.plan(x[0], *problem.potentials(*x, iteration)),)


def compiled_plan(x: Inputs) -> Call:
    torch._dynamo.reset()
    return plan(torch.compile(problem.log_iteration, dynamic=False), x)


def through_iterations_reference(x: Inputs) -> tuple[Tensor, ...]:
    """A problem at a time: less memory."""
    parts = [gradient(through_iterations, (cost, x[1]))()[0] for cost in x[0].double().split(1)]
    return (torch.cat(parts),)


VALUE = SOLVE._replace(
    shapes=SOLVE.shapes | {"cuda": ((256, 256, 256, 50), (1, 10_000, 10_000, 20))},
    reference=lambda x: plan(problem.log_iteration, (x[0].double(), x[1]))(),
    peers=(
        Peer("kdfast", partial(gradient, partial(total, "envelope"))),
        Peer("eager", partial(plan, problem.log_iteration)),
        Peer("kdfast, backward alone", partial(backward_alone, partial(total, "envelope"))),
        Peer("torch.compile", compiled_plan, missing=peers.no_compiler, quick=False),
    ),
)
UNROLLED = Case(
    shapes={
        "quick": ((1, 200, 200, 20), (8, 64, 64, 20)),
        "default": ((1, 1000, 1000, 20), (64, 128, 128, 20)),
        "full": ((1, 2000, 2000, 20), (64, 128, 128, 20), (64, 128, 128, 100)),
        "cuda": ((64, 128, 128, 20), (1, 2000, 2000, 20)),
    },
    axes=SOLVE.axes,
    dtypes=SOLVE.dtypes,
    inputs=SOLVE.inputs,
    reference=through_iterations_reference,
    flop=None,
    peers=(
        Peer("kdfast", partial(gradient, partial(total, "unrolled"))),
        Peer("eager", partial(gradient, through_iterations)),
        Peer("kdfast, backward alone", partial(backward_alone, partial(total, "unrolled"))),
        Peer("torch.compile", partial(compiled, through_iterations), missing=peers.no_compiler, quick=False),
    ),
)
# After so many iterations the fixed point's gradient is that of the iterations.
IMPLICIT = UNROLLED._replace(
    shapes={
        "quick": ((1, 200, 200, 60), (8, 64, 64, 60)),
        "default": ((1, 1000, 1000, 60), (64, 128, 128, 60)),
        "full": ((1, 2000, 2000, 60), (64, 128, 128, 60)),
        "cuda": ((64, 128, 128, 60), (1, 2000, 2000, 60)),
    },
    peers=(
        Peer("kdfast", partial(gradient, partial(total, "implicit"))),
        Peer("eager", partial(gradient, through_iterations)),
        Peer("kdfast, backward alone", partial(backward_alone, partial(total, "implicit"))),
    ),
)
