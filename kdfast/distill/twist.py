"""TWIST: twin class distributions of two views (Wang et al. 2021, 2110.07402)."""

import torch
from torch import Tensor

from .._core import checks, collectives
from .._core.dtypes import wide
from .base import DistillLoss, first, times, views


class TWIST(DistillLoss):
    """Two views agree on a class, each is sure of it, and all classes are used. No teacher and no labels.

    `loss({"a": z_1, "b": z_2})` with logits [N, C] of two views, p = softmax(z):
        loss = 1/2 [KL(p_1 || p_2) + KL(p_2 || p_1)] + (1 + sharpness) 1/2 sum_v mean H(p_v) - diversity 1/2 sum_v H(mean p_v).
    The mean of p is over the samples of all ranks, with gradient.

    Args:
        sharpness: lambda_1 of the paper, default 0. diversity: lambda_2, default 1.

    Raises:
        ValueError, TypeError: missing views, a negative weight.
    """

    def __init__(self, sharpness: float = 0.0, diversity: float = 1.0) -> None:
        super().__init__()
        checks.nonnegative_number("sharpness", sharpness)
        checks.nonnegative_number("diversity", diversity)
        self.sharpness, self.diversity = sharpness, diversity

    def forward(self, student, teacher=None, *, index=None, labels=None) -> Tensor:
        logits = [checks.rows("student", first(view), ndim=2) for view in views("student", student, ("a", "b"))]
        log_p = torch.stack([wide(z) for z in logits]).log_softmax(-1)  # [2, N, C]
        p = log_p.exp()
        (p_1, p_2), (log_1, log_2) = p.unbind(), log_p.unbind()
        means = _mean_over_ranks(p)  # [2, C]
        log_means = means.clamp(min=torch.finfo(means.dtype).tiny).log()  # log 0 has no gradient
        return self._report(
            consistency=((p_1 - p_2) * (log_1 - log_2)).sum(-1).mean() / 2,
            sharpness=-(1 + self.sharpness) * (p * log_p).sum(-1).mean(),
            diversity=times(self.diversity, (means * log_means).sum(-1).mean()),
        )


def _mean_over_ranks(x: Tensor) -> Tensor:
    group = collectives.world()
    if group is None:
        return x.mean(1)
    count = collectives.all_reduce_sum(x.new_full((), x.shape[1]), group)
    return collectives.all_reduce_sum(x.sum(1), group) / count
