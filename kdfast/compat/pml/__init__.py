"""pytorch-metric-learning's losses and miners (2.9): `from kdfast.compat.pml import losses, miners` in place of its own.

Losses: `loss(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None)` -> 0-d. Miners: `miner(embeddings, labels,
ref_emb=None, ref_labels=None)` -> (a, p, n) or (a1, p, a2, n), int64. Without `indices_tuple` a loss runs fused; with one it
computes the listed pairs alone. Scores are float32 (float64 for float64 inputs) whatever the input's dtype.

Of the base class's keywords `distance` takes the library's own LpDistance(p=2) and CosineSimilarity objects where a class says so,
`reducer` the reducers it says; other values, and regularisers, raise a ValueError. There are no recorded statistics.
"""

from . import losses, miners
from .losses import CrossBatchMemory, MarginLoss, MultiSimilarityLoss, NTXentLoss, SupConLoss, TripletMarginLoss
from .miners import BatchEasyHardMiner, BatchHardMiner, DistanceWeightedMiner, MultiSimilarityMiner, TripletMarginMiner

__all__ = [
    "BatchEasyHardMiner",
    "BatchHardMiner",
    "CrossBatchMemory",
    "DistanceWeightedMiner",
    "MarginLoss",
    "MultiSimilarityLoss",
    "MultiSimilarityMiner",
    "NTXentLoss",
    "SupConLoss",
    "TripletMarginLoss",
    "TripletMarginMiner",
    "losses",
    "miners",
]
