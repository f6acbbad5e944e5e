"""The short way of a plain call: whole matrices on the CPU, and nothing unusual (plain_info_nce.py, plain_matching.py and so on).

Finding out what a call gives, checking it and choosing how to compute takes as long as the arithmetic of 64 queries and 256 keys. A plain
call is seen to be one by what little it has; any other, and one with something wrong, is left (None) to the general way, which
says what that is. Both end in the same ops.
"""

import torch
from torch import Tensor

from ..._core import bank_protocol, impls
from ..._core.reduction import NAMES as REDUCTIONS
from . import cpu
from .apply import transformed

_TYPES = (Tensor, torch.nn.Parameter)
PRODUCTS = {torch.float32: "ieee", torch.float16: "ieee", torch.bfloat16: "bf16"}  # how they are formed


def rows_of(bank) -> Tensor | None:
    """All rows of a bank that has no more to say of them."""
    if type(bank) in _TYPES or not hasattr(bank, "as_rows"):
        return bank
    given = bank_protocol.unpack(bank)
    return given.rows if given.valid is given.bias is given.panels is None else None


def filled_rows(bank, valid) -> tuple[Tensor | None, int | None]:
    """`rows_of`, and how many of them exist (None: all): as given or, of a QueueBank on the CPU that is not full, as it says."""
    if type(bank) in _TYPES or not hasattr(bank, "as_rows"):
        return bank, valid
    given = bank_protocol.unpack(bank, valid=valid)
    count = given.valid
    if type(count) is Tensor and count.is_cpu and count.dim() == 0 and not transformed():
        count = count.item()
    return (given.rows if given.bias is given.panels is None else None), count


def number_of(x):
    """A scalar's number; anything else as it is."""
    return x.item() if scalar(x) else x


def usual(number) -> bool:
    return type(number) is float and 1e-3 <= number <= 1e3


def scalar(x) -> bool:
    return type(x) in _TYPES and x.is_cpu and x.layout == torch.strided and x.dim() == 0 and x.dtype == torch.float32


def plain(*matrices: Tensor, batched: bool = False) -> bool:
    """Whether they are dense CPU matrices of one dtype, with something in them, that kernels are here for, outside modes and transforms.

    batched: they have further dimensions before these two.
    """
    first = matrices[0]
    if type(first) not in _TYPES or first.dtype not in cpu.DTYPES or impls.DEFAULT is not None or cpu.missing() is not None:
        return False
    if transformed() or impls.forward_mode() or torch.is_autocast_enabled("cpu"):
        return False
    dtype = first.dtype
    for x in matrices:
        if type(x) not in _TYPES or x.dtype is not dtype or not x.is_cpu or x.layout is not torch.strided or x.is_nested:
            return False
        if (x.dim() > 2) is not batched or x.dim() < 2 or x.numel() == 0:
            return False
    return True


def whole_index(x, count: int) -> bool:
    return type(x) is Tensor and x.is_cpu and x.layout == torch.strided and x.dtype == torch.int64 and x.shape == (count,)


def whole_rows(x, count: int) -> bool:
    """Whether it is a number for each of so many rows."""
    dense = type(x) in _TYPES and x.is_cpu and x.layout == torch.strided
    return dense and x.dtype == torch.float32 and x.shape == (count,) and x.is_contiguous()


def reducible(reduction, weight: Tensor | None, count: int) -> bool:
    return reduction in REDUCTIONS and (weight is None or (whole_rows(weight, count) and not weight.requires_grad))


def indexes_rows(x, count: int, rows: int) -> bool:
    """Whether it names one of so many rows, or -1, for each of a count."""
    if not whole_index(x, count):
        return False
    first, last = x.aminmax()
    return first.item() >= -1 and last.item() < rows
