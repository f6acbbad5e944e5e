"""`kdfast distill`: train a small student by each method beside its task, and say what that gained over seeds."""

import importlib.util
import time
from functools import partial
from pathlib import Path

from tqdm import tqdm

from .._core import checks
from ..bench import measure
from . import report
from .recipes import RECIPES

BASELINE = "cross-entropy alone"
DATA_FREE = "RGAL without data"
METHODS = (BASELINE, *RECIPES, DATA_FREE)
STEPS, BATCH = 400, 64


def run(methods: list[str], output: Path, *, data: str = "digits", seeds: int = 3, steps: int = STEPS) -> list[dict]:
    """Train every method (default: all) with every seed; print the table, write results.csv and results.md to `output`.

    Returns the rows of the CSV: method, seed, accuracy (of the student's own output on the test samples, in per cent) and
    milliseconds of processor time a step. Raises ValueError for an unknown name, ImportError without scikit-learn: before any work.
    """
    checks.choice("data", data, ("digits",))
    for name in methods:
        checks.choice("method", name, METHODS)
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError("not installed: pip install scikit-learn")
    from . import data_free, digits, training

    def trained(name: str, seed: int) -> dict:
        start = time.process_time()
        if name == DATA_FREE:
            score = data_free.train(problem, seed, batch_size=BATCH, steps=steps)
        else:
            trainer = training.Trainer(RECIPES.get(name, training.ALONE), problem, seed, batch_size=BATCH, steps=steps)
            for _ in range(steps):
                trainer.step()
            score = training.accuracy(trainer.student, problem)
        seconds = time.process_time() - start
        return {"method": name, "seed": seed, "accuracy": round(100 * score, 2), "step_ms": round(1e3 * seconds / steps, 2)}

    chosen = [BASELINE, *(name for name in methods or METHODS if name != BASELINE)]
    with measure.threads(1):
        problem = digits.load()
        teacher = 100 * training.accuracy(problem.teachers["one"], problem)
        runs = [partial(trained, name, seed) for name in chosen for seed in range(seeds)]
        rows = [one() for one in tqdm(runs, desc="training", unit="student")]
    lines = report.table(rows, teacher, BASELINE)
    print("\n" + "\n".join(lines))
    for path in report.write(rows, lines, output):
        print(path)
    return rows
