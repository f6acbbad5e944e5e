"""Which triplets a mining takes, for a block of anchors whose distances d [R, M] are at hand. No gradient flows here."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..._core import random
from . import classes, distances, extrema, sampling, triton
from .classes import Anchors, References
from .extrema import PER_ANCHOR

#: one negative a positive pair
PER_PAIR = ("semi_hard_facenet", "distance_weighted", "focal")
#: every triplet that satisfies an inequality
SETS = ("batch_all", "semi_hard", "multi_similarity")
MININGS = (*PER_ANCHOR, *SETS, *PER_PAIR)


class Settings(NamedTuple):
    mining: str
    metric: str
    normalize: bool = True
    margin: float = 0.2
    soft: bool = False
    swap: bool = False
    sign: int = 1  # -1: direction "confuse"
    fallback: str = "uniform"
    width: int = 0  # of the rows mined on
    epsilon: float = 0.1
    impl: str = "torch"


class Candidates(NamedTuple):
    """Positives and negatives of a block of anchors, and the distances they are mined by."""

    d: Tensor  # [R, M]
    d_ap: Tensor  # [R, P]
    column: Tensor  # [R, P] the positives
    positive: Tensor  # [R, P] which of them exist
    negative: Tensor  # [R, M]
    poisoned: Tensor  # [R] has triplets, and a distance among them is NaN


def per_anchor(s: Settings, x: Tensor, y: Tensor, anchors: Anchors, refs: References) -> tuple[Tensor, Tensor, Tensor]:
    """positive, negative [N] (-1: none) and whether a distance compared was NaN [N], streaming over the references."""
    kind, beyond = PER_ANCHOR[s.mining]
    scan = triton.scan if s.impl == "triton" else extrema.scan
    if beyond:
        (p,) = scan(x, y, anchors, refs, s.metric, (kind,))
        (n,) = scan(x, y, anchors, refs, s.metric, ("hardest_negative",), beyond=p.value)
    else:
        p, n = scan(x, y, anchors, refs, s.metric, (kind, "hardest_negative"))
    return p.index, n.index, p.value.isnan() | n.value.isnan()


def candidates(s: Settings, d: Tensor, anchors: Anchors, refs: References, first: int, last: int) -> Candidates:
    """Of distances d [R, M]: positives number first ... last - 1, filtered for multi_similarity, which looks at all of them."""
    column, exists = classes.positives(anchors, refs, first, last)
    positive, negative = classes.same(anchors, refs)
    poisoned = unordered(d, positive, negative)
    d_ap = d.gather(1, column)
    if s.mining == "multi_similarity":
        nearest = torch.where(negative, d, torch.inf).amin(-1, keepdim=True)
        farthest = torch.where(positive, d, -torch.inf).amax(-1, keepdim=True)
        exists, negative = exists & (d_ap + s.epsilon > nearest), negative & (d - s.epsilon < farthest)
    return Candidates(d, d_ap, column, exists, negative, poisoned)


def unordered(d: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Anchors that have both kinds of references and a NaN among their distances."""
    return (d.isnan() & (positive | negative)).any(-1) & positive.any(-1) & negative.any(-1)


def choose_negative(s: Settings, c: Candidates, anchors: Anchors, seed: Tensor) -> tuple[Tensor, Tensor]:
    """PER_PAIR minings: the negative of each positive pair and whether there is one -> [R, P] each."""
    if s.mining == "semi_hard_facenet":
        ordered, order, count = _sorted_negatives(c)
        rank = torch.searchsorted(ordered, c.d_ap.contiguous(), right=True)  # the first with d_an > d_ap
        farthest = extrema.first(c.d, c.negative, farthest=True).index[:, None]
        index = torch.where(rank < count, order.gather(1, rank.clamp_max(order.shape[1] - 1)), farthest.clamp_min(0))
        return index, c.positive & (count > 0)
    w = sampling.weights(distances.euclidean(c.d, s.metric), c.negative, s.mining, s.width, s.fallback)
    u = random.uniform(seed, anchors.row[:, None], c.column, w.dtype)
    return sampling.draw(w, u), c.positive & (w > 0).any(-1, keepdim=True)


def draw_negatives(s: Settings, c: Candidates, anchors: Anchors, seed: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """SETS minings: `draws` negatives of each positive pair, uniform among the qualifying -> [R, P, draws] and [R, P].

    In the order of the distances the qualifying negatives are a run, so a draw is a rank.
    """
    ordered, order, count = _sorted_negatives(c)
    low, high = torch.zeros_like(c.column), count.expand_as(c.column)
    if s.mining == "semi_hard":
        low = torch.searchsorted(ordered, c.d_ap.contiguous(), right=True)
        high = torch.minimum(torch.searchsorted(ordered, c.d_ap + s.margin, right=True), high)
    slot = c.column[..., None] * draws + torch.arange(draws, device=c.d.device)
    u = random.uniform(seed, anchors.row[:, None, None], slot, distances.wide(c.d))
    size = (high - low)[..., None]
    rank = low[..., None] + torch.minimum((u * size).long(), size - 1)
    index = order.gather(1, rank.clamp(0, order.shape[1] - 1).flatten(1)).view(slot.shape)
    return index, c.positive & (high > low)


def _sorted_negatives(c: Candidates) -> tuple[Tensor, Tensor, Tensor]:
    """Distances of the negatives ascending (ties by index, the others last), their columns, and how many there are [R, 1]."""
    top = torch.finfo(c.d.dtype).max  # a negative at infinity still sorts before what is no negative
    ordered, order = torch.where(c.negative, c.d.clamp_max(top), torch.inf).sort(dim=-1, stable=True)
    return ordered, order, c.negative.sum(-1, keepdim=True)


class Active(NamedTuple):
    """Triplets of a set mining whose hinge is positive, counted by positive and by negative."""

    positive: Tensor  # [R, P] int64
    negative: Tensor  # [R, M] int64
    mined: Tensor  # [R] int64, triplets taken, active or not


def active(s: Settings, c: Candidates) -> Active:
    """SETS minings with a plain hinge: it is active on an interval of d_an around each threshold d_ap + margin."""
    positives, negatives = c.positive.sum(-1, keepdim=True), c.negative.sum(-1, keepdim=True)
    if s.mining == "semi_hard":  # d_ap < d_an <= d_ap + margin; the hinge is 0 at the upper end unless it is flipped
        low, closed = _crossings(c, 0.0, strict=False), _crossings(c, s.margin, strict=False)
        high = _crossings(c, s.margin, strict=True) if s.sign > 0 else closed
        return Active(high[0] - low[0], high[1] - low[1], (closed[0] - low[0]).sum(-1))
    mined = (positives * negatives).squeeze(-1)
    if s.sign > 0:  # d_an < d_ap + margin
        return Active(*_crossings(c, s.margin, strict=True), mined)
    low = _crossings(c, -s.margin, strict=False)  # d_an > d_ap - margin
    return Active(
        torch.where(c.positive, negatives - low[0], 0),
        torch.where(c.negative, positives - low[1], 0),
        mined,
    )


def _crossings(c: Candidates, offset: float, strict: bool) -> tuple[Tensor, Tensor]:
    """With thresholds t = d_ap + offset: the negatives below each t [R, P], the t above each negative [R, M].

    strict: d_an < t, else d_an <= t. Each negative is binned among the sorted thresholds; running sums of the bins
    count the negatives below each of them. O(M log P) an anchor, and no sort of the negatives.
    """
    t = torch.where(c.positive, c.d_ap + offset, -torch.inf)
    ordered, order = t.sort(dim=-1)
    size = t.shape[1]
    bin_ = torch.searchsorted(ordered, c.d.contiguous(), right=strict)  # how many t are not above the negative
    bins = torch.zeros(t.shape[0], size + 1, dtype=torch.int64, device=t.device).scatter_add(1, bin_, c.negative.long())
    below = torch.zeros_like(order).scatter(1, order, bins.cumsum(-1)[:, :size])
    return torch.where(c.positive, below, 0), torch.where(c.negative, size - bin_, 0)
