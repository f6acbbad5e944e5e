"""CRD: contrastive representation distillation (Tian, Krishnan, Isola 2020, 1910.10699)."""

import torch
from torch import Tensor

from .._core import checks
from ..bank import AliasSampler, ClassSampler, IndexedBank
from .base import like_bank
from .embedded import EmbeddedLoss
from .noise_contrast import NoiseContrast


class CRD(EmbeddedLoss):
    """Student and teacher find each other's bank row among sampled rows of other classes, by noise-contrastive estimation.

    `loss(student, teacher, index=i)` with both penultimate features ([N, C], or maps that are averaged). Each is embedded
    linearly to `dim` and l2-normalised here: v_s, v_t [N, dim]. Two IndexedBanks M_s, M_t of `num_data` rows are kept. With
    rows j_0 (the sample's own, as it was last seen) and j_1 ... j_K drawn,
        x_k = exp(v_s . M_t[j_k] / temperature) / Z,   c = K / num_data,
        loss = mean -[log x_0 / (x_0 + c + 1e-7) + sum_k log c / (x_k + c + 1e-7)]   + the same of v_t against M_s.
    Z = num_data mean(exp) of the first training batch, over all ranks. Then both banks move to the new embeddings.
    The usual use: `Term(CRD(...), at="avgpool", weight=0.8)` beside the task loss.

    Args:
        num_data: number of training samples; `index` lies in [0, num_data).
        dim: width of the embeddings.
        num_negatives: K, default 16384.
        labels: [num_data] integers: negatives come from other classes (published). None: from all other samples.
        sampler: draws instead of the two: sampler.draw(index, positive=True) -> [N, 1 + K], as kdfast.bank's samplers.
        temperature: > 0, default 0.07. momentum: of the banks, default 0.5.
        student_dim, teacher_dim: widths of the features; None reads them from the first batch.
        generator: torch.Generator of the draws, saved in state_dict.
        push: see DistillLoss; here both banks.

    Raises:
        ValueError, TypeError: labels that do not fit, a missing index. IndexError: an index out of range, on the CPU.
    """

    def __init__(
        self,
        num_data: int,
        *,
        dim: int = 128,
        num_negatives: int = 16384,
        labels: Tensor | None = None,
        sampler=None,
        temperature: float = 0.07,
        momentum: float = 0.5,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        generator: torch.Generator | None = None,
        push: bool = True,
    ) -> None:
        super().__init__(dim, student_dim, teacher_dim, push=push)
        checks.count("num_data", num_data)
        checks.count("num_negatives", num_negatives)
        if labels is not None:
            checks.integral("labels", labels, shape=(num_data,))
        if sampler is None and labels is None:
            sampler = AliasSampler(torch.ones(num_data), num_negatives, generator=generator)
        elif sampler is None:
            sampler = ClassSampler(labels, num_negatives, generator=generator)
        if not hasattr(sampler, "draw"):
            raise TypeError(f"sampler must draw rows, as kdfast.bank.AliasSampler does, got {type(sampler).__name__}")
        self.sampler = sampler
        self.student_bank, self.teacher_bank = (IndexedBank(num_data, dim, momentum=momentum) for _ in range(2))
        self.student_contrast, self.teacher_contrast = NoiseContrast(temperature), NoiseContrast(temperature)

    def forward(self, student, teacher, *, index=None, labels=None) -> Tensor:
        embedded_s, embedded_t = self._embedded(student, teacher)  # [N, dim]
        if index is None:
            raise ValueError("index must be given: it says which rows of the banks belong to the batch")
        index = checks.integral("index", index, shape=(len(embedded_s),))
        rows = self.teacher_bank.storage
        drawn = self.sampler.draw(index.to(rows.device), positive=True)  # [N, 1 + K]
        loss = self._report(
            student=self.student_contrast(like_bank(embedded_s, rows), self.teacher_bank, drawn)[0],
            teacher=self.teacher_contrast(like_bank(embedded_t, rows), self.student_bank, drawn)[0],
        )
        self._update_bank(embedded_s, index, bank=self.student_bank)
        self._update_bank(embedded_t, index, bank=self.teacher_bank)
        return loss
