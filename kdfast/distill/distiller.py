"""Distiller: a student, its teachers and a weighted sum of losses on their outputs and intermediate values."""

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._core import checks
from ..features.capture import capture, main_output, read_spec, spec_keys
from ..features.store import Features
from .base import DistillLoss, broadcast_from_first_rank, detached, mean_of, total

_NOTHING = object()


@dataclass
class Term:
    """One loss of a Distiller, where it looks, and its weight.

    loss: a loss of kdfast.distill, called as loss(student, teacher, index=, labels=, **extra); or any other callable
        (nn.MSELoss(), a module of kdfast.losses), called as loss(student, teacher, **extra).
    at: where student and teacher values are found: a spec for both, or a tuple (student spec, teacher spec). A spec is
        None (the model's output; `logits` of a dict or ModelOutput), a module path (its output), "path:in" (its input),
        a list or a dict of specs.
    weight: factor of the loss; may be changed between steps.
    teacher: which of several teachers; None: all of them, as a list.
    """

    loss: Callable
    at: Any = field(default=None, kw_only=True)
    weight: float = field(default=1.0, kw_only=True)
    teacher: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise TypeError(f"loss must be callable, got {type(self.loss).__name__}")
        if isinstance(self.at, tuple) and len(self.at) != 2:
            raise ValueError(f"at, as a tuple, must be (student spec, teacher spec), got {len(self.at)} specs")
        for spec in self.specs:
            spec_keys(spec)

    @property
    def specs(self) -> tuple:
        """(student spec, teacher spec)."""
        return self.at if isinstance(self.at, tuple) else (self.at, self.at)


class _Pass(NamedTuple):
    """One forward of one model on one view."""

    output: Any
    values: Mapping[str, Tensor]


class Distiller(nn.Module):
    """Student, teachers and losses as one module: `out = d(x)`, then `loss, parts = d.loss(target, task=F.cross_entropy)`.

    Or in one forward, which is the form to wrap (`DDP(d)`, `fully_shard(d)`, accelerate):
    `loss, parts = d(x, target, index=i, task=F.cross_entropy)`. `d.student` is for inference.

    The hooks that read intermediate values are installed here, once; the student may be compiled before (unless it has
    already run) or wrapped. Teachers stay in eval mode with requires_grad False, run without gradient under the
    caller's autocast, follow `d.to(...)`, and are not in `parameters()` or `state_dict()`, which hold the student, the
    projectors and whatever the losses learn or keep (banks, samplers).

    Args:
        student: the model to train.
        teacher: a model (torch's AveragedModel too), Features (needs `index` at each loss), a list of these, or None.
        terms: {name: Term}. "task" is the name of the task loss.
        teacher_dtype: dtype the teachers run in whatever the caller's autocast: torch.float32 turns autocast off for them.

    Raises:
        ValueError, TypeError: terms that are not Terms, a name that cannot be used, a module path that does not exist,
            a teacher index out of range, a teacher that shares parameters with the student.
    """

    def __init__(self, student: nn.Module, teacher=None, terms: Mapping[str, Term] | None = None, *, teacher_dtype=None) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be an nn.Module, got {type(student).__name__}")
        self.student = student
        self.one_teacher = not isinstance(teacher, (list, tuple))
        self.teachers = tuple(t for t in ([teacher] if self.one_teacher else teacher) if t is not None)  # a tuple: not submodules
        self.teacher_dtype = teacher_dtype
        self.terms = _checked_terms(terms, len(self.teachers))
        self.losses = nn.ModuleDict({name: term.loss for name, term in self.terms.items() if isinstance(term.loss, nn.Module)})
        owned = {id(p) for p in student.parameters()}
        for t in self.teachers:
            if isinstance(t, nn.Module):
                if any(id(p) in owned for p in t.parameters()):
                    raise ValueError("teacher must not share parameters with the student: they would be frozen (use copy.deepcopy)")
                t.requires_grad_(False).eval()
            elif not isinstance(t, Features):
                raise TypeError(f"teacher must be an nn.Module, Features, a list of these or None, got {type(t).__name__}")
        self._install()

    def _install(self) -> None:
        """Hooks on the student and on every teacher, for the keys that the terms ask for."""
        terms = self.terms.values()
        self._student_tap = capture(self.student, [key for term in terms for key in spec_keys(term.specs[0])])
        self._teacher_taps = [
            capture(t, [key for term in terms if term.teacher in (None, i) for key in spec_keys(term.specs[1])])
            if isinstance(t, nn.Module)
            else None
            for i, t in enumerate(self.teachers)
        ]
        self._passes = None
        for tap in (self._student_tap, *self._teacher_taps):
            if tap is not None:
                weakref.finalize(self, tap.remove)  # a student that outlives its Distiller is free of hooks

    # -- one step ------------------------------------------------------------------------------------------------

    def forward(self, x, target=_NOTHING, *, index=None, labels=None, task=None, task_weight=1.0, extra=None, teacher_input=None):
        """Run student and teachers on `x`; with anything besides `x` and `teacher_input`, also the loss.

        x: what the models take: a tensor, or a mapping that is not a dict (a tokenizer's BatchEncoding) for keywords. A
            dict or tuple of these holds views: one forward a view, and the losses see {view: value}.
        teacher_input: what the teachers take instead of `x` (their own views, say).
        target, index, labels, task, task_weight, extra: as for `loss`. `d(x, None)` asks for the loss without a target.

        Returns: the student's output ({view: output} for views), or (loss, parts).
        """
        self._passes = self._run(x, teacher_input)
        if target is _NOTHING and all(value is None for value in (index, labels, task, extra)):
            return _each(self._passes[0], lambda one: one.output)
        target = None if target is _NOTHING else target
        return self.loss(target, index=index, labels=labels, task=task, task_weight=task_weight, extra=extra)

    def loss(
        self,
        target=None,
        *,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        task: Callable | None = None,
        task_weight: float = 1.0,
        extra: Mapping[str, Mapping] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the terms for the last forward, which it uses up.

        target: given to `task`, as task(output, target); of several views the mean.
        index: [N] dataset index of each sample, for Features and indexed banks.
        labels: [N] classes for the losses; default `target` where that is an integer tensor.
        task: the task loss, none by default; task_weight its weight.
        extra: {term: keywords} for single losses, such as {"bingo": {"lam": lam}}.

        Returns: loss, parts: {term or "task": weighted value, detached}, which sum to it.
        """
        if self._passes is None:
            raise RuntimeError("call the Distiller on a batch first: loss() uses up the last forward")
        (student, teachers), self._passes = self._passes, None
        if labels is None and isinstance(target, Tensor) and target.dtype in checks.INTEGRAL:
            labels = target
        extra = {} if extra is None else extra
        for name in extra:
            if name not in self.terms:
                raise ValueError(f"extra must name terms ({', '.join(self.terms)}), got {name!r}")
        weighted = {}
        if task is not None:
            if target is None:
                raise ValueError("target must be given with task")
            outputs = list(student.values()) if isinstance(student, dict) else [student]
            weighted["task"] = task_weight * mean_of([task(main_output(one.output), target) for one in outputs])
        for name, term in self.terms.items():
            s = _each(student, lambda one, spec=term.specs[0]: read_spec(spec, one.output, one.values))
            t = self._of_teachers(term, teachers, index)
            known = {"index": index, "labels": labels} if isinstance(term.loss, DistillLoss) else {}
            weighted[name] = term.weight * term.loss(s, t, **known, **extra.get(name, {}))
        return total(weighted.values()), detached(weighted)

    def _run(self, x, teacher_input) -> tuple:
        """(passes of the student, [passes of each teacher, None for Features])."""
        x = _as_views(x)
        teacher_input = x if teacher_input is None else _as_views(teacher_input)
        student = _each(x, lambda view: _call(self.student, self._student_tap, view))
        teachers = []
        for teacher, tap in zip(self.teachers, self._teacher_taps, strict=True):
            if tap is None:
                teachers.append(None)
                continue
            if teacher.training:
                teacher.eval()
            with torch.no_grad(), self._teacher_autocast(teacher):
                teachers.append(_each(teacher_input, lambda view, t=teacher, tap=tap: _call(t, tap, view)))
        return student, teachers

    def _teacher_autocast(self, teacher: nn.Module):
        if self.teacher_dtype is None:
            return nullcontext()
        device = next((p.device.type for p in teacher.parameters()), "cpu")
        lower = self.teacher_dtype in (torch.float16, torch.bfloat16)
        return torch.autocast(device, dtype=self.teacher_dtype if lower else None, enabled=lower)

    def _of_teachers(self, term: Term, passes: list, index: Tensor | None, rows: int | None = None):
        """The teacher's value for a term: one, a list over several teachers, or None without a teacher."""

        def value(i: int):
            seen = passes[i]
            if seen is None:
                features = self.teachers[i]
                if rows is not None:
                    seen = _as_pass({name: stored[:rows] for name, stored in features.tensors.items()})
                elif index is not None:  # looked up where the index is, moved to where the student is
                    device = next((p.device for p in self.student.parameters()), index.device)
                    seen = _as_pass({name: stored.to(device) for name, stored in features.select(index).items()})
                else:
                    raise ValueError("index must be given when the teacher is Features: it says which rows belong to the batch")
            return _each(seen, lambda one: read_spec(term.specs[1], one.output, one.values))

        if term.teacher is not None:
            return value(term.teacher)
        if not self.teachers:
            return None
        return value(0) if self.one_teacher else [value(i) for i in range(len(self.teachers))]

    # -- widths, parameters, state -------------------------------------------------------------------------------

    @torch.no_grad()
    def build(self, x, *, teacher_input=None) -> "Distiller":
        """Give every lazy projector its widths from one batch, equal on all ranks. Call it before `parameters()`.

        Student and teachers run once in eval mode without gradient; BatchNorm statistics, training flags and the random
        state stay as they were.
        """
        modes = [(module, module.training) for module in self.student.modules()]
        devices = {p.device.index for p in self.student.parameters() if p.device.type == "cuda"}
        try:
            self.student.eval()
            with torch.random.fork_rng(devices=list(devices)):
                student, teachers = self._run(x, teacher_input)
                for term in self.terms.values():
                    if isinstance(term.loss, DistillLoss):
                        s = _each(student, lambda one, spec=term.specs[0]: read_spec(spec, one.output, one.values))
                        term.loss.materialize(s, self._of_teachers(term, teachers, None, rows=1))
        finally:
            for module, training in modes:
                module.training = training
        broadcast_from_first_rank(self.losses)
        return self

    def parameters(self, recurse: bool = True):
        """Student, projectors and what the losses learn. RuntimeError while a width is unknown."""
        self._require_built()
        return super().parameters(recurse)

    def named_parameters(self, *args, **kwargs):
        """As nn.Module's; RuntimeError while a width is unknown."""
        self._require_built()
        return super().named_parameters(*args, **kwargs)

    def _require_built(self) -> None:
        for name, parameter in self.losses.named_parameters():
            if is_lazy(parameter):
                raise RuntimeError(f"losses.{name} has no width yet: call build(x) with a batch (or load_state_dict) before parameters()")

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Banks are equal on all ranks by themselves: DistributedDataParallel is not to broadcast them."""
        return [
            f"{path}.{name}"
            for path, module in self.named_modules()
            if module is not self
            for name in getattr(module, "_ddp_params_and_buffers_to_ignore", ())
        ]

    def _apply(self, fn, recurse: bool = True):
        for teacher in self.teachers:
            if isinstance(teacher, nn.Module):
                teacher._apply(fn)
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {**self.__dict__, "_student_tap": None, "_teacher_taps": None, "_passes": None}

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self._install()  # copied and unpickled modules carry inert hooks


def _checked_terms(terms, teachers: int) -> dict[str, Term]:
    if not terms:
        raise ValueError("terms must hold at least one Term: {name: Term(loss, at=..., weight=...)}")
    for name, term in terms.items():
        if not isinstance(term, Term):
            raise TypeError(f"terms[{name!r}] must be a Term, got {type(term).__name__}")
        if name == "task" or "." in name:
            raise ValueError(f'a term cannot be called {name!r}: "task" is the task loss, and names go into state_dict keys')
        if term.teacher is not None and not 0 <= term.teacher < teachers:
            raise ValueError(f"terms[{name!r}].teacher must be in [0, {teachers}), got {term.teacher}")
    return dict(terms)


def _as_views(x):
    return dict(enumerate(x)) if isinstance(x, (tuple, list)) else x


def _each(x, function: Callable):
    """`function` of `x`, or {view: function of it} where `x` is a dict of views."""
    return {view: function(value) for view, value in x.items()} if isinstance(x, dict) else function(x)


def _call(model: nn.Module, tap: capture, view) -> _Pass:
    output = model(**view) if isinstance(view, Mapping) else model(view)
    return _Pass(output, tap.take())


class _Rows(dict):
    """Encoded tensors by name."""

    def __missing__(self, name):
        raise ValueError(f"Features hold no {name!r}, they hold {', '.join(map(repr, self))}")


def _as_pass(rows: Mapping[str, Tensor]) -> _Pass:
    """Encoded rows as if a model had just computed them: its output is "output", or the only tensor there is."""
    only = next(iter(rows.values())) if len(rows) == 1 else rows
    return _Pass(rows.get("output", only), _Rows(rows))
