"""impl="triton": the contractions of portable.py in Triton, each sampled row read once; scatter is a sort and PyTorch's own sum of runs."""

from functools import partial

import torch
from torch import Tensor

from ...._core import triton_runtime as runtime
from .. import contractions, portable

_TILE = 4096  # numbers of a tile of sampled rows: 32 registers of a thread, and as many for the sums
_WIDEST = 1024  # a statistic needs a row's score before its weight: the row stays in registers

scores = partial(contractions.scores, torch.ops.kdfast_triton)
pool = partial(contractions.pool, torch.ops.kdfast_triton)
scatter = portable.scatter


def missing() -> str | None:
    return runtime.missing()


def refuses(*, device_type: str = "cuda", dtype: torch.dtype = torch.float32, bank_dtype: torch.dtype = torch.float32) -> str | None:
    """Why the kernels cannot serve a call on this device type with these dtypes of query and bank (None: they can)."""
    return contractions.refuses_dtypes(dtype, bank_dtype) or runtime.refuses_device(device_type)


def statistic(
    query: Tensor, bank: Tensor, index: Tensor, offset: Tensor | None, shift: Tensor | None, pooled: bool
) -> tuple[Tensor, Tensor]:
    """As portable.statistic."""
    if query.shape[1] > _WIDEST or index.shape[1] == 0 or query.shape[1] == 0:
        return portable.statistic(query, bank, index, offset, shift, pooled)
    offset = None if offset is None else offset.contiguous()
    shift = None if shift is None else shift.reshape(-1).contiguous()
    query, bank, index = query.contiguous(), contractions.rows(bank), index.contiguous()
    value, out = torch.ops.kdfast_triton.gather_statistic(query, bank, index, offset, shift, pooled)
    return value, out


def gather_similarity(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    from . import kernels

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
    return runtime.joined(_parts(None, weights, bank, index, None, None, 0, True)[2])


def gather_statistic(
    query: Tensor, bank: Tensor, index: Tensor, offset: Tensor | None, shift: Tensor | None, pooled: bool
) -> tuple[Tensor, Tensor]:
    value, top, sums = _parts(query, None, bank, index, offset, shift, 1 if shift is None else 2, pooled)
    if shift is None:
        highest = top.amax(0)
        scale = torch.exp(top - torch.where(highest.isinf(), 0.0, highest))
        total = (scale * value).sum(0)
        sums = sums * (scale / torch.where(total == 0, 1.0, total))[..., None] if pooled else sums
        return highest + total.log(), runtime.joined(sums)
    return runtime.joined(value), runtime.joined(sums)


def _parts(query, weights, bank, index, offset, shift, statistic: int, pooled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """value and top [S, N] and sums [S, N, D] (without `pooled` [S, 0, D]) of the shares of each query's samples."""
    from . import kernels

    like = weights if query is None else query
    (n, slots), width = index.shape, bank.shape[1]
    tile = min(_WIDEST if statistic else 256, runtime.power_of_two(width))
    step = _TILE // tile
    shares = runtime.fill(-(-n // 4), slots, step, like.device)  # four programs a multiprocessor
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


runtime.register("gather_similarity", gather_similarity, contractions.scores_fake)
runtime.register("gather_weighted_sum", gather_weighted_sum, contractions.pool_fake)
runtime.register("gather_statistic", gather_statistic, contractions.statistic_fake)
