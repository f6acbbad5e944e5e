"""lightly's NTXentLoss (1.5, 1.6): in batch as SimCLR, or against a memory bank as MoCo."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core import checks, collectives
from ..bank import QueueBank
from ..functional import info_nce, nt_xent


class NTXentLoss(nn.Module):
    """`loss(out0, out1)`, both [N, D], normalised here.

    Args:
        temperature: > 0, default 0.5.
        memory_bank_size: 0 (default): each embedding against the other 2N - 1. (num, dim): out0 against its row of out1 and `num`
            earlier rows of out1, random at first; out1 is pushed afterwards when out0 needs a gradient.
        gather_distributed: in batch, negatives from all ranks.

    Differs: a batch that does not divide the bank wraps round its end (the original drops what does not fit); the bank is read in
    place (the original copies it every step) and is in state_dict; under torch.distributed every rank pushes the keys of all ranks,
    whatever `gather_distributed` says, so that banks stay equal. Negative temperatures are refused.

    Raises: ValueError naming the argument.
    """

    def __init__(self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False):
        super().__init__()
        checks.positive_number("temperature", temperature)
        checks.flag("gather_distributed", gather_distributed)
        self.temperature, self.gather_distributed = temperature, gather_distributed
        self.memory_bank = None
        if not isinstance(memory_bank_size, (int, list, tuple)):
            raise TypeError(f"memory_bank_size must be 0 or (number of rows, their width), got {type(memory_bank_size).__name__}")
        if memory_bank_size not in (0, (0,), [0]):
            if isinstance(memory_bank_size, int) or len(memory_bank_size) != 2:
                raise ValueError(f"memory_bank_size must be 0 or (number of rows, their width), got {memory_bank_size!r}")
            for size in memory_bank_size:
                checks.count("memory_bank_size", size)
            self.memory_bank = QueueBank(*memory_bank_size)
            with torch.no_grad():
                start = torch.randn(*memory_bank_size, generator=torch.Generator().manual_seed(0))  # equal on all ranks
                self.memory_bank.storage.copy_(F.normalize(start, dim=1))
                self.memory_bank.fill.fill_(memory_bank_size[0])

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        for name, out in (("out0", out0), ("out1", out1)):
            checks.rows(name, out, ndim=2)
        checks.exact_shape("out1", out1, out0.shape)
        if self.memory_bank is None:
            return nt_xent(out0, out1, temperature=self.temperature, group=collectives.world() if self.gather_distributed else None)
        query, key = (F.normalize(out.to(self.memory_bank.storage.dtype), dim=1) for out in (out0, out1))
        loss = info_nce(query, key, self.memory_bank, temperature=self.temperature)
        if out0.requires_grad:
            self.memory_bank.push(out1)
        return loss
