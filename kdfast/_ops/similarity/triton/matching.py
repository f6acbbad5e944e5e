"""impl="triton" of losses in which every row has one match: CLIP's and NT-Xent's, with the schemas of kdfast::matching_loss.

The pairs that are not matches are a pass over all pairs (pairs.py); what matches is O(N D). Of two views scores and weights are
symmetric matrices, of which half is made: 4 to 5 N^2 D floating-point operations forward and backward, CLIP's 8.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...._core import triton_runtime as runtime
from ..positives import dot
from . import pairs as triton_pairs
from .formats import missing, refuses

__all__ = ["missing", "refuses"]

_LARGEST = 40  # beyond it log(1 + e^x) is x


def matching_loss(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    labels: Tensor | None,
    mean: bool,
    keep_x: bool,
    keep_y: bool,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [N] of x, y [N, D] or, without y, of the two views in x; or their mean. Then statistics [3, sides, N], and no gradients.

    Statistics of a side: lse over the pairs that are not left out, its low digits, and dloss / dlse. shift is None; labels as in Call.
    """
    of_rows, pairs = scale.expand(1, len(x)).contiguous(), _pairs(x, y, labels)
    if y is None:
        lse, low = triton_pairs.row_lse(x[None], of_rows, pairs, precision)
    else:
        row_lse, column_lse, row_low, column_low = triton_pairs.symmetric_lse(x[None], y[None], of_rows, pairs, pairs, precision)
        lse, low = torch.cat((row_lse, column_lse)), torch.cat((row_low, column_low))
    behind = (lse - scale * dot(x, _matches(x, y))) + low  # [sides, N]
    losses = F.softplus(behind, threshold=_LARGEST).mean(0)
    nothing = scale.new_empty(0)
    return losses.mean() if mean else losses, torch.stack((lse, low, behind.sigmoid())), nothing, nothing.clone()


def matching_loss_grad(
    g: Tensor,
    statistics: Tensor,
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    labels: Tensor | None,
    want_x: bool,
    want_y: bool,
    want_scale: bool,
    want_shift: bool,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients in x, y, scale and shift, [0] where not wanted; g is [N], or [] of the mean."""
    lse, low, share = statistics
    slopes = (g / len(x) if g.dim() == 0 else g) * share / len(share)  # [sides, N]
    of_rows, pairs = scale.expand(1, len(x)).contiguous(), _pairs(x, y, labels)
    sides = [tuple(t[None].contiguous() for t in side) for side in zip(slopes, lse, low, strict=True)]
    dx, dy, _, moment = triton_pairs.pair_gradients(
        x[None], (x if y is None else y)[None], of_rows, pairs, pairs, None, None, sides[0], sides[-1], want_x, want_y, precision,
        half=y is None,
    )  # fmt: skip
    matches = _matches(x, y)
    # of a match i: -dL / dz_i, which two views have in common
    pulled = slopes[0] + (slopes[0].roll(len(x) // 2) if y is None else slopes[1])
    found = []
    for want, total, others, like in ((want_x, dx, matches, x), (want_y, dy, x, y)):
        of_rows = total[0].addcmul_((scale * pulled)[:, None], others.float(), value=-1).to(like.dtype) if want else scale.new_empty(0)
        found.append(of_rows)
    of_matches = (pulled * dot(x, matches)).sum()
    of_scale = (moment.sum() - of_matches) / (2 if y is None else 1)  # a pair of two views is counted from either
    return *found, of_scale if want_scale else scale.new_empty(0), scale.new_empty(0)


def _pairs(x: Tensor, y: Tensor | None, labels: Tensor | None) -> Tensor:
    """Labels [1, N] of 32 bits, equal for pairs that are left out: a sample's own, or those of classes."""
    if labels is not None:
        return triton_pairs.classes_of(labels)[None]
    own = torch.arange(len(x), dtype=torch.int32, device=x.device)
    return (own % (len(x) // 2) if y is None else own)[None]


def _matches(x: Tensor, y: Tensor | None) -> Tensor:
    return x.roll(len(x) // 2, 0) if y is None else y


def _loss_fake(x, y, scale, shift, labels, mean, *_):
    nothing = scale.new_empty(0)
    statistics = scale.new_empty((3, 1 if y is None else 2, len(x)))
    return scale.new_empty(() if mean else x.shape[:1]), statistics, nothing, nothing.clone()


def _grad_fake(g, statistics, x, y, scale, shift, labels, *want_and_precision):
    want = want_and_precision[:4]
    return tuple([torch.empty_like(t) if wanted else scale.new_empty(0) for t, wanted in zip((x, y, scale, shift), want, strict=True)])


runtime.register("matching_loss", matching_loss, _loss_fake)
runtime.register("matching_loss_grad", matching_loss_grad, _grad_fake)
