"""Distillation: the published methods as losses, and the Distiller that applies them to models."""

from .bags import BagDataset, cutmix, make_bags
from .base import DistillLoss
from .bingo import BINGO
from .cka import CKA
from .ckd import CKD
from .codir import CoDIR
from .compress import CompRess
from .crd import CRD
from .dist import DIST
from .distiller import Distiller, Term
from .feature import MSE, Cosine
from .hybrid import HybridDistill
from .ickd import ICKD
from .image_generator import ImageGenerator, ImagePool
from .kd import KD
from .mlkd import MLKD
from .multi_head import MultiHeadKD
from .pesf import PESFKD
from .rgal import RGAL
from .rkd import RKD
from .seed import SEED
from .spectral_tail import SpectralTail
from .srd import SRD
from .synthesizer import RGALSynthesizer
from .twist import TWIST
from .wcord import WCoRD

__all__ = [
    "BINGO",
    "CKA",
    "CKD",
    "CRD",
    "DIST",
    "ICKD",
    "KD",
    "MLKD",
    "MSE",
    "PESFKD",
    "RGAL",
    "RKD",
    "SEED",
    "SRD",
    "TWIST",
    "BagDataset",
    "CoDIR",
    "CompRess",
    "Cosine",
    "DistillLoss",
    "Distiller",
    "HybridDistill",
    "ImageGenerator",
    "ImagePool",
    "MultiHeadKD",
    "RGALSynthesizer",
    "SpectralTail",
    "Term",
    "WCoRD",
    "cutmix",
    "make_bags",
]
