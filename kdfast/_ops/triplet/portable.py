"""impl="torch": triplet losses and mining in blocks of anchors, on any device, in linear memory, without a host synchronisation."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distances, mining
from .blocks import Block, budget, plan, row_sums, whole
from .classes import Anchors, References
from .mining import Settings


class Problem(NamedTuple):
    layers: tuple[Tensor, ...]  # [N, D_l] each, carry the gradient
    refs: tuple[Tensor, ...]  # [M, D_l] each
    mine: Tensor  # [N, D], detached: what is mined on
    mine_ref: Tensor  # [M, D]
    anchors: Anchors
    classes: References
    positives: int  # a bound on the positives of an anchor
    separate: bool  # mine is another tensor than layers[0]


class Rows(NamedTuple):
    """Per anchor [N]."""

    loss: Tensor  # summed over its triplets
    valid: Tensor  # its triplets
    nonzero: Tensor  # those with a loss > 0


class Mined(NamedTuple):
    positive: Tensor  # [N], [N, P] or [N, P, per_pair]; -1 where not valid
    negative: Tensor
    valid: Tensor


def triplet_rows(s: Settings, p: Problem, seed: Tensor) -> Rows:
    if s.mining in mining.PER_ANCHOR:
        return _per_anchor_rows(s, p)
    n, m = p.mine.shape[0], p.mine_ref.shape[0]
    layers, refs = p.layers, p.refs
    limit = budget(p.mine.device, sum(y.numel() for y in refs))
    if s.mining in mining.PER_PAIR:
        fn, blocks = _sparse, plan(n, p.positives, m, sum(x.shape[1] for x in layers), limit)
    else:
        layers, refs = zip(*(distances.centred(x, y, s.metric) for x, y in zip(layers, refs, strict=True)), strict=True)
        if separates(s, p):
            sums, counts = row_sums(separable, s, whole(n, p.positives, m, limit), layers, refs, tuple(p.anchors), tuple(p.classes))
            return Rows(sums[:, 0], counts[:, 0], counts[:, 1])
        gathered = max(y.shape[1] for y in refs) if s.swap else 0  # a positive's row, to take d_pn from
        fn, blocks = cube, plan(n, p.positives, m, max(m, gathered), limit)
    sums, counts = row_sums(fn, s, blocks, layers, refs, (p.mine, *p.anchors), (p.mine_ref, *p.classes, seed))
    return Rows(sums[:, 0], counts[:, 0], counts[:, 1])


def separates(s: Settings, p: Problem) -> bool:
    """Whether the loss of a set mining is a sum over pairs: each distance times the triplets in which it is active."""
    return not (s.soft or s.swap or p.separate or len(p.layers) > 1)


def _hinge(s: Settings, d_ap: Tensor, d_an: Tensor) -> Tensor:
    z = (d_ap - d_an) * s.sign + s.margin
    return F.softplus(z, threshold=50) if s.soft else z.relu()


def _swapped(s: Settings, d_an: Tensor, d_pn: Tensor) -> Tensor:
    return torch.where(d_pn < d_an, d_pn, d_an)


def _per_anchor_rows(s: Settings, p: Problem) -> Rows:
    """One triplet an anchor: mined without gradient, then O(N D) plain tensor code on exact distances."""
    with torch.no_grad():
        positive, negative, nan = mining.per_anchor(s, p.mine, p.mine_ref, p.anchors, p.classes)
        valid = (positive >= 0) & (negative >= 0)
    loss = sum(chosen(s, x, y, positive.clamp_min(0), negative.clamp_min(0)) for x, y in zip(p.layers, p.refs, strict=True))
    loss = torch.where(valid, loss + distances.nan_where(nan, loss.detach()), torch.zeros_like(loss))
    return Rows(loss, valid.long(), nonzero(s, loss, valid).long())


def chosen(s: Settings, x: Tensor, y: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Hinge of chosen triplets, x [..., D] against rows of y by index [...], from ||x - y|| itself."""
    return hinge_of_rows(s, x, distances.gather(y, positive), distances.gather(y, negative))


def hinge_of_rows(s: Settings, x: Tensor, y_p: Tensor, y_n: Tensor) -> Tensor:
    """Hinge of triplets given as rows, [..., D] each -> [...]."""
    d_an = distances.between(x, y_n, s.metric)
    if s.swap:
        d_an = _swapped(s, d_an, distances.between(y_p, y_n, s.metric))
    return _hinge(s, distances.between(x, y_p, s.metric), d_an)


def _unpack(s: Settings, block: Block, fixed_rows, fixed) -> tuple[Anchors, References, mining.Candidates, Tensor]:
    (mine, *anchors), (mine_ref, *refs, seed) = fixed_rows, fixed
    anchors, refs = Anchors(*anchors), References(*refs)
    d = distances.tile(mine, mine_ref, s.metric)
    return anchors, refs, mining.candidates(s, d, anchors, refs, block.first, block.last), seed


def _sparse(s, block, layers, refs, fixed_rows, fixed):
    """One negative a positive pair: exact distances of the chosen rows, [R, P, D]."""
    with torch.no_grad():
        anchors, _, c, seed = _unpack(s, block, fixed_rows, fixed)
        negative, valid = mining.choose_negative(s, c, anchors, seed)
    loss = sum(chosen(s, x[:, None], y, c.column, negative) for x, y in zip(layers, refs, strict=True))
    return summed(s, loss, valid, c.poisoned, (1,))


def cube(s, block, layers, refs, fixed_rows, fixed):
    """Every triplet of the block, [R, P, M]: where the loss of a triplet does not separate into its distances."""
    with torch.no_grad():
        _, _, c, _ = _unpack(s, block, fixed_rows, fixed)
        mined = c.positive[:, :, None] & c.negative[:, None, :]
        if s.mining == "semi_hard":
            d_ap, d_an = c.d_ap[:, :, None], c.d[:, None, :]
            mined = mined & (d_an > d_ap) & (d_an <= d_ap + s.margin)  # not in place: under vmap distances may be a batch, labels not
    loss = 0
    for x, y in zip(layers, refs, strict=True):
        d = distances.tile(x, y, s.metric)
        d_an = d[:, None, :]
        if s.swap:
            d_an = _swapped(s, d_an, distances.tile(distances.gather(y, c.column), y, s.metric))
        loss = loss + _hinge(s, d.gather(1, c.column)[:, :, None], d_an)
    return summed(s, loss, mined, c.poisoned, (1, 2))


def every_triplet(s, block, layers, refs, fixed_rows, fixed):
    """The same, mined on the embeddings themselves."""
    mine, mine_ref = layers[0].detach(), refs[0].detach()
    return cube(s, block, layers, refs, (mine, *fixed_rows), (mine_ref, *fixed, None))


def nonzero(s: Settings, loss: Tensor, valid: Tensor) -> Tensor:
    """Which losses, 0 where not `valid`, are > 0. Every softplus is, though a float may not hold it."""
    return valid if s.soft else loss > 0


def summed(s: Settings, loss: Tensor, valid: Tensor, poisoned: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    loss = torch.where(valid, loss, torch.zeros_like(loss))
    sums = loss.sum(dims)
    counts = torch.stack([valid.sum(dims), nonzero(s, loss, valid).sum(dims)], -1)
    return (sums + distances.nan_where(poisoned, sums.detach()))[:, None], counts


def separable(s, block, layers, refs, fixed_rows, fixed):
    """Set minings with a plain hinge: sum over active triplets of +-(d_ap - d_an) + margin = sum_p c_p d_ap - sum_n c_n d_an + margin c."""
    (x,), (y,) = layers, refs
    anchors, classes_ = Anchors(*fixed_rows), References(*fixed)
    d = distances.tile(x, y, s.metric)
    with torch.no_grad():
        c = mining.candidates(s, d.detach(), anchors, classes_, block.first, block.last)
        a = mining.active(s, c)
        count = a.positive.sum(-1)
    wide = distances.wide(d)  # the two sums nearly cancel

    def weighted(distance: Tensor, times: Tensor) -> Tensor:
        return (torch.where(times > 0, distance, torch.zeros_like(distance)).to(wide) * times).sum(-1)

    sums = s.sign * (weighted(d.gather(1, c.column), a.positive) - weighted(d, a.negative)) + s.margin * count.to(wide)
    sums = sums.to(d.dtype)
    return (sums + distances.nan_where(c.poisoned, sums.detach()))[:, None], torch.stack([a.mined, count], -1)


@torch.no_grad()
def mine(s: Settings, p: Problem, seed: Tensor, per_pair: int | None) -> Mined:
    """The triplets themselves, at a static shape."""
    if s.mining in mining.PER_ANCHOR:
        positive, negative, _ = mining.per_anchor(s, p.mine, p.mine_ref, p.anchors, p.classes)
        valid = (positive >= 0) & (negative >= 0)
        return Mined(torch.where(valid, positive, -1), torch.where(valid, negative, -1), valid)
    n, m = p.mine.shape[0], p.mine_ref.shape[0]
    parts = []
    for block in whole(n, p.positives, m + p.positives * (per_pair or 1), budget(p.mine.device)):
        cut = tuple(t[block.start : block.stop] for t in (p.mine, *p.anchors))
        anchors, _, c, _ = _unpack(s, block, cut, (p.mine_ref, *p.classes, seed))
        if s.mining in mining.PER_PAIR:
            negative, valid = mining.choose_negative(s, c, anchors, seed)
            positive = c.column
        else:
            negative, valid = mining.draw_negatives(s, c, anchors, seed, per_pair)
            positive, valid = c.column[..., None].expand_as(negative), valid[..., None].expand_as(negative)
        parts.append((torch.where(valid, positive, -1), torch.where(valid, negative, -1), valid))
    return Mined(*(torch.cat(t) for t in zip(*parts, strict=True)))


def finish(rows: Rows, reduction: str) -> Tensor:
    """From losses per anchor to the value returned; nothing counted gives 0 with a graph."""
    if reduction == "none":
        return rows.loss
    total = rows.loss.sum()
    if reduction == "sum":
        return total
    count = (rows.valid if reduction == "mean" else rows.nonzero).sum()
    return total / count.clamp_min(1).to(total.dtype)


def nothing(matrices: tuple[Tensor, ...], reduction: str) -> Tensor:
    """The loss of no anchors: [0], or 0, with a graph to all `matrices`, none of whose rows it reads."""
    rows = sum(x[:0].sum(-1) for x in matrices)
    return rows if reduction == "none" else rows.sum()
