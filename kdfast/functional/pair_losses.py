"""Metric-learning losses over all pairs of a batch or a bank: multi-similarity, margin, contrastive, angular."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import checks
from .._core.dtypes import full_precision
from .._core.reduction import reduce_rows
from .._ops import triplet as op
from .._ops.similarity import KeyIndex, SameLabel, similarity_lse
from .._ops.triplet import classes, dense, distances, inputs, pairs

_REDUCTIONS = ("mean_nonzero", "mean", "sum", "none")


def multi_similarity_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ref_valid: int | Tensor | None = None,
    own_index: bool | Tensor | None = None,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float | None = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """log(1 + sum_p exp(-alpha (s_ap - base))) / alpha + log(1 + sum_n exp(beta (s_an - base))) / beta, s = x_a . y.

    Pairs are mined first: positives with s_ap - epsilon < max s_an, negatives with s_an + epsilon > min s_ap (epsilon None: all). An
    anchor without a positive or a negative has loss 0.

    Args:
        embeddings [N, D], labels [N], ref, ref_labels, ref_valid, own_index: as in `triplet_loss`.
        alpha, beta: > 0. base, epsilon: in units of the similarity.
        normalize: unit rows first (s is the cosine). Default True.
        reduction: "mean" over all N anchors, "sum", "none" [N].

    Returns: 0-d or [N]; float32, float64 for float64. Raises: ValueError, TypeError, IndexError naming the argument.
    Source: Wang et al. 2019, eq. 11-15; defaults as in pytorch-metric-learning.
    """
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    for name, value in (("alpha", alpha), ("beta", beta)):
        checks.finite_number(name, value)
        checks.positive_number(name, value)
    checks.finite_number("base", base)
    if epsilon is not None:
        checks.finite_number("epsilon", epsilon)
        checks.nonnegative_number("epsilon", epsilon)
    b, impl = _collect("multi_similarity_loss", impl, embeddings, labels, ref, ref_labels, ref_valid, own_index, "euclidean", normalize)
    with full_precision(b.layers[0]):
        if _empty(b):
            return op.portable.nothing((*b.layers, *b.refs), reduction)
        settings = pairs.MultiSimilarity(alpha, beta, base, epsilon)
        rows = pairs.multi_similarity_rows(b, settings) if impl == "torch" else dense.multi_similarity_rows(impl, b, settings)
        return reduce_rows(rows, reduction=reduction)


def margin_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ref_valid: int | Tensor | None = None,
    own_index: bool | Tensor | None = None,
    margin: float = 0.2,
    beta: float | Tensor = 1.2,
    metric: str = "euclidean",
    normalize: bool = True,
    reduction: str = "mean_nonzero",
    impl: str | None = None,
) -> Tensor:
    """relu(d_ap - beta + margin) + relu(beta - d_an + margin), summed over all triplets in O(N M D): the two hinges separate.

    Args:
        embeddings [N, D], labels [N], ref, ref_labels, ref_valid, own_index, metric, normalize: as in `triplet_loss`.
        beta: the boundary: float, 0-d tensor or [num_classes], taken at the anchor's label; tensors may need gradient.
        reduction: "mean_nonzero": over hinges > 0, counted over triplets; "mean": over triplets; "sum"; "none": sums per anchor [N].

    Returns: 0-d or [N]; float32, float64 for float64. Raises: ValueError, TypeError, IndexError naming the argument.
    Source: Wu et al. 2017, eq. 8, without its regulariser of beta; defaults as in pytorch-metric-learning.
    """
    checks.choice("reduction", reduction, _REDUCTIONS)
    checks.finite_number("margin", margin)
    checks.nonnegative_number("margin", margin)
    b, impl = _collect("margin_loss", impl, embeddings, labels, ref, ref_labels, ref_valid, own_index, metric, normalize)
    x = b.layers[0]
    with full_precision(x):
        if isinstance(beta, Tensor):
            checks.floating("beta", beta)
            checks.alike("beta", beta, "embeddings", x, dtype=False)
            if beta.dim() > 1 or beta.numel() == 0:
                raise ValueError(f"beta must be a float, a 0-d tensor or [num_classes], got shape {tuple(beta.shape)}")
            beta = beta.to(x.dtype)
            if beta.dim() == 1:
                checks.index_range("labels", b.anchors.label, beta.shape[0])
                beta = distances.gather(beta[:, None], b.anchors.label)[:, 0]
        else:
            checks.finite_number("beta", beta)
            checks.in_range("beta", beta, x.dtype)
            beta = torch.full((), beta, dtype=x.dtype, device=x.device)
        if _empty(b):
            return op.portable.nothing((x, *b.refs, beta.expand(0)[:, None]), reduction)
        levels = torch.stack([beta - margin, beta + margin], -1).expand(x.shape[0], 2)
        (pull, push), (positives, negatives, pulled, pushed) = _pair_hinges(impl, b, metric, levels)
        rows = op.portable.Rows(negatives * pull + positives * push, positives * negatives, negatives * pulled + positives * pushed)
        return op.portable.finish(rows, reduction)


def contrastive_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ref_valid: int | Tensor | None = None,
    own_index: bool | Tensor | None = None,
    pos_margin: float = 0.0,
    neg_margin: float = 1.0,
    metric: str = "euclidean",
    normalize: bool = True,
    reduction: str = "mean_nonzero",
    impl: str | None = None,
) -> Tensor:
    """relu(d_ap - pos_margin) over positive pairs + relu(neg_margin - d_an) over negative pairs, each averaged apart.

    Args:
        embeddings [N, D], labels [N], ref, ref_labels, ref_valid, own_index, metric, normalize: as in `triplet_loss`. An anchor needs
            only one kind of pair to count.
        pos_margin, neg_margin: in units of the metric.
        reduction: "mean_nonzero": each kind over its losses > 0; "mean": over its pairs; "sum"; "none": sums per anchor [N].

    Returns: 0-d or [N]; float32, float64 for float64. Raises: ValueError, TypeError, IndexError naming the argument.
    Source: Hadsell et al. 2006, with hinges that are not squared and defaults as in pytorch-metric-learning.
    """
    checks.choice("reduction", reduction, _REDUCTIONS)
    for name, value in (("pos_margin", pos_margin), ("neg_margin", neg_margin)):
        checks.finite_number(name, value)
    b, impl = _collect("contrastive_loss", impl, embeddings, labels, ref, ref_labels, ref_valid, own_index, metric, normalize)
    with full_precision(b.layers[0]):
        if _empty(b):
            return op.portable.nothing((*b.layers, *b.refs), reduction)
        levels = b.layers[0].new_tensor([pos_margin, neg_margin]).expand(b.layers[0].shape[0], 2)
        sums, counts = _pair_hinges(impl, b, metric, levels)
        return sum(op.portable.finish(op.portable.Rows(*kind), reduction) for kind in zip(sums, counts[:2], counts[2:], strict=True))


def angular_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ref_valid: int | Tensor | None = None,
    own_index: bool | Tensor | None = None,
    alpha: float = 40.0,
    normalize: bool = True,
    max_positives: int | None = None,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Per positive pair log(1 + sum_n exp(4 tan^2(alpha) (x_a + x_p).x_n - 2 (1 + tan^2(alpha)) x_a.x_p)).

    Args:
        embeddings [N, D], labels [N], ref, ref_labels, ref_valid, own_index, max_positives: as in `triplet_loss`.
        alpha: in degrees, in (0, 90).
        normalize: unit rows first, negatives included (pytorch-metric-learning leaves those as they are). Default True.
        reduction: "mean" over positive pairs whose anchor has a negative, "sum", "none": sums per anchor [N].

    Returns: 0-d or [N]; float32, float64 for float64. O(N P M D) time for P positives an anchor.
    Raises: ValueError, TypeError, IndexError naming the argument. Source: Wang et al. 2017, eq. 8.
    """
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    checks.finite_number("alpha", alpha)
    if not 0 < alpha < 90:
        raise ValueError(f"alpha must be an angle in (0, 90) degrees, got {alpha}")
    if max_positives is not None:
        checks.count("max_positives", max_positives)
    b = _arranged(embeddings, labels, ref, ref_labels, ref_valid, own_index, "euclidean", normalize)
    size = b.refs[0].shape[0]
    positives = min(max_positives, size) if max_positives else classes.largest(b.anchors, size)
    impl = op.choose("angular_loss", impl, b.layers[0], width=b.layers[0].shape[1], gathered=b.layers[0].numel() * positives)
    with full_precision(b.layers[0]):
        if _empty(b):
            return op.portable.nothing((*b.layers, *b.refs), reduction)
        if impl == "torch":
            loss, valid = pairs.angular_rows(b, alpha, positives)
        else:
            loss, valid = _angular_queries(b, alpha, positives, "cpu" if impl == "cpu" else None)
        return op.portable.finish(op.portable.Rows(loss, valid, valid), reduction)


def _angular_queries(b: inputs.Batch, alpha: float, positives: int, impl: str | None) -> tuple[Tensor, Tensor]:
    """As pairs.angular_rows: each x_a + x_p is a query of the streaming softmax over the negatives, in the softmax's `impl`."""
    (x,), (y,) = b.layers, b.refs
    column, exists = classes.positives(b.anchors, b.classes, 0, positives)  # [N, P]
    x_p = distances.gather(y, column)  # [N, P, D]
    tan2 = math.tan(math.radians(alpha)) ** 2
    label, own = (t[:, None].expand(column.shape).flatten() for t in (b.anchors.label, b.anchors.own))
    lse, _ = similarity_lse(
        (x[:, None] + x_p).flatten(0, 1),
        y,
        scale=4 * tan2,
        bias=torch.zeros_like(y[:, 0]).masked_fill(~b.classes.exists, -torch.inf),
        exclude=(SameLabel(label, b.classes.label), KeyIndex(own)),
        impl=impl,
    )
    lse = lse.view(column.shape)
    exists = exists & (lse > -torch.inf).logical_or(lse.isnan())
    loss = F.softplus(lse - 2 * (1 + tan2) * (x[:, None] * x_p).sum(-1), threshold=50)
    return torch.where(exists, loss, torch.zeros_like(loss)).sum(-1), exists.sum(-1)


def _collect(name, impl, *arguments) -> tuple[inputs.Batch, str]:
    """Arguments checked and arranged, and the implementation that serves them."""
    batch = _arranged(*arguments)
    return batch, op.choose(name, impl, batch.layers[0], width=batch.layers[0].shape[1])


def _arranged(embeddings, labels, ref, ref_labels, ref_valid, own_index, metric, normalize) -> inputs.Batch:
    checks.rows("embeddings", embeddings, ndim=2)
    return inputs.collect(
        embeddings,
        labels,
        ref=ref,
        ref_labels=ref_labels,
        ref_valid=ref_valid,
        own_index=own_index,
        metric=metric,
        normalize=normalize,
    )


def _pair_hinges(impl: str, b: inputs.Batch, metric: str, levels: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Columns of pairs.pair_hinges."""
    settings = pairs.Hinges(metric)
    sums, counts = pairs.pair_hinges(b, settings, levels) if impl == "torch" else dense.pair_hinges(impl, b, settings, levels)
    return sums.unbind(-1), counts.unbind(-1)


def _empty(b: inputs.Batch) -> bool:
    return b.layers[0].shape[0] == 0
