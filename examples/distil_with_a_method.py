"""Distil a teacher into a smaller student with the Distiller: an ordinary training loop, two loss terms.

Synthetic data: 10 classes in 32 dimensions. The student sees no labels: it learns from the teacher's outputs (KD) and its
features (cosine, through a learned projector). Beside it, the same network trained on the 100 labels there are.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdfast import Distiller, Projector, Term
from kdfast.distill import KD, Cosine

CLASSES, WIDTH, LABELLED = 10, 32, 100


def network(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


def data(n: int, centres: torch.Tensor) -> TensorDataset:
    y = torch.randint(0, CLASSES, (n,))
    return TensorDataset(centres[y] + 1.2 * torch.randn(n, WIDTH), y)


def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    x, y = dataset.tensors
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def train(model: nn.Module, dataset: TensorDataset, epochs: int = 15) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for x, y in DataLoader(dataset, 64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def distil(student: nn.Module, teacher: nn.Module, x: torch.Tensor, epochs: int = 15) -> None:
    terms = {
        "kd": Term(KD(T=4), weight=0.5),
        "cosine": Term(Cosine(projector=Projector()), at="3"),  # "3": the module path of the last hidden layer
    }
    d = Distiller(student, teacher, terms)
    d.build(x[:2])  # the projector learns its widths
    optimizer = torch.optim.Adam(d.parameters(), lr=3e-3)
    for epoch in range(epochs):
        for (batch,) in DataLoader(TensorDataset(x), 64, shuffle=True):
            d(batch)
            loss, parts = d.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 5 == 0:
            print(f"epoch {epoch:2d}  " + "  ".join(f"{name} {value.item():.4f}" for name, value in parts.items()))


def main() -> dict[str, float]:
    torch.manual_seed(0)
    centres = torch.randn(CLASSES, WIDTH) * 0.6
    full, test = data(2000, centres), data(1000, centres)
    few = TensorDataset(*(t[:LABELLED] for t in full.tensors))
    teacher, from_labels, distilled = network(128), network(16), network(16)
    train(teacher, full)
    train(from_labels, few, epochs=100)
    distil(distilled, teacher, full.tensors[0])
    models = {"teacher": teacher, f"student, {LABELLED} labels": from_labels, "student, distilled": distilled}
    result = {name: accuracy(model, test) for name, model in models.items()}
    for name, value in result.items():
        print(f"{name:24s} {100 * value:.1f} %")
    return result


if __name__ == "__main__":
    main()
