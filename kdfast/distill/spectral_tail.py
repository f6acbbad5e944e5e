"""SpectralTail: a pressure towards features of low rank, without a teacher (ours; the idea is in Learning to Project, 2403.14494)."""

import torch
from torch import Tensor

from .._core import checks
from .._core.dtypes import full_precision, wide
from .base import DistillLoss, mean_of, vectors
from .pairs import pairs


class SpectralTail(DistillLoss):
    """The share of the features' singular values past the first `rank`: sum_{k > rank} sigma_k^p / sum_k sigma_k^p, in [0, 1].

    `loss(student, teacher=None)`: features [N, D]; tokens [N, L, D] are N L rows, maps [N, C, H, W] are averaged; lists and
    dicts give the mean. The teacher is not looked at. sigma_k are the singular values of the batch's feature matrix,
    from the eigenvalues of the smaller Gram matrix, in float32 (float64 for float64) outside autocast.

    Matching a student Z_s with the best linear map of teacher features U_t S V^T leaves |(1 - U_t U_t^T) Z_s|^2: inverted projection
    penalises what lies outside the teacher's span. This is the same pressure with the span left free. The paper's gain of
    2.3 % on ImageNet (its second version) is of its own method, not of this one.

    Args:
        rank: number of leading singular values that cost nothing, >= 1.
        p: > 0, default 2: shares of variance; smaller p weighs small singular values more ((sigma^2 + 1e-12)^{p/2}).
        center: subtract the mean over rows first. Default True.

    Raises:
        ValueError, TypeError: rank < 1, p <= 0, shapes that are no features.
    """

    def __init__(self, rank: int, p: float = 2.0, center: bool = True) -> None:
        super().__init__()
        self.rank, self.p, self.center = checks.count("rank", rank), p, center
        checks.positive_number("p", p)
        checks.scalar("p", p)
        checks.flag("center", center)

    def forward(self, student, teacher=None, *, index=None, labels=None) -> Tensor:
        return self._report(spectral_tail=mean_of([self._tail(x) for _, x, _ in pairs(student, student)]))

    def _tail(self, features: Tensor) -> Tensor:
        x = features.flatten(0, 1) if features.dim() == 3 else vectors(features, "student")  # [N, D]
        with full_precision(x):
            x = wide(x)
            x = x - x.mean(0) if self.center else x
            gram = x @ x.t() if x.shape[0] < x.shape[1] else x.t() @ x
            values = torch.linalg.eigvalsh(gram).relu()  # sigma^2, ascending
            powers = values if self.p == 2 else (values + 1e-12) ** (self.p / 2)
            return powers[: -self.rank].sum() / (powers.sum() + torch.finfo(powers.dtype).tiny)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, p={self.p}, center={self.center}"
