"""The trilinear form T(w, q, k) = sum_nk w_nk q_n . k_{index_nk} differentiated: its three partial derivatives
are one another's derivatives, so three small Functions give every order. Row statistics of the scores follow.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from . import cpu, portable, statistics, triton

#: the contractions by name of implementation; each has scores, pool, scatter and statistic
FORMS = {"cpu": cpu, "triton": triton, "torch": portable}


class GatherScores(Function):
    """dT/dw: query [N, D], bank [M, D], index [N, K] -> [N, K]."""

    @staticmethod
    def forward(query, bank, index, impl: str):
        return FORMS[impl].scores(query, bank, index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.impl = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad):
        query, bank, index = ctx.saved_tensors
        return *_sums(ctx.needs_input_grad[:2], grad, query, bank, index, ctx.impl), None, None

    @staticmethod
    def vmap(info, in_dims, query, bank, index, impl):
        query, bank, index = _folded(info, in_dims[:3], query, bank, index, bank_at=1)
        return GatherScores.apply(query, bank, index, impl).unflatten(0, (info.batch_size, -1)), 0


class GatherPool(Function):
    """dT/dq: weights [N, K], bank [M, D], index [N, K] -> [N, D]."""

    @staticmethod
    def forward(weights, bank, index, impl: str):
        return FORMS[impl].pool(weights, bank, index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.impl = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad):
        weights, bank, index = ctx.saved_tensors
        if grad is None:
            return (None,) * 4
        grad = grad.contiguous()
        d_weights = GatherScores.apply(grad, bank, index, ctx.impl) if ctx.needs_input_grad[0] else None
        d_bank = ScatterRows.apply(weights, grad, index, len(bank), bank.dtype, ctx.impl) if ctx.needs_input_grad[1] else None
        return d_weights, d_bank, None, None

    @staticmethod
    def vmap(info, in_dims, weights, bank, index, impl):
        weights, bank, index = _folded(info, in_dims[:3], weights, bank, index, bank_at=1)
        return GatherPool.apply(weights, bank, index, impl).unflatten(0, (info.batch_size, -1)), 0


class ScatterRows(Function):
    """dT/dk: weights [N, K], query [N, D], index [N, K], size M -> [M, D] of `dtype`, the bank's."""

    @staticmethod
    def forward(weights, query, index, size, dtype, impl: str):
        return FORMS[impl].scatter(weights, query, index, size, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, _, ctx.impl = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad):
        weights, query, index = ctx.saved_tensors
        if grad is None:
            return (None,) * 6
        d_weights = GatherScores.apply(query, grad, index, ctx.impl) if ctx.needs_input_grad[0] else None
        d_query = GatherPool.apply(weights, grad, index, ctx.impl) if ctx.needs_input_grad[1] else None
        return d_weights, d_query, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, weights, query, index, size, dtype, impl):
        weights, query, index = _folded(info, in_dims[:3], weights, query, index)
        index = index + size * _batch(info, index)
        return ScatterRows.apply(weights, query, index, size * info.batch_size, dtype, impl).unflatten(0, (info.batch_size, size)), 0


def _sums(wanted, weights: Tensor | None, query: Tensor, bank: Tensor, index: Tensor, impl: str) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of query and bank, those of them that are wanted, for scores with upstream gradient `weights`."""
    if weights is None:
        return None, None
    d_query = GatherPool.apply(weights, bank, index, impl) if wanted[0] else None
    d_bank = ScatterRows.apply(weights, query, index, len(bank), bank.dtype, impl) if wanted[1] else None
    return d_query, d_bank


def _folded(info, in_dims, *tensors: Tensor, bank_at: int | None = None) -> list[Tensor]:
    """Per-row tensors with the batch of vmap folded into their rows; a batched bank is stacked and the index, last, shifted."""
    folded = []
    for i, (x, dim) in enumerate(zip(tensors, in_dims, strict=True)):
        if i == bank_at:
            folded.append(x if dim is None else x.movedim(dim, 0).flatten(0, 1))
        else:
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            folded.append(x.flatten(0, 1))
    if bank_at is not None and in_dims[bank_at] is not None:
        folded[-1] = folded[-1] + len(folded[bank_at]) // info.batch_size * _batch(info, folded[-1])
    return folded


def _batch(info, index: Tensor) -> Tensor:
    """Which element of vmap's batch each folded row came from, [B N, 1]."""
    n = len(index) // info.batch_size
    return torch.arange(info.batch_size, device=index.device).repeat_interleave(n, output_size=len(index))[:, None]


class RowStatistic(Function):
    """A statistic (statistics.py) of each row's scores q_n . k_{index_nk} + offset_nk, [N].

    The weighted row sum that is the query's gradient is its by-product, so the first backward does not read a bank
    that needs no gradient, and the bank may change in between. Differentiating twice reads it again.
    """

    @staticmethod
    def forward(query, bank, index, offset, shift, with_pooled: bool, impl: str):
        value, pooled = FORMS[impl].statistic(query, bank, index, offset, shift, with_pooled)
        return value, _of_admitted(pooled, offset) if with_pooled else pooled

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, bank, index, offset, shift, ctx.with_pooled, ctx.impl = inputs
        pooled = output[1]
        ctx.mark_non_differentiable(pooled)
        ctx.set_materialize_grads(False)
        if ctx.with_pooled:
            ctx.save_for_backward(query, index, offset, shift, pooled, None)
            if not torch.compiler.is_compiling():  # held beside the saved tensors: those may not change
                ctx.bank, ctx.version = bank, _version(bank)
        else:
            ctx.save_for_backward(query, index, offset, shift, None, bank)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 7
        query, index, offset, shift, pooled, bank = ctx.saved_tensors
        grad = grad[:, None]
        if pooled is not None and (torch.compiler.is_compiling() or not torch.is_grad_enabled()):
            return grad * pooled, *(None,) * 6
        if bank is None:
            bank = ctx.bank
            if _version(bank) != ctx.version:
                raise RuntimeError("the bank was changed in place after the forward: differentiating twice needs it as it was")
        scores = GatherScores.apply(query, bank, index, ctx.impl)
        slopes = statistics.of_scores if torch.is_grad_enabled() else statistics.replace_scores
        weights = grad * slopes(scores, offset, shift)[1]  # not in place: of many at once, a gradient has more than there is room for
        d_query, d_bank = _sums(ctx.needs_input_grad[:2], weights, query, bank, index, ctx.impl)
        return None if d_query is None else _of_admitted(d_query, offset), d_bank, *(None,) * 5

    @staticmethod
    def vmap(info, in_dims, query, bank, index, offset, shift, with_pooled, impl):
        if offset is not None:
            offset = _folded(info, in_dims[3:4], offset)[0]
        if in_dims[4] is not None:
            n = query.shape[0 if in_dims[0] is None or in_dims[0] > 0 else 1]
            shift = shift.movedim(in_dims[4], 0).reshape(-1, 1).expand(-1, n).flatten()
        query, bank, index = _folded(info, in_dims[:3], query, bank, index, bank_at=1)
        value, pooled = RowStatistic.apply(query, bank, index, offset, shift, with_pooled, impl)
        split = (info.batch_size, -1)
        return (value.unflatten(0, split), pooled.unflatten(0, split) if with_pooled else pooled), (0, 0 if with_pooled else None)


def _of_admitted(sums: Tensor, offset: Tensor | None) -> Tensor:
    """Sums [N, D] over the rows read, 0 where all of them are left out."""
    return sums if offset is None else torch.where((offset != -torch.inf).any(dim=1, keepdim=True), sums, 0.0)


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version
