"""Triplet mining and losses over all pairs of a labelled batch or a bank, and losses on relations between samples."""

from .drawn import DISTANCE_WEIGHTED
from .forms import CONFUSE, LAYERS, SAMPLE_ON, SWAP
from .mined import BANK, BATCH_ALL, BATCH_HARD, LARGE_CLASSES, SEMI_HARD, SEMI_HARD_FACENET
from .pairs import MULTI_SIMILARITY
from .relations import MMD_RBF, RKD_ANGLE, RKD_DISTANCE

CASES = {
    "batch_hard": BATCH_HARD,
    "bank": BANK,
    "batch_all": BATCH_ALL,
    "large_classes": LARGE_CLASSES,
    "semi_hard": SEMI_HARD,
    "semi_hard_facenet": SEMI_HARD_FACENET,
    "distance_weighted": DISTANCE_WEIGHTED,
    "sample_on": SAMPLE_ON,
    "layers": LAYERS,
    "swap": SWAP,
    "confuse": CONFUSE,
    "multi_similarity": MULTI_SIMILARITY,
    "rkd_angle": RKD_ANGLE,
    "rkd_distance": RKD_DISTANCE,
    "mmd_rbf": MMD_RBF,
}
