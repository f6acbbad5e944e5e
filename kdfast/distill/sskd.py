"""SSKD: self-supervision by rotation as a part of distillation (Xu et al. 2020, 2006.07114)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import checks
from .._core.dtypes import accumulator, full_precision
from .base import DistillLoss, first, unit, vectors, views
from .kd import KD, check_softening
from .pairs import make_projector

_VIEWS = ("plain", "rotated1", "rotated2", "rotated3")


class SSKD(DistillLoss):
    """Classes, softened logits of plain and rotated images, and which plain image a rotated one came from.

    `loss(student, teacher, labels=y)` with dicts of "logits" and "feat" ([4 N, D], or maps that are averaged), as from
    at={"logits": None, "feat": "avgpool"} on torch.cat([torch.rot90(x, i, (2, 3)) for i in range(4)]): the N plain images first, in
    one batch with the rotated ones, so that BatchNorm knows what it will meet. Or dicts of four views (plain, rotated1, rotated2,
    rotated3, or 0 ... 3), each such a dict of N rows, for networks without BatchNorm. The teacher's "feat" is its embedding under a
    self-supervision head trained beforehand, the student's passes `projector`; both are l2-normalised here.
        loss = ce_weight CE(plain) + kd_weight KD_T(plain) + rotated_weight KD_T(rotated) + contrast_weight contrast.
    Contrast: with scores cos / temperature of the 3 N rotated rows against the N plain columns, temperature^2
    KL(softmax(teacher's) || softmax(student's)), the mean over the rows kept: those whose source the teacher ranks first and, of
    the others, the share `kept` with the best-ranked sources.

    The task loss is in here: use it without `task`.

    Args:
        T: of KD, default 4. temperature: of the contrast, default 0.5. kept: in [0, 1], default 0.75.
        ce_weight, kd_weight, rotated_weight, contrast_weight: default 0.1, 0.9, 2.7, 10.
        projector, student_dim, teacher_dim: as for MSE; default "mlp".

    Raises:
        ValueError, TypeError: missing views, values or labels.
    """

    def __init__(
        self,
        *,
        T: float = 4.0,
        temperature: float = 0.5,
        kept: float = 0.75,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        rotated_weight: float = 2.7,
        contrast_weight: float = 10.0,
        projector="mlp",
        student_dim: int | None = None,
        teacher_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_softening("temperature", temperature)
        checks.weights(ce_weight=ce_weight, kd_weight=kd_weight, rotated_weight=rotated_weight, contrast_weight=contrast_weight)
        checks.nonnegative_number("kept", kept)
        if kept > 1:
            raise ValueError(f"kept must be in [0, 1], got {kept}")
        self.kd, self.temperature, self.kept = KD(T), temperature, kept
        self.ce_weight, self.kd_weight, self.rotated_weight, self.contrast_weight = ce_weight, kd_weight, rotated_weight, contrast_weight
        self.projector = make_projector(projector, student_dim, teacher_dim)

    def materialize(self, student, teacher) -> None:
        if self.projector is not None:
            (_, s), (_, t) = _stacked("student", student), _stacked("teacher", teacher)
            self.projector.materialize(s, t)

    def forward(self, student, teacher, *, index=None, labels=None) -> Tensor:
        if labels is None and self.ce_weight:
            raise ValueError("labels must be given for SSKD (or ce_weight=0)")
        (s_logits, s), (t_logits, t) = _stacked("student", student), _stacked("teacher", teacher)
        t_logits, t = t_logits.detach(), t.detach()
        if self.projector is not None:
            s, t = self.projector(s, t)
        n = len(t) // 4
        terms = {}
        if self.ce_weight:
            plain = s_logits[:n].to(accumulator(s_logits.dtype))
            terms["task"] = self.ce_weight * F.cross_entropy(plain, checks.class_labels(labels, plain))
        terms["plain"] = self.kd_weight * self.kd.compare(s_logits[:n], t_logits[:n])
        terms["rotated"] = self.rotated_weight * self.kd.compare(s_logits[n:], t_logits[n:])
        terms["contrast"] = self.contrast_weight * self._contrast(unit(s), unit(t))
        return self._report(**terms)

    def _contrast(self, s: Tensor, t: Tensor) -> Tensor:
        n = len(t) // 4
        with full_precision(s):
            scores_s, scores_t = (x[n:] @ x[:n].t() / self.temperature for x in (s, t))  # [3 N, N]
        source = torch.arange(n, device=t.device).repeat(3)[:, None]
        rank = (scores_t > scores_t.gather(1, source)).sum(1)  # of each row's source, 0 the best
        wrong = rank > 0
        place = torch.empty_like(rank)
        place[torch.where(wrong, rank, n).argsort(stable=True)] = torch.arange(len(rank), device=rank.device)  # wrong rows first, by rank
        keep = (~wrong | (place < (self.kept * wrong.sum()).floor())).to(scores_s.dtype)
        log_s, log_t = scores_s.log_softmax(1), scores_t.log_softmax(1)
        rows = F.kl_div(log_s, log_t.to(log_s.dtype), reduction="none", log_target=True).sum(1)
        return self.temperature**2 * (keep * rows).sum() / keep.sum().clamp(min=1)


def _stacked(name: str, value) -> tuple[Tensor, Tensor]:
    """(logits [4 N, C], features [4 N, D]), plain images first."""
    if isinstance(value, Mapping) and {"logits", "feat"} <= value.keys():
        logits, features = first(value["logits"]), vectors(value["feat"], name)
        if len(features) % 4:
            raise ValueError(f"{name} must have 4 N rows, N plain images and three rotations of them, got {len(features)}")
        return logits, features
    seen = views(name, value, _VIEWS)
    for view in seen:
        if not isinstance(view, Mapping) or not {"logits", "feat"} <= view.keys():
            raise ValueError(f"{name} must have logits and feat in every view")
    return torch.cat([first(view["logits"]) for view in seen]), torch.cat([vectors(view["feat"], name) for view in seen])
