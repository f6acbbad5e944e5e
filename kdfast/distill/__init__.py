"""Distillation: the published methods as losses, and the Distiller that applies them to models."""

from .bags import BagDataset, cutmix, make_bags
from .base import DistillLoss
from .bingo import BINGO
from .cka import CKA
from .ckd import CKD
from .codir import CoDIR
from .compress import CompRess
from .cone import CoNe
from .crd import CRD
from .dist import DIST
from .distiller import Distiller, Term
from .faculty_ot import FacultyOT
from .feature import MSE, Cosine
from .hybrid import HybridDistill
from .iaa import IAA
from .ickd import ICKD
from .image_generator import ImageGenerator, ImagePool
from .kd import KD
from .mlkd import MLKD
from .msvq import MSVQ
from .multi_head import MultiHeadKD
from .pesf import PESFKD
from .refilled import REFILLED
from .rgal import RGAL
from .rkd import RKD
from .seed import SEED
from .spectral_tail import SpectralTail
from .srd import SRD
from .sskd import SSKD
from .swav import SwAV
from .synthesizer import RGALSynthesizer
from .twist import TWIST
from .wcl import WCL
from .wcord import WCoRD

__all__ = [
    "BINGO",
    "CKA",
    "CKD",
    "CRD",
    "DIST",
    "IAA",
    "ICKD",
    "KD",
    "MLKD",
    "MSE",
    "MSVQ",
    "PESFKD",
    "REFILLED",
    "RGAL",
    "RKD",
    "SEED",
    "SRD",
    "SSKD",
    "TWIST",
    "WCL",
    "BagDataset",
    "CoDIR",
    "CoNe",
    "CompRess",
    "Cosine",
    "DistillLoss",
    "Distiller",
    "FacultyOT",
    "HybridDistill",
    "ImageGenerator",
    "ImagePool",
    "MultiHeadKD",
    "RGALSynthesizer",
    "SpectralTail",
    "SwAV",
    "Term",
    "WCoRD",
    "cutmix",
    "make_bags",
]
