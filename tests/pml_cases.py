"""pytorch-metric-learning's losses, written out pair by pair, and what the tests of kdfast.compat.pml share."""

import itertools

import torch

from kdfast.compat.pml import MarginLoss, MultiSimilarityLoss, NTXentLoss, SupConLoss, TripletMarginLoss


def batch(n=20, d=6, classes=5, dtype=torch.float64):
    x = torch.randn(n, d, dtype=dtype, requires_grad=True)
    return x, torch.randint(0, classes, (n,))


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def pairs_of(labels, ref_labels=None, own=True):
    """(positive pairs, negative pairs) of every anchor, as lists of (a, b)."""
    columns = (labels if ref_labels is None else ref_labels).tolist()
    positive, negative = [], []
    for a, b in itertools.product(range(len(labels)), range(len(columns))):
        if ref_labels is None and own and a == b:
            continue
        (positive if labels[a] == columns[b] else negative).append((a, b))
    return positive, negative


def as_tuple(positive, negative):
    return tuple(torch.tensor([pair[side] for pair in pairs], dtype=torch.int64) for pairs in (positive, negative) for side in (0, 1))


def triplets_of(positive, negative):
    return [(a, p, n) for a, p in positive for b, n in negative if a == b]


# -- the definitions -------------------------------------------------------------------------------------------------------------


def mean_of(values, like):
    values = list(values)
    return torch.stack(values).mean() if values else 0 * like.sum()


def plain_triplet(x, y, positive, negative, margin=0.05, swap=False, smooth=False):
    x, y, losses = unit(x), unit(y), []
    for a, p, n in triplets_of(positive, negative):
        d_ap, d_an = (x[a] - y[p]).norm(), (x[a] - y[n]).norm()
        if swap:
            d_an = min(d_an, (y[p] - y[n]).norm())
        z = d_ap - d_an + margin
        losses.append(z.exp().log1p() if smooth else z.clamp(min=0))
    return mean_of((v for v in losses if v > 0), x)


def plain_margin(x, y, positive, negative, margin=0.2, beta=1.2):
    x, y, hinges = unit(x), unit(y), []
    for a, p, n in triplets_of(positive, negative):
        b = beta[a] if isinstance(beta, list) else beta
        hinges += [((x[a] - y[p]).norm() - b + margin).clamp(min=0), (b - (x[a] - y[n]).norm() + margin).clamp(min=0)]
    return mean_of((v for v in hinges if v > 0), x)


def plain_nt_xent(x, y, positive, negative, temperature=0.07):
    x, y, losses = unit(x), unit(y), []
    for a, p in positive:
        scores = [x[a] @ y[p]] + [x[a] @ y[n] for b, n in negative if a == b]
        losses.append(torch.logsumexp(torch.stack(scores) / temperature, 0) - scores[0] / temperature)
    return mean_of(losses, x)


def plain_sup_con(x, y, positive, negative, temperature=0.1):
    x, y, losses = unit(x), unit(y), []
    for a in range(len(x)):
        mine = [x[a] @ y[p] / temperature for b, p in positive if a == b]
        others = [x[a] @ y[n] / temperature for b, n in negative if a == b]
        if mine:
            losses.append(torch.logsumexp(torch.stack(mine + others), 0) - torch.stack(mine).mean())
    return mean_of((v for v in losses if v > 0), x)


def plain_multi_similarity(x, y, positive, negative, alpha=2.0, beta=50.0, base=0.5):
    x, y, losses = unit(x), unit(y), []
    for a in range(len(x)):
        up = sum((-alpha * (x[a] @ y[p] - base)).exp() for b, p in positive if a == b)
        down = sum((beta * (x[a] @ y[n] - base)).exp() for b, n in negative if a == b)
        losses.append((torch.as_tensor(up + 0 * x.sum()).log1p()) / alpha + torch.as_tensor(down + 0 * x.sum()).log1p() / beta)
    return mean_of(losses, x)


LOSSES = {
    "triplet": (TripletMarginLoss(), plain_triplet),
    "triplet, swap": (TripletMarginLoss(0.3, swap=True), lambda *a: plain_triplet(*a, margin=0.3, swap=True)),
    "triplet, smooth": (TripletMarginLoss(0.1, smooth_loss=True), lambda *a: plain_triplet(*a, margin=0.1, smooth=True)),
    "margin": (MarginLoss(beta=1.25), lambda *a: plain_margin(*a, beta=1.25)),
    "nt_xent": (NTXentLoss(), plain_nt_xent),
    "sup_con": (SupConLoss(), plain_sup_con),
    "multi_similarity": (MultiSimilarityLoss(), plain_multi_similarity),
}


def agree(got, want, *inputs, atol=1e-9):
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-9, atol=atol)
    for x in inputs:
        grads = [torch.autograd.grad(v, x, retain_graph=True)[0] for v in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-7, atol=atol)
