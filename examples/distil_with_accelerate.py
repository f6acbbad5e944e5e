"""Distil under Accelerate: prepare the Distiller as the model, with gradient accumulation.

    accelerate launch examples/distil_with_accelerate.py

On several processes the bank gathers the keys of all of them by itself, and stays equal.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdfast import Distiller, QueueBank, Term
from kdfast.distill import BINGO, KD

WIDTH, CLASSES = 16, 5


def network(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))


def main(epochs: int = 6) -> tuple[float, float]:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    teacher, student, x = network(64), network(8), torch.randn(512, WIDTH)
    with torch.no_grad():
        y = teacher(x).argmax(1)
    before = (student(x).argmax(1) == y).float().mean().item()
    terms = {"kd": Term(KD(T=4), weight=0.5), "bingo": Term(BINGO(bank=QueueBank(256, 64), projector="linear"), at="1", weight=0.1)}
    d = Distiller(student, teacher, terms)
    d.build({"a": x[:2], "p": x[:2]})
    optimizer = torch.optim.Adam(d.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(x, y), 32, shuffle=True)
    d, optimizer, loader = accelerator.prepare(d, optimizer, loader)
    for _ in range(epochs):
        for batch, target in loader:
            views = {"a": batch, "p": batch + 0.1 * torch.randn_like(batch)}  # a bag here: a sample and a noisy copy of it
            with accelerator.accumulate(d):
                loss, _ = d(views, target, task=F.cross_entropy)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    student = accelerator.unwrap_model(d).student.cpu()
    after = (student(x).argmax(1) == y).float().mean().item()
    accelerator.print(f"agreement with the teacher {100 * before:.0f} % -> {100 * after:.0f} %")
    return before, after


if __name__ == "__main__":
    main()
