"""impl="triton": the contractions of portable.py in Triton, each sampled row read once; scatter is a sort and PyTorch's own sum of runs."""

import torch
from torch import Tensor

from ..._core import triton_runtime as runtime
from . import portable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 4096  # numbers of a tile of sampled rows: 32 registers of a thread, and as many for the sums
_WIDEST = 1024  # a statistic needs a row's score before its weight: the row stays in registers

scatter = portable.scatter


def missing() -> str | None:
    return runtime.missing()


def refuses(*, device_type: str = "cuda", dtype: torch.dtype = torch.float32, bank_dtype: torch.dtype = torch.float32) -> str | None:
    """Why the kernels cannot serve a call on this device type with these dtypes of query and bank (None: they can)."""
    for given in (dtype, bank_dtype):
        if given not in DTYPES:
            return f"it takes float32, bfloat16 or float16, not {given}"
    return runtime.refuses_device(device_type)


def scores(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """query [N, D] float32, bank [M, D], index [N, K] int64 -> z_nk = q_n . k_{index_nk}, [N, K] float32.

    NaN for an index outside the bank.
    """
    return torch.ops.kdfast_triton.gather_similarity(query.contiguous(), _rows(bank), index.contiguous())


def pool(weights: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """weights [N, K] float32, bank [M, D], index [N, K] int64 -> o_n = sum_k w_nk k_{index_nk}, [N, D] float32."""
    return torch.ops.kdfast_triton.gather_weighted_sum(weights.contiguous(), _rows(bank), index.contiguous())


def statistic(
    query: Tensor, bank: Tensor, index: Tensor, offset: Tensor | None, shift: Tensor | None, pooled: bool
) -> tuple[Tensor, Tensor]:
    """As portable.statistic."""
    if query.shape[1] > _WIDEST or index.shape[1] == 0 or query.shape[1] == 0:
        return portable.statistic(query, bank, index, offset, shift, pooled)
    offset = None if offset is None else offset.contiguous()
    shift = None if shift is None else shift.reshape(-1).contiguous()
    value, out = torch.ops.kdfast_triton.gather_statistic(query.contiguous(), _rows(bank), index.contiguous(), offset, shift, pooled)
    return value, out


def _rows(bank: Tensor) -> Tensor:
    return bank if bank.stride(1) == 1 else bank.contiguous()


def gather_similarity(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    from . import triton_kernels as kernels

    (n, slots), width = index.shape, bank.shape[1]
    out = query.new_empty(n, slots)
    depth = min(256, runtime.power_of_two(width))
    step = _TILE // depth
    if out.numel():
        kernels.scores[(-(-slots // step) * n,)](
            query, bank, index, out, bank.stride(0), len(bank), slots, width, SLOTS=step, DEPTH=depth, num_warps=4
        )
    return out


def gather_weighted_sum(weights: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    return _parts(None, weights, bank, index, None, None, 0, True)[2].sum(0)


def gather_statistic(
    query: Tensor, bank: Tensor, index: Tensor, offset: Tensor | None, shift: Tensor | None, pooled: bool
) -> tuple[Tensor, Tensor]:
    value, top, sums = _parts(query, None, bank, index, offset, shift, 1 if shift is None else 2, pooled)
    if shift is None:
        highest = top.amax(0)
        scale = torch.exp(top - torch.where(highest.isinf(), 0.0, highest))
        total = (scale * value).sum(0)
        sums = sums * (scale / torch.where(total == 0, 1.0, total))[..., None] if pooled else sums
        return highest + total.log(), sums.sum(0)
    return value.sum(0), sums.sum(0)


def _parts(query, weights, bank, index, offset, shift, statistic: int, pooled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """value and top [S, N] and sums [S, N, D] (without `pooled` [S, 0, D]) of the shares of each query's samples."""
    from . import triton_kernels as kernels

    like = weights if query is None else query
    (n, slots), width = index.shape, bank.shape[1]
    tile = min(_WIDEST if statistic else 256, runtime.power_of_two(width))
    step = _TILE // tile
    shares = runtime.splits(-(-n // 4), slots, step, like.device)  # four programs a multiprocessor
    value, top = like.new_empty(shares, n), like.new_empty(shares, n)
    sums = like.new_empty(shares, n if pooled else 0, width)
    if n and width:
        unread = value
        kernels.row_sums[(n, shares, -(-width // tile))](
            *(unread if x is None else x for x in (query, weights)), bank, index, *(unread if x is None else x for x in (offset, shift)),
            value, top, sums, bank.stride(0), 0 if shift is None or len(shift) == 1 else 1, len(bank), n, slots, width,
            runtime.share(slots, shares, step),
            STATISTIC=statistic, OFFSET=offset is not None, POOLED=pooled, SLOTS=step, WIDTH=tile, num_warps=4,
        )  # fmt: skip
    return value, top, sums


def _scores_fake(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    return query.new_empty(index.shape)


def _sum_fake(weights: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    return weights.new_empty(len(index), bank.shape[1])


def _statistic_fake(
    query: Tensor, bank: Tensor, index: Tensor, offset: Tensor | None, shift: Tensor | None, pooled: bool
) -> tuple[Tensor, Tensor]:
    return query.new_empty(len(index)), query.new_empty(len(index) if pooled else 0, bank.shape[1])


runtime.register("gather_similarity", gather_similarity, _scores_fake)
runtime.register("gather_weighted_sum", gather_weighted_sum, _sum_fake)
runtime.register("gather_statistic", gather_statistic, _statistic_fake)
