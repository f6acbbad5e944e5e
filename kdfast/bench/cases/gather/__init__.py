"""Sampled bank rows: their scores, losses of these, and drawing them."""

from .crd import CRD, GROWTH
from .info_nce import INFO_NCE
from .samplers import ALIAS, OTHER_CLASS
from .scores import SCORES, SCORES_BANK

CASES = {
    "scores": SCORES,
    "scores_bank": SCORES_BANK,
    "info_nce": INFO_NCE,
    "crd": CRD,
    "alias": ALIAS,
    "other_class": OTHER_CLASS,
    "growth": GROWTH,
}
