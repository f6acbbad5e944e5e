"""From what a caller gives to one batched problem: checks, broadcasting of the bank's side, the dtype products are formed in."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..._core import checks, dtypes, impls, precision
from . import exclusions


class Compute(NamedTuple):
    """How products of the operands are formed."""

    dtype: torch.dtype  # that operands are rounded to, before they are multiplied in the accumulator's
    products: str  # "ieee", "tf32", "bf16x3" or "bf16": what a kernel may make of float32 operands
    panels: Tensor | None = None  # the keys' packed copy (kdfast.QueueBank), which a kernel may read in their place: the result is the same


class Spec(NamedTuple):
    """What a problem is beside its tensors."""

    impl: str
    compute: Compute
    rows: torch.Size  # [*B, N]
    lead: tuple[int, int]  # [B, N] with one batch dimension: B is 1 where all of the bank's side is shared, the whole batch else

    def per_row(self, x: Tensor | None) -> Tensor | None:
        """[*B, N, ...] as [B, N, ...]."""
        return None if x is None else x.reshape(self.lead + x.shape[len(self.rows) :])

    def per_key(self, x: Tensor | None, own: int) -> Tensor | None:
        """[*B, ...], or `own` dimensions that the whole batch shares, as [B, ...], the latter with stride 0."""
        if x is None:
            return None
        return x.expand(self.lead[:1] + x.shape) if x.dim() == own else x.reshape(self.lead[:1] + x.shape[len(self.rows) - 1 :])


class Tensors(NamedTuple):
    """A problem's tensors, with the leading dimensions that the caller gave, or with one (`folded`)."""

    query: Tensor  # [*B, N, D]
    keys: Tensor  # [M, D] or [*B, M, D]
    scale: Tensor  # [*B, N]
    bias: Tensor | None  # [M] or [*B, M]
    start_logit: Tensor | None  # [*B, N]
    values: Tensor | None  # [M, Dv] or [*B, M, Dv]
    start_value: Tensor | None  # [*B, N, Dv]
    query_labels: Tensor | None  # [*B, N]
    key_labels: Tensor | None  # [M] or [*B, M]
    key_index: Tensor | None  # [*B, N, E]
    limit: Tensor | None  # [*B, N]
    valid: Tensor | None  # [] or [*B]

    def folded(self, spec: Spec) -> "Tensors":
        if len(spec.rows) == 1:
            return Tensors(*[None if x is None else x.unsqueeze(0) for x in self])
        query, keys, scale, bias, start_logit, values, start_value, query_labels, key_labels, key_index, limit, valid = self
        row, key = spec.per_row, spec.per_key
        return Tensors(
            row(query), key(keys, 2), row(scale), key(bias, 1), row(start_logit), key(values, 2), row(start_value),
            row(query_labels), key(key_labels, 1), row(key_index), row(limit), key(valid, 0),
        )  # fmt: skip


class Problem(NamedTuple):
    spec: Spec
    tensors: Tensors


def problem(query, keys, scale, values, bias, start, exclude, valid, precision_name, impl, panels=None) -> Problem:
    """Checks, and the `checked_problem`. `exclude`: rules, or Rules, already checked."""
    checks.rows("query", query)
    batch = query.shape[:-2]
    _bank_side("keys", keys, query, batch)
    checks.same_width("keys", keys, "query", query)
    count = keys.shape[-2]
    if count == 0:
        raise ValueError(f"keys must have at least 1 row, got shape {tuple(keys.shape)} (an unfilled bank is valid=0)")
    if values is not None:
        _bank_side("values", values, query, batch)
        if values.shape[-2] != count:
            raise ValueError(f"values must have a row for each of the {count} keys, got shape {tuple(values.shape)}")
    bias = None if bias is None else key_bias(bias, query, keys)
    return checked_problem(query, keys, scale, values, bias, start, exclude, valid, precision_name, impl, panels)


def checked_problem(query, keys, scale, values, bias, start, exclude, valid, precision_name, impl, panels=None) -> Problem:
    """Of matrices and a bias that fit each other: the accumulator's dtype for what is not a matrix, and the implementation."""
    *batch, rows, _ = query.shape
    acc = dtypes.accumulator(query.dtype)
    scale = row_parameter("scale", scale, query)
    bias = None if bias is None else bias.to(acc)
    compute = how_to_compute(query, precision_name, panels)
    start_logit = start_value = None
    if start is not None:
        start_logit, start_value = _start(start, query, keys if values is None else values, acc, compute.dtype)
    rules = exclude if isinstance(exclude, exclusions.Rules) else exclusions.flatten(exclude, query, keys, acc)
    valid = None if valid is None else prefix_length(valid, query, keys, batch)

    facts = {"device_type": query.device.type, "dtype": compute.dtype, "stored": query.dtype, "width": query.shape[-1]}
    facts |= {"value_width": None if values is None else values.shape[-1]}
    impl = impls.choose("similarity_softmax", impl, **facts)
    lead = (1, rows)
    if batch:
        bank = ((keys, 2), (bias, 1), (values, 2), (rules.key_labels, 1), (valid, 0))  # with their dimensions when shared
        shared = all(x is None or x.dim() == own for x, own in bank)
        lead = (1, query.shape[:-1].numel()) if shared else (query.shape[:-2].numel(), rows)
    tensors = Tensors(query, keys, scale, bias, start_logit, values, start_value, *rules, valid)
    return Problem(Spec(impl, compute, query.shape[:-1], lead), tensors)


def _bank_side(name: str, x, query: Tensor, batch: torch.Size) -> None:
    checks.rows(name, x)
    if x.dim() != 2 and x.shape[:-2] != batch:
        raise ValueError(f"{name} must be [M, D] or have the leading dimensions {tuple(batch)} of query, got shape {tuple(x.shape)}")
    checks.alike(name, x, "query", query)


def key_bias(bias, query: Tensor, keys: Tensor) -> Tensor:  # [M] or [*B, M], in the accumulator's dtype
    count = keys.shape[-2]
    checks.floating("bias", bias)
    checks.exact_shape("bias", bias, (count,) if bias.dim() == 1 else (*query.shape[:-2], count))
    checks.alike("bias", bias, "query", query, dtype=False)
    return bias.to(dtypes.accumulator(query.dtype))


def row_parameter(name: str, x, query: Tensor) -> Tensor:
    """`x`, a float or a tensor [], [N] or [*B, N], as [*B, N] in the accumulator's dtype."""
    rows, acc = query.shape[:-1], dtypes.accumulator(query.dtype)
    if not isinstance(x, Tensor):
        checks.number(name, x)
        checks.in_range(name, x, acc)
        return query.new_full(rows, x, dtype=acc)
    checks.floating(name, x)
    checks.alike(name, x, "query", query, dtype=False)
    if x.dim() and tuple(x.shape) not in (tuple(rows), tuple(rows[-1:])):
        raise ValueError(f"{name} must be a float, 0-d, or have shape {tuple(rows)} or {tuple(rows[-1:])}, got {tuple(x.shape)}")
    return x.to(acc).expand(rows).contiguous()


def _start(start, query: Tensor, values: Tensor, acc: torch.dtype, compute: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if not isinstance(start, tuple) or len(start) != 2:
        raise TypeError(f"start must be a tuple (logit, value), got {type(start).__name__}")
    logit, value = start
    checks.floating("start logit", logit)
    checks.exact_shape("start logit", logit, query.shape[:-1])
    checks.alike("start logit", logit, "query", query, dtype=False)
    if value is not None:
        checks.floating("start value", value)
        checks.exact_shape("start value", value, (*query.shape[:-1], values.shape[-1]))
        checks.alike("start value", value, "query", query, dtype=False)
    return logit.to(acc), None if value is None else value.to(compute)


def prefix_length(valid, query: Tensor, keys: Tensor, batch: list[int]) -> Tensor:  # [] or [*B] int64
    valid = checks.prefix("valid", valid, keys.shape[-2], query.device, tuple(batch))
    return valid if isinstance(valid, Tensor) else torch.full((), int(valid), dtype=torch.int64, device=query.device)


def rounded(precision_name: str | None, *matrices: Tensor | None) -> tuple[Tensor | None, ...]:
    """The matrices in the dtype that their products are formed from, for losses that compare levels from kernels with levels of their own:
    beside unrounded ones a loss near 0 would be what rounding took from the levels."""
    return tuple(None if x is None else x.to(how_to_compute(x, precision_name).dtype) for x in matrices)


def how_to_compute(query: Tensor, precision_name: str | None, panels: Tensor | None = None) -> Compute:
    dtype, device_type = query.dtype, query.device.type
    name = precision.resolve(precision_name, device_type)
    if dtype == torch.float64:
        return Compute(dtype, "ieee", panels)
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    elif name == "bf16" and dtype == torch.float32:
        dtype = torch.bfloat16
    return Compute(dtype, "bf16" if dtype == torch.bfloat16 else "ieee" if dtype == torch.float16 else name, panels)
