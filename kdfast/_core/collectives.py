"""Rows spread over the ranks of a torch.distributed group: gathering them, and sums over ranks, with gradients.

Every function is collective: all ranks of the group call it, in the same order, forward and backward alike. Ranks may hold
different numbers of rows, none included; sizes are exchanged first, which waits for the device.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from . import dtypes


def check_group(group, name: str = "group") -> None:
    """`group` is None or a torch.distributed group that this process is in."""
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"{name} must be None or a torch.distributed group of this process, got {type(group).__name__}")


def all_gather_rows(x: Tensor, group) -> tuple[Tensor, int]:
    """The rows of every rank, in rank order, and the position of this rank's first one: ([N_all, ...], offset).

    x: [N, ...], N may differ between ranks, the rest may not; any dtype. The backward sums, for each row, the gradients that all
    ranks send to it, so that the sum of the ranks' losses is what is differentiated; twice differentiable.
    """
    sizes = _row_counts(x, group)
    offset = sum(sizes[: dist.get_rank(group)])
    if not x.dtype.is_floating_point:
        return _gather(x, sizes, group), offset
    return _GatherRows.apply(x, sizes, group), offset


def all_gather_rows_no_grad(x: Tensor, group) -> tuple[Tensor, int]:
    """`all_gather_rows` for what carries no gradient: bank rows, labels, indices."""
    sizes = _row_counts(x, group)
    return _gather(x.detach(), sizes, group), sum(sizes[: dist.get_rank(group)])


def all_reduce_sum(x: Tensor, group) -> Tensor:
    """The sum of x over the ranks, on every rank. The backward sums the ranks' gradients likewise; differentiable any number of times."""
    return _AllReduceSum.apply(x, group)


def world():
    """The default group where torch.distributed runs, else None: this process alone."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def _row_counts(x: Tensor, group) -> list[int]:
    own = torch.tensor([x.shape[0]], dtype=torch.int64, device=x.device)
    counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=x.device)
    dist.all_gather(list(counts.split(1)), own, group=group)
    return counts.tolist()


def _gather(x: Tensor, sizes: list[int], group) -> Tensor:
    longest = max(sizes)  # backends gather equal sizes only: pad to the longest
    padded = x.new_zeros(longest, *x.shape[1:])
    padded[: x.shape[0]] = x
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _sum_to_owners(x: Tensor, sizes: list[int], group) -> Tensor:
    """The sum over ranks of the rows of x [sum of sizes, ...] that this rank owns. Summed in fp32 (fp64 for fp64)."""
    slices = [part.to(dtypes.accumulator(x.dtype)).clone(memory_format=torch.contiguous_format) for part in x.split(sizes)]
    work = [dist.reduce(part, group_dst=rank, group=group, async_op=True) for rank, part in enumerate(slices)]
    for handle in work:
        handle.wait()
    return slices[dist.get_rank(group)].to(x.dtype)


class _GatherRows(Function):
    @staticmethod
    def forward(x, sizes, group):
        return _gather(x, sizes, group)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.sizes, ctx.group = inputs

    @staticmethod
    def backward(ctx, gradient):
        return _SumToOwners.apply(gradient, ctx.sizes, ctx.group), None, None


class _SumToOwners(Function):
    @staticmethod
    def forward(x, sizes, group):
        return _sum_to_owners(x, sizes, group)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.sizes, ctx.group = inputs

    @staticmethod
    def backward(ctx, gradient):
        return _GatherRows.apply(gradient, ctx.sizes, ctx.group), None, None


class _AllReduceSum(Function):
    @staticmethod
    def forward(x, group):
        total = x.to(dtypes.accumulator(x.dtype)).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        return _AllReduceSum.apply(gradient, ctx.group), None
