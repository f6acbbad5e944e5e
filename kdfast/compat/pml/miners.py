"""The miners: plain index tuples, without gradient."""

import torch
from torch import Tensor, nn

from ... import functional
from ..._core import checks
from ..._core.dtypes import full_precision
from ..._ops.triplet import distances
from .arguments import Reference, checked_labels, metric_of, refuse
from .pairs import joined, label_blocks, listed

_BLOCK = 1 << 22  # triplets compared at a time


class Miner(nn.Module):
    """`miner(embeddings, labels, ref_emb, ref_labels)` -> index tuple; ref_emb None, or the embeddings themselves: the batch."""

    width = 3  # of the tuple

    def __init__(self, distance, default: str, options: dict, allowed: tuple[str, ...] = distances.METRICS):
        super().__init__()
        refuse(type(self).__name__, options)
        self.metric, self.normalize = metric_of(distance, default, allowed)

    def forward(self, embeddings: Tensor, labels: Tensor, ref_emb=None, ref_labels=None) -> tuple[Tensor, ...]:
        labels = checked_labels(embeddings, labels)
        return self.against(Reference.given(embeddings, ref_emb, ref_labels), embeddings, labels)

    @torch.no_grad()
    def against(self, reference: Reference, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """The index tuple of checked arguments."""
        if len(embeddings) == 0:
            return joined([], embeddings.device, self.width)
        with full_precision(embeddings):
            return self.mine(embeddings, labels, reference)

    def mine(self, embeddings: Tensor, labels: Tensor, reference: Reference) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _triplets(self, embeddings, labels, reference, mining: str, **options) -> tuple[Tensor, Tensor, Tensor]:
        options |= {"metric": self.metric, "normalize": self.normalize}
        return functional.mine_triplets(embeddings, labels, **reference.options, mining=mining, **options).to_tuple()

    def _distances(self, embeddings, labels, reference):
        """(block of anchors, d [R, M], positives, negatives) for one block after the other."""
        ref = reference.labelled(embeddings, labels)
        x, y = (distances.prepare(t, self.metric, self.normalize) for t in (embeddings, ref.rows))
        x, y = distances.centred(x, y, self.metric)
        for block, positive, negative in label_blocks(labels, ref):
            yield block, distances.tile(x[block], y, self.metric), positive, negative


class BatchEasyHardMiner(Miner):
    """One positive and one negative an anchor -> (a, p, a, n).

    Args:
        pos_strategy: "easy" (nearest, default) or "hard" (farthest).
        neg_strategy: "semihard" (nearest beyond the positive, default; without one the anchor is dropped) or "hard" (nearest).
        distance: None (Euclidean, unit rows), LpDistance(p=2) or CosineSimilarity. Other strategies and ranges are refused.
    """

    width = 4
    HARD, SEMIHARD, EASY, ALL = "hard", "semihard", "easy", "all"
    _MININGS = {  # noqa: RUF012 (a constant)
        ("easy", "semihard"): "easy_semihard",
        ("hard", "semihard"): "hard_semihard",
        ("easy", "hard"): "easy_positive",
        ("hard", "hard"): "batch_hard",
    }

    def __init__(self, pos_strategy=EASY, neg_strategy=SEMIHARD, allowed_pos_range=None, allowed_neg_range=None, distance=None, **options):
        super().__init__(distance, "euclidean", options)
        checks.choice("pos_strategy", pos_strategy, ("easy", "hard"))
        checks.choice("neg_strategy", neg_strategy, ("semihard", "hard"))
        for name, value in (("allowed_pos_range", allowed_pos_range), ("allowed_neg_range", allowed_neg_range)):
            if value is not None:
                raise ValueError(f"{name} must be None, got {value!r}")
        self.pos_strategy, self.neg_strategy = pos_strategy, neg_strategy

    def mine(self, embeddings, labels, reference):
        a, p, n = self._triplets(embeddings, labels, reference, self._MININGS[self.pos_strategy, self.neg_strategy])
        return a, p, a, n


class BatchHardMiner(Miner):
    """The farthest positive and the nearest negative of each anchor -> (a, p, n). `distance`: as for BatchEasyHardMiner."""

    def __init__(self, distance=None, **options):
        super().__init__(distance, "euclidean", options)

    def mine(self, embeddings, labels, reference):
        return self._triplets(embeddings, labels, reference, "batch_hard")


class DistanceWeightedMiner(Miner):
    """A negative for each positive pair, drawn with the inverse of the distances' density on the sphere (Wu et al. 2017) -> (a, p, n).

    Args:
        cutoff: 0.5. nonzero_loss_cutoff: 1.4. distance: None or LpDistance(p=2).
        generator: torch.Generator of the draws; None: PyTorch's global one.

    Differs: every positive pair once (the original draws as many positives, with replacement); weights are relative to the anchor's
    own largest, so that none underflows because of another anchor; draws depend on the seed alone.
    """

    def __init__(self, cutoff=0.5, nonzero_loss_cutoff=1.4, distance=None, *, generator=None, **options):
        super().__init__(distance, "euclidean", options, ("euclidean",))
        for name, value, served in (("cutoff", cutoff, 0.5), ("nonzero_loss_cutoff", nonzero_loss_cutoff, 1.4)):
            if value != served:
                raise ValueError(f"{name} must be {served}, got {value!r}")
        if not self.normalize:
            raise ValueError("distance must normalise embeddings: the weights are those of the unit sphere")
        self.cutoff, self.nonzero_loss_cutoff, self.generator = cutoff, nonzero_loss_cutoff, generator

    def mine(self, embeddings, labels, reference):
        return self._triplets(embeddings, labels, reference, "distance_weighted", fallback="drop", generator=self.generator)


class TripletMarginMiner(Miner):
    """Every triplet with d_an - d_ap <= margin ("all"), <= 0 ("hard"), in (0, margin] ("semihard") or > margin ("easy") -> (a, p, n).

    Args:
        margin: default 0.2. type_of_triplets: default "all". distance: as for BatchEasyHardMiner.

    The comparisons run in blocks; what is stored is the list itself. A loss that mines for itself (kdfast.functional.triplet_loss,
    mining="semi_hard" or "batch_all") needs no list.
    """

    def __init__(self, margin=0.2, type_of_triplets="all", distance=None, **options):
        super().__init__(distance, "euclidean", options)
        checks.choice("type_of_triplets", type_of_triplets, ("all", "hard", "semihard", "easy"))
        checks.finite_number("margin", margin)
        self.margin, self.type_of_triplets = margin, type_of_triplets

    def mine(self, embeddings, labels, reference):
        found = []
        for block, d, positive, negative in self._distances(embeddings, labels, reference):
            anchor, column = positive.nonzero(as_tuple=True)
            for a, p in zip(*(t.split(max(1, _BLOCK // d.shape[1])) for t in (anchor, column)), strict=True):
                pair, n = (self._taken(d[a] - d[a, p][:, None]) & negative[a]).nonzero(as_tuple=True)
                found.append((a[pair] + block.start, p[pair], n))
        return joined(found, embeddings.device, self.width)

    def _taken(self, gap: Tensor) -> Tensor:
        if self.type_of_triplets == "easy":
            return gap > self.margin
        taken = gap <= self.margin
        if self.type_of_triplets == "all":
            return taken
        return taken & (gap <= 0 if self.type_of_triplets == "hard" else gap > 0)


class MultiSimilarityMiner(Miner):
    """Positives less similar than the most similar negative + epsilon, negatives more similar than the least similar positive - epsilon.

    Returns (a1, p, a2, n), the pairs of an anchor in order of their index (the original's are in order of their similarity).

    Args:
        epsilon: default 0.1. distance: None (cosine), LpDistance(p=2) or CosineSimilarity.
    """

    width = 4

    def __init__(self, epsilon=0.1, distance=None, **options):
        super().__init__(distance, "cosine", options)
        checks.finite_number("epsilon", epsilon)
        self.epsilon = epsilon

    def mine(self, embeddings, labels, reference):
        found = []
        for block, d, positive, negative in self._distances(embeddings, labels, reference):
            nearest = torch.where(negative, d, torch.inf).amin(-1, keepdim=True)
            farthest = torch.where(positive, d, -torch.inf).amax(-1, keepdim=True)
            kept = positive & (d + self.epsilon > nearest), negative & (d - self.epsilon < farthest)
            found.append((*listed(block, kept[0]), *listed(block, kept[1])))
        return joined(found, embeddings.device, self.width)
