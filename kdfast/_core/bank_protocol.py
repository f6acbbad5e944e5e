"""What a loss takes as `bank`: a tensor of rows, or an object that knows its rows, fill, labels and bias."""

from typing import NamedTuple

import torch
from torch import Tensor


class BankRows(NamedTuple):
    rows: Tensor | None
    valid: "int | Tensor | None"
    labels: Tensor | None
    bias: Tensor | None
    panels: Tensor | None = None  # the rows' packed copy, which kernels may read in their place


def unpack(bank, *, valid=None, labels=None, bias=None, name: str = "bank") -> BankRows:
    """The rows [M, D] of `bank` with prefix count, labels [M] and bias [M].

    A Bank (kdfast.bank) has `as_rows()`, which returns its own BankRows; giving `valid`, `labels` or `bias`
    besides what it supplies is a ValueError. A tensor takes them as given. Of a bank on the CPU that is full there is no prefix.
    """
    if bank is None or isinstance(bank, Tensor):
        return BankRows(bank, valid, labels, bias)
    if not hasattr(bank, "as_rows"):
        raise TypeError(f"{name} must be a Tensor or a kdfast bank, got {type(bank).__name__}")
    own = bank.as_rows()
    for name, given, supplied in (("bank_valid", valid, own.valid), ("bank_labels", labels, own.labels), ("bank_bias", bias, own.bias)):
        if given is not None and supplied is not None:
            raise ValueError(f"{name} must not be given with a bank object that supplies its own")
    return BankRows(
        own.rows,
        valid if own.valid is None or _full(own) else own.valid,
        labels if own.labels is None else own.labels,
        bias if own.bias is None else own.bias,
        own.panels,
    )


def _full(own: BankRows) -> bool:
    """Whether the prefix is known to be all rows, without waiting for a device."""
    if type(own.valid) is not Tensor or not own.valid.is_cpu or own.valid.dim() or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active() and own.valid.item() == own.rows.shape[0]
