"""CKA, contrastive knowledge amalgamation (not centered kernel alignment): several teachers, one student, no labels (2307.14781)."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._core import checks
from ..functional import info_nce, mmd_rbf, sinkhorn_divergence, sup_con
from ..projectors import Affine
from .base import DistillLoss, bank_rows, check_queue, first, like_bank, mean_of, unit, vectors
from .kd import KD

_SIGMAS = (0.001, 0.01, 0.05, 0.1, 0.2, 1.0, 2.0)
_WEIGHTS = {"intra": 0.5, "inter": 0.5, "align": 10.0, "task": 1.0}


class _Task(NamedTuple):
    """One labelling of the batch, and what it is used on."""

    student: Tensor  # [N, C] the student's logits
    teacher: Tensor  # [N, C]
    labels: Tensor  # [N] pseudo-labels, counted over all teachers' classes
    target: Tensor  # [N, D] the embedding that each sample's student embedding is drawn to
    embeddings: list[Tensor]  # of the teachers that these labels train


class CKA(DistillLoss):
    """Contrastive knowledge amalgamation: one student learns what several teachers of different classes know, without labels.

    `loss(student, [teacher, ...])` with dicts of "logits" and "feat" ([N, C], or maps that are averaged; any widths), as from
    at={"logits": None, "feat": "avgpool"}. Linear adapters of the student and of each teacher lead to `common_dim`, where all
    are l2-normalised here: z_s, z_1, z_2, ... Labels are the teachers' own:
    - tasks="disjoint": the student has one head over all classes, in the teachers' order. y = argmax of the concatenated
      teacher logits; the teacher in whose range it lies owns the sample.
    - tasks="separate": the student's logits are a list, a head a teacher; y_i = argmax of teacher i, who owns every sample of
      its task; terms are means over tasks.

    | term | | default weight |
    |---|---|---|
    | intra | SupCon(z_s, y) + mean over teachers of SupCon(z_i, y), which trains the adapters | 0.5 |
    | inter | SupCon of z_s against the owners' embeddings, its own among the positives | 0.5 |
    | align | mean over teachers of MMD(z_s, z_i), Gaussian kernels of widths 0.001 ... 2; or the Sinkhorn divergence | 10 |
    | task | KL(softmax(teacher logits) || softmax(student logits)) | 1 |

    There is no released code: the terms are the abstract's, their forms ours. Ours gained 0.4 to 1.2 points in accuracy over
    soft targets alone: modest.

    Args:
        num_classes: classes of each teacher.
        tasks: "disjoint" or "separate".
        common_dim: width of the common space.
        bank: None, or a QueueBank(capacity, common_dim, labels=True) of past owners' embeddings, more candidates of inter.
        align: "mmd" or "sinkhorn".
        weights: {term: weight}, in place of the defaults; 0 leaves a term out.
        temperature: of SupCon, default 0.1.
        student_dim, teacher_dims: widths of the features; None reads them from the first batch.
        push: see DistillLoss.

    Raises:
        ValueError, TypeError: unknown options, another number of teachers or classes than `num_classes` says.
    """

    def __init__(
        self,
        num_classes: list[int],
        tasks: str = "disjoint",
        common_dim: int = 128,
        bank=None,
        align: str = "mmd",
        weights: Mapping[str, float] | None = None,
        *,
        temperature: float = 0.1,
        student_dim: int | None = None,
        teacher_dims: list[int] | None = None,
        push: bool = True,
    ) -> None:
        if bank is not None:
            check_queue("bank", bank, common_dim)
            if bank.labels is None:
                raise ValueError("bank must be made with labels=True")
        super().__init__(bank, push)
        checks.choice("tasks", tasks, ("disjoint", "separate"))
        checks.choice("align", align, ("mmd", "sinkhorn"))
        checks.positive_number("temperature", temperature)
        self.num_classes = [checks.count("num_classes", count) for count in _list("num_classes", num_classes)]
        if weights is not None and not isinstance(weights, Mapping):
            raise TypeError(f"weights must be a dict of terms and their weights or None, got {type(weights).__name__}")
        for name, weight in (weights or {}).items():
            checks.choice("weights", name, tuple(_WEIGHTS))
            checks.nonnegative_number(f"weights[{name!r}]", weight)
        self.weights = {**_WEIGHTS, **(weights or {})}
        self.tasks, self.align, self.temperature, self.kd = tasks, align, temperature, KD(T=1)
        dims = [None] * len(self.num_classes) if teacher_dims is None else _list("teacher_dims", teacher_dims)
        if len(dims) != len(self.num_classes):
            raise ValueError(f"teacher_dims must have one width a teacher ({len(self.num_classes)}), got {len(dims)}")
        checks.count("common_dim", common_dim)
        for name, dim in (("student_dim", student_dim), *(("teacher_dims", dim) for dim in dims)):
            if dim is not None:
                checks.count(name, dim)
        self.student_adapter = Affine(student_dim, common_dim)
        self.teacher_adapters = nn.ModuleList(Affine(dim, common_dim) for dim in dims)

    def materialize(self, student, teacher) -> None:
        self.student_adapter.materialize(in_features=_features(student, "student").shape[1])
        for adapter, one in zip(self.teacher_adapters, self._teachers(teacher), strict=True):
            adapter.materialize(in_features=_features(one, "teacher").shape[1])

    def forward(self, student, teacher, *, index=None, labels=None) -> Tensor:
        self.materialize(student, teacher)
        teachers = self._teachers(teacher)
        z_s = unit(self.student_adapter(_features(student, "student")))  # [N, D]
        z_t = [unit(adapter(_features(t, "teacher").detach())) for adapter, t in zip(self.teacher_adapters, teachers, strict=True)]
        tasks = self._disjoint(student, teachers, z_t) if self.tasks == "disjoint" else self._separate(student, teachers, z_t)
        parts = {
            "intra": lambda: _mean(self._within(z_s, task) for task in tasks),
            "inter": lambda: _mean(self._between(z_s, task) for task in tasks),
            "align": lambda: _mean(self._aligned(z_s, z) for z in z_t),
            "task": lambda: _mean(self.kd.compare(task.student, task.teacher) for task in tasks),
        }
        loss = self._report(**{name: weight * parts[name]() for name, weight in self.weights.items() if weight})
        self._update_bank(torch.cat([task.target for task in tasks]), labels=torch.cat([task.labels for task in tasks]))
        return loss

    def _disjoint(self, student, teachers, z_t) -> list[_Task]:
        logits = torch.cat(self._logits(teachers), 1)  # [N, all classes]
        labels = logits.argmax(1)
        ends = torch.tensor(self.num_classes, device=labels.device).cumsum(0)
        owner = torch.bucketize(labels, ends, right=True)
        target = torch.stack(z_t, 1)[torch.arange(len(labels), device=labels.device), owner]
        return [_Task(first(student["logits"]), logits, labels, target, z_t)]

    def _separate(self, student, teachers, z_t) -> list[_Task]:
        heads, logits = student["logits"], self._logits(teachers)
        if not isinstance(heads, list) or len(heads) != len(teachers):
            raise ValueError(f'student["logits"] must be a list of {len(teachers)} heads for tasks="separate"')
        before = [sum(self.num_classes[:i]) for i in range(len(teachers))]
        columns = zip(heads, logits, before, z_t, strict=True)
        return [_Task(first(head), t, t.argmax(1) + start, z, [z]) for head, t, start, z in columns]

    def _within(self, z_s: Tensor, task: _Task) -> Tensor:
        options = {"temperature": self.temperature, "normalize": False}
        return sup_con(z_s, task.labels, **options) + _mean(sup_con(z, task.labels, **options) for z in task.embeddings)

    def _between(self, z_s: Tensor, task: _Task) -> Tensor:
        options = {"query_labels": task.labels, "same_class": "positive", "temperature": self.temperature}
        if self.bank is None:
            return info_nce(z_s, bank=task.target.to(z_s.dtype), bank_labels=task.labels, **options)
        rows = bank_rows(self.bank)
        return info_nce(like_bank(z_s, rows), like_bank(task.target, rows), self.bank, **options)

    def _aligned(self, z_s: Tensor, z_t: Tensor) -> Tensor:
        z_t = z_t.to(z_s.dtype)
        return mmd_rbf(z_s, z_t, sigmas=_SIGMAS) if self.align == "mmd" else sinkhorn_divergence(z_s, z_t)

    def _teachers(self, teacher) -> list:
        teachers = teacher if isinstance(teacher, list) else [teacher]
        if len(teachers) != len(self.num_classes):
            raise ValueError(f"teacher must be a list of {len(self.num_classes)} (num_classes), got {len(teachers)}")
        return teachers

    def _logits(self, teachers) -> list[Tensor]:
        logits = [first(t["logits"]).detach() for t in teachers]
        for x, classes in zip(logits, self.num_classes, strict=True):
            if x.shape[1] != classes:
                raise ValueError(f"teacher logits must have the widths {self.num_classes} (num_classes), got shape {tuple(x.shape)}")
        return logits


def _features(value, name: str) -> Tensor:
    if not isinstance(value, Mapping) or not {"logits", "feat"} <= value.keys():
        raise ValueError(f'{name} must be a dict of logits, feat (as from at={{"logits": None, "feat": "avgpool"}})')
    return vectors(value["feat"], name)


def _list(name: str, given) -> list:
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name} must be a list with a number a teacher, got {type(given).__name__}")
    return list(given)


def _mean(values) -> Tensor:
    return mean_of(list(values))
