"""Distance-weighted mining alone: a negative drawn for each anchor and positive.

Draws differ, so what is compared is which rows are drawn from. The rows lie about two opposite points: negatives on the
anchor's side are nearer than 1.4 and may be drawn, those on the other side are farther and may not.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.functional import mine_triplets

from ... import peers
from ...registry import Call, Case, Peer
from . import batch

NEAREST, FARTHEST = 0.5, 1.4  # distances below the first weigh as much as it; from the second on they are not drawn

Triplets = tuple[Tensor, Tensor, Tensor]  # rows of anchors, positives, negatives


class Inputs(NamedTuple):
    x: Tensor  # [N, D], unit rows; the last column says on which side
    labels: Tensor  # [N]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> Inputs:
    x, labels = batch.inputs(shape, torch.float32)
    side = torch.where(torch.arange(len(x)) % 2 == 0, 1.0, -1.0)
    x = torch.cat([F.normalize(x[:, 1:], dim=-1), side[:, None]], -1) / 2**0.5
    return Inputs(x.to(dtype), labels)


def plain(x: Tensor, labels: Tensor) -> Triplets:
    """The weights as an N x N matrix, and as many draws a row as it has positives."""
    x = batch.unit(x)
    d = batch.distances(x, x)
    positive, negative = batch.sides(labels)
    kept, width = d.clamp_min(NEAREST), x.shape[1]
    log_weight = (2 - width) * kept.log() - (width - 3) / 2 * (1 - kept.square() / 4).log()
    log_weight = torch.where(negative & (d < FARTHEST), log_weight, -torch.inf)
    weight = (log_weight - log_weight.amax(-1, keepdim=True)).exp()
    drawn = weight.multinomial(int(positive.sum(-1).amax()), replacement=True)  # [N, P]
    anchor, column = positive.nonzero(as_tuple=True)
    rank = positive.cumsum(-1)[anchor, column] - 1
    return anchor, column, drawn[anchor, rank]


def kdfast(x: Tensor, labels: Tensor) -> Triplets:
    return mine_triplets(x, labels, mining="distance_weighted").to_tuple()


def metric_learning() -> Callable[[Tensor, Tensor], Triplets]:
    from pytorch_metric_learning.miners import DistanceWeightedMiner

    return DistanceWeightedMiner(cutoff=NEAREST, nonzero_loss_cutoff=FARTHEST)


def share_right(x: Inputs, triplets: Triplets) -> Tensor:
    """Of each anchor's triplets those of rows that may be taken -> [N], 1 where mining is right."""
    anchor, positive, negative = triplets
    labels, side = x.labels, x.x[:, -1] > 0
    right = (labels[positive] == labels[anchor]) & (positive != anchor)
    right &= (labels[negative] != labels[anchor]) & (side[negative] == side[anchor])
    count = torch.bincount(anchor, minlength=len(labels))
    return torch.bincount(anchor, weights=right.double(), minlength=len(labels)) / count


def mining(mine: Callable[[Tensor, Tensor], Triplets], x: Inputs) -> Call:
    return lambda: (share_right(x, mine(*x)),)


DISTANCE_WEIGHTED = Case(
    shapes={"quick": ((256, 128, 8),), "default": ((1024, 128, 8),), "full": ((1024, 128, 8), (4096, 128, 8)), "cuda": ((4096, 128, 8),)},
    axes="N D C",
    dtypes=(torch.float32,),
    inputs=inputs,
    reference=lambda x: (torch.ones(len(x.x), dtype=torch.float64, device=x.x.device),),
    flop=lambda shape: 2 * shape[0] ** 2 * shape[1],
    peers=(
        Peer("kdfast", partial(mining, kdfast)),
        Peer("eager", partial(mining, plain)),
        Peer(
            "pytorch-metric-learning",
            lambda x: mining(metric_learning(), x),
            missing=peers.installed("pytorch_metric_learning", "pytorch-metric-learning"),
            dtypes=(torch.float32,),
        ),
    ),
)
