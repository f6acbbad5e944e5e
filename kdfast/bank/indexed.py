"""IndexedBank: one row a sample of the data set, moved towards each new key (Wu et al. 2018; CRD, Tian et al. 2020)."""

import math

import torch
from torch import Tensor

from .._core import checks
from .._core.bank_protocol import BankRows
from .base import Bank, unit_rows

_LOAD_BLOCK = 1 << 16  # rows normalised at a time, so that a memory-mapped source is never copied whole


class IndexedBank(Bank):
    """`size` unit rows of width `dim`, row y belonging to sample y of the data set.

    `update` moves rows by momentum: M[y] <- normalise(m M[y] + (1 - m) v), in float32. Like a QueueBank it may be
    updated between a loss's forward and its backward, is all buffers, and stays equal over ranks; inside your own
    module name it to DDP with `kdfast.bank.ddp_ignored`.

    Args:
        size: number of rows, >= 1.
        dim: width of a row, >= 1.
        momentum: m in [0, 1]: how much of the old row stays.
        labels: keep an integer label with each row.
        init: "uniform": entries from U(-1/sqrt(dim/3), 1/sqrt(dim/3)), rows not normalised (as in CRD); "empty":
            rows carry bias -inf, so no loss admits them, and take their first key whole.
        dtype: dtype of the stored rows.
        gather: as in QueueBank.
        generator: torch.Generator of the uniform start.

    Raises:
        ValueError, TypeError: a size below 1, momentum outside [0, 1], an unknown `init` or `gather`.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        momentum: float = 0.5,
        labels: bool = False,
        init: str = "uniform",
        dtype: torch.dtype = torch.float32,
        gather="auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(checks.count("size", size), checks.count("dim", dim), labels=labels, dtype=dtype, gather=gather)
        checks.choice("init", init, ("uniform", "empty"))
        checks.nonnegative_number("momentum", momentum)
        if momentum > 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        self.momentum = momentum
        self.register_buffer("filled", torch.zeros(size, dtype=torch.bool) if init == "empty" else None)
        if init == "uniform":
            bound = math.sqrt(3 / dim)
            self.storage.uniform_(-bound, bound, generator=generator)

    @torch.no_grad()
    def update(self, index: Tensor, keys: Tensor, labels: Tensor | None = None) -> None:
        """Move the rows `index` [n] towards `keys` [n, dim] (with `labels` [n] when the bank keeps them).

        Keys enter the mean as they are: normalise them for both terms to weigh as CRD's do. Where an index comes
        twice the last key counts alone (ranks in order), on every device. Never waits for the device, except for
        the batch sizes of the other ranks.

        Raises:
            ValueError, TypeError: wrong rank, width, device or dtype; labels missing or not wanted.
            IndexError: an index outside [0, size), on the CPU.
        """
        labels = self._checked(keys, labels)
        index = checks.integral("index", index, shape=(len(keys),), device=keys.device).contiguous()
        checks.index_range("index", index, len(self))
        index, keys, labels = self._of_all_ranks(index, keys, labels)
        ascending, order = torch.sort(index, stable=True)
        last = order[torch.searchsorted(ascending, index, right=True) - 1]  # each row's last namesake: all duplicates write one value
        unit = unit_rows(keys)  # also fixes the dtype of the arithmetic
        old = self.storage[index].to(unit.dtype)
        moved = unit_rows(self.momentum * old + (1 - self.momentum) * keys[last].to(unit.dtype))
        if self.filled is not None:
            moved = torch.where(self.filled[index][:, None], moved, unit[last])
            self.filled.index_fill_(0, index, True)
        self.storage.index_copy_(0, index, moved.to(self.storage.dtype))
        if labels is not None:
            self.labels.index_copy_(0, index, labels[last])

    @torch.no_grad()
    def load_(self, features: Tensor, labels: Tensor | None = None) -> "IndexedBank":
        """Replace every row by the normalised rows of `features` [size, dim] (any device, floating dtype), and return self.

        Raises:
            ValueError, TypeError: wrong shape or dtype; labels missing or not wanted.
        """
        checks.rows("features", features, ndim=2)
        checks.exact_shape("features", features, tuple(self.storage.shape))
        labels = self._checked_labels(labels, len(self))
        for start in range(0, len(self), _LOAD_BLOCK):
            block = slice(start, start + _LOAD_BLOCK)
            self.storage[block].copy_(unit_rows(features[block]))
        if labels is not None:
            self.labels.copy_(labels)
        if self.filled is not None:
            self.filled.fill_(True)
        return self

    def __len__(self) -> int:
        """The number of rows, written or not."""
        return self.storage.shape[0]

    def as_rows(self) -> BankRows:
        """All rows; with init="empty", bias [size] is -inf for rows not yet written: what a loss takes."""
        bias = None
        if self.filled is not None:
            zero = torch.zeros((), device=self.filled.device)
            bias = torch.where(self.filled, zero, zero - math.inf)
        return BankRows(self.storage, None, self.labels, bias)

    def extra_repr(self) -> str:
        return f"size={len(self)}, dim={self.storage.shape[1]}, momentum={self.momentum}, labels={self.labels is not None}"
