"""impl="cpu": the contractions of portable.py by fused C++ kernels (csrc/cpu/gather), each sampled row read once."""

from functools import partial

import torch
from torch import Tensor

from kdfast._core import extension

from . import contractions, portable

__all__ = ["missing", "pool", "refuses", "scatter", "scores", "statistic"]

scores = partial(contractions.scores, torch.ops.kdfast)
pool = partial(contractions.pool, torch.ops.kdfast)


def missing() -> str | None:
    """Why the kernels are not on this machine (None: they are)."""
    return extension.missing_cpu()


def refuses(*, device_type: str = "cpu", dtype: torch.dtype = torch.float32, bank_dtype: torch.dtype = torch.float32) -> str | None:
    """Why they cannot serve a call on this device type with these dtypes of query and bank (None: they can)."""
    if device_type != "cpu":
        return f"it runs on CPU tensors, these are on {device_type}"
    return contractions.refuses_dtypes(dtype, bank_dtype)


def statistic(
    query: Tensor, bank: Tensor, index: Tensor, offset: Tensor | None, shift: Tensor | None, pooled: bool
) -> tuple[Tensor, Tensor]:
    """As portable.statistic, of a query [N, D] float32; scores and weights [N, K] are never in the order of `index`."""
    if index.shape[1] == 0 or query.shape[1] == 0:
        return portable.statistic(query, bank, index, offset, shift, pooled)
    offset = None if offset is None else offset.contiguous()
    shift = None if shift is None else shift.reshape(-1)
    return torch.ops.kdfast.gather_statistic(query.contiguous(), contractions.rows(bank), index.contiguous(), offset, shift, pooled)


def scatter(weights: Tensor, query: Tensor, index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """weights [N, K] and query [N, D] float32, index [N, K] int64 -> h_m = sum over (n, k): index_nk = m of w_nk q_n, [size, D]."""
    return torch.ops.kdfast.gather_scatter(weights.contiguous(), query.contiguous(), index.contiguous(), size, dtype)


def _fake_scatter(weights: Tensor, query: Tensor, index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return query.new_empty(size, query.shape[1], dtype=dtype)


if missing() is None:
    torch.library.register_fake("kdfast::gather_similarity", contractions.scores_fake)
    torch.library.register_fake("kdfast::gather_weighted_sum", contractions.pool_fake)
    torch.library.register_fake("kdfast::gather_statistic", contractions.statistic_fake)
    torch.library.register_fake("kdfast::gather_scatter", _fake_scatter)
