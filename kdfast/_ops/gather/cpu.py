"""impl="cpu": the contractions of portable.py by fused C++ kernels (csrc/cpu/gather), each sampled row read once."""

import torch
from torch import Tensor

from kdfast._core import extension

from . import portable

__all__ = ["missing", "pool", "refuses", "scatter", "scores", "statistic"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def missing() -> str | None:
    """Why the kernels are not on this machine (None: they are)."""
    return extension.missing_cpu()


def refuses(*, device_type: str = "cpu", dtype: torch.dtype = torch.float32, bank_dtype: torch.dtype = torch.float32) -> str | None:
    """Why they cannot serve a call on this device type with these dtypes of query and bank (None: they can)."""
    if device_type != "cpu":
        return f"it runs on CPU tensors, these are on {device_type}"
    for given in (dtype, bank_dtype):
        if given not in DTYPES:
            return f"it takes float32, bfloat16 or float16, not {given}"
    return None


def scores(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """query [N, D] float32, bank [M, D], index [N, K] int64 -> z_nk = q_n . k_{index_nk}, [N, K] float32.

    RuntimeError for an index outside the bank.
    """
    return torch.ops.kdfast.gather_similarity(query.contiguous(), _rows(bank), index.contiguous())


def pool(weights: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """weights [N, K] float32, bank [M, D], index [N, K] int64 -> o_n = sum_k w_nk k_{index_nk}, [N, D] float32."""
    return torch.ops.kdfast.gather_weighted_sum(weights.contiguous(), _rows(bank), index.contiguous())


def statistic(
    query: Tensor, bank: Tensor, index: Tensor, offset: Tensor | None, shift: Tensor | None, pooled: bool
) -> tuple[Tensor, Tensor]:
    """As portable.statistic, of a query [N, D] float32; scores and weights [N, K] are never in the order of `index`."""
    if index.shape[1] == 0 or query.shape[1] == 0:
        return portable.statistic(query, bank, index, offset, shift, pooled)
    offset = None if offset is None else offset.contiguous()
    shift = None if shift is None else shift.reshape(-1)
    return torch.ops.kdfast.gather_statistic(query.contiguous(), _rows(bank), index.contiguous(), offset, shift, pooled)


def scatter(weights: Tensor, query: Tensor, index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """weights [N, K] and query [N, D] float32, index [N, K] int64 -> h_m = sum over (n, k): index_nk = m of w_nk q_n, [size, D]."""
    return torch.ops.kdfast.gather_scatter(weights.contiguous(), query.contiguous(), index.contiguous(), size, dtype)


def _rows(bank: Tensor) -> Tensor:
    return bank if bank.stride(1) == 1 else bank.contiguous()


def _fake_scores(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    return query.new_empty(index.shape)


def _fake_pool(weights: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    return weights.new_empty(index.shape[0], bank.shape[1])


def _fake_statistic(
    query: Tensor, bank: Tensor, index: Tensor, offset: Tensor | None, shift: Tensor | None, pooled: bool
) -> tuple[Tensor, Tensor]:
    return query.new_empty(index.shape[0]), query.new_empty(index.shape[0] if pooled else 0, bank.shape[1])


def _fake_scatter(weights: Tensor, query: Tensor, index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return query.new_empty(size, query.shape[1], dtype=dtype)


if missing() is None:
    torch.library.register_fake("kdfast::gather_similarity", _fake_scores)
    torch.library.register_fake("kdfast::gather_weighted_sum", _fake_pool)
    torch.library.register_fake("kdfast::gather_statistic", _fake_statistic)
    torch.library.register_fake("kdfast::gather_scatter", _fake_scatter)
