"""WCoRD's linear critic, the mean negative score less the positive: all it needs is the bank's mean, so its time is reading the bank."""

from functools import partial

from torch import Tensor

from kdfast.functional import wasserstein_dependency

from ... import peers
from .info_nce import INFO_NCE, TAU


def formula(query: Tensor, positive: Tensor, bank: Tensor) -> Tensor:
    return ((query @ bank.T).mean(-1) - (query * positive).sum(-1)).mean() / TAU


def by_mean(query: Tensor, positive: Tensor, bank: Tensor) -> Tensor:
    return (query * (bank.mean(0) - positive)).sum(-1).mean() / TAU


WASSERSTEIN = INFO_NCE._replace(
    shapes={
        "quick": ((64, 256, 128),),
        "default": ((64, 256, 128), (256, 65536, 128)),
        "full": ((64, 256, 128), (256, 65536, 128), (256, 1_000_000, 128)),
    },
    reference=lambda x: peers.step(formula, *(t.double() for t in x)),
    flop=None,
    peers=(
        peers.steps("kdfast", partial(wasserstein_dependency, temperature=TAU)),
        peers.steps("eager", formula),
        peers.steps("eager, by the mean", by_mean),
        peers.compiled(by_mean),
    ),
)
