"""Set minings in their other forms: mined on another tensor, over several layers, with swapped anchors, and in the other direction.

Rows are exact (batch.exact): whether a triplet is mined, and which of two distances is the smaller, are jumps.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdfast.functional import triplet_loss

from ... import peers
from ...registry import Case, Peer
from . import batch
from .mined import ALL, BATCH_ALL, MARGIN, in_double

_TRIPLETS = 2**25  # whose losses the formula by parts holds at a time


class SampledOn(NamedTuple):
    x: Tensor  # [N, D]
    labels: Tensor  # [N]
    on: Tensor  # [N, D], what is mined on


class Layers(NamedTuple):
    x: Tensor  # [N, D]
    deeper: Tensor  # [N, D / 2]
    labels: Tensor
    on: Tensor


def other(shape: tuple[int, int, int], dtype: torch.dtype, width: int) -> Tensor:
    """Rows of another kind with the same labels: in the other order of the batch."""
    n, _, size = shape
    return batch.exact((n, width, size), dtype).x.flip(0)


def sampled_on(shape: tuple[int, int, int], dtype: torch.dtype) -> SampledOn:
    return SampledOn(*batch.exact(shape, dtype), other(shape, dtype, shape[1]))


def layers(shape: tuple[int, int, int], dtype: torch.dtype) -> Layers:
    x, labels, on = sampled_on(shape, dtype)
    return Layers(x, other(shape, dtype, shape[1] // 2), labels, on)


# ---- plain formulas -----------------------------------------------------------------------------------------------------


def of_pairs(
    anchor: Tensor, column: Tensor, negative: Tensor, on: Tensor, *layers: Tensor, semi_hard: bool, swap: bool, sign: int
) -> tuple[Tensor, Tensor]:
    """Sum and number of the active triplets of pairs [P] with a positive; `on` and `layers` are distances [N, N]."""
    taken = negative[anchor]  # [P, N]
    if semi_hard:
        gap = on[anchor] - on[anchor, column, None]
        taken = taken & (gap > 0) & (gap <= MARGIN)
    loss = 0
    for d in layers:
        d_an = torch.where(d[column] < d[anchor], d[column], d[anchor]) if swap else d[anchor]
        loss = loss + (sign * (d[anchor, column, None] - d_an) + MARGIN).relu()
    loss = torch.where(taken, loss, 0)
    return loss.sum(), (loss > 0).sum()


def formula(
    *tensors: Tensor, separate: bool = False, semi_hard: bool = True, swap: bool = False, sign: int = 1, by_parts: bool = True
) -> Tensor:
    """Of layers, labels and, with `separate`, what is mined on. `by_parts`: a few pairs at a time, evaluated again by the backward pass."""
    *rows, labels, on = tensors if separate else (*tensors, tensors[0])
    rows, on = [batch.unit(x) for x in rows], batch.unit(on.detach())
    layers, on = [batch.distances(x, x) for x in rows], batch.distances(on, on)
    positive, negative = batch.sides(labels)
    pairs = positive.nonzero(as_tuple=True)
    losses = partial(of_pairs, semi_hard=semi_hard, swap=swap, sign=sign)
    if not by_parts:
        total, count = losses(*pairs, negative, on, *layers)
        return total / count.clamp_min(1)
    parts = zip(*(t.split(max(1, _TRIPLETS // len(labels))) for t in pairs), strict=True)
    totals, counts = zip(*(checkpoint(losses, *part, negative, on, *layers, use_reentrant=False) for part in parts), strict=True)
    return torch.stack(totals).sum() / torch.stack(counts).sum().clamp_min(1)


# ---- kdfast and a library -------------------------------------------------------------------------------------------------


def on_another(x: Tensor, labels: Tensor, on: Tensor) -> Tensor:
    return triplet_loss(x, labels, mining="semi_hard", margin=MARGIN, sample_on=on)


def on_layers(x: Tensor, deeper: Tensor, labels: Tensor, on: Tensor) -> Tensor:
    return triplet_loss([x, deeper], labels, mining="semi_hard", margin=MARGIN, sample_on=on)


def mined_elsewhere() -> Callable[..., Tensor]:
    from pytorch_metric_learning import losses, miners

    miner, criterion = miners.TripletMarginMiner(margin=MARGIN, type_of_triplets="semihard"), losses.TripletMarginLoss(margin=MARGIN)
    return lambda x, labels, on: criterion(x, labels, miner(on, labels))


# ---- cases ----------------------------------------------------------------------------------------------------------------


def case(
    inputs: Callable, ours: Callable[..., Tensor], plain: Callable[..., Tensor], *more: Peer, leaves: int = 1, products: float = 3
) -> Case:
    """`products`: of N x N x D, of scores and of gradients."""
    return BATCH_ALL._replace(
        shapes={"quick": ((256, 128, 4),), "default": ((1024, 128, 4),), "full": ((1024, 128, 4), (1024, 128, 64), (4096, 128, 4))},
        inputs=inputs,
        reference=partial(in_double, plain, leaves=leaves),
        flop=lambda shape: int(2 * products) * shape[0] ** 2 * shape[1],
        peers=(
            peers.steps("kdfast", ours, leaves=leaves),
            peers.steps("eager, by parts", plain, leaves=leaves),
            peers.steps("eager", partial(plain, by_parts=False), leaves=leaves)._replace(quick=False),
            *more,
        ),
    )


SAMPLE_ON = case(
    sampled_on,
    on_another,
    partial(formula, separate=True),
    peers.library("pytorch-metric-learning", "pytorch_metric_learning", mined_elsewhere)._replace(dtypes=(torch.float32,), allowance=ALL),
    products=4,
)
LAYERS = case(layers, on_layers, partial(formula, separate=True), leaves=2, products=5.5)
# without pytorch-metric-learning, which halves the gradient between equal distances: exact rows have many
SWAP = case(
    batch.exact,
    partial(triplet_loss, mining="batch_all", margin=MARGIN, swap=True),
    partial(formula, semi_hard=False, swap=True),
)._replace(
    shapes={
        "quick": ((256, 128, 4), (256, 128, 32)),
        "default": ((1024, 128, 4), (1024, 128, 64)),
        "full": ((1024, 128, 64), (4096, 128, 4)),
    }
)
CONFUSE = case(
    batch.exact,
    partial(triplet_loss, mining="semi_hard", margin=MARGIN, direction="confuse"),
    partial(formula, sign=-1),
)
