"""Pairing of student and teacher values, and the losses that are a mean over such pairs, each pair first projected."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from .._core import checks
from ..projectors import KINDS, Projector
from .base import DistillLoss, first, mean_of


class PairLoss(DistillLoss):
    """The mean over pairs (views, layers, teachers) of `compare(student, teacher)`, each pair first projected.

    projector: a Projector, one of its kinds, or a list with one a layer (or teacher); None with widths given is a
    linear Projector, and None alone takes the features as they are.

    A subclass's `compare` returns a tensor or a dict of terms. With `parts` a pair is two dicts that have these values,
    the "feat" of which is projected; with `needs_labels` it is called as compare(student, teacher, labels).
    """

    parts: tuple[str, ...] = ()
    needs_labels = False

    def __init__(self, projector=None, student_dim: int | None = None, teacher_dim: int | None = None) -> None:
        super().__init__()
        self.projectors = make_projectors(projector, student_dim, teacher_dim)

    def compare(self, student, teacher, *labels: Tensor) -> "Tensor | dict[str, Tensor]":
        raise NotImplementedError

    def materialize(self, student, teacher) -> None:
        if len(self.projectors):
            for slot, s, t in pairs(student, teacher, self.parts):
                s, t = (first(x["feat"]) if self.parts else x for x in (s, t))
                pick_projector(self.projectors, slot).materialize(s, t)

    def forward(self, student, teacher, *, index=None, labels=None) -> Tensor:
        if self.needs_labels and labels is None:
            raise ValueError(f"labels must be given for {type(self).__name__}")
        known = (labels,) if self.needs_labels else ()
        values = []
        for slot, s, t in pairs(student, teacher, self.parts):
            compared = self.compare(*self._projected(slot, s, t), *known)
            values.append(compared if isinstance(compared, dict) else {type(self).__name__.lower(): compared})
        if not values:
            raise ValueError("student and teacher must hold a value each, got none")
        if len(values) == 1:
            return self._report(**values[0])
        return self._report(**{name: mean_of([value[name] for value in values]) for name in values[0]})

    def _projected(self, slot: int, student, teacher) -> tuple:
        if not self.parts:
            teacher = teacher.detach()
            return pick_projector(self.projectors, slot)(student, teacher) if len(self.projectors) else (student, teacher)
        student = {name: first(student[name]) for name in self.parts}
        teacher = {name: first(teacher[name]).detach() for name in self.parts}
        if len(self.projectors):
            student["feat"], teacher["feat"] = pick_projector(self.projectors, slot)(student["feat"], teacher["feat"])
        return student, teacher


def make_projectors(projector, student_dim: int | None, teacher_dim: int | None) -> nn.ModuleList:
    """No projector, one for all pairs, or one a layer."""
    if isinstance(projector, (list, tuple)):
        made = list(projector)
    elif projector is None:
        made = [] if student_dim is None and teacher_dim is None else [Projector(student_dim, teacher_dim)]
    elif isinstance(projector, str):
        checks.choice("projector", projector, KINDS)
        return nn.ModuleList([Projector(student_dim, teacher_dim, projector)])
    else:
        made = [projector]
    for one in made:
        if not isinstance(one, Projector):
            raise TypeError(
                f"projector must be a Projector, one of {', '.join(KINDS)}, a list of Projectors or None, got {type(one).__name__}"
            )
    if projector is not None and (student_dim is not None or teacher_dim is not None):
        raise ValueError("student_dim and teacher_dim must not be given with a Projector, which has its own")
    return nn.ModuleList(made)


def make_projector(projector, student_dim: int | None, teacher_dim: int | None) -> Projector | None:
    """As `make_projectors`, for a loss with one pair."""
    made = make_projectors(projector, student_dim, teacher_dim)
    if len(made) > 1:
        raise ValueError(f"projector must be one Projector, got {len(made)}")
    return made[0] if len(made) else None


def pick_projector(projectors: nn.ModuleList, slot: int) -> nn.Module:
    if len(projectors) > 1 and slot >= len(projectors):
        raise ValueError(f"projector must hold one Projector a layer, got {len(projectors)} for layer {slot}")
    return projectors[slot if len(projectors) > 1 else 0]


def pairs(student, teacher, parts: tuple[str, ...] = ()) -> Iterator[tuple]:
    """(slot, student value, teacher value): dicts pair by name, lists of layers by position (the slot), and a student
    with each of several teachers (the slot, where the student is not a list of layers).

    A student's list needs a teacher's list of the same length: which layer faces which is never guessed. Values are
    tensors or, with `parts`, dicts that have these names.
    """
    student, teacher = first(student), first(teacher)
    if isinstance(teacher, list):
        layers = isinstance(student, list)
        if layers and not any(isinstance(t, list) for t in teacher):
            if len(student) != len(teacher):
                raise ValueError(f"student and teacher must be lists of one length, got {len(student)} and {len(teacher)}")
            for slot, (s, t) in enumerate(zip(student, teacher, strict=True)):
                yield from ((slot, *pair[1:]) for pair in pairs(s, t, parts))
        else:
            for slot, t in enumerate(teacher):
                yield from (pair if layers else (slot, *pair[1:]) for pair in pairs(student, t, parts))
    elif isinstance(student, Mapping) and not (parts and _has(student, parts)):
        for name, value in student.items():
            by_name = isinstance(teacher, Mapping) and not (parts and _has(teacher, parts))
            if by_name and name not in teacher:
                raise ValueError(f"teacher must have {name!r} as student does, it has {', '.join(map(repr, teacher))}")
            yield from pairs(value, teacher[name] if by_name else teacher, parts)
    else:
        for name, value in (("student", student), ("teacher", teacher)):
            if parts:
                if not isinstance(value, Mapping) or not _has(value, parts):
                    raise ValueError(f'{name} must be a dict of {", ".join(parts)} (as from at={{"logits": None, "feat": "avgpool"}})')
            else:
                checks.floating(name, value)
        yield 0, student, teacher


def _has(value: Mapping, parts: tuple[str, ...]) -> bool:
    return all(part in value for part in parts)
