"""The short way of a plain call: the mean of the losses of whole matrices on the CPU (of distillation, any reduction), and nothing else.

Finding out what a call gives, checking it and choosing how to compute takes as long as the arithmetic of 64 queries and 256 keys. A plain
call is seen to be one by what little it has; any other, and one with something wrong, is left (None) to the general way, which
says what that is. Both end in the same ops.
"""

import functools

import torch
from torch import Tensor

from ..._core import bank_protocol, impls
from . import cpu, distillation, info_nce, matching
from .apply import transformed
from .arguments import Compute, Spec
from .plain_functions import DistillationLosses, InfoNceMean, WassersteinMean
from .unit_length import unit_length

_TYPES = (Tensor, torch.nn.Parameter)
_PRODUCTS = {torch.float32: "ieee", torch.float16: "ieee", torch.bfloat16: "bf16"}


def info_nce_mean(
    query: Tensor,
    positive: Tensor | None,
    bank,
    temperature: float | Tensor,
    targets: Tensor | None,
    smoothing: float,
    labels: tuple[Tensor | None, Tensor | None],
    attract: bool,
    normalize: bool,
) -> Tensor | None:
    """The mean InfoNCE loss of query and positive [N, D] against the rows [M, D] of a bank; None: against each other's positives.

    targets: int64 [N], the positives' rows of the bank, in place of positive.
    labels: int64 [N] and [M], None within a batch. Rows of the bank are left out for their class or, with `attract`, attract it, beside
    the positive or without one.
    """
    keys = positive if bank is None else _rows(bank)
    query_labels, key_labels = labels
    alone = attract and positive is None and targets is None
    if positive is None:
        whole = (alone or targets is not None) and _plain(query, keys)
    else:
        whole = targets is None and _plain(query, positive, keys) and positive.shape == query.shape
    if not (whole and keys.shape[1] == query.shape[1] and 0 <= smoothing < 1):
        return None
    if targets is not None and (attract or not _whole_index(targets, len(query))):
        return None
    if query_labels is None:
        labelled = key_labels is None and not attract
    elif bank is None:
        labelled, key_labels = key_labels is None and attract and _whole_index(query_labels, len(query)), query_labels
    else:
        labelled = type(bank) in _TYPES and _whole_index(query_labels, len(query)) and _whole_index(key_labels, len(keys))
    if not labelled or (attract and smoothing):
        return None
    number = _number(temperature)
    if not _usual(number):
        return None
    if normalize:
        query, positive = unit_length(query), None if positive is None else unit_length(positive)
        keys = positive if bank is None else unit_length(keys)
    if bank is None and not attract:
        scale = 1.0 / number if number is temperature else temperature.reciprocal()
        call = matching.Call(None, True, torch.is_grad_enabled(), None, None, cpu.KERNELS, cpu.product_number(None, query), True, smoothing)
        return matching.fused_losses(call, query, positive, scale, None)
    learnt = None if number is temperature else temperature
    pull = torch.is_grad_enabled() and (query.requires_grad or (learnt is not None and learnt.requires_grad))
    call = _info_nce_call(len(query), query.dtype, pull, 1.0 / number, smoothing, attract)
    if targets is None:  # within a batch a sample's own positive is of its class as others' are
        return InfoNceMean.run(call, query, keys, None if bank is None else positive, learnt, None, query_labels, key_labels)
    try:
        return InfoNceMean.run(call, query, keys, None, learnt, targets.unsqueeze(1), query_labels, key_labels)
    except RuntimeError:  # the op has looked at the targets, where they may point
        return None


@functools.lru_cache
def _info_nce_call(count: int, dtype: torch.dtype, pull: bool, scale: float, smoothing: float, attract: bool) -> info_nce.Call:
    products = _PRODUCTS[dtype]
    spec = Spec("cpu", Compute(dtype, products), torch.Size((count,)), (1, count))
    return info_nce.Call(spec, True, True, pull, cpu.KERNELS.products[products], scale, smoothing, attract)


def distillation_losses(
    student: Tensor,
    bank,
    teacher: Tensor,
    teacher_bank,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    kl: bool,
    own: bool,
    reduction: str,
) -> Tensor | None:
    """`distillation_rows`, reduced, of student [N, Ds] and a bank [M, Ds] under teacher [N, Dt] and another [M, Dt] (None: the same).

    own: the teacher's rows are one more candidate of each row, on both sides.
    """
    keys, teacher_keys = _rows(bank), None if teacher_bank is None else _rows(teacher_bank)
    theirs = keys if teacher_keys is None else teacher_keys
    if not _plain(student, keys, teacher, theirs):
        return None
    number, teacher_number = _number(temperature), _number(teacher_temperature)
    if not (_usual(number) and _usual(teacher_number)) or (teacher_number is not teacher_temperature and teacher_temperature.requires_grad):
        return None
    if own and number is not temperature:
        return None
    count = len(student)
    if len(teacher) != count or len(theirs) != len(keys) or keys.shape[1] != student.shape[1] or theirs.shape[1] != teacher.shape[1]:
        return None
    if own and teacher.shape != student.shape:
        return None
    if teacher.requires_grad or (teacher_keys is not None and teacher_keys.requires_grad):
        return None
    if not (student.is_contiguous() and keys.is_contiguous() and teacher.is_contiguous() and theirs.is_contiguous()):
        return None
    scales = 1.0 / number, 1.0 / teacher_number
    call = distillation.Call(kl, reduction != "none", None, None, cpu.product_number(None, student), *scales)
    other = None if teacher_keys is keys else teacher_keys
    losses = DistillationLosses.run(call, student, keys, teacher, other, own, None if number is temperature else temperature)
    return losses * count if reduction == "sum" else losses


def wasserstein_mean(query: Tensor, positive: Tensor, bank, temperature: float) -> Tensor | None:
    """The mean of query_i.(mean of the bank's rows - positive_i) / temperature, of query and positive [N, D] and a bank [M, D]."""
    keys = _rows(bank)
    if not (_plain(query, positive, keys) and positive.shape == query.shape and keys.shape[1] == query.shape[1] and _usual(temperature)):
        return None
    if torch.is_grad_enabled() and (positive.requires_grad or keys.requires_grad):
        return None
    return WassersteinMean.run(query, positive, keys, 1.0 / temperature)


def matching_mean(
    x: Tensor, y: Tensor, scale: float | Tensor, shift: float | Tensor | None = None, smoothing: float = 0.0
) -> Tensor | None:
    """The mean of `clip_rows` or, with a shift, of `sigmoid_rows` of x and y [N, D]."""
    numbers = (_usual(scale) or _scalar(scale)) and (shift is None or (type(shift) is float and abs(shift) <= 1e3) or _scalar(shift))
    if not (numbers and _plain(x, y) and x.shape == y.shape):
        return None
    call = matching.Call(None, True, torch.is_grad_enabled(), None, None, cpu.KERNELS, cpu.product_number(None, x), False, smoothing)
    return matching.fused_losses(call, x, y, scale, shift)


def _rows(bank) -> Tensor | None:
    """All rows of a bank that has no more to say of them."""
    if type(bank) in _TYPES or not hasattr(bank, "as_rows"):
        return bank
    given = bank_protocol.unpack(bank)
    return given.rows if given.valid is given.bias is given.panels is None else None


def _number(x):
    """A scalar's number; anything else as it is."""
    return x.item() if _scalar(x) else x


def _usual(number) -> bool:
    return type(number) is float and 1e-3 <= number <= 1e3


def _scalar(x) -> bool:
    return type(x) in _TYPES and x.is_cpu and x.layout == torch.strided and x.dim() == 0 and x.dtype == torch.float32


def _plain(*matrices: Tensor) -> bool:
    """Whether they are dense CPU matrices of one dtype, with something in them, that kernels are here for, outside modes and transforms."""
    first = matrices[0]
    dtype = first.dtype if type(first) in _TYPES else None
    if dtype not in cpu.DTYPES or impls.DEFAULT is not None or cpu.missing() is not None:
        return False
    if transformed() or impls.forward_mode() or torch.is_autocast_enabled("cpu"):
        return False
    return all([type(x) in _TYPES and x.dtype == dtype and _dense_matrix(x) for x in matrices])


def _whole_index(x, count: int) -> bool:
    return type(x) is Tensor and x.is_cpu and x.layout == torch.strided and x.dtype == torch.int64 and x.shape == (count,)


def _dense_matrix(x: Tensor) -> bool:
    return x.is_cpu and x.layout == torch.strided and not x.is_nested and x.dim() == 2 and x.numel() > 0
