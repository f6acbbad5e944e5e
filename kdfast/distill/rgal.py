"""RGAL: relation-guided adversarial learning, the student's phase of data-free distillation (2412.11380)."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from .._core import checks
from .._core.dtypes import wide
from ..functional import triplet_loss
from ..projectors import Projector
from .base import DistillLoss, first, same_shape, vectors
from .kd import KD
from .pairs import make_projectors, pick_projector


class RGAL(DistillLoss):
    """Soft targets, pooled features of several layers, and a triplet loss on samples that the teacher names.

    `loss(student, teacher)` with dicts of "logits" [N, C] and "layers", a list of features ([N, D], or maps that are
    averaged), as from at={"logits": None, "layers": ["layer2", "layer4"]}:
        loss = KD(T)  +  feature_weight sum_l MSE(linear_l(s_l), t_l)  +  triplet_weight triplet,
    where triplet is relu(d_ap - d_an + margin) between the l2-normalised (here) features s_l of the student's last layer,
    classes the teacher's argmax, a mean over every ordered positive pair, each with one negative drawn by distance weighting
    among the student's normalised logits (d clamped at 0.5, d < 1.4; any negative where none is in range). Draws take
    PyTorch's global random state. Train it on images of an RGALSynthesizer.

    Args:
        layers: number of layers in the lists.
        T: temperature, default 20 (with the factor T^2). margin: default 0.2.
        feature_weight, triplet_weight: default 0.1; 0 leaves a term out.
        projector: a Projector a layer, as for MSE; None makes linear ones to the teacher's widths.

    Raises:
        ValueError, TypeError: missing values, lists of another length, widths that do not fit.
    """

    def __init__(
        self,
        layers: int = 1,
        *,
        T: float = 20.0,
        feature_weight: float = 0.1,
        triplet_weight: float = 0.1,
        margin: float = 0.2,
        projector=None,
    ) -> None:
        super().__init__()
        checks.nonnegative_number("feature_weight", feature_weight)
        checks.nonnegative_number("triplet_weight", triplet_weight)
        checks.nonnegative_number("margin", margin)
        self.layers, self.kd = checks.count("layers", layers), KD(T)
        self.feature_weight, self.triplet_weight, self.margin = feature_weight, triplet_weight, margin
        if not feature_weight:
            projector = []
        elif projector is None:
            projector = [Projector() for _ in range(layers)]
        self.projectors = make_projectors(projector, None, None)

    def materialize(self, student, teacher) -> None:
        if len(self.projectors):
            for i, (s, t) in enumerate(zip(self._layers(student, "student"), self._layers(teacher, "teacher"), strict=True)):
                pick_projector(self.projectors, i).materialize(s, t)

    def forward(self, student, teacher, *, index=None, labels=None) -> Tensor:
        s_layers, t_layers = self._layers(student, "student"), self._layers(teacher, "teacher")
        s_logits, t_logits = first(student["logits"]), first(teacher["logits"]).detach()
        terms = {"logits": self.kd.compare(s_logits, t_logits)}
        if self.feature_weight:
            columns = enumerate(zip(s_layers, t_layers, strict=True))
            terms["features"] = self.feature_weight * sum(self._distance(i, s, t.detach()) for i, (s, t) in columns)
        if self.triplet_weight:
            options = {"mining": "distance_weighted", "margin": self.margin, "reduction": "mean"}
            terms["triplet"] = self.triplet_weight * triplet_loss(s_layers[-1], t_logits.argmax(1), sample_on=s_logits, **options)
        return self._report(**terms)

    def _distance(self, layer: int, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = pick_projector(self.projectors, layer)(student, teacher)
        same_shape(student, teacher)
        return F.mse_loss(wide(student), wide(teacher))

    def _layers(self, value, name: str) -> list[Tensor]:
        if not isinstance(value, Mapping) or not {"logits", "layers"} <= value.keys() or not isinstance(value["layers"], list):
            raise ValueError(f'{name} must be a dict of logits, layers (as from at={{"logits": None, "layers": ["layer4"]}})')
        if len(value["layers"]) != self.layers:
            raise ValueError(f'{name}["layers"] must have {self.layers} layers, got {len(value["layers"])}')
        return [vectors(layer, name) for layer in value["layers"]]
