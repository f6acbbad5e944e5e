"""Row losses of InfoNCE where the keys of a row's class attract it, in PyTorch's operations around the streaming softmax.

For any device and transform, and for derivatives of the second order; info_nce.py's op has them on the CPU
(csrc/cpu/similarity/bind_attraction.h).
"""

import torch
from torch import Tensor

from .apply import streaming_softmax
from .arguments import Problem
from .positives import positive_logits
from .score_sums import score_sums


def attracted_rows(p: Problem, positive: Tensor | None, include: bool) -> tuple[Tensor, Tensor]:
    """(losses [*B, N], which of them count): loss_i = lse_i - mean of z over the keys of i's class and the rows of `positive`.

    positive: [*B, N, D] or [*B, N, J, D]. include: all of them are in the one denominator; else none is. A row counts that has a positive
    and something in its denominator.
    """
    spec, tensors = p
    query, keys, scale, bias, *_ = tensors
    labels = tensors.query_labels, tensors.key_labels
    softmax = tensors._replace(query_labels=None, key_labels=None) if include else tensors
    lse, *_ = streaming_softmax(spec, softmax.folded(spec), pool=False, need_pooled=False)
    lse = lse.reshape(spec.rows)
    rules = dict(zip(("query_labels", "bank_labels"), labels, strict=True), skip=tensors.key_index)
    sums = score_sums(query, keys, scale, valid=tensors.valid, bias=bias, **rules)
    total, number = sums.same, sums.same_count
    if positive is not None:
        _, logits = positive_logits(query, keys, scale, None, positive, None)
        if include:
            lse = torch.logsumexp(torch.cat([lse[..., None], logits], dim=-1), dim=-1)
        total, number = total + logits.sum(-1), number + logits.shape[-1]
    return lse - total / number.clamp(min=1), (number > 0) & (lse != -torch.inf)
