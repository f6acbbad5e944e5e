"""Statistics of the rows of scores z [N, K], with their derivatives: log-sum-exp and the noise-contrastive loss of CRD.

Which one is told by `shift`: None is log-sum-exp. `offset` [N, K] or None is added to the scores; -inf leaves a sample out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1 << 18  # scores that a statistic takes at once: the handful of arrays of that size it needs stay in L2
_CHUNKS = 16  # at most so many: torch.compile unrolls them


def log_sum_exp(z: Tensor) -> tuple[Tensor, Tensor]:
    """log sum_k exp z_nk [N] and its derivative [N, K]; a row of -inf gives -inf and 0."""
    some = (z != -torch.inf).any(dim=1)
    z = torch.where(some[:, None], z, torch.zeros_like(z))
    weights = torch.where(some[:, None], torch.softmax(z, dim=1), torch.zeros_like(z))
    return torch.where(some, torch.logsumexp(z, dim=1), -torch.inf), weights


def noise_contrast(z: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """softplus(a - z_n0) + sum_{k > 0} softplus(z_nk - a) [N] and its derivative [N, K], a = `shift` [] or [N] (NCE)."""
    sign = torch.ones(z.shape[1], dtype=z.dtype, device=z.device)
    sign = torch.cat([-sign[:1], sign[1:]])
    u = sign * (z - shift[..., None])
    return -F.logsigmoid(-u).sum(dim=1), sign * torch.sigmoid(u)


def of_scores(z: Tensor, offset: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """The statistic [N] and its derivative [N, K]; a sample left out may hold NaN."""
    if offset is not None:
        z = torch.where(offset == -torch.inf, offset, z + offset)
    return log_sum_exp(z) if shift is None else noise_contrast(z, shift)


def replace_scores(z: Tensor, offset: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same; the derivative overwrites z, a few rows at a time, so that the formula's intermediates stay small."""
    n, k = z.shape
    step = max(1, _CHUNK // max(1, k), -(-n // _CHUNKS))
    values = []
    for i in range(0, max(1, n), step):
        rows = slice(i, i + step)
        value, z[rows] = of_scores(
            z[rows], None if offset is None else offset[rows], shift if shift is None or shift.dim() == 0 else shift[rows]
        )
        values.append(value)
    return torch.cat(values), z
