"""Softmax of similarities over a bank or a batch: a file a loss, or a group of losses on the same inputs."""

from .bank_gradient import BANK_GRADIENT
from .batched import BATCHED, SHARED_BANK
from .clip import CLIP, SIGLIP
from .distillation import DISTILLATION
from .forms import FORMS
from .in_batch import IN_BATCH, NT_XENT, SUP_CON
from .info_nce import GROWTH, INFO_NCE, ODD_SIZES
from .lse import LSE
from .normalized import NORMALIZED
from .pooled import POOLED, POOLED_BANK
from .precision import PRECISION
from .queue import QUEUE, QUEUE_AUTOCAST
from .second import POOLED_SECOND, SECOND, SECOND_BANK
from .wasserstein import WASSERSTEIN

CASES = {
    "info_nce": INFO_NCE,
    "normalized": NORMALIZED,
    "bank_gradient": BANK_GRADIENT,
    **FORMS,
    "batched": BATCHED,
    "shared_bank": SHARED_BANK,
    "precision": PRECISION,
    "lse": LSE,
    "second": SECOND,
    "second_bank": SECOND_BANK,
    "pooled": POOLED,
    "pooled_bank": POOLED_BANK,
    "pooled_second": POOLED_SECOND,
    "queue": QUEUE,
    "queue_autocast": QUEUE_AUTOCAST,
    "wasserstein": WASSERSTEIN,
    "clip": CLIP,
    "siglip": SIGLIP,
    "distillation": DISTILLATION,
    "in_batch": IN_BATCH,
    "nt_xent": NT_XENT,
    "sup_con": SUP_CON,
    "odd_sizes": ODD_SIZES,
    "growth": GROWTH,
}
