"""sentence-transformers' batch triplet losses (5, 6), and an InfoNCE loss with a memory bank, which it does not have.

Each takes the model first and is called by its trainer as `loss(sentence_features, labels)`; `compute_loss_from_embeddings` takes the
embeddings themselves.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .._core import checks, dtypes
from ..bank import QueueBank
from ..functional import info_nce, triplet_loss
from ._memory import push_located

_METRICS = {
    "euclidean_distance": "euclidean",
    "eucledian_distance": "euclidean",
    "cosine_distance": "cosine",
    "euclidean": "euclidean",
    "cosine": "cosine",
}


class BatchTripletLoss(nn.Module):
    """Triplets mined in the batch by label; subclasses say how.

    Args:
        model: maps a feature dict to a dict with "sentence_embedding" [N, D].
        distance_metric: "euclidean" (default; rows as they are), "cosine" (1 - cos), or the library's function of that name.

    Differs: anchors without a positive or without a negative count neither in the sum nor in the mean (the original gives them
    losses such as the margin itself); no N x N matrix is made.

    Raises: ValueError naming the argument.
    """

    mining = reduction = None
    soft = False

    def __init__(self, model: nn.Module, distance_metric: str | Callable = "euclidean", margin: float = 5):
        super().__init__()
        name = distance_metric if isinstance(distance_metric, str) else getattr(distance_metric, "__name__", None)
        if name not in _METRICS:
            raise ValueError(f"distance_metric must be euclidean_distance or cosine_distance, got {distance_metric!r}")
        self.sentence_embedder = model
        self.distance_metric, self.metric, self.margin = distance_metric, _METRICS[name], margin

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        first = next(iter(sentence_features))
        return self.compute_loss_from_embeddings([self.sentence_embedder(first)["sentence_embedding"]], labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        options = {"mining": self.mining, "metric": self.metric, "normalize": False, "reduction": self.reduction}
        return triplet_loss(embeddings[0], labels.flatten(), **options, margin=self.margin, soft=self.soft)

    @property
    def triplet_margin(self) -> float:
        """The margin, by the name that some of the originals give it."""
        return self.margin

    def get_config_dict(self) -> dict:
        return {"distance_metric": getattr(self.distance_metric, "__name__", self.distance_metric), "margin": self.margin}


class BatchHardTripletLoss(BatchTripletLoss):
    """The farthest positive and the nearest negative of each anchor; the mean over anchors. Default margin 5."""

    mining, reduction = "batch_hard", "mean"


class BatchHardSoftMarginTripletLoss(BatchTripletLoss):
    """As BatchHardTripletLoss with log(1 + exp(d_ap - d_an)) and no margin."""

    mining, reduction, soft = "batch_hard", "mean", True

    def __init__(self, model: nn.Module, distance_metric: str | Callable = "euclidean"):
        super().__init__(model, distance_metric, margin=0)


class BatchSemiHardTripletLoss(BatchTripletLoss):
    """Per positive pair the nearest negative beyond it, else the farthest; the mean over pairs. Default margin 5."""

    mining, reduction = "semi_hard_facenet", "mean"


class BatchAllTripletLoss(BatchTripletLoss):
    """Every triplet; the mean over losses > 0. Default margin 5."""

    mining, reduction = "batch_all", "mean_nonzero"


class BankInfoNCELoss(nn.Module):
    """InfoNCE of (anchor, positive) texts against the positives of the last `bank_size` pairs, this batch's among them.

    `loss([anchor features, positive features], labels=None)`. The batch's positives are pushed first (in training mode with gradients
    enabled), each anchor's own left out of its negatives; a positive has a gradient as a positive, bank rows have none.
    Embeddings are normalised here. With bank_size = N it has the value of MultipleNegativesRankingLoss on a batch of N.

    Args:
        model: maps a feature dict to a dict with "sentence_embedding" [N, D].
        bank_size: rows kept, default 65536.
        dim: D; None asks the model (get_sentence_embedding_dimension).
        scale: 1 / temperature, default 20.

    The bank is in state_dict; under torch.distributed every rank pushes the positives of all ranks, so that banks stay equal. Banks
    are scored as they are: lower the learning rate, or encode positives with a momentum copy, where old rows differ too much.

    Raises: ValueError, TypeError naming the argument.
    """

    def __init__(self, model: nn.Module, bank_size: int = 65536, dim: int | None = None, scale: float = 20.0):
        super().__init__()
        checks.positive_number("scale", scale)
        self.model, self.scale = model, scale
        self.bank = QueueBank(bank_size, model.get_sentence_embedding_dimension() if dim is None else dim, gather=None)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        return self.compute_loss_from_embeddings([self.model(features)["sentence_embedding"] for features in sentence_features], labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        if len(embeddings) != 2:
            raise ValueError(f"sentence_features must be (anchor, positive), got {len(embeddings)}")
        anchor, positive = (torch.nn.functional.normalize(x.to(dtypes.accumulator(x.dtype)), dim=-1) for x in embeddings)
        self.bank.to(anchor.device, anchor.dtype)
        own = push_located(self.bank, positive) if self.training and torch.is_grad_enabled() else None
        return info_nce(anchor, positive, self.bank, temperature=1 / self.scale, own_index=own)
