"""What both banks share: rows of fixed storage, normalisation in float32, and the other ranks' share of a push."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core import checks, collectives
from .._core.dtypes import accumulator


class Bank(nn.Module):
    """`storage` [rows, dim] and, with `labels`, `labels` [rows] (int64, -1 where nothing was written).

    `gather`: "auto" (all ranks of the default group, when there are several), None (this process alone) or a
    torch.distributed group.
    """

    def __init__(self, rows: int, dim: int, *, labels: bool, dtype: torch.dtype, gather) -> None:
        super().__init__()
        if dtype not in checks.FLOATING:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        checks.flag("labels", labels)
        if isinstance(gather, str) and gather != "auto":
            raise ValueError(f'gather must be "auto", None or a torch.distributed group, got {gather!r}')
        collectives.check_group(None if gather == "auto" else gather, "gather")
        self.gather = gather
        self.register_buffer("storage", torch.zeros(rows, dim, dtype=dtype))
        self.register_buffer("labels", torch.full((rows,), -1) if labels else None)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        return [name for name, _ in self.named_buffers()]

    def _checked(self, keys: Tensor, labels: Tensor | None) -> Tensor | None:
        """Labels as int64, after checking that `keys` and `labels` fit this bank."""
        checks.rows("keys", keys, ndim=2)
        if keys.shape[1] != self.storage.shape[1]:
            raise ValueError(f"keys must have the bank's width {self.storage.shape[1]}, got shape {tuple(keys.shape)}")
        checks.alike("keys", keys, "the bank", self.storage, dtype=False)
        return self._checked_labels(labels, len(keys), keys.device)

    def _checked_labels(self, labels: Tensor | None, count: int, device: torch.device | None = None) -> Tensor | None:
        if (labels is None) != (self.labels is None):
            needed = "must not be given: this bank was made with labels=False" if self.labels is None else "are needed: labels=True"
            raise ValueError(f"labels {needed}")
        return None if labels is None else checks.integral("labels", labels, shape=(count,), device=device)

    def _of_all_ranks(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Each tensor with the rows of every rank, in rank order."""
        if self.gather is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return tensors
        group = None if self.gather == "auto" else self.gather
        if torch.distributed.get_world_size(group) == 1:
            return tensors
        return tuple(None if t is None else collectives.all_gather_rows_no_grad(t, group)[0] for t in tensors)


def unit_rows(keys: Tensor) -> Tensor:
    """Rows of length 1, computed in float32 (float64 for float64); a row of zeros stays zero."""
    return F.normalize(keys.to(accumulator(keys.dtype)), dim=-1)


def ddp_ignored(module: nn.Module) -> list[str]:
    """Qualified names, inside `module`, of every bank's buffers.

    DistributedDataParallel broadcasts buffers from rank 0 before each forward. Set
    `module._ddp_params_and_buffers_to_ignore = kdfast.bank.ddp_ignored(module)` before wrapping `module`, and the
    banks, which `gather` keeps equal on all ranks, are left alone. `Distiller` does so by itself.
    """
    return [
        f"{path}.{name}" if path else name
        for path, child in module.named_modules()
        if isinstance(child, Bank)
        for name in child._ddp_params_and_buffers_to_ignore
    ]
