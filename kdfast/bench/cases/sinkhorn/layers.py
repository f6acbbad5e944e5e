"""Sinkhorn iterations as layers: SwAV's assignments, and doubly stochastic normalisation forward and backward."""

from functools import partial

import torch
from torch import Tensor

from kdfast.functional import sinkhorn_assign, sinkhorn_normalize

from ... import peers
from ...registry import Call, Case, Peer

EPSILON = 0.05
EPS = 1e-6

Inputs = tuple[Tensor, int]


def scores(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """Cosines of N samples with K prototypes, and the iterations."""
    n, k, iterations = shape
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.2).clamp(-1, 1).to(dtype), iterations


def published_assign(scores: Tensor, iterations: int) -> Tensor:
    """The loop of SwAV and DINOv2, prototypes first."""
    codes = (scores / EPSILON).exp().T  # [K, N]
    codes = codes / codes.sum()
    for _ in range(iterations):
        codes = codes / codes.sum(1, keepdim=True) / len(codes)
        codes = codes / codes.sum(0, keepdim=True) / codes.shape[1]
    return (codes * codes.shape[1]).T


def codes(assign, x: Inputs) -> Call:
    return lambda: (assign(*x),)


def compiled(build, function, x: Inputs) -> Call:
    torch._dynamo.reset()
    return build(torch.compile(function, dynamic=False), x)


def lightly(x: Inputs) -> Call:
    from lightly.loss.swav_loss import sinkhorn

    return codes(lambda scores, iterations: sinkhorn(scores, iterations=iterations, epsilon=EPSILON), x)


def logits(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """B matrices of n x n, and the iterations."""
    batch, n, iterations = shape
    return torch.randn(batch, n, n, generator=torch.Generator().manual_seed(0)).to(dtype), iterations


def published_normalize(logits: Tensor, iterations: int) -> Tensor:
    matrix = logits.softmax(-1) + EPS
    matrix = matrix / (matrix.sum(-2, keepdim=True) + EPS)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + EPS)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + EPS)
    return matrix


def normalized(normalize, x: Inputs) -> Call:
    """The matrices, and the gradient of a weighted sum of their entries."""
    leaf = x[0].detach().requires_grad_()
    weight = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(leaf)

    def call() -> tuple[Tensor, ...]:
        out = normalize(leaf, x[1])
        return out.detach(), *torch.autograd.grad(out, leaf, weight)

    return call


ASSIGN = Case(
    shapes={
        "quick": ((256, 300, 3),),
        "default": ((2048, 3000, 3),),
        "full": ((2048, 3000, 3), (4096, 16384, 3), (64, 3000, 3)),
        "cuda": ((8192, 65_536, 3), (4096, 3000, 3)),
    },
    axes="N K T",
    dtypes=(torch.float32,),
    inputs=scores,
    reference=lambda x: (published_assign(x[0].double(), x[1]),),
    flop=None,
    peers=(
        Peer("kdfast", partial(codes, lambda scores, iterations: sinkhorn_assign(scores, epsilon=EPSILON, iters=iterations))),
        Peer("eager", partial(codes, published_assign)),
        Peer("torch.compile", partial(compiled, codes, published_assign), missing=peers.no_compiler, quick=False),
        Peer("lightly", lightly, missing=peers.installed("lightly", "lightly")),
    ),
)
NORMALIZE = Case(
    shapes={
        "quick": ((5_000, 4, 20),),
        "default": ((100_000, 4, 20),),
        "full": ((100_000, 4, 20), (10_000, 8, 20), (1_000, 32, 20)),
        "cuda": ((100_000, 4, 20), (4_096, 32, 20)),
    },
    axes="B n T",
    dtypes=(torch.float32,),
    inputs=logits,
    reference=lambda x: normalized(published_normalize, (x[0].double(), x[1]))(),
    flop=None,
    peers=(
        Peer("kdfast", partial(normalized, lambda logits, iterations: sinkhorn_normalize(logits, iters=iterations, eps=EPS))),
        Peer("eager", partial(normalized, published_normalize)),
        Peer("torch.compile", partial(compiled, normalized, published_normalize), missing=peers.no_compiler, quick=False),
    ),
)
