"""TWIST: twin class distributions of two views (Wang et al. 2021, 2110.07402)."""

import torch
from torch import Tensor

from .._core import checks, collectives
from .._core.dtypes import accumulator
from .base import DistillLoss, first, total, views


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
        log_p = [z.to(accumulator(z.dtype)).log_softmax(-1) for z in logits]  # [N, C]
        p = [x.exp() for x in log_p]
        entropy = [-(x * log_x).sum(-1).mean() for x, log_x in zip(p, log_p, strict=True)]
        cross = [-(p[i] * log_p[1 - i]).sum(-1).mean() for i in range(2)]
        means = [_mean_over_ranks(x) for x in p]
        tiny = torch.finfo(means[0].dtype).tiny  # log 0 has no gradient
        return self._report(
            consistency=(total(cross) - total(entropy)) / 2,
            sharpness=(1 + self.sharpness) * total(entropy) / 2,
            diversity=self.diversity * total((mean * mean.clamp(min=tiny).log()).sum() for mean in means) / 2,
        )


def _mean_over_ranks(x: Tensor) -> Tensor:
    group = collectives.world()
    if group is None:
        return x.mean(0)
    count = collectives.all_reduce_sum(x.new_full((), len(x)), group)
    return collectives.all_reduce_sum(x.sum(0), group) / count
