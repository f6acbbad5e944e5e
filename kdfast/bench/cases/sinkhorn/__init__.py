"""Entropic optimal transport: solving, its gradients, point clouds, and the layers made of its iterations."""

from .gradient import IMPLICIT, UNROLLED, VALUE
from .layers import ASSIGN, NORMALIZE
from .points import POINTS
from .solve import GROWTH, SOLVE

CASES = {
    "solve": SOLVE,
    "value_gradient": VALUE,
    "unrolled": UNROLLED,
    "implicit": IMPLICIT,
    "points": POINTS,
    "assign": ASSIGN,
    "normalize": NORMALIZE,
    "growth": GROWTH,
}
