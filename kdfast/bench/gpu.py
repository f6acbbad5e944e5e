"""`kdfast bench --device cuda`: within a time limit, whatever happens to a kernel.

Comparisons run one after another in a worker process. One that fails, or takes too long, costs its own rows: the worker, whose GPU context
may be lost, is replaced, and the comparison repeated with kdfast and the plain formula alone; but where kdfast itself hangs, its family's
others in that dtype, which may hang too, wait until all else is measured. The first shapes of all cases come before any second one, and
results are written as they come.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from . import devices, measure, registry, report, runner
from .runner import Row

LIMIT = 90.0  # seconds of a comparison
OWN_LIMIT = 40.0  # of those until kdfast's first result, which it has checked before any other call begins
WORKERS = 12  # processes that compile, each with a context on the GPU


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
    """The cases of families `chosen`, first shapes first. Raises ValueError for an unknown level."""
    placed = []
    for family, names in chosen.items():
        for name in names:
            comparisons = runner.comparisons(registry.cases_of(family)[name], level, "cuda")
            shapes = list(dict.fromkeys(shape for shape, _ in comparisons))
            placed += [(shapes.index(shape), Task(family, name, shape, dtype, level)) for shape, dtype in comparisons]
    return [task for _, task in sorted(placed, key=lambda entry: entry[0])]


def run(tasks: list[Task], output: Path, seconds: float | None = None) -> list[Path]:
    """Measure `tasks`, as many as fit into `seconds`, and write cuda.csv, cuda.json and cuda.md to `output`.

    Raises RuntimeError, when all is written, if kdfast or the plain formula failed anywhere.
    """
    rows: list[Row] = []
    failed: list[str] = []
    left = list(tasks)
    until = time.monotonic() + (seconds if seconds is not None else float("inf"))
    facts = report.gpu_facts()
    written = report.write_gpu(rows, output, facts, failed, left)
    worker = Worker()
    try:
        while left and time.monotonic() < until:
            task = left[0]
            found, problem, hung = worker.ask(_measure, task, until=until)
            if problem is not None and time.monotonic() < until:
                failed.append(f"{task}: {problem}")
                print(failed[-1], end="\n\n", flush=True)
                if hung:
                    left.sort(key=lambda other, like=task: (other.family, other.dtype) == (like.family, like.dtype))
                else:
                    found, *_ = worker.ask(_measure_own, task, until=until)
            elif problem is not None:
                break
            left.remove(task)
            if found:
                rows += found
                print(report.table(found), end="\n\n", flush=True)
            written = report.write_gpu(rows, output, facts, failed, left)
    finally:
        worker.stop()
    if left:
        print(f"left for lack of time: {', '.join(map(str, left))}")
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(tasks)} comparisons failed:\n  " + "\n  ".join(failed))
    return written


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
    hung: bool = False  # in kdfast's own call


class Worker:
    """A process that answers one question at a time, and is started anew where the last answer was a problem."""

    def __init__(self) -> None:
        self._process = self._pipe = None

    def ask(self, function: Callable[..., list[Row]], task: Task, *, until: float) -> Answer:
        """`function(task, tell)` in the process: its rows, or the problem. It tells whose call it begins."""
        if self._process is None:
            self._start()
        asked = time.monotonic()
        answer, peer, ends = None, "", min(asked + LIMIT, until)
        try:
            self._pipe.send((function, task))
            while answer is None:
                if not self._pipe.poll(max(0.0, ends - time.monotonic())):
                    waited = time.monotonic() - asked
                    answer = Answer([], f"no answer within {waited:.0f} s{peer and ', in the call of ' + peer}", hung=peer == _own(task))
                elif isinstance(told := self._pipe.recv(), str):
                    peer = told
                    ends = min(asked + LIMIT, until, time.monotonic() + (OWN_LIMIT if peer == _own(task) else LIMIT))
                else:
                    answer = Answer(*told)
        except (EOFError, OSError):
            self._process.join()
            answer = Answer([], f"the process ended with exit code {self._process.exitcode}{peer and ', in the call of ' + peer}")
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


def _serve(pipe) -> None:
    while True:
        try:
            function, task = pipe.recv()
        except EOFError:  # the other end has gone
            return
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
