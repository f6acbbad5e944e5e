"""`pytorch_metric_learning.losses`, as far as it is here."""

from .criteria import MarginLoss, MultiSimilarityLoss, NTXentLoss, SupConLoss, TripletMarginLoss
from .memory import CrossBatchMemory

__all__ = ["CrossBatchMemory", "MarginLoss", "MultiSimilarityLoss", "NTXentLoss", "SupConLoss", "TripletMarginLoss"]
