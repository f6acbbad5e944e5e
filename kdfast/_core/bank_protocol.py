"""What a loss takes as `bank`: a tensor of rows, or an object that knows its rows, fill, labels and bias."""

from typing import NamedTuple

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
    besides what it supplies is a ValueError. A tensor takes them as given.
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
        valid if own.valid is None else own.valid,
        labels if own.labels is None else own.labels,
        bias if own.bias is None else own.bias,
        own.panels,
    )
