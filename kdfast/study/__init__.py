"""`kdfast distill`: train a small student by each method beside its task, and say what that gained over seeds."""

import functools
import importlib
import importlib.util
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from .._core import checks
from ..bench import measure, memory
from . import report
from .recipes import RECIPES

BASELINE = "cross-entropy alone"
DATA_FREE = "RGAL without data"
METHODS = (BASELINE, *RECIPES, DATA_FREE)
DATA = ("digits", "mnist1d", "text")
STEPS, BATCH = 400, 64
FACTORS = (0.1, 1.0, 10.0)  # of a recipe's weight, tried by `tune`
_FIRST_TUNING_SEED = 100  # no seed of `run`


def run(methods: list[str], output: Path, *, data: str = "digits", seeds: int = 3, steps: int = STEPS) -> list[dict]:
    """Train every method (default: all) with every seed; print the table, write results.csv and results.md to `output`.

    Returns the rows of the CSV: method, seed, accuracy (of the student's own output on the test samples, in per cent),
    milliseconds of processor time a step, and MiB of memory at the peak of a step beyond what stays between steps (one measurement).
    Raises ValueError for an unknown name, ImportError for a missing library, OSError where `output` cannot be made: before any work.
    """
    chosen = _chosen(methods, data)
    output.mkdir(parents=True, exist_ok=True)
    with measure.threads(1):
        problem = _problem(data)
        runs = [partial(_trained, problem, name, seed, steps) for name in chosen for seed in range(seeds)]
        rows = [one() for one in tqdm(runs, desc="training", unit="student")]
        with memory.fresh_process() as process:
            peaks = {name: memory.peak_in(process, _step, data, name) / 2**20 for name in tqdm(chosen, desc="peak memory", unit="method")}
    rows = [{**row, "step_mib": round(peaks[row["method"]], 2)} for row in rows]
    lines = report.table(rows, _teacher_accuracy(problem), BASELINE)
    print("\n" + "\n".join(lines))
    for path in report.write(rows, lines, output):
        print(path)
    return rows


def tune(methods: list[str], output: Path, *, data: str = "digits", seeds: int = 2, steps: int = STEPS) -> list[dict]:
    """Score every method at a tenth of its recipe's weight, at it and at ten times it, on the validation samples, seeds from 100 on.

    Prints the table, writes weights.csv and weights.md to `output`; returns the rows: method, weight, seed, accuracy.
    Raises as `run` does.
    """
    chosen = [name for name in _chosen(methods, data) if name in RECIPES]
    output.mkdir(parents=True, exist_ok=True)
    with measure.threads(1):
        problem = _problem(data)
        problem = problem._replace(test=problem.validation)
        runs = [
            (name, factor, seed) for name in chosen for factor in FACTORS for seed in range(_FIRST_TUNING_SEED, _FIRST_TUNING_SEED + seeds)
        ]
        rows = []
        for name, factor, seed in tqdm(runs, desc="training", unit="student"):
            found = _trained(problem, name, seed, steps, factor)
            rows.append({"method": name, "weight": RECIPES[name].weight * factor, "seed": seed, "accuracy": found["accuracy"]})
    lines = report.weights(rows)
    print("\n" + "\n".join(lines))
    for path in report.write(rows, lines, output, "weights"):
        print(path)
    return rows


def _chosen(methods: list[str], data: str) -> list[str]:
    """The methods to train, the baseline first; every name and library checked."""
    checks.choice("data", data, DATA)
    possible = [name for name in METHODS if name != DATA_FREE or data == "digits"]  # the generator makes square images
    for name in methods:
        checks.choice("method", name, possible)
    missing = [package for module, package in _module(data).NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"not installed: pip install {' '.join(missing)}")
    return [BASELINE, *(name for name in methods or possible if name != BASELINE)]


def _module(data: str):
    return importlib.import_module(f".{data}", __package__)


def _problem(data: str, *, taught: bool = True):
    from . import subject

    return subject.prepare(_module(data).load(), taught=taught)


def _trainer(problem, name: str, seed: int, steps: int, factor: float = 1.0):
    from . import data_free, training

    if name == DATA_FREE:
        return data_free.Trainer(problem, seed, batch_size=BATCH, steps=steps)
    recipe = RECIPES.get(name, training.ALONE)
    return training.Trainer(recipe._replace(weight=factor * recipe.weight), problem, seed, batch_size=BATCH, steps=steps)


def _trained(problem, name: str, seed: int, steps: int, factor: float = 1.0) -> dict:
    from . import training

    start = time.process_time()
    trainer = _trainer(problem, name, seed, steps, factor)
    for _ in range(steps):
        trainer.step()
    seconds = time.process_time() - start
    score = training.accuracy(trainer.student, problem.test)
    return {"method": name, "seed": seed, "accuracy": round(100 * score, 2), "step_ms": round(1e3 * seconds / steps, 2)}


def _step(data: str, name: str):
    """A call that trains one step, for the measurement of memory."""
    torch.set_num_threads(1)
    trainer = _trainer(_untaught(data), name, seed=0, steps=STEPS)
    if name == DATA_FREE:
        trainer.between = 1  # the images are made in every step
    return trainer.step


@functools.cache
def _untaught(data: str):
    """Teachers that have learnt nothing need as much memory."""
    return _problem(data, taught=False)


def _teacher_accuracy(problem) -> float:
    from . import training

    return 100 * training.accuracy(problem.teachers["one"], problem.test)
