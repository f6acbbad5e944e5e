"""The definition of every mining and loss of this family, in float64: it builds N x M and N x M x M and is the oracle.

A mining is a function (d [N, M], positive [N, M], negative [N, M], ...) -> [N, M, M], true at the triplets
(anchor, positive, negative) it takes. d is the metric's distance; positive and negative exclude the own row.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

INF = math.inf


def root(sq: Tensor) -> Tensor:
    """sqrt with derivative 0 at 0."""
    zero = sq == 0
    return torch.where(zero, torch.zeros_like(sq), torch.where(zero, torch.ones_like(sq), sq).sqrt())


def distances(x: Tensor, y: Tensor, metric: str = "euclidean", normalize: bool = True) -> Tensor:
    x, y = x.double(), y.double()
    if normalize or metric == "cosine":
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    if metric == "cosine":
        return 1 - x @ y.mT
    sq = (x[:, None] - y[None]).square().sum(-1)
    return sq if metric == "sqeuclidean" else root(sq)


def sides(labels: Tensor, ref_labels: Tensor, own: Tensor | None, valid: int | None = None) -> tuple[Tensor, Tensor]:
    """positive, negative [N, M] bool. `own` [N]: each row's own column, or -1."""
    column = torch.arange(ref_labels.numel())
    admitted = torch.ones(labels.numel(), column.numel(), dtype=torch.bool)
    if own is not None:
        admitted &= column != own[:, None]
    if valid is not None:
        admitted &= column < valid
    same = labels[:, None] == ref_labels
    return same & admitted, ~same & admitted


def pick(d: Tensor, mask: Tensor, *, farthest: bool) -> Tensor:
    """True at the first extreme of d among mask along the last axis; all False where mask is."""
    key = torch.where(mask, -d if farthest else d, INF)
    return F.one_hot(key.argmin(-1), d.shape[-1]).bool() & mask


def every(positive: Tensor, negative: Tensor) -> Tensor:
    return positive[:, :, None] & negative[:, None, :]


def batch_hard(d, positive, negative):
    return every(pick(d, positive, farthest=True), pick(d, negative, farthest=False))


def easy_positive(d, positive, negative):
    return every(pick(d, positive, farthest=False), pick(d, negative, farthest=False))


def beyond(d, chosen, negative):
    """The chosen positive [N, M] (one a row) and the nearest negative strictly farther than it."""
    d_ap = torch.where(chosen, d, -INF).amax(-1, keepdim=True)
    return every(chosen, pick(d, negative & (d > d_ap), farthest=False))


def easy_semihard(d, positive, negative):
    return beyond(d, pick(d, positive, farthest=False), negative)


def hard_semihard(d, positive, negative):
    return beyond(d, pick(d, positive, farthest=True), negative)


def batch_all(d, positive, negative):
    return every(positive, negative)


def semi_hard(d, positive, negative, margin):
    gap = d[:, None, :] - d[:, :, None]
    return every(positive, negative) & (gap > 0) & (gap <= margin)


def semi_hard_facenet(d, positive, negative):
    farther = every(positive, negative) & (d[:, None, :] > d[:, :, None])
    nearest = pick(d[:, None, :].expand_as(farther), farther, farthest=False)
    return torch.where(farther.any(-1, keepdim=True), nearest, every(positive, pick(d, negative, farthest=True)))


def multi_similarity(d, positive, negative, epsilon=0.1):
    nearest_negative = torch.where(negative, d, INF).amin(-1, keepdim=True)
    farthest_positive = torch.where(positive, d, -INF).amax(-1, keepdim=True)
    return every(positive & (d + epsilon > nearest_negative), negative & (d - epsilon < farthest_positive))


def negative_weights(d: Tensor, negative: Tensor, mining: str, width: int, fallback: str) -> Tensor:
    """Probabilities [N, M] of the negatives; d is the Euclidean distance of unit rows of `width`. A row of zeros draws nothing."""
    clamped = d.clamp_min(0.5) if mining == "distance_weighted" else d
    eligible = negative & (d < 1.4 if mining == "distance_weighted" else (d > 0.5) & (d < 1.0))
    log_w = (2 - width) * clamped.log() - (width - 3) / 2 * (1 - clamped.square() / 4).log()
    log_w = torch.where(eligible, log_w, -INF)
    w = torch.where(eligible, (log_w - log_w.amax(-1, keepdim=True)).exp(), 0)
    if fallback == "uniform":
        w = torch.where(eligible.any(-1, keepdim=True), w, negative.to(w.dtype))
    return w / w.sum(-1, keepdim=True).clamp_min(1e-300)


def sampled(weights: Tensor, positive: Tensor, uniform: Tensor) -> Tensor:
    """One negative for each (a, p), by inversion: the first n whose cumulative weight exceeds uniform [N, M]."""
    cumulative = weights.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp_max(weights.shape[1] - 1)
    return (positive & weights.gt(0).any(-1, keepdim=True))[:, :, None] & F.one_hot(drawn, weights.shape[1]).bool()


def triplet_loss(layers, mined, *, margin, soft=False, swap=False, direction="cluster", reduction="mean_nonzero"):
    """layers: a list of (d [N, M], d_ref [M, M] or None); mined [N, M, M] bool."""
    total = 0
    for d, d_ref in layers:
        d_an = d[:, None, :].expand(mined.shape)
        if swap:
            d_an = torch.where(d_ref < d_an, d_ref, d_an)
        z = (d[:, :, None] - d_an) * (1 if direction == "cluster" else -1) + margin
        total = total + (torch.logaddexp(z, torch.zeros_like(z)) if soft else z.relu())
    total = torch.where(mined, total, 0)
    if reduction == "none":
        return total.sum((1, 2))
    nonzero = mined if soft else total > 0  # every softplus is, even where float64 does not hold it
    count = {"sum": torch.ones(()), "mean": mined.sum(), "mean_nonzero": nonzero.sum()}[reduction]
    return total.sum() / count.clamp_min(1)


def multi_similarity_loss(s, positive, negative, *, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1):
    """Per anchor [N], from similarities s [N, M]; epsilon None keeps every pair of an anchor that has both kinds."""
    if epsilon is None:
        both = positive.any(-1, keepdim=True) & negative.any(-1, keepdim=True)
        positive, negative = positive & both, negative & both
    else:
        kept = multi_similarity(1 - s, positive, negative, epsilon)
        positive, negative = kept.any(2), kept.any(1)
    return (
        torch.where(positive, (-alpha * (s - base)).exp(), 0).sum(-1).log1p() / alpha
        + torch.where(negative, (beta * (s - base)).exp(), 0).sum(-1).log1p() / beta
    )


def margin_loss(d, positive, negative, beta, *, margin=0.2):
    """Per triplet [N, M, M] (0 elsewhere), the two hinges apart; beta [N]."""
    beta = beta[:, None]
    mined = every(positive, negative)
    pull, push = (d - beta + margin).relu(), (beta - d + margin).relu()
    return torch.where(mined, pull[:, :, None], 0), torch.where(mined, push[:, None, :], 0)


def contrastive_loss(d, positive, negative, *, pos_margin=0.0, neg_margin=1.0):
    """Per pair [N, M], of the positives and of the negatives."""
    return torch.where(positive, (d - pos_margin).relu(), 0), torch.where(negative, (neg_margin - d).relu(), 0)


def angular_loss(s, s_ref, positive, negative, *, alpha=40.0):
    """Per positive pair [N, M] (0 elsewhere); s [N, M] and s_ref [M, M] are similarities, alpha is in degrees."""
    tan2 = math.tan(math.radians(alpha)) ** 2
    f = 4 * tan2 * (s[:, None, :] + s_ref[None]) - 2 * (1 + tan2) * s[:, :, None]
    mined = every(positive, negative)
    return torch.where(mined, f.exp(), 0).sum(-1).log1p()


def mmd_rbf(x, y, sigmas):
    x, y = x.double(), y.double()

    def kernel(a, b):
        sq = (a[:, None] - b[None]).square().sum(-1)
        return sum((-sq / (2 * sigma**2)).exp().mean() for sigma in sigmas)

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def rkd_distance(student, teacher):
    def relative(x):
        d = distances(x, x, normalize=False)
        return d / d[d > 0].mean()

    return F.smooth_l1_loss(relative(student), relative(teacher))


def rkd_angle(student, teacher):
    def angles(x):
        direction = x.double()[None] - x.double()[:, None]  # [i, j, D]
        norm = root(direction.square().sum(-1, keepdim=True))
        direction = torch.where(norm > 0, direction / torch.where(norm > 0, norm, 1), 0)
        return direction @ direction.mT  # [i, j, k]

    return F.smooth_l1_loss(angles(student), angles(teacher))
