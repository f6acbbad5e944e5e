"""Distil inside a LightningModule: the Distiller is a submodule, training_step calls it once.

Checkpoints hold the student, the projectors and the bank; the teacher is not in them. On several devices the bank gathers
the keys of all of them by itself, and stays equal.
"""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdfast import Distiller, QueueBank, Term
from kdfast.bank import ddp_ignored
from kdfast.distill import KD, WCoRD

WIDTH, CLASSES = 16, 5


def network(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))


class Distillation(L.LightningModule):
    def __init__(self, student: nn.Module, teacher: nn.Module, example: torch.Tensor):
        super().__init__()
        terms = {
            "kd": Term(KD(T=4), weight=0.5),
            "wcord": Term(WCoRD(QueueBank(256, 16), dim=16), at="1", weight=0.1),
        }
        self.distiller = Distiller(student, teacher, terms).build(example)  # before configure_optimizers asks for parameters
        self._ddp_params_and_buffers_to_ignore = ddp_ignored(self)  # DistributedDataParallel leaves the bank alone

    def forward(self, x):
        return self.distiller.student(x)

    def training_step(self, batch, batch_index):
        x, y = batch
        loss, parts = self.distiller(x, y, task=F.cross_entropy)
        self.log_dict({"loss": loss.detach(), **parts})
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.distiller.parameters(), lr=1e-2)


def main(epochs: int = 3) -> tuple[float, float]:
    torch.manual_seed(0)
    teacher, student, x = network(64), network(8), torch.randn(512, WIDTH)
    with torch.no_grad():
        y = teacher(x).argmax(1)
    module = Distillation(student, teacher, x[:2])
    before = (module(x).argmax(1) == y).float().mean().item()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(x, y), 32, shuffle=True))
    after = (module(x).argmax(1) == y).float().mean().item()
    print(f"agreement with the teacher {100 * before:.0f} % -> {100 * after:.0f} %")
    return before, after


if __name__ == "__main__":
    main()
