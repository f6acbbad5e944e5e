"""WCoRD: Wasserstein contrastive representation distillation (Chen et al. 2021, 2012.08674)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import checks
from ..bank import AliasSampler
from ..functional import info_nce, sampled_info_nce, sinkhorn_loss, wasserstein_dependency
from .base import bank_rows, like_bank, own_rows, query_labels
from .embedded import EmbeddedLoss
from .noise_contrast import NoiseContrast

_NCE_EPS = 1e-7  # of CRD's released code, added to the noise density


class WCoRD(EmbeddedLoss):
    """A contrastive term against a bank (dual form) and an optimal transport term inside the batch (primal form).

    `loss(student, teacher, index=None, labels=None)` with both penultimate features ([N, C], or maps that are averaged).
    Each is embedded linearly to `dim`, spectral norm on both maps, and l2-normalised here; the bank holds embedded
    teacher rows, and the positive is the current teacher embedding e_t:
        loss = global_weight * critic(e_s, e_t, bank) + local_weight * sinkhorn(e_s, e_t; cost 1 - cosine).
    The transport term never stands alone: its plan may permute the pairs.

    critic: "infonce"; "crd_nce": CRD's noise-contrastive loss with num_data = the bank's rows and the normaliser of
        the first training batch (leave classes out with a ClassSampler, and start the bank with init="uniform");
        "wasserstein": mean negative - mean positive score, which needs only the bank's mean.
    bank: an IndexedBank (all other rows, or `num_negatives` of them; needs `index`) or a QueueBank (all rows). Where it
        keeps labels, rows of the sample's own class are left out.

    There is no released code. Which critic, weights, epsilon and iterations the paper uses is our reading of it.

    Args:
        bank: of width `dim`; CRD's protocol: IndexedBank(size of the data set, 128).
        dim: width of the embeddings.
        num_negatives: rows drawn uniformly from the others; None takes all. "crd_nce" needs it (16384 in CRD) or a sampler.
        sampler: draws the negatives instead: a kdfast.bank.ClassSampler or AliasSampler (sampler.draw(index) -> [N, K]).
        temperature: > 0, default 0.07; a float or an nn.Parameter.
        epsilon, iters: of the transport term.
        student_dim, teacher_dim: widths of the features; None reads them from the first batch.
        generator: torch.Generator of the uniform draws, saved in state_dict.
        push: see DistillLoss.

    Raises:
        ValueError, TypeError: an unknown critic, a bank of another width, sampling that the bank or critic cannot
            use, global_weight <= 0, a missing index or labels.
    """

    def __init__(
        self,
        bank,
        *,
        dim: int = 128,
        critic: str = "infonce",
        num_negatives: int | None = None,
        sampler=None,
        temperature: float = 0.07,
        epsilon: float = 0.05,
        iters: int = 20,
        global_weight: float = 0.8,
        local_weight: float = 0.05,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        generator: torch.Generator | None = None,
        push: bool = True,
    ) -> None:
        if not hasattr(bank, "as_rows"):
            raise TypeError(f"bank must be an IndexedBank or a QueueBank, got {type(bank).__name__}")
        super().__init__(checks.count("dim", dim), student_dim, teacher_dim, constraint="spectral", bank=bank, push=push)
        checks.choice("critic", critic, ("infonce", "crd_nce", "wasserstein"))
        checks.positive_number("temperature", temperature)
        checks.positive_number("epsilon", epsilon)
        checks.positive_number("global_weight", global_weight)
        checks.nonnegative_number("local_weight", local_weight)
        stored = bank_rows(self.bank).shape
        if stored[1] != dim:
            raise ValueError(f"bank must have width dim ({dim}), got rows {tuple(stored)}")
        sampled = num_negatives is not None or sampler is not None
        if sampled and (critic == "wasserstein" or not hasattr(bank, "update")):
            raise ValueError('num_negatives and sampler need an IndexedBank and critic "infonce" or "crd_nce"')
        if critic == "crd_nce" and not sampled:
            raise ValueError('num_negatives or sampler must be given for critic="crd_nce"')
        if critic == "crd_nce" and (bank.as_rows().bias is not None or bank.labels is not None):
            raise ValueError(
                'bank must be made with init="uniform" and labels=False for critic="crd_nce" (a ClassSampler leaves classes out)'
            )
        if num_negatives is not None and sampler is not None:
            raise ValueError("num_negatives and sampler must not both be given: the sampler knows how many it draws")
        if num_negatives is not None:
            sampler = AliasSampler(torch.ones(len(bank)), num_negatives, generator=generator)
        self.critic, self.sampler = critic, sampler
        self.temperature, self.epsilon, self.iters = temperature, epsilon, checks.count("iters", iters)
        self.global_weight, self.local_weight = global_weight, local_weight
        self.noise_contrast = NoiseContrast(temperature) if critic == "crd_nce" else None

    def forward(self, student, teacher, *, index=None, labels=None) -> Tensor:
        embedded_s, embedded_t = self._embedded(student, teacher)  # [N, dim]
        terms = {"global": self.global_weight * self._contrast(embedded_s, embedded_t, index, labels)}
        if self.local_weight:
            options = {"metric": "cosine", "epsilon": self.epsilon, "max_iters": self.iters, "grad": "envelope"}
            terms["local"] = self.local_weight * sinkhorn_loss(embedded_s, embedded_t, **options)
        loss = self._report(**terms)
        self._update_bank(embedded_t.detach(), index, labels)
        return loss

    def _contrast(self, query: Tensor, positive: Tensor, index, labels) -> Tensor:
        own, classes = own_rows(self.bank, index), query_labels(self.bank, labels)
        rows = bank_rows(self.bank)
        query, positive = like_bank(query, rows), like_bank(positive, rows)
        negatives = None if self.sampler is None else self.sampler.draw(own)
        if self.critic == "crd_nce":
            return self._noise_contrast(query, positive, own, negatives)
        options = {"temperature": self.temperature, "query_labels": classes}
        if negatives is not None:
            return sampled_info_nce(query, positive, self.bank, negatives, **options)
        score = wasserstein_dependency if self.critic == "wasserstein" else info_nce
        return score(query, positive, self.bank, own_index=own, **options)

    def _noise_contrast(self, query: Tensor, positive: Tensor, own: Tensor, negatives: Tensor) -> Tensor:
        """CRD's loss with the current teacher embedding in place of the sample's own, older bank row.

        With x = exp(z) / Z and c = K / n: the mean over samples of -log(x+ / (x+ + c + eps)) - sum_k log(c / (x_k + c + eps)),
        where -log(x+ / (x+ + c + eps)) = softplus(shift - z+), shift = log Z + log(c + eps).
        """
        bank, count = bank_rows(self.bank), negatives.shape[1]
        own_keys = bank[own]  # a copy: the bank is updated before the backward
        losses, normalizer = self.noise_contrast(query, self.bank, torch.cat([own[:, None], negatives], 1), reduction="none")
        shift = normalizer.log() + math.log(count / len(bank) + _NCE_EPS)
        wide = query.to(losses.dtype)
        own_term, term = (F.softplus(shift - (wide * rows.to(wide)).sum(-1) / self.temperature) for rows in (own_keys, positive))
        return (losses - own_term + term).mean()

    def extra_repr(self) -> str:
        return f"critic={self.critic}, global_weight={self.global_weight}, local_weight={self.local_weight}"
