"""open_clip's ClipLoss."""

import torch
from torch import Tensor, nn

from .._core import checks, collectives
from ..functional import clip_loss


class ClipLoss(nn.Module):
    """`loss(image_features, text_features, logit_scale, logit_bias=None, output_dict=False)`: features [N, D] as they are.

    Args:
        local_loss: with several ranks, the loss of this rank's rows; False (default): of the whole batch, the same on every rank.
        world_size: 1 (default), or the size of the default torch.distributed group. rank: taken from that group.
        gather_with_grad, cache_labels: accepted, without effect. use_horovod: refused.

    logit_bias is one constant in every score, which a softmax cancels: it gets a gradient of 0.

    Differs: neither of the two matrices of scores is made. With several ranks both towers always get the gradient of the whole
    batch's loss, averaged by DistributedDataParallel as `local_loss=True, gather_with_grad=True` does (without the latter the
    original drops part of it, or scales it by 1 / world_size); ranks may hold batches of different sizes.

    Raises: ValueError, TypeError naming the argument.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        if use_horovod is not False:
            raise ValueError("use_horovod is not supported by kdfast.compat.open_clip.ClipLoss: use torch.distributed")
        checks.count("world_size", world_size)
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size = rank, world_size

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale, logit_bias=None, output_dict: bool = False):
        for name, features in (("image_features", image_features), ("text_features", text_features)):
            checks.rows(name, features, ndim=2)
        checks.exact_shape("text_features", text_features, image_features.shape)
        if logit_bias is not None:
            checks.number("logit_bias", logit_bias)
        group = self._group()
        loss = clip_loss(image_features, text_features, logit_scale, group=group)
        if group is not None and not self.local_loss:  # the mean over all rows of all ranks
            rows = len(image_features)
            total, count = collectives.all_reduce_sum(torch.stack([loss * rows, torch.full_like(loss, rows)]), group)
            loss = total / count
        if logit_bias is not None:
            loss = loss + 0 * logit_bias
        return {"contrastive_loss": loss} if output_dict else loss

    def _group(self):
        """torch.distributed's default group, of world_size ranks; None for a single one."""
        if self.world_size == 1:
            return None
        group = collectives.world()
        size = 1 if group is None else torch.distributed.get_world_size(group)
        if size != self.world_size:
            raise ValueError(f"world_size must be the size of torch.distributed's default group, {size}, got {self.world_size}")
        return group
