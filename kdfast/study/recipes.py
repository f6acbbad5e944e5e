"""How each method of kdfast.distill is used on an image classifier: what it is made of, where it looks, with which weight.

Models have modules of one set of names: "early" and "maps" (feature maps), "tokens" [N, L, D], "pool" [N, D]; their output is
logits. One setting for all data. Weights are for short runs of a small student: the published one, or a tenth, a hundredth or ten
times it, by the accuracy on samples kept for validation (docs/results.md says how). Docstrings give the published ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import distill
from ..bank import QueueBank
from ..projectors import Projector


class Setting(NamedTuple):
    """The sizes a method is made for."""

    labels: Tensor  # [num_data]
    num_classes: int
    student_dim: int  # of "pool"
    teacher_dim: int
    queue: int  # rows of a queue
    negatives: int  # sampled rows, prototypes
    dim: int  # of embeddings that a method makes itself

    def keys(self, dim: int, **options) -> QueueBank:
        return QueueBank(self.queue, dim, **options)


class Recipe(NamedTuple):
    """`make` gives the loss; the rest are arguments of Term and Distiller."""

    make: Callable[[Setting], nn.Module]
    at: Any = None
    weight: float = 1.0
    task_weight: float = 1.0
    views: tuple[str, ...] = ()  # of the student; () is the batch itself
    stacked: bool = False  # the student's views in one batch, the first view first
    teacher_views: tuple[str, ...] = ()  # () is what the student sees
    teachers: str = "one"  # or another of subject.prepare; "average" of the student, "averages" (two), "none"


LOGITS_AND_FEATURES = {"logits": None, "feat": "pool"}
VIEWS = ("plain", "turned1", "turned2", "turned3")


def _student_queue(s: Setting, **options) -> QueueBank:
    return s.keys(s.student_dim, **options)


def _inverted(s: Setting) -> nn.Module:
    return distill.MSE(Projector(invert=True))


def _cka(s: Setting, **options) -> nn.Module:
    halves = [s.num_classes // 2, s.num_classes - s.num_classes // 2]
    return distill.CKA(halves, common_dim=s.dim, **{"weights": {"intra": 0.05, "inter": 0.05, "align": 1.0}, **options})


RECIPES = {
    "KD": Recipe(lambda s: distill.KD(T=4), weight=0.9, task_weight=0.1),
    "DIST": Recipe(lambda s: distill.DIST(temperature=4)),
    "CKD": Recipe(lambda s: distill.CKD(), weight=10.0),
    "MultiHeadKD": Recipe(lambda s: distill.MultiHeadKD(num_heads=2, num_classes=s.num_classes), at=(["maps", "pool"], None), weight=0.1),
    "PESFKD": Recipe(lambda s: distill.PESFKD()),
    "FacultyOT": Recipe(lambda s: distill.FacultyOT()),
    "TWIST": Recipe(lambda s: distill.TWIST(), views=("a", "b"), teachers="none", weight=0.2),
    "MSE": Recipe(lambda s: distill.MSE("linear"), at="pool"),
    "MSE inverted": Recipe(_inverted, at="maps", weight=0.1),
    "MSE, other task": Recipe(lambda s: distill.MSE("linear"), at="maps", teachers="other", weight=0.1),
    "MSE inverted, other task": Recipe(_inverted, at="maps", teachers="other", weight=0.1),
    "MSE, random teacher": Recipe(lambda s: distill.MSE("linear"), at="maps", teachers="random", weight=0.1),
    "MSE inverted, random teacher": Recipe(_inverted, at="maps", teachers="random", weight=0.1),
    "Cosine": Recipe(lambda s: distill.Cosine("linear"), at="pool", weight=10.0),
    "SRD": Recipe(lambda s: distill.SRD(), at=LOGITS_AND_FEATURES),
    "ICKD": Recipe(lambda s: distill.ICKD(), at="maps"),
    "HybridDistill": Recipe(lambda s: distill.HybridDistill(), at={"tokens": "tokens", "values": "early"}, teachers="two"),
    "SpectralTail": Recipe(lambda s: distill.SpectralTail(rank=max(1, s.student_dim // 2)), at="pool", teachers="none", weight=0.1),
    "RKD": Recipe(lambda s: distill.RKD(), at="pool"),
    "MLKD": Recipe(lambda s: distill.MLKD(), at=LOGITS_AND_FEATURES, weight=0.1),
    "REFILLED": Recipe(lambda s: distill.REFILLED(), at="pool", weight=0.1),
    "REFILLED, stage 2": Recipe(lambda s: distill.REFILLED(2), at=(None, "pool"), weight=0.2),
    "SSKD": Recipe(
        lambda s: distill.SSKD(),
        at=(LOGITS_AND_FEATURES, {"logits": None, "feat": "head"}),
        views=VIEWS,
        stacked=True,
        teachers="self-supervised",
        task_weight=0.0,
    ),
    "WCL": Recipe(lambda s: distill.WCL(), at={"instance": "pool", "graph": "pool"}, views=("a", "b"), teachers="none", weight=0.01),
    "SwAV": Recipe(
        lambda s: distill.SwAV(s.negatives, s.student_dim, banks=[_student_queue(s), _student_queue(s)]),
        at="pool",
        views=("a", "b"),
        teachers="none",
        weight=0.01,
    ),
    "IAA": Recipe(lambda s: distill.IAA(s.num_classes, s.student_dim), at="pool", teachers="none", weight=0.1),
    "CRD": Recipe(lambda s: distill.CRD(len(s.labels), dim=s.dim, num_negatives=s.negatives, labels=s.labels), at="pool", weight=0.1),
    "CoDIR": Recipe(
        lambda s: distill.CoDIR(len(s.labels), dim=s.dim, num_negatives=s.negatives, labels=s.labels), at=["tokens", "pool"], weight=0.1
    ),
    "WCoRD": Recipe(lambda s: distill.WCoRD(s.keys(s.dim), dim=s.dim), at="pool", weight=0.1),
    "SEED": Recipe(lambda s: distill.SEED(s.keys(s.teacher_dim)), at="pool"),
    "CompRess": Recipe(lambda s: distill.CompRess(s.keys(s.teacher_dim), _student_queue(s)), at="pool"),
    "BINGO": Recipe(
        lambda s: distill.BINGO(bank=s.keys(s.teacher_dim), projector="linear"),
        at="pool",
        views=("a", "p"),
        teacher_views=("a",),
    ),
    "MSVQ": Recipe(
        lambda s: distill.MSVQ(_student_queue(s), _student_queue(s)),
        at="pool",
        views=("a",),
        teacher_views=("b", "c", "d"),
        teachers="averages",
        weight=0.1,
    ),
    "CoNe": Recipe(
        lambda s: distill.CoNe(_student_queue(s, labels=True), s.keys(s.num_classes, normalize=False), neighbors=s.queue // 2),
        at=LOGITS_AND_FEATURES,
        teachers="average",
        weight=0.1,
    ),
    "CKA, soft targets alone": Recipe(
        lambda s: _cka(s, weights={"intra": 0, "inter": 0, "align": 0}), at=LOGITS_AND_FEATURES, teachers="halves", task_weight=0.0
    ),
    "CKA": Recipe(_cka, at=LOGITS_AND_FEATURES, teachers="halves", task_weight=0.0),
    "CKA, bank and transport": Recipe(
        lambda s: _cka(s, bank=s.keys(s.dim, labels=True), align="sinkhorn"), at=LOGITS_AND_FEATURES, teachers="halves", task_weight=0.0
    ),
    "RGAL": Recipe(lambda s: distill.RGAL(2), at={"logits": None, "layers": ["maps", "pool"]}),
}
