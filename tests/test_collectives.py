"""Rows gathered over two gloo processes with different row counts, against one process that holds them all."""

import pytest
import torch
import torch.distributed as dist
from ranks import needs_gloo, on_two_ranks

from kdfast._core import collectives
from kdfast._ops.similarity import similarity_lse
from kdfast._ops.similarity.losses.sigmoid import sigmoid_pair_loss
from kdfast.ops import KeyIndex

pytestmark = needs_gloo

SIZES = [(3, 5), (4, 0)]  # rows of either rank; one has none at all


def rows_of(sizes, rank, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    everything = torch.randn(sum(sizes), 6, generator=generator, dtype=torch.float64).to(dtype)
    return everything.split(list(sizes))[rank].clone().requires_grad_()


def in_batch_loss(query, keys, offset):
    """InfoNCE of each row against all rows but itself, the next row (in the whole batch) as positive: a sum over local rows."""
    own = torch.arange(len(query)) + offset
    lse, _ = similarity_lse(query, keys, exclude=(KeyIndex(own),))
    return (lse - (query * keys[(own + 1) % len(keys)]).sum(-1)).sum() + sigmoid_pair_loss(query, keys, 0.5, -1.0, own).sum()


def measure_all(rank):
    return {sizes: measure(rank, sizes, dist.group.WORLD) for sizes in SIZES}


def measure(rank, sizes, group):
    results = {}
    local = rows_of(sizes, rank)
    keys, offset = collectives.all_gather_rows(local, group)
    loss = in_batch_loss(local, keys, offset)
    (first,) = torch.autograd.grad(loss, local, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), local)
    results.update(offset=offset, keys=keys.detach(), loss=loss.detach(), first=first.detach(), second=second)

    labels, label_offset = collectives.all_gather_rows(torch.arange(sizes[rank]) + 10 * rank, group)
    fixed, _ = collectives.all_gather_rows_no_grad(local, group)
    results.update(labels=labels, same_offset=label_offset == offset, fixed_needs_grad=fixed.requires_grad)

    half = rows_of(sizes, rank, torch.bfloat16)
    gathered, _ = collectives.all_gather_rows(half, group)
    (gathered.float().square().sum() * (rank + 1)).backward()
    results.update(half=gathered.detach(), half_grad=half.grad)

    share = torch.tensor([1.0 + rank, 2.0], requires_grad=True)
    total = collectives.all_reduce_sum(share, group)
    (total.square().sum() * (rank + 1)).backward()
    results.update(total=total.detach(), share_grad=share.grad)

    return results


@pytest.fixture(scope="module")
def results():
    return on_two_ranks(measure_all)


@pytest.fixture(params=SIZES, ids=str)
def run(request, results):
    return request.param, [result[request.param] for result in results]


def test_values_order_and_offsets(run):
    sizes, ranks = run
    everything = torch.cat([rows_of(sizes, rank) for rank in range(2)]).detach()
    labels = torch.cat([torch.arange(sizes[0]), torch.arange(sizes[1]) + 10])
    for rank, result in enumerate(ranks):
        assert torch.equal(result["keys"], everything) and torch.equal(result["labels"], labels)
        assert torch.equal(result["half"], everything.bfloat16())
        assert result["offset"] == sum(sizes[:rank]) and result["same_offset"] and not result["fixed_needs_grad"]


def test_loss_and_both_orders_of_gradient_equal_one_process(run):
    sizes, ranks = run
    everything = torch.cat([rows_of(sizes, rank) for rank in range(2)]).detach().requires_grad_()
    loss = in_batch_loss(everything, everything, 0)
    (first,) = torch.autograd.grad(loss, everything, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), everything)
    torch.testing.assert_close(sum(result["loss"] for result in ranks), loss.detach())
    torch.testing.assert_close(torch.cat([result["first"] for result in ranks]), first.detach())
    torch.testing.assert_close(torch.cat([result["second"] for result in ranks]), second)


def test_each_row_receives_the_sum_of_the_ranks_gradients(run):
    sizes, ranks = run
    for rank, result in enumerate(ranks):
        expected = 2 * rows_of(sizes, rank, torch.bfloat16).detach().float() * 3  # rank 0 weighs the sum of squares once, rank 1 twice
        assert result["half_grad"].dtype == torch.bfloat16
        torch.testing.assert_close(result["half_grad"].float(), expected, rtol=1e-2, atol=1e-2)


def test_all_reduce_sum(run):
    for result in run[1]:
        torch.testing.assert_close(result["total"], torch.tensor([3.0, 4.0]))
        torch.testing.assert_close(result["share_grad"], 3 * 2 * torch.tensor([3.0, 4.0]))
