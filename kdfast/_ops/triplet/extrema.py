"""Hardest and easiest references of each anchor in one streaming pass; no gradient, ties to the lower index."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import classes, distances
from .blocks import budget
from .classes import Anchors, References

#: name -> (among the positives, the farthest)
KINDS = {
    "hardest_positive": (True, True),
    "easiest_positive": (True, False),
    "hardest_negative": (False, False),
    "easiest_negative": (False, True),
}
#: mining -> kind of positive, whether the negative must be farther than it: one triplet an anchor
PER_ANCHOR = {
    "batch_hard": ("hardest_positive", False),
    "easy_positive": ("easiest_positive", False),
    "easy_semihard": ("easiest_positive", True),
    "hard_semihard": ("hardest_positive", True),
}
#: Rows of a tile; its columns follow from the budget.
TILE_ROWS = 256


class Extreme(NamedTuple):
    value: Tensor  # [N] distance as the tile gave it; +-inf where there is none
    index: Tensor  # [N] -1 where there is none


def first(d: Tensor, mask: Tensor, farthest: bool) -> Extreme:
    """First extreme of d [R, M] among mask. A NaN among them is the extreme, as in torch.min and torch.max."""
    top = torch.finfo(d.dtype).max
    d = d.clamp(-top, top)  # an admitted inf must still beat what is masked
    value, index = torch.where(mask, d, -torch.inf).max(-1) if farthest else torch.where(mask, d, torch.inf).min(-1)
    return Extreme(value, torch.where(mask.any(-1), index, -1))


def _merge(old: Extreme, new: Extreme, farthest: bool) -> Extreme:
    better = (new.value > old.value) if farthest else (new.value < old.value)
    better = better | (new.value.isnan() & ~old.value.isnan())
    return Extreme(torch.where(better, new.value, old.value), torch.where(better, new.index, old.index))


def scan(
    x: Tensor, y: Tensor, anchors: Anchors, refs: References, metric: str, kinds: tuple[str, ...], beyond: Tensor | None = None
) -> tuple[Extreme, ...]:
    """The extremes named in `kinds`; with `beyond` [N] only references strictly farther than it compete."""
    n, m = x.shape[0], y.shape[0]
    if n == 0:
        return (Extreme(x.new_empty(0), anchors.row),) * len(kinds)
    tall = max(1, min(n, TILE_ROWS))
    wide = max(1, budget(x.device) // tall)
    parts = []
    for i in range(0, n, tall):
        rows = Anchors(*(t[i : i + tall] for t in anchors))
        best = None
        for j in range(0, m, wide):
            stop = min(j + wide, m)
            d = distances.tile(x[i : i + tall], y[j:stop], metric)
            masks = classes.same(rows, refs, j, stop)
            if beyond is not None:
                farther = ~(d <= beyond[i : i + tall, None])  # a NaN stays: it must reach the loss
                masks = masks[0] & farther, masks[1] & farther
            new = []
            for kind in kinds:
                positive, farthest = KINDS[kind]
                e = first(d, masks[0] if positive else masks[1], farthest)
                new.append(Extreme(e.value, torch.where(e.index < 0, -1, e.index + j)))
            best = new if best is None else [_merge(a, b, KINDS[k][1]) for a, b, k in zip(best, new, kinds, strict=True)]
        parts.append(best)
    return tuple(Extreme(*(torch.cat(t) for t in zip(*(p[k] for p in parts), strict=True))) for k in range(len(kinds)))
