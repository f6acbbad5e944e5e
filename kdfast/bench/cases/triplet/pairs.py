"""The multi-similarity loss with its mining: value and gradient of the rows."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.functional import multi_similarity_loss

from ... import peers
from . import batch
from .mined import BATCH_ALL, in_double

ALPHA, BETA, BASE, EPSILON = 2.0, 50.0, 0.5, 0.1


def log1p_sum_exp(f: Tensor, mask: Tensor) -> Tensor:
    return F.pad(f.masked_fill(~mask, -torch.inf), (1, 0)).logsumexp(-1)


def formula(x: Tensor, labels: Tensor) -> Tensor:
    x = batch.unit(x)
    s = x @ x.T
    positive, negative = batch.sides(labels)
    with torch.no_grad():
        kept_positive = positive & (s - EPSILON < s.masked_fill(~negative, -torch.inf).amax(-1, keepdim=True))
        kept_negative = negative & (s + EPSILON > s.masked_fill(~positive, torch.inf).amin(-1, keepdim=True))
    of_positives = log1p_sum_exp(-ALPHA * (s - BASE), kept_positive) / ALPHA
    return (of_positives + log1p_sum_exp(BETA * (s - BASE), kept_negative) / BETA).mean()


def metric_learning() -> Callable[..., Tensor]:
    from pytorch_metric_learning import losses, miners

    miner, criterion = miners.MultiSimilarityMiner(epsilon=EPSILON), losses.MultiSimilarityLoss(alpha=ALPHA, beta=BETA, base=BASE)
    return lambda x, labels: criterion(x, labels, miner(x, labels))


MULTI_SIMILARITY = BATCH_ALL._replace(
    inputs=batch.inputs,
    reference=partial(in_double, formula),
    peers=(
        peers.steps("kdfast", partial(multi_similarity_loss, alpha=ALPHA, beta=BETA, base=BASE, epsilon=EPSILON)),
        peers.steps("eager", formula),
        peers.compiled(formula),
        peers.library("pytorch-metric-learning", "pytorch_metric_learning", metric_learning)._replace(dtypes=(torch.float32,)),
    ),
)
