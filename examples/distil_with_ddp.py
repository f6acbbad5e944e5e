"""Distil on several processes: DistributedDataParallel round the whole Distiller, one call a step.

    torchrun --nproc-per-node 2 examples/distil_with_ddp.py          (gloo on CPUs, NCCL on GPUs)

The student, the projector and the bank stay equal on every rank: parameters through DDP, the bank through its own gathering.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from kdfast import Distiller, IndexedBank, Projector, Term
from kdfast.distill import KD, MSE, WCoRD

SAMPLES, WIDTH, CLASSES = 256, 16, 5


def network(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))


def problem() -> tuple[TensorDataset, nn.Module, nn.Module]:
    torch.manual_seed(0)
    x, teacher = torch.randn(SAMPLES, WIDTH), network(64)
    with torch.no_grad():
        labels = teacher(x).argmax(1)
    return TensorDataset(x, labels, torch.arange(SAMPLES)), teacher, network(8)


def train(device: torch.device, epochs: int = 3) -> tuple[Distiller, list[float]]:
    dataset, teacher, student = problem()
    torch.manual_seed(1 + dist.get_rank())  # ranks may differ from here on: build() takes rank 0's projectors and bank
    terms = {
        "kd": Term(KD(T=4), weight=0.5),
        "hint": Term(MSE(projector=Projector()), at="1", weight=0.1),
        "wcord": Term(WCoRD(IndexedBank(SAMPLES, 32), dim=32), at="1", weight=0.1),
    }
    d = Distiller(student, teacher, terms).to(device).build(dataset.tensors[0][:2].to(device))
    parallel = DistributedDataParallel(d)
    optimizer = torch.optim.Adam(d.parameters(), lr=1e-2)
    sampler = DistributedSampler(dataset, seed=0)
    losses = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y, index in DataLoader(dataset, 32, sampler=sampler):
            loss, _ = parallel(x.to(device), y.to(device), index=index.to(device), task=F.cross_entropy)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return d, losses


def equal_on_all_ranks(d: Distiller) -> bool:
    """Whether every number in the state is rank 0's."""
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, {name: value.cpu() for name, value in d.state_dict().items() if torch.is_tensor(value)})
    return all(torch.equal(states[0][name], state[name]) for state in states for name in state)


def main() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    d, losses = train(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    equal = equal_on_all_ranks(d)
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; student, projectors and bank equal on all ranks: {equal}")


if __name__ == "__main__":
    dist.init_process_group()
    main()
    dist.destroy_process_group()
