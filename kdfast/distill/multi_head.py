"""MultiHeadKD: softened logits matched at several depths (our reading of multi-head knowledge distillation, Wang et al. 2020)."""

from torch import Tensor, nn

from .._core import checks
from ..projectors import Affine
from .base import DistillLoss, first, vectors
from .kd import KD


class MultiHeadKD(DistillLoss):
    """The sum over heads of KD's T^2 KL(softmax(t_h / T) || softmax(s_h / T)).

    `loss(student, teacher)`: the student's list of layers, and the teacher's list of logits for them or one tensor of
    logits for all. Layers are logits themselves (auxiliary classifiers of the model) or, with `num_heads`, features [N, D]
    (maps are averaged), each under a linear head made here and trained by this loss alone. `.last` has a term a head. No code of
    the authors was read: this is our reading.

    Args:
        T: temperature, > 0, default 4.
        num_heads, num_classes: how many heads to make and their width; None: the layers are logits.

    Raises:
        ValueError, TypeError: lists of different lengths, one of num_heads and num_classes alone.
    """

    def __init__(self, T: float = 4.0, *, num_heads: int | None = None, num_classes: int | None = None) -> None:
        super().__init__()
        if (num_heads is None) != (num_classes is None):
            raise ValueError("num_heads and num_classes must be given together")
        self.kd = KD(T)
        heads = 0 if num_heads is None else checks.count("num_heads", num_heads)
        self.heads = nn.ModuleList(Affine(None, checks.count("num_classes", num_classes)) for _ in range(heads))

    def materialize(self, student, teacher) -> None:
        for head, layer in zip(self.heads, self._layers(student), strict=True):
            head.materialize(in_features=vectors(layer, "student").shape[1])

    def forward(self, student, teacher, *, index=None, labels=None) -> Tensor:
        layers = self._layers(student)
        logits = teacher if isinstance(teacher, list) else [teacher] * len(layers)
        if len(logits) != len(layers):
            raise ValueError(f"teacher must hold logits for each of student's {len(layers)} layers, got {len(logits)}")
        if len(self.heads):
            self.materialize(student, teacher)
            layers = [head(vectors(layer, "student")) for head, layer in zip(self.heads, layers, strict=True)]
        given = zip(layers, logits, strict=True)
        terms = {f"head{i}": self.kd.compare(s, checks.floating("teacher", first(t)).detach()) for i, (s, t) in enumerate(given)}
        return self._report(**terms)

    def _layers(self, student) -> list[Tensor]:
        layers = student if isinstance(student, list) else [student]
        if len(self.heads) and len(layers) != len(self.heads):
            raise ValueError(f"student must be a list of {len(self.heads)} layers (num_heads), got {len(layers)}")
        return [first(layer) for layer in layers]
