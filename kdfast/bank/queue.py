"""QueueBank: the last `capacity` keys, first in first out (MoCo's queue)."""

import torch
from torch import Tensor

from .._core import checks
from .._core.bank_protocol import BankRows
from . import kernels
from .base import Bank, unit_rows


class QueueBank(Bank):
    """A first-in first-out bank of `capacity` rows of width `dim` (He et al. 2020, MoCo, section 3.2).

    A batch of any size may be pushed: it wraps round the end, and of a batch larger than the capacity the last
    rows stay. `push` never waits for the device, except for the batch sizes of the other ranks; `len(bank)` and
    `bank.keys` do wait.

    The bank may be pushed between a loss's forward and its backward. All state (rows, labels, pointer, fill) is
    buffers in `state_dict`. Under DistributedDataParallel every rank pushes the keys of all ranks, in rank order,
    so the banks stay equal; inside your own module name them to DDP with `kdfast.bank.ddp_ignored`, lest it
    broadcast their buffers before each forward. A Distiller does so by itself.

    layout="packed" keeps, for a float32 bank of at least 16,384 rows on a CPU with bf16 products, a copy of the rows in bf16 and
    in the order in which these products read them, brought up to date row by row as keys are pushed. A contrastive loss whose
    products are in bf16 (autocast, precision="bf16") then converts and packs nothing: with 65,536 rows a step takes 0.8 to 0.9 of the
    time at 32 and 64 queries (docs/cpu-kernels.md). Smaller banks and 16-bit ones gain nothing by it and have no copy; other losses,
    float32 products, rows wider than 384 and compiled code read the rows. The copy takes 4 bytes for each of `dim` (rounded up to a
    multiple of 32) a row, as much as the rows. It is never saved: it is made when a loss first asks for it, and again once something
    other than a push has written to `storage` (`load_state_dict`, `.to()`, a change by hand, but not one by way of `.data` or
    NumPy, which PyTorch does not count). A bank in shared memory has none. On one thread results are those of layout="rows" to
    the bit.

    Args:
        capacity: number of rows, >= 1.
        dim: width of a row, >= 1.
        labels: keep an integer label with each row.
        dtype: dtype of the stored rows.
        normalize: l2-normalise each key as it is pushed, in float32.
        layout: "rows" (default), or "packed": with the copy above.
        gather: "auto" (default): the keys of all ranks when torch.distributed is initialised with several;
            None: this process's keys alone; or a torch.distributed group.

    Raises:
        ValueError, TypeError: a size below 1, a dtype that is not floating, an unknown `gather` or `layout`.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        *,
        labels: bool = False,
        dtype: torch.dtype = torch.float32,
        normalize: bool = True,
        layout: str = "rows",
        gather="auto",
    ) -> None:
        super().__init__(checks.count("capacity", capacity), checks.count("dim", dim), labels=labels, dtype=dtype, gather=gather)
        checks.choice("layout", layout, ("rows", "packed"))
        checks.flag("normalize", normalize)
        self.normalize, self.layout = normalize, layout
        self._copy: kernels.Packed | None = None
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))  # the slot the next row takes
        self.register_buffer("fill", torch.zeros((), dtype=torch.int64))  # number of slots written so far

    @property
    def capacity(self) -> int:
        return self.storage.shape[0]

    @torch.no_grad()
    def push(self, keys: Tensor, labels: Tensor | None = None, where: Tensor | None = None) -> None:
        """Append `keys` [n, dim] (any floating dtype), with `labels` [n] when the bank keeps them.

        where: [n] bool; rows where it is False are dropped and take no slot (padding, non-finite rows).

        Raises:
            ValueError, TypeError: wrong rank, width, device or dtype; labels missing or not wanted.
        """
        labels = self._checked(keys, labels)
        if where is not None and checks.real("where", where, shape=(len(keys),), device=keys.device).dtype != torch.bool:
            raise TypeError(f"where must be a bool tensor, got {where.dtype}")
        keys, labels, where = self._of_all_ranks(keys, labels, where)
        mine = (self.storage, self.pointer, self.fill, self.labels)
        if kernels.serve(self.storage, keys) and self.storage.is_contiguous():
            kernels.push(*mine, self._copy, keys, labels, where, self.normalize)
        else:
            self._push(keys, labels, where)

    def _push(self, keys: Tensor, labels: Tensor | None, where: Tensor | None) -> None:
        keys = (unit_rows(keys) if self.normalize else keys).to(self.storage.dtype)
        n, capacity = len(keys), self.capacity
        window = torch.arange(min(n, capacity), device=keys.device)
        if where is None:
            total = torch.full_like(self.fill, n)
        else:  # kept rows first, in their order: their number is known to the device alone
            order = torch.argsort(~where, stable=True)
            keys, labels = keys[order], None if labels is None else labels[order]
            total = where.sum()
        # Row r of the batch belongs in slot (pointer + r) mod capacity; of more than `capacity` rows the last stay.
        # A window of min(n, capacity) distinct slots covers them; slots past the last row get their own content.
        row = window + (total - capacity).clamp(min=0)
        slot = (self.pointer + row) % capacity
        new = row < total
        row = row.clamp(max=max(n - 1, 0))
        self.storage.index_copy_(0, slot, torch.where(new[:, None], keys[row], self.storage[slot]))
        if labels is not None:
            self.labels.index_copy_(0, slot, torch.where(new, labels[row], self.labels[slot]))
        self.pointer.copy_((self.pointer + total) % capacity)
        self.fill.copy_((self.fill + total).clamp(max=capacity))

    def _packed(self) -> Tensor | None:
        """The packed copy, in step with the rows; None where there is none."""
        if self.layout == "rows" or torch.compiler.is_compiling():
            return None
        kept = kernels.serve(self.storage) and kernels.worthwhile(self.storage)
        self._copy = kernels.packed(self.storage, self._copy) if kept else None
        return None if self._copy is None else self._copy.panels

    def _apply(self, fn, recurse=True):
        self._copy = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_copy": None}

    @property
    def keys(self) -> Tensor:
        """The rows written so far, [len(self), dim], in slot order. Waits for the device."""
        return self.storage[: len(self)]

    def __len__(self) -> int:
        return int(self.fill)

    def as_rows(self) -> BankRows:
        """The whole storage with the fill count as a 0-d tensor: what a loss takes."""
        return BankRows(self.storage, self.fill, self.labels, None, self._packed())

    def extra_repr(self) -> str:
        labels, normalize, layout = self.labels is not None, self.normalize, self.layout
        return f"capacity={self.capacity}, dim={self.storage.shape[1]}, {labels=}, {normalize=}, {layout=}"
