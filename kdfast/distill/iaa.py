"""IAA: intra-class adaptive augmentation for metric learning (Fu et al. 2022, 2211.16264)."""

import torch
from torch import Tensor

from .._core import checks, collectives
from .._core.dtypes import wide
from ..functional import multi_similarity_loss
from .base import DistillLoss, vectors


class IAA(DistillLoss):
    """The multi-similarity loss on embeddings and on synthetic ones, drawn round them with their class's variance. No teacher.

    `loss(student, labels=y)` with embeddings [N, dim] (l2-normalised by the loss, not before). Per class a diagonal variance
    Sigma_y, a mean and a count are kept. Each embedding z gives `samples` more, z + sqrt(lam Sigma_y) eps with eps normal, of the
    same class, through which the gradient flows to z. With n_b rows of a class in the batch (of all ranks), of mean mu_b and
    variance Sigma_b, before the draw, where banks would be pushed:
        w = max(n_b / (n_b + n), least_rate),
        Sigma <- (1 - w) Sigma + w Sigma_b + w (1 - w) (mu - mu_b)^2,   mu <- (1 - w) mu + w mu_b,   n <- n + n_b.
    A class's first batch is taken whole. The paper's correction by neighbouring classes is not in here. Draws take PyTorch's
    global random state.

    Args:
        num_classes, dim: sizes of the statistics.
        lam: default 0.8; the paper multiplies it by 0.9, 0.75 and 0.6 late in training: set `loss.lam`.
        samples: synthetic embeddings a sample, default 3.
        alpha, beta, base, epsilon: of the multi-similarity loss, default 2, 40, 0.5, 0.1.
        least_rate: default 0.2.
        push: False keeps the statistics as they are.

    Raises:
        ValueError, TypeError: missing labels, embeddings of another width. IndexError: a label out of range, on the CPU.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        lam: float = 0.8,
        samples: int = 3,
        alpha: float = 2.0,
        beta: float = 40.0,
        base: float = 0.5,
        epsilon: float = 0.1,
        least_rate: float = 0.2,
        push: bool = True,
    ) -> None:
        super().__init__(push=push)
        checks.nonnegative_number("lam", lam)
        checks.nonnegative_number("least_rate", least_rate)
        self.lam, self.samples, self.least_rate = lam, checks.count("samples", samples, minimum=0), least_rate
        self.options = {"alpha": alpha, "beta": beta, "base": base, "epsilon": epsilon}
        shape = checks.count("num_classes", num_classes), checks.count("dim", dim)
        self.register_buffer("variance", torch.zeros(shape))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("count", torch.zeros(num_classes))

    def forward(self, student, teacher=None, *, index=None, labels=None) -> Tensor:
        z = vectors(student, "student")
        if labels is None:
            raise ValueError("labels must be given for IAA")
        labels = checks.integral("labels", labels, shape=(len(z),), device=z.device)
        checks.index_range("labels", labels, len(self.count))
        if z.shape[1] != self.mean.shape[1]:
            raise ValueError(f"student must have width dim ({self.mean.shape[1]}), got shape {tuple(z.shape)}")
        z = wide(z)
        if self.push and self.training and torch.is_grad_enabled():
            self._update(z.detach(), labels)
        spread = (self.lam * self.variance[labels]).sqrt().to(z.dtype)  # [N, dim]
        drawn = [z + spread * torch.randn_like(z) for _ in range(self.samples)]
        loss = multi_similarity_loss(torch.cat([z, *drawn]), labels.repeat(1 + self.samples), **self.options)
        return self._report(iaa=loss)

    @torch.no_grad()
    def _update(self, z: Tensor, labels: Tensor) -> None:
        group = collectives.world()
        if group is not None:
            z, labels = (collectives.all_gather_rows_no_grad(x, group)[0] for x in (z, labels))
        z = z.to(self.mean.dtype)
        new = torch.zeros_like(self.count).index_add_(0, labels, torch.ones_like(z[:, 0]))
        size = new.clamp(min=1)[:, None]
        mean = torch.zeros_like(self.mean).index_add_(0, labels, z) / size
        variance = torch.zeros_like(self.mean).index_add_(0, labels, (z - mean[labels]).square()) / size
        rate = torch.where(new > 0, (new / (new + self.count).clamp(min=1)).clamp(min=self.least_rate), 0.0)[:, None]
        moved = (1 - rate) * self.variance + rate * variance + rate * (1 - rate) * (self.mean - mean).square()
        self.variance.copy_(moved)
        self.mean.lerp_(mean, rate)
        self.count.add_(new)
