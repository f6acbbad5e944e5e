"""`kdfast bench --device cuda`: within a time limit, whatever happens to a kernel.

Comparisons run one after another in a worker process. One that fails, or takes too long, costs its own rows: the worker, whose GPU context
may be lost, is replaced, and the comparison repeated with kdfast and the plain formula alone. Where kdfast itself fails, or is wrong, its
compiled kernels are trusted no more: that comparison and its family's others in that dtype run with Triton's, and where it hangs, when all
else is measured. The targets come first, then the first shapes of all cases before any second one, and results are written as they come.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from .._core import extension, impls
from . import devices, measure, registry, report, runner
from .clocks import Clocks
from .runner import Row

LIMIT = 90.0  # seconds of a comparison
OWN_LIMIT = 40.0  # of those until kdfast's first result, which it has checked before any other call begins
WORKERS = 12  # processes that compile, each with a context on the GPU
FALLBACK = "triton"  # whose kernels stand in for compiled ones that failed


#: what the kernels for GPUs were written to reach: (family, case, shape, dtype)
TARGETS = (
    ("similarity", "info_nce", (4096, 65536, 128), torch.bfloat16),
    ("similarity", "info_nce", (8192, 65536, 256), torch.bfloat16),
    ("similarity", "clip", (16384, 512), torch.bfloat16),
    ("similarity", "info_nce", (32768, 1_048_576, 128), torch.bfloat16),
    ("sinkhorn", "solve", (256, 256, 256, 50), torch.float32),
    ("sinkhorn", "points", (1, 10_000, 10_000, 64, 100), torch.float32),
    ("sinkhorn", "assign", (8192, 65536, 3), torch.float32),
    ("triplet", "batch_hard", (16384, 256, 4), torch.float32),
    ("similarity", "bank_gradient", (4096, 65536, 128), torch.bfloat16),
)


class Task(NamedTuple):
    """A comparison: what runner.compare takes."""

    family: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    level: str

    def __str__(self) -> str:
        case = registry.cases_of(self.family)[self.name]
        return f"{self.family} {self.name} {runner.label(case, self.shape)} {runner.dtype_name(self.dtype)}"


def plan(chosen: dict[str, list[str]], level: str) -> list[Task]:
    """The cases of families `chosen`: targets, then first shapes first. Raises ValueError for an unknown level."""
    placed = []
    for family, names in chosen.items():
        for name in names:
            comparisons = runner.comparisons(registry.cases_of(family)[name], level, "cuda")
            shapes = list(dict.fromkeys(shape for shape, _ in comparisons))
            placed += [(_place(task := Task(family, name, *comparison, level), shapes), task) for comparison in comparisons]
    return [task for _, task in sorted(placed, key=lambda entry: entry[0])]


def _place(task: Task, shapes: list[tuple[int, ...]]) -> int:
    return TARGETS.index(task[:4]) - len(TARGETS) if task[:4] in TARGETS else shapes.index(task.shape)


def run(tasks: list[Task], output: Path, seconds: float | None = None) -> list[Path]:
    """Measure `tasks`, as many as fit into `seconds`, and write cuda.csv, cuda.json and cuda.md to `output`.

    Raises RuntimeError, when all is written, if kdfast or the plain formula failed anywhere.
    """
    rows: list[Row] = []
    failed: list[str] = []
    left = list(tasks)
    doubted: set[tuple[str, torch.dtype]] = set()  # families whose compiled kernels failed in a dtype
    until = time.monotonic() + (seconds if seconds is not None else float("inf"))
    facts = report.gpu_facts()
    written = report.write_gpu(rows, output, facts, failed, left)
    worker, clocks = Worker(), Clocks()
    clocks.start()
    try:
        while left and time.monotonic() < until:
            task, about = left[0], (left[0].family, left[0].dtype)
            impl = FALLBACK if about in doubted else None
            answer = worker.ask(_measure, task, until=until, impl=impl)
            if answer.problem is not None and time.monotonic() >= until:
                break
            found = answer.rows
            if answer.problem is not None:
                failed.append(f"{task}{f', impl={impl!r}' if impl else ''}: {answer.problem}")
                print(failed[-1], end="\n\n", flush=True)
                again = answer.own and impl is None and extension.missing_cuda() is None
                if again:
                    doubted.add(about)
                if answer.hung:
                    left.sort(key=lambda other, like=about: (other.family, other.dtype) == like)
                if again:
                    continue
                if not answer.own:
                    found = worker.ask(_measure_own, task, until=until, impl=impl).rows
            left.remove(task)
            if found:
                state = clocks.since(answer.since)
                found = [_own_noted(task, row, impl)._replace(**state._asdict()) for row in found]
                rows += found
                print(report.table(found), end="\n\n", flush=True)
            written = report.write_gpu(rows, output, facts, failed, left)
    finally:
        worker.stop()
        clocks.stop()
    if left:
        print(f"left for lack of time: {', '.join(map(str, left))}")
    if failed:
        raise RuntimeError(f"of {len(tasks)} comparisons these failed:\n  " + "\n  ".join(failed))
    return written


def _own_noted(task: Task, row: Row, impl: str | None) -> Row:
    """kdfast's rows say whose kernels they are, where not those it would choose."""
    return row._replace(note=row.note or f"impl={impl!r}") if impl is not None and row.peer == _own(task) else row


def compile_all(tasks: Iterable[Task], seconds: float | None = None) -> None:
    """Call what compiles itself once, several tasks at a time: the caches on disk serve `run` afterwards. Problems are left to it."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # of each process: else every one starts as many as there are cores
    with multiprocessing.get_context("spawn").Pool(min(WORKERS, os.cpu_count() or 1)) as pool:  # terminated where the block ends
        until = time.monotonic() + (seconds if seconds is not None else float("inf"))
        waiting = [pool.apply_async(_call_once, (task,)) for task in tasks]
        for result in waiting:
            result.wait(min(LIMIT, max(0.0, until - time.monotonic())))
        print(f"{sum(result.ready() for result in waiting)} of {len(waiting)} comparisons compiled")


class Answer(NamedTuple):
    rows: list[Row]
    problem: str | None
    own: bool = False  # it came in kdfast's own call
    hung: bool = False  # there, without an end
    since: float = 0.0  # when the last call began for the first time: calls are timed after it


class Worker:
    """A process that answers one question at a time, and is started anew where the last answer was a problem."""

    def __init__(self) -> None:
        self._process = self._pipe = None

    def ask(self, function: Callable[..., list[Row]], task: Task, *, until: float, impl: str | None = None) -> Answer:
        """`function(task, tell)` in the process, with `impl` for KDFAST_IMPL: its rows, or the problem. It tells whose call it begins."""
        if self._process is None:
            self._start()
        asked = began = time.monotonic()
        answer, peer, ends = None, "", min(asked + LIMIT, until)

        def problem(what: str, **more) -> Answer:
            return Answer([], f"{what}{peer and ', in the call of ' + peer}", own=peer == _own(task), **more)

        try:
            self._pipe.send((function, task, impl))
            while answer is None:
                if not self._pipe.poll(max(0.0, ends - time.monotonic())):
                    answer = problem(f"no answer within {time.monotonic() - asked:.0f} s", hung=peer == _own(task))
                elif isinstance(told := self._pipe.recv(), str):
                    peer, began = told, time.monotonic()
                    ends = min(asked + LIMIT, until, began + (OWN_LIMIT if peer == _own(task) else LIMIT))
                elif told[1] is not None:
                    answer = problem(told[1])
                else:
                    answer = Answer(told[0], amiss := wrong(told[0], _own(task)), own=amiss is not None, since=began)
        except (EOFError, OSError):
            self._process.join()
            answer = problem(f"the process ended with exit code {self._process.exitcode}")
        if answer.problem is not None:
            self.stop()
        return answer

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = self._pipe = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # its end in this process: else nothing would tell that the other has gone


def wrong(rows: list[Row], own: str) -> str | None:
    """What the gate says against kdfast's own result (None: nothing)."""
    return next((row.note for row in rows if row.peer == own and row.error is not None and row.median is None), None)


def _serve(pipe) -> None:
    default = impls.DEFAULT
    while True:
        try:
            function, task, impl = pipe.recv()
        except EOFError:  # the other end has gone
            return
        impls.DEFAULT = impl or default
        try:
            answer = function(task, pipe.send), None
        except Exception as problem:  # a kernel may do anything to its process
            answer = [], f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"
        pipe.send(answer)


def _own(task: Task) -> str:
    """The name of kdfast's own call."""
    return registry.cases_of(task.family)[task.name].peers[0].name


def _measure(task: Task, tell: Callable[[str], None]) -> list[Row]:
    torch.cuda.empty_cache()
    return runner.compare(*task, device=devices.CUDA, tell=tell)


def _measure_own(task: Task, tell: Callable[[str], None]) -> list[Row]:
    return runner.compare(*task, device=devices.CUDA, own=True, tell=tell)


def _call_once(task: Task) -> None:
    """Each peer but plain PyTorch, which compiles nothing."""
    case = registry.cases_of(task.family)[task.name]
    with measure.threads(1):
        inputs = devices.place(case.inputs(task.shape, task.dtype), "cuda")
    for peer in case.peers:
        if peer is case.peers[1] or peer.floor or not runner.serves(peer, task.dtype, "cuda") or runner.missing(peer, task.level):
            continue
        try:
            peer.build(inputs)()
            torch.cuda.synchronize()
        except Exception as problem:
            print(f"{task}, {peer.name}: {type(problem).__name__}", flush=True)
            _end_where_the_gpu_is_lost()
        torch.cuda.empty_cache()


def _end_where_the_gpu_is_lost() -> None:
    """After a kernel's fault nothing else runs in its process: the pool starts another."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(1)
