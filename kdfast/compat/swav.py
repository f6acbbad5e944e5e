"""SwAV's cluster codes: `distributed_sinkhorn(out)` of its training script."""

import torch
from torch import Tensor

from .._core import checks, collectives
from ..functional import sinkhorn_assign


@torch.no_grad()
def distributed_sinkhorn(out: Tensor, epsilon: float = 0.05, sinkhorn_iterations: int = 3) -> Tensor:
    """Codes [N, K] of scores [N, K], rows summing to 1, in `out`'s dtype; over the batch of all ranks when there are several.

    The script reads `epsilon` and `sinkhorn_iterations` from its global `args`: here they are arguments, with its defaults.
    Differs: exp(out / epsilon) cannot overflow (there it does beyond 88 in float32, and in half precision for cosine scores at
    epsilon = 0.05); ranks may hold batches of different sizes.

    Raises: ValueError, TypeError naming the argument.
    """
    checks.rows("out", out, ndim=2)
    checks.count("sinkhorn_iterations", sinkhorn_iterations)
    return sinkhorn_assign(out, epsilon=epsilon, iters=sinkhorn_iterations, group=collectives.world()).to(out.dtype)
