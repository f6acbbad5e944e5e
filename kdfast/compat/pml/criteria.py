"""The losses, with the library's constructors and defaults. Everything is computed in float32 (float64), autocast or not."""

import torch
from torch import Tensor, nn

from ... import functional
from ..._core import checks, dtypes
from ..._core.dtypes import full_precision
from ..._ops.similarity import SameLabel, similarity_lse
from ..._ops.triplet import distances
from .arguments import Reference, checked_labels, checked_tuple, metric_of, refuse
from .pairs import as_pairs, as_triplets, log_sum_exp, pair_distances, pair_similarities, positive_pairs, softplus, unique_pairs


class PairLoss(nn.Module):
    """`loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)`; ref_emb None, or the embeddings themselves: the batch.

    Without `indices_tuple` every pair (or triplet) counts, an anchor's own row excepted. Labels may be None where a tuple is given.
    """

    metric, normalize = "cosine", True

    def forward(self, embeddings: Tensor, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None) -> Tensor:
        if labels is not None:
            labels = checked_labels(embeddings, labels)
        elif indices_tuple is None:
            raise ValueError("labels or indices_tuple must be given")
        indices = None if indices_tuple is None else checked_tuple(indices_tuple)
        return self.against(Reference.given(embeddings, ref_emb, ref_labels), embeddings, labels, indices)

    def against(self, reference: Reference, embeddings: Tensor, labels: Tensor | None, indices: tuple[Tensor, ...] | None) -> Tensor:
        """The loss of checked arguments; 0, with a graph, for an empty batch."""
        if len(embeddings) == 0:
            return embeddings.to(dtypes.accumulator(embeddings.dtype)).sum()
        with full_precision(embeddings):
            if indices is None:
                return self.of_all(embeddings, labels, reference)
            return self.of_list(embeddings, labels, indices, reference)

    def of_all(self, embeddings: Tensor, labels: Tensor, reference: Reference) -> Tensor:
        raise NotImplementedError

    def of_list(self, embeddings: Tensor, labels: Tensor | None, indices: tuple[Tensor, ...], reference: Reference) -> Tensor:
        raise NotImplementedError

    def _rows(self, embeddings: Tensor, reference: Reference) -> tuple[Tensor, Tensor]:
        """Embeddings and references as they are compared: float32 (float64), of unit length where the distance says so."""
        x = distances.prepare(embeddings, self.metric, self.normalize)
        return x, x if reference.rows is None else distances.prepare(reference.unpacked(embeddings).rows, self.metric, self.normalize)


class TripletMarginLoss(PairLoss):
    """relu(d_ap - d_an + margin), the mean over losses > 0; every triplet in one pass, no list of them.

    Args:
        margin: default 0.05. swap: d_an = min(d_an, d_pn). smooth_loss: softplus instead of relu.
        triplets_per_anchor: "all".
        distance: None (Euclidean, unit rows), LpDistance(p=2), CosineSimilarity. reducer: None, AvgNonZeroReducer, MeanReducer, SumReducer.

    Differs: with `swap` and ref_emb, d_pn is between two references (the original reads another row of its matrix).
    """

    def __init__(self, margin=0.05, swap=False, smooth_loss=False, triplets_per_anchor="all", distance=None, reducer=None, **options):
        super().__init__()
        refuse("TripletMarginLoss", options)
        _all_triplets(triplets_per_anchor)
        checks.flag("swap", swap)
        checks.flag("smooth_loss", smooth_loss)
        self.margin, self.swap, self.smooth_loss, self.triplets_per_anchor = margin, swap, smooth_loss, triplets_per_anchor
        self.metric, self.normalize = metric_of(distance, "euclidean")
        reductions = {"NoneType": "mean_nonzero", "AvgNonZeroReducer": "mean_nonzero", "MeanReducer": "mean", "SumReducer": "sum"}
        if type(reducer).__name__ not in reductions:
            raise ValueError(f"reducer must be None, AvgNonZeroReducer, MeanReducer or SumReducer, got {type(reducer).__name__}")
        self.reduction = reductions[type(reducer).__name__]

    def of_all(self, embeddings, labels, reference):
        return functional.triplet_loss(
            embeddings,
            labels,
            **reference.options,
            mining="batch_all",
            margin=self.margin,
            soft=self.smooth_loss,
            swap=self.swap,
            metric=self.metric,
            normalize=self.normalize,
            reduction=self.reduction,
        )

    def of_list(self, embeddings, labels, indices, reference):
        a, p, n = as_triplets(indices)
        x, y = self._rows(embeddings, reference)
        d_an = pair_distances(x, y, a, n, self.metric)
        if self.swap:
            d_an = torch.minimum(d_an, pair_distances(y, y, p, n, self.metric))
        violation = pair_distances(x, y, a, p, self.metric) - d_an + self.margin
        losses = softplus(violation) if self.smooth_loss else violation.relu()
        if self.reduction == "sum":
            return losses.sum()
        return _mean(losses, losses > 0 if self.reduction == "mean_nonzero" else torch.ones_like(losses))


class MarginLoss(PairLoss):
    """relu(d_ap - beta + margin) + relu(beta - d_an + margin), over hinges > 0; O(N M D), no list of triplets.

    Args:
        margin: default 0.2. nu: weight of beta in the loss, for a learned scalar beta. beta: default 1.2. triplets_per_anchor: "all".
        learn_beta: `beta` [1], or [num_classes], is a Parameter (the same name and shape in state_dict).
        distance: None or LpDistance(p=2).

    Differs: nu > 0 with num_classes is refused (the original divides that term by the hinges of the other).
    """

    def __init__(self, margin=0.2, nu=0, beta=1.2, triplets_per_anchor="all", learn_beta=False, num_classes=None, distance=None, **options):
        super().__init__()
        refuse("MarginLoss", options)
        _all_triplets(triplets_per_anchor)
        checks.weights(nu=nu)
        checks.finite_number("beta", beta)
        checks.in_range("beta", beta, torch.float32)
        checks.flag("learn_beta", learn_beta)
        if num_classes is not None:
            checks.count("num_classes", num_classes)
        if nu and num_classes:
            raise ValueError(f"nu must be 0 with num_classes, got {nu}")
        self.margin, self.nu, self.learn_beta, self.triplets_per_anchor = margin, nu, learn_beta, triplets_per_anchor
        self.metric, self.normalize = metric_of(distance, "euclidean", ("euclidean", "sqeuclidean"))
        beta = torch.full((num_classes or 1,), float(beta))
        if learn_beta:
            self.beta = nn.Parameter(beta)
        else:
            self.register_buffer("beta", beta, persistent=False)

    @property
    def _boundary(self) -> Tensor:
        return self.beta[0] if len(self.beta) == 1 else self.beta

    def _regularized(self, loss: Tensor) -> Tensor:
        return loss + self.nu * self._boundary if self.learn_beta and self.nu else loss

    def of_all(self, embeddings, labels, reference):
        options = {"margin": self.margin, "metric": self.metric, "normalize": self.normalize}
        return self._regularized(functional.margin_loss(embeddings, labels, **reference.options, beta=self._boundary, **options))

    def of_list(self, embeddings, labels, indices, reference):
        a, p, n = as_triplets(indices)
        beta = self._boundary
        if beta.dim():
            if labels is None:
                raise ValueError("labels must be given with num_classes: beta is taken at the anchor's label")
            beta = beta[labels[a]]
        x, y = self._rows(embeddings, reference)
        hinges = torch.stack(
            [
                (pair_distances(x, y, a, p, self.metric) - beta + self.margin).relu(),
                (beta - pair_distances(x, y, a, n, self.metric) + self.margin).relu(),
            ]
        )
        return self._regularized(_mean(hinges, hinges > 0))


class SupConLoss(PairLoss):
    """lse over an anchor's positives and negatives - the mean over its positives, the mean over losses > 0 (Khosla et al. 2020, L_out).

    Args:
        temperature: default 0.1. distance: None or CosineSimilarity.

    Differs: a batch without any negative has the formula's loss (the original returns 0).
    """

    def __init__(self, temperature=0.1, distance=None, **options):
        super().__init__()
        refuse("SupConLoss", options)
        metric_of(distance, "cosine", ("cosine",))
        checks.positive_number("temperature", temperature)
        checks.scalar("temperature", temperature)
        self.temperature = temperature

    def of_all(self, embeddings, labels, reference):
        x, y = self._rows(embeddings, reference)
        options = {}
        if reference.rows is not None:
            ref = reference.labelled(embeddings, labels)
            options = {"bank": y, "bank_labels": ref.labels, "bank_valid": ref.valid, "own_index": ref.own}
        losses = functional.sup_con(x, labels, **options, temperature=self.temperature, normalize=False, reduction="none")
        return _mean(losses, losses > 0)

    def of_list(self, embeddings, labels, indices, reference):
        a1, p, a2, n = as_pairs(indices)
        x, y = self._rows(embeddings, reference)
        a1, p = unique_pairs(a1, p, len(y))
        a, b = unique_pairs(torch.cat([a1, a2]), torch.cat([p, n]), len(y))
        lse = log_sum_exp(pair_similarities(x, y, a, b) / self.temperature, a, len(x))
        differences = lse[a1] - pair_similarities(x, y, a1, p) / self.temperature
        count = torch.bincount(a1, minlength=len(x)).clamp(min=1)
        losses = differences.new_zeros(len(x)).index_add(0, a1, differences) / count
        return _mean(losses, losses > 0)


class _NegativesLoss(PairLoss):
    """A loss of the similarities of positive pairs, and of n_a = log sum exp(scale s_an) over each anchor's negatives, streamed."""

    once = False  # whether a pair listed several times counts once

    def __init__(self, scale: float, distance, options: dict):
        super().__init__()
        refuse(type(self).__name__, options)
        metric_of(distance, "cosine", ("cosine",))
        self.scale = scale

    def of_all(self, embeddings, labels, reference):
        x, y = self._rows(embeddings, reference)
        ref = reference.labelled(embeddings, labels)
        negatives, _ = similarity_lse(x, y, scale=self.scale, exclude=(SameLabel(labels, ref.labels),), valid=ref.valid)
        return self.combined(x, y, *positive_pairs(labels, ref), negatives)

    def of_list(self, embeddings, labels, indices, reference):
        a1, p, a2, n = as_pairs(indices)
        x, y = self._rows(embeddings, reference)
        if self.once:
            (a1, p), (a2, n) = unique_pairs(a1, p, len(y)), unique_pairs(a2, n, len(y))
        return self.combined(x, y, a1, p, log_sum_exp(self.scale * pair_similarities(x, y, a2, n), a2, len(x)))

    def combined(self, x: Tensor, y: Tensor, a: Tensor, p: Tensor, negatives: Tensor) -> Tensor:
        """The loss of positive pairs (a, p) [P] and of n_a [N]."""
        raise NotImplementedError


class NTXentLoss(_NegativesLoss):
    """-log(exp(s_ap / t) / (exp(s_ap / t) + sum_n exp(s_an / t))), the mean over positive pairs.

    Args:
        temperature: t, default 0.07. distance: None or CosineSimilarity.

    The negatives are streamed once an anchor; the original makes a matrix of positive by negative pairs. Differs: a ratio
    below 1e-38 keeps its value and gradient (the original's logarithm stops there); a single listed pair counts (there it gives 0).
    """

    def __init__(self, temperature=0.07, distance=None, **options):
        checks.positive_number("temperature", temperature)
        checks.scalar("temperature", temperature)
        super().__init__(1 / temperature, distance, options)
        self.temperature = temperature

    def combined(self, x, y, a, p, negatives):
        losses = softplus(negatives[a] - self.scale * pair_similarities(x, y, a, p))
        return _mean(losses, torch.ones_like(losses))


class MultiSimilarityLoss(_NegativesLoss):
    """log(1 + sum_p exp(-alpha (s - base))) / alpha + log(1 + sum_n exp(beta (s - base))) / beta, the mean over anchors.

    Args:
        alpha, beta, base: defaults 2, 50, 0.5. distance: None or CosineSimilarity.

    Nothing is mined here: give a MultiSimilarityMiner's tuple, or use kdfast.functional.multi_similarity_loss, which mines as it streams.
    """

    once = True

    def __init__(self, alpha=2, beta=50, base=0.5, distance=None, **options):
        for name, value in (("alpha", alpha), ("beta", beta)):
            checks.finite_number(name, value)
            checks.positive_number(name, value)
            checks.in_range(name, value, torch.float32)
        checks.finite_number("base", base)
        super().__init__(float(beta), distance, options)
        self.alpha, self.beta, self.base = alpha, beta, base

    def combined(self, x, y, a, p, negatives):
        positives = log_sum_exp(-self.alpha * pair_similarities(x, y, a, p), a, len(x))
        up, down = softplus(positives + self.alpha * self.base), softplus(negatives - self.beta * self.base)
        return (up / self.alpha + down / self.beta).mean()


def _all_triplets(triplets_per_anchor) -> None:
    if triplets_per_anchor != "all":
        raise ValueError(f'triplets_per_anchor must be "all", which costs no more here than a sample of them, got {triplets_per_anchor!r}')


def _mean(losses: Tensor, counted: Tensor) -> Tensor:
    """The mean over what counts; 0, with a graph, where nothing does."""
    return losses.sum() / counted.sum().clamp(min=1)
