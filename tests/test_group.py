"""Losses with group=: two gloo processes with uneven batches against one process that holds the whole batch."""

import pytest
import torch
import torch.distributed as dist
from ranks import needs_gloo, on_two_ranks

from kdfast.distill import WCL
from kdfast.functional import clip_loss, info_nce, nt_xent, siglip_loss, sup_con

pytestmark = needs_gloo

SIZES, D = (5, 3), 6
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 3])
LOSSES = {
    "info_nce": lambda x, y, labels, group: info_nce(x, y, temperature=0.3, reduction="sum", group=group),
    "info_nce-labels": lambda x, y, labels, group: info_nce(x, y, query_labels=labels, reduction="sum", group=group),
    "info_nce-copies": lambda x, y, labels, group: info_nce(x, torch.stack([y, x], 1), temperature=1.0, reduction="sum", group=group),
    "nt_xent": lambda x, y, labels, group: nt_xent(x, y, reduction="sum", group=group),
    "nt_xent-labels": lambda x, y, labels, group: nt_xent(x, y, labels=labels, reduction="sum", group=group),
    "sup_con": lambda x, y, labels, group: sup_con(x, labels, reduction="sum", group=group),
    "clip_loss": lambda x, y, labels, group: clip_loss(x, y, 3.0, reduction="sum", group=group),
    "siglip_loss": lambda x, y, labels, group: siglip_loss(x, y, 3.0, -1.0, reduction="sum", group=group),
    "wcl": lambda x, y, labels, group: len(x) * WCL(0.3)({"a": x, "b": y}),  # a mean over rows that all count, over all ranks by itself
}


def batch(rank):
    """This rank's rows, or with rank None everybody's."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, sum(SIZES), D, generator=generator, dtype=torch.float64)
    part = slice(None) if rank is None else slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    return x[part].clone().requires_grad_(), y[part].clone().requires_grad_(), LABELS[part]


def measure(rank, group):
    results = {}
    for name, loss in LOSSES.items():
        x, y, labels = batch(rank)
        value = loss(x, y, labels, group)
        value.backward()
        results[name] = (value.detach(), x.grad, torch.zeros_like(y) if y.grad is None else y.grad)
    return results


def measure_rank(rank):
    return measure(rank, dist.group.WORLD)


@pytest.fixture(scope="module")
def ranks():
    return on_two_ranks(measure_rank)


@pytest.mark.parametrize("name", LOSSES)
def test_the_ranks_sum_to_the_single_process(ranks, name):
    value, *gradients = measure(None, None)[name]
    torch.testing.assert_close(sum(rank[name][0] for rank in ranks), value)
    for i, gradient in enumerate(gradients, start=1):
        torch.testing.assert_close(torch.cat([rank[name][i] for rank in ranks]), gradient)
