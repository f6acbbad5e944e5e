"""Softmax of similarities over a bank or a batch: a file a loss, or a group of losses on the same inputs."""

from .bank_gradient import BANK_GRADIENT
from .clip import CLIP, SIGLIP
from .distillation import DISTILLATION
from .in_batch import NT_XENT, SUP_CON
from .info_nce import GROWTH, INFO_NCE, ODD_SIZES
from .lse import LSE
from .normalized import NORMALIZED
from .queue import QUEUE, QUEUE_AUTOCAST

CASES = {
    "info_nce": INFO_NCE,
    "normalized": NORMALIZED,
    "bank_gradient": BANK_GRADIENT,
    "lse": LSE,
    "queue": QUEUE,
    "queue_autocast": QUEUE_AUTOCAST,
    "clip": CLIP,
    "siglip": SIGLIP,
    "distillation": DISTILLATION,
    "nt_xent": NT_XENT,
    "sup_con": SUP_CON,
    "odd_sizes": ODD_SIZES,
    "growth": GROWTH,
}
