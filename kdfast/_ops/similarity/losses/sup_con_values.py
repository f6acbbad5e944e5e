"""SupCon's losses by themselves, in tiles of PyTorch's operations on any device; derivatives come from elsewhere.

With m a row's running maximum over j != i, l the sum of e^(z - m) and C_i the others of i's class, loss_i = log l less the mean of z - m
over C_i: where a row is learnt the differences are small, and so is their rounding; that of lse_i less a mean logit is the logits' own.
"""

import torch
from torch import Tensor

from ..portable import _finite
from ..tiles import Scores, no_autocast


@no_autocast
def losses(x: Tensor, scale: Tensor, labels: Tensor, compute: torch.dtype) -> Tensor:
    """[N], 0 for a row alone in its class, of x [N, D], scale [N] in the accumulator's dtype and labels [N]."""
    scores = Scores(x[None], x[None], scale[None], compute)
    one, (_, row_blocks, column_blocks) = slice(0, 1), scores.blocks()
    found = []
    for r in row_blocks:
        query, row = scores.query_tile(one, r)[0], torch.arange(r.start, r.stop, device=x.device)
        total = excess = count = torch.zeros_like(scale[r])
        top = torch.full_like(total, -torch.inf)
        for c in column_blocks:
            own = row[:, None] == torch.arange(c.start, c.stop, device=x.device)
            z = query @ scores.column_tile(scores.keys, one, c)[0].mT  # [r, c]
            z = torch.where(own, -torch.inf, z)
            same = (labels[r, None] == labels[c]) & ~own
            higher = torch.maximum(top, z.amax(-1))
            shift = _finite(higher)
            z, step = z - shift[:, None], torch.where(total == 0, 0.0, top - shift)
            excess = excess + step * count + torch.where(same, z, 0.0).sum(-1)
            count = count + same.sum(-1)
            total, top = total * torch.exp(step) + torch.exp(z).sum(-1), higher
        found.append(torch.where(count > 0, torch.log(total) - excess / count.clamp(min=1), 0.0))
    return torch.cat(found)


# Opaque to the compiler, which would otherwise unroll the loops over tiles.
torch.library.custom_op("kdfast_torch::sup_con_losses", losses, mutates_args=()).register_fake(lambda x, scale, *_: torch.empty_like(scale))
