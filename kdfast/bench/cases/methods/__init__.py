"""A step of a distillation method, value and the student's gradient, beside the same in plain PyTorch. Banks are not pushed."""

from .queued import BINGO_STEP, COMPRESS_STEP, SEED_STEP
from .related import RGAL_STEP, RKD_STEP
from .sampled import CRD_STEP, WCORD_STEP

CASES = {
    "bingo": BINGO_STEP,
    "seed": SEED_STEP,
    "compress": COMPRESS_STEP,
    "crd": CRD_STEP,
    "wcord": WCORD_STEP,
    "rgal": RGAL_STEP,
    "rkd": RKD_STEP,
}
