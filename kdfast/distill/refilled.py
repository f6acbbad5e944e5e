"""REFILLED: a teacher of another task supervises by comparing samples (Ye, Lu, Zhan 2020, Cross-Task Knowledge Distillation)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import checks
from .._core.dtypes import wide
from ..functional import mine_triplets
from .base import unit, vectors
from .pairs import PairLoss


class REFILLED(PairLoss):
    """Stage 1 distils comparisons between embeddings, stage 2 a local classifier made of class centres.

    stage=1, `loss(student, teacher, labels=y)` with embeddings of any two widths ([N, D], or maps that are averaged), l2-normalised here.
        On semi-hard triplets of the student (0 < d_an - d_ap <= margin; `per_pair` negatives drawn for each positive pair), with
        p = sigmoid((d_an - d_ap) / temperature): loss = weight * mean KL(Bernoulli(p_teacher) || Bernoulli(p_student)).
    stage=2, with the student's logits [N, C] and the teacher's embeddings, as from at=(None, "avgpool"):
        loss = weight * mean KL(softmax(t . centres / temperature) || softmax(logits / temperature)) over the classes in the batch;
        a centre is the l2-normalised mean of a class's teacher embeddings. The task loss comes besides.

    The released code divides stage 1 by twice the number of triplets. Draws take PyTorch's global random state.

    Args:
        stage: 1 or 2.
        temperature: default 4 in stage 1, 2 in stage 2. weight: default 1000 and 100.
        margin, per_pair: of stage 1, default 0.2 and 4.
        max_positives: positives considered for each sample in stage 1; None: all, whose largest number is read from the device
            (compiled code needs a number).
        centres: [C, D_t] class centres over the whole data set, for stage 2; None takes the batch's own.

    Raises:
        ValueError, TypeError: an unknown stage, missing labels, shapes that do not fit.
    """

    needs_labels = True

    def __init__(
        self,
        stage: int = 1,
        *,
        temperature: float | None = None,
        weight: float | None = None,
        margin: float = 0.2,
        per_pair: int = 4,
        max_positives: int | None = None,
        centres: Tensor | None = None,
    ) -> None:
        super().__init__()
        checks.choice("stage", stage, (1, 2))
        self.stage = stage
        self.temperature = {1: 4.0, 2: 2.0}[stage] if temperature is None else temperature
        self.weight = {1: 1000.0, 2: 100.0}[stage] if weight is None else weight
        checks.positive_number("temperature", self.temperature)
        checks.scalar("temperature", self.temperature)
        checks.weights(weight=self.weight)
        checks.positive_number("margin", margin)
        self.margin, self.per_pair, self.max_positives = margin, checks.count("per_pair", per_pair), max_positives
        self.register_buffer("centres", None if centres is None else unit(checks.rows("centres", centres, ndim=2)))

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        teacher = vectors(teacher, "teacher")
        if self.stage == 1:
            return {"comparisons": self.weight * self._comparisons(unit(vectors(student, "student")), unit(teacher), labels)}
        return {"centres": self.weight * self._local_classes(student, wide(teacher), labels)}

    def _comparisons(self, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        options = {"margin": self.margin, "per_pair": self.per_pair, "max_positives": self.max_positives}
        mined = mine_triplets(s.detach(), labels, mining="semi_hard", normalize=False, **options)  # [N, P, per_pair]
        positive, negative = mined.positive.clamp(min=0), mined.negative.clamp(min=0)
        valid = mined.valid.to(s.dtype)

        def gap(x: Tensor) -> Tensor:
            """(d_an - d_ap) / temperature, 0 where there is no triplet."""
            ap, an = (((x[mined.anchor] - x[other]) * mined.valid[..., None]).square().sum(-1) for other in (positive, negative))
            return (_root(an) - _root(ap)) / self.temperature

        gap_s, gap_t = gap(s), gap(t).to(s.dtype)
        p = gap_t.sigmoid()
        divergence = p * (F.logsigmoid(gap_t) - F.logsigmoid(gap_s)) + (1 - p) * (F.logsigmoid(-gap_t) - F.logsigmoid(-gap_s))
        return (divergence * valid).sum() / valid.sum().clamp(min=1)

    def _local_classes(self, logits: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        logits = wide(logits)
        centres = self.centres
        member = F.one_hot(labels.long(), logits.shape[1])  # [N, C]
        if centres is None:
            centres = unit(member.to(t.dtype).t() @ t)
        if tuple(centres.shape) != (logits.shape[1], t.shape[1]):
            raise ValueError(f"centres must be [{logits.shape[1]}, {t.shape[1]}], got {tuple(centres.shape)}")
        absent = ~member.bool().any(0)  # [C]
        scores = t.to(logits.dtype) @ centres.to(logits.dtype).t()
        log_t, log_s = ((x / self.temperature).masked_fill(absent, -torch.inf).log_softmax(1) for x in (scores, logits))
        p, log_t, log_s = log_t.exp(), log_t.masked_fill(absent, 0), log_s.masked_fill(absent, 0)
        return (p * (log_t - log_s)).sum(1).mean()


def _root(x: Tensor) -> Tensor:
    """Square root with gradient 0 at 0."""
    return torch.where(x > 0, x, 1.0).sqrt() * (x > 0)
