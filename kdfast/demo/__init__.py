"""`kdfast demo`: distil a teacher into a student with each method, and show what the losses gained and cost."""

import importlib.util
from pathlib import Path

from kdfast.bench import measure

from . import cost, experiment, report

COMPARED = "BINGO + 10 cosine"


def run(output: Path, *, quick: bool = False, seeds: int = 3, epochs: int | None = None) -> dict:
    """Run the text demo (`quick`: the digits), print the table, write results.json and results.png to `output`.

    The teacher's embeddings are kept in `output` too, for the next run. Raises TeacherMissing when its package is
    not installed, ImportError when a library is not, OSError where `output` cannot be made: all before any work.
    """
    from . import digits, text

    subject = digits if quick else text
    needed = {"matplotlib": "matplotlib", **subject.NEEDS}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"not installed: pip install {' '.join(missing)}")
    output.mkdir(parents=True, exist_ok=True)
    task, teacher, methods = subject.prepare(output, epochs=epochs or subject.EPOCHS)
    with measure.threads(1):  # steps of milliseconds gain little from a second thread, and on a busy machine lose much
        results = {
            "title": subject.TITLE,
            "machine": report.machine(),
            "settings": {"seeds": seeds, "epochs": task.epochs, "batch_size": task.batch_size, "temperature": task.temperature},
            "teacher": teacher,
            **experiment.run(task, methods, seeds=seeds, compared=COMPARED),
        }
        sizes = cost.Sizes(task.batch_size, *task.bank.shape)
        for name, costs in cost.loss_costs(sizes, seconds=2 if quick else 10).items():
            results["methods"][name]["loss_cost"] = costs
    print(f"\n{subject.TITLE}\n\n{report.table(results)}\n\n{report.findings(results)}\n")
    for path in report.write(results, output):
        print(path)
    return results
