"""Triplet losses: the hinge over mined triplets, mean over those that are active; value and gradient of the rows."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdfast.functional import triplet_loss

from ... import peers
from ...registry import Call, Case, Peer
from . import batch

MARGIN = 0.2
ALL = 1e-4  # error allowed to a library that adds all triplets' gradients to their rows one after another
_TRIPLETS = 2**26  # whose losses the formula over all triplets holds at a time, where it goes by parts

Distances = Callable[[Tensor, Tensor], Tensor]


class AgainstBank(NamedTuple):
    x: Tensor  # [N, D]
    labels: Tensor  # [N]
    bank: Tensor  # [M, D], no gradient
    bank_labels: Tensor  # [M]


# ---- plain formulas -----------------------------------------------------------------------------------------------------


def hardest(x: Tensor, labels: Tensor, ref: Tensor | None = None, ref_labels: Tensor | None = None, *, distances: Distances) -> Tensor:
    x = batch.unit(x)
    d = distances(x, x if ref is None else batch.unit(ref))
    positive, negative = batch.sides(labels, ref_labels)
    farthest = d.masked_fill(~positive, -torch.inf).amax(-1)
    nearest = d.masked_fill(~negative, torch.inf).amin(-1)
    loss = (farthest - nearest + MARGIN).relu()
    return loss.sum() / (loss > 0).sum().clamp_min(1)


def every(d: Tensor, positive: Tensor, negative: Tensor, semi_hard: bool) -> tuple[Tensor, Tensor]:
    """Sum and number of the active triplets of rows [R, M], over their pairs with a positive: [pairs, M]."""
    anchor, column = positive.nonzero(as_tuple=True)
    d_ap, d_an, taken = d[anchor, column, None], d[anchor], negative[anchor]
    if semi_hard:
        taken = taken & (d_an > d_ap) & (d_an - d_ap <= MARGIN)
    loss = torch.where(taken, d_ap - d_an + MARGIN, 0).relu()
    return loss.sum(), (loss > 0).sum()


def all_triplets(x: Tensor, labels: Tensor, *, semi_hard: bool, by_parts: bool = False) -> Tensor:
    """`by_parts`: a few anchors at a time, evaluated again by the backward pass, where the triplets do not fit."""
    x = batch.unit(x)
    d = batch.distances(x, x)
    positive, negative = batch.sides(labels)
    if not by_parts:
        total, count = every(d, positive, negative, semi_hard)
        return total / count.clamp_min(1)
    size = max(1, _TRIPLETS // max(1, int(positive.sum(-1).amax()) * len(x)))
    rows = zip(*(t.split(size) for t in (d, positive, negative)), strict=True)
    totals, counts = zip(*(checkpoint(every, *part, semi_hard, use_reentrant=False) for part in rows), strict=True)
    return torch.stack(totals).sum() / torch.stack(counts).sum().clamp_min(1)


def facenet(x: Tensor, labels: Tensor) -> Tensor:
    x = batch.unit(x)
    d = batch.distances(x, x)
    positive, negative = batch.sides(labels)
    anchor, column = positive.nonzero(as_tuple=True)
    d_ap, d_an, other = d[anchor, column], d[anchor], negative[anchor]
    beyond = d_an.masked_fill(~(other & (d_an > d_ap[:, None])), torch.inf).min(-1).values  # of equals the first has the gradient
    farthest = d_an.masked_fill(~other, -torch.inf).max(-1).values
    return (d_ap - torch.where(beyond.isfinite(), beyond, farthest) + MARGIN).relu().mean()


# ---- libraries ------------------------------------------------------------------------------------------------------------


def metric_learning(miner: str | None, x: NamedTuple, **options) -> Call:
    """pytorch-metric-learning's loss averages over the active triplets, and its miners take unit rows."""
    from pytorch_metric_learning import losses, miners

    mine = getattr(miners, miner)(**options) if miner else lambda *args: None
    criterion = losses.TripletMarginLoss(margin=MARGIN)

    def loss(x: Tensor, labels: Tensor, *ref: Tensor) -> Tensor:
        if not ref:
            return criterion(x, labels, mine(x, labels))
        return criterion(x, labels, mine(x, labels, *ref), *ref)

    return partial(peers.step, loss, *x)


def with_metric_learning(miner: str | None, allowance: float = 0.0, **options) -> Peer:
    name = "pytorch-metric-learning"
    missing = peers.installed("pytorch_metric_learning", name)
    return Peer(name, partial(metric_learning, miner, **options), missing=missing, dtypes=(torch.float32,), allowance=allowance)


def with_sentence_transformers(kind: str, method: str) -> Peer:
    """A loss of sentence-transformers, of embeddings that its model would have made."""

    def loss() -> Callable[..., Tensor]:
        from sentence_transformers.sentence_transformer import losses

        criterion = getattr(losses, kind)(None, margin=MARGIN)
        return lambda x, labels: getattr(criterion, method)(labels, F.normalize(x, dim=-1))

    return peers.library("sentence-transformers", "sentence_transformers", loss)._replace(dtypes=(torch.float32,))


# ---- cases ----------------------------------------------------------------------------------------------------------------


def against_bank(shape: tuple[int, ...], dtype: torch.dtype) -> AgainstBank:
    n, m, d, size = shape
    x, labels = batch.inputs((n + m, d, size), dtype)
    order = torch.randperm(n + m, generator=torch.Generator().manual_seed(1))
    return AgainstBank(x[order[:n]], labels[order[:n]], x[order[n:]], labels[order[n:]])


def bank_loss(x: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor) -> Tensor:
    return triplet_loss(x, labels, ref=bank, ref_labels=bank_labels, mining="batch_hard", margin=MARGIN)


def in_double(loss: Callable[..., Tensor], x: NamedTuple, **options) -> tuple[Tensor, ...]:
    return peers.step(loss, *(t.double() if t.is_floating_point() else t for t in x), **options)


def scores(mm: Callable, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (mm(x, y.T),)


def with_formula(mining: str, formula: Callable[..., Tensor], reduction: str = "mean_nonzero") -> tuple[Peer, Peer, Peer]:
    ours = partial(triplet_loss, mining=mining, margin=MARGIN, reduction=reduction)
    return peers.steps("kdfast", ours), peers.steps("eager", formula), peers.compiled(formula)


HARDEST = partial(hardest, distances=batch.distances)
BATCH_HARD = Case(
    shapes={
        "quick": ((512, 128, 4),),
        "default": ((4096, 128, 4),),
        "full": ((1024, 128, 4), (4096, 128, 4), (16_384, 128, 4)),
        "cuda": ((4096, 128, 4), (16_384, 256, 4)),
    },
    axes="N D C",
    dtypes=(torch.float32, torch.bfloat16),
    inputs=batch.inputs,
    reference=partial(in_double, HARDEST),
    flop=lambda shape: 2 * shape[0] ** 2 * shape[1],  # of all pairs: kernels on vectors take each once, and so half of it
    peers=(
        *with_formula("batch_hard", HARDEST),
        peers.steps("torch.cdist", partial(hardest, distances=torch.cdist))._replace(dtypes=(torch.float32,)),
        with_metric_learning("BatchHardMiner"),
        with_sentence_transformers("BatchHardTripletLoss", "batch_hard_triplet_loss"),
        *peers.bare_mm(scores, lambda x: (x.x, x.x)),
    ),
)
BANK = BATCH_HARD._replace(
    shapes={
        "quick": ((128, 4096, 128, 4),),
        "default": ((1024, 65_536, 128, 4),),
        "full": ((128, 65_536, 128, 4), (1024, 65_536, 128, 4)),
        "cuda": ((4096, 65_536, 128, 4),),
    },
    axes="N M D C",
    inputs=against_bank,
    flop=lambda shape: 2 * shape[0] * shape[1] * shape[2],
    peers=(
        peers.steps("kdfast", bank_loss),
        peers.steps("eager", HARDEST),
        peers.compiled(HARDEST),
        with_metric_learning("BatchHardMiner"),
        *peers.bare_mm(scores, lambda x: (x.x, x.bank)),
    ),
)
EVERY, SEMI = partial(all_triplets, semi_hard=False), partial(all_triplets, semi_hard=True)
BATCH_ALL = BATCH_HARD._replace(
    shapes={
        "quick": ((512, 128, 4),),
        "default": ((4096, 128, 4),),
        "full": ((1024, 128, 4), (4096, 128, 4), (4096, 128, 8)),
        "cuda": ((4096, 128, 4),),
    },
    dtypes=(torch.float32,),
    inputs=batch.exact,
    reference=partial(in_double, partial(EVERY, by_parts=True)),
    flop=lambda shape: 6 * shape[0] ** 2 * shape[1],
    peers=(
        *with_formula("batch_all", EVERY),
        with_metric_learning(None, ALL),
        with_sentence_transformers("BatchAllTripletLoss", "batch_all_triplet_loss"),
    ),
)
LARGE_CLASSES = BATCH_ALL._replace(
    shapes={"quick": ((256, 128, 64),), "default": ((512, 128, 256),), "full": ((1024, 128, 512),)},
    peers=with_formula("batch_all", partial(EVERY, by_parts=True))[:2],
)
SEMI_HARD = BATCH_ALL._replace(
    reference=partial(in_double, partial(SEMI, by_parts=True)),
    peers=(
        *with_formula("semi_hard", SEMI),
        with_metric_learning("TripletMarginMiner", ALL, margin=MARGIN, type_of_triplets="semihard"),
    ),
)
SEMI_HARD_FACENET = BATCH_ALL._replace(
    reference=partial(in_double, facenet),
    flop=BATCH_HARD.flop,
    peers=(
        *with_formula("semi_hard_facenet", facenet, reduction="mean"),
        with_sentence_transformers("BatchSemiHardTripletLoss", "batch_semi_hard_triplet_loss"),
    ),
)
