"""Losses over all pairs of an anchor, as block functions for `blocks.row_sums`: multi-similarity, margin, contrastive, angular."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import classes, distances, mining
from .blocks import budget, plan, row_sums, whole
from .classes import Anchors, References
from .inputs import Batch


class MultiSimilarity(NamedTuple):
    alpha: float
    beta: float
    base: float
    epsilon: float | None


class Hinges(NamedTuple):
    metric: str


class Angular(NamedTuple):
    tan2: float  # squared tangent of the angle


def multi_similarity_rows(b: Batch, settings: MultiSimilarity) -> Tensor:
    """[N] losses; an anchor without a kept pair has 0."""
    return _run(multi_similarity, settings, b)[0][:, 0]


def pair_hinges(b: Batch, settings: Hinges, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums [N, 2] of relu(d_ap - levels_0) over positives and relu(levels_1 - d_an) over negatives, levels [N, 2].

    Counts [N, 4]: the pairs of either kind, those of either kind whose hinge is > 0.
    """
    return _run(hinges, settings, b, levels)


def angular_rows(b: Batch, alpha: float, positives: int) -> tuple[Tensor, Tensor]:
    """[N] sums over positive pairs, and their numbers."""
    (x,), (y,) = b.layers, b.refs
    blocks = plan(x.shape[0], positives, y.shape[0], max(y.shape), budget(x.device, y.numel()))
    settings = Angular(math.tan(math.radians(alpha)) ** 2)
    sums, counts = row_sums(_angular, settings, blocks, (x,), (y,), tuple(b.anchors), tuple(b.classes))
    return sums[:, 0], counts[:, 0]


def _run(fn, settings, b: Batch, *more: Tensor) -> tuple[Tensor, Tensor]:
    (x,), (y,) = b.layers, b.refs
    if getattr(settings, "metric", "cosine") != "cosine":
        x, y = distances.centred(x, y)
    blocks = whole(x.shape[0], 1, y.shape[0], budget(x.device, y.numel()))
    return row_sums(fn, settings, blocks, (x, *more), (y,), tuple(b.anchors), tuple(b.classes))


def _log1p_sum_exp(f: Tensor, mask: Tensor) -> Tensor:
    """log(1 + sum over mask of exp f)."""
    return F.pad(torch.where(mask, f, -torch.inf), (1, 0)).logsumexp(-1)


def multi_similarity(s, block, rows, shared, fixed_rows, fixed):
    (x,), (y,) = rows, shared
    similarity = x @ y.mT
    with torch.no_grad():
        seen = similarity.detach()
        positive, negative = classes.same(Anchors(*fixed_rows), References(*fixed))
        poisoned = mining.unordered(seen, positive, negative)
        if s.epsilon is None:
            both = positive.any(-1, keepdim=True) & negative.any(-1, keepdim=True)
            positive, negative = positive & both, negative & both
        else:
            highest = torch.where(negative, seen, -torch.inf).amax(-1, keepdim=True)
            lowest = torch.where(positive, seen, torch.inf).amin(-1, keepdim=True)
            positive, negative = positive & (seen - s.epsilon < highest), negative & (seen + s.epsilon > lowest)
    centred = similarity - s.base
    loss = _log1p_sum_exp(-s.alpha * centred, positive) / s.alpha + _log1p_sum_exp(s.beta * centred, negative) / s.beta
    return (loss + distances.nan_where(poisoned, loss.detach()))[:, None], (positive.sum(-1) + negative.sum(-1))[:, None]


def hinges(s, block, rows, shared, fixed_rows, fixed):
    (x, levels), (y,) = rows, shared
    d = distances.tile(x, y, s.metric)
    sides = classes.same(Anchors(*fixed_rows), References(*fixed))
    losses = _relu(d - levels[:, :1], sides[0]), _relu(levels[:, 1:] - d, sides[1])
    counts = torch.stack([*(mask.sum(-1) for mask in sides), *((loss > 0).sum(-1) for loss in losses)], -1)
    return torch.stack([loss.sum(-1) for loss in losses], -1), counts


def _relu(z: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, z.relu(), torch.zeros_like(z))


def _angular(s, block, rows, shared, fixed_rows, fixed):
    """Per positive pair log(1 + sum_n exp(4 tan^2 (x_a + x_p).x_n - 2 (1 + tan^2) x_a.x_p))."""
    (x,), (y,) = rows, shared
    anchors, refs = Anchors(*fixed_rows), References(*fixed)
    column, exists = classes.positives(anchors, refs, block.first, block.last)
    _, negative = classes.same(anchors, refs)
    exists = exists & negative.any(-1, keepdim=True)
    x_p = distances.gather(y, column)  # [R, P, D]
    pair = (x[:, None] * x_p).sum(-1)
    f = 4 * s.tan2 * ((x[:, None] + x_p) @ y.mT) - 2 * (1 + s.tan2) * pair[..., None]
    loss = _log1p_sum_exp(f, negative[:, None, :])
    sums = torch.where(exists, loss, torch.zeros_like(loss)).sum(-1)
    return sums[:, None], exists.sum(-1, keepdim=True)
