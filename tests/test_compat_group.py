"""kdfast.compat under torch.distributed: two gloo processes against one process with the whole batch."""

from types import SimpleNamespace

import pytest
import torch
from ranks import needs_gloo, on_two_ranks
from torch import nn

from kdfast.compat import lightly, open_clip, pml, repdistiller, sentence_transformers, swav

pytestmark = needs_gloo

ROWS, D = 4, 6  # a rank's batch
OPT = SimpleNamespace(s_dim=D, t_dim=D, feat_dim=5, n_data=30, nce_k=7, nce_t=0.2, nce_m=0.5)


def crd(loss):
    contrast = torch.cat([torch.arange(30)[:, None], torch.randint(0, 30, (30, OPT.nce_k), generator=torch.Generator().manual_seed(2))], 1)
    return lambda x, y, labels, idx: loss(x, y, idx, contrast[idx])


class Encoder(nn.Module):
    def forward(self, features):
        return {"sentence_embedding": features}


def made(world):
    """name -> (the loss as a function of (x, y, labels, idx), the module whose state is to be equal on the ranks)"""
    torch.manual_seed(0)
    memory = pml.CrossBatchMemory(pml.TripletMarginLoss(0.5), D, 12, pml.BatchHardMiner())
    bank = sentence_transformers.BankInfoNCELoss(Encoder(), 12, D)
    in_batch, queue = lightly.NTXentLoss(gather_distributed=True), lightly.NTXentLoss(memory_bank_size=(12, D))
    clips = {local: open_clip.ClipLoss(local_loss=local, gather_with_grad=True, world_size=world) for local in (False, True)}
    contrast = repdistiller.CRDLoss(OPT)
    return {
        "cross-batch memory": (lambda x, y, labels, idx: memory(x, labels), memory),
        "bank InfoNCE": (lambda x, y, labels, idx: bank([x, y]), bank),
        "lightly": (lambda x, y, labels, idx: in_batch(x, y), in_batch),
        "lightly's bank": (lambda x, y, labels, idx: queue(x, y), queue),
        "open_clip": (lambda x, y, labels, idx: clips[False](x, y, 3.0), nn.Module()),
        "open_clip, local": (lambda x, y, labels, idx: clips[True](x, y, 3.0), nn.Module()),
        "swav": (lambda x, y, labels, idx: (swav.distributed_sinkhorn(x) * x).mean(), nn.Module()),
        "crd": (crd(contrast), contrast),
    }


def steps(rank):
    """Three batches: this rank's rows, or with rank None everybody's in rank order."""
    generator = torch.Generator().manual_seed(1)
    mine = slice(None) if rank is None else slice(rank * ROWS, (rank + 1) * ROWS)
    for step in range(3):
        x, y = torch.randn(2, 2 * ROWS, D, generator=generator)
        labels = torch.randint(0, 2, (2 * ROWS,), generator=generator)
        yield x[mine].clone().requires_grad_(), y[mine].clone(), labels[mine], torch.arange(2 * ROWS)[mine] + step


def measure(rank, world):
    results = {}
    for name, (loss, module) in made(world).items():
        values, gradients = [], []
        for x, y, labels, idx in steps(rank):
            values.append(loss(x, y, labels, idx))
            gradients.append(torch.autograd.grad(values[-1], x)[0])
        results[name] = (
            torch.stack(values).detach(),
            torch.stack(gradients),
            {k: v for k, v in module.state_dict().items() if v is not None},
        )
    return results


def measure_rank(rank):
    return measure(rank, 2)


@pytest.fixture(scope="module")
def ranks():
    return on_two_ranks(measure_rank)


@pytest.fixture(scope="module")
def alone():
    return measure(None, 1)


@pytest.mark.parametrize("name", made(1))
def test_two_ranks_are_one_process_and_keep_equal_banks(ranks, alone, name):
    (values, gradients, state), (first, second) = alone[name], (rank[name] for rank in ranks)
    torch.testing.assert_close(first[2], second[2], rtol=0, atol=0)
    torch.testing.assert_close(first[2], state)
    averaged = torch.cat([first[1], second[1]], 1) / 2  # as DistributedDataParallel averages
    if name == "cross-batch memory":  # its mean is over the losses > 0, of which ranks have different numbers
        assert values.isfinite().all() and averaged.isfinite().all()
    else:
        torch.testing.assert_close((first[0] + second[0]) / 2, values)
        torch.testing.assert_close(averaged, gradients)
    if name == "open_clip":
        torch.testing.assert_close(first[0], values)  # the whole batch's loss on every rank
