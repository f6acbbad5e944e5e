"""Pushing a batch to a queue before it is scored, and where its rows went: so that a sample can leave out its own row."""

import torch
from torch import Tensor

from .._core import collectives
from ..bank import QueueBank


@torch.no_grad()
def push_located(bank: QueueBank, keys: Tensor, labels: Tensor | None = None) -> Tensor:
    """Push the keys [N, D] of every rank; the bank rows of this rank's [N], -1 for those a batch beyond the capacity loses.

    `bank` is made with gather=None: the gathering is done here, where the ranks' offsets are known.
    """
    group, offset, count = collectives.world(), 0, len(keys)
    if group is not None:
        keys, offset = collectives.all_gather_rows_no_grad(keys, group)
        labels = None if labels is None else collectives.all_gather_rows_no_grad(labels, group)[0]
    place = torch.arange(offset, offset + count, device=keys.device)
    rows = (bank.pointer + place) % bank.capacity
    bank.push(keys, labels)
    return torch.where(place >= len(keys) - bank.capacity, rows, -1)
