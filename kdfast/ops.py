"""The public ops, as functions."""

from ._ops.gather import gather_similarity
from ._ops.knn import knn
from ._ops.similarity import Harder, KeyIndex, SameLabel, similarity_softmax, symmetric_lse
from ._ops.sinkhorn import SinkhornResult, sinkhorn
from ._ops.triplet import row_extrema

__all__ = [
    "Harder",
    "KeyIndex",
    "SameLabel",
    "SinkhornResult",
    "gather_similarity",
    "knn",
    "row_extrema",
    "similarity_softmax",
    "sinkhorn",
    "symmetric_lse",
]
