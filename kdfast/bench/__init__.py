"""`kdfast bench`: each op against its peers and the machine's own limit. benchmarks/README.md says how to read the figures."""

from collections.abc import Sequence
from pathlib import Path

import torch

from . import gpu, registry, report, runner


def run(families: list[str], level: str, output: Path, names: Sequence[str] = ()) -> list[Path]:
    """Measure `families` (none: all), or only their cases called `names`, on the CPU: prints a table a comparison.

    Writes one CSV a family to `output`; returns the paths. Raises ValueError for an unknown family, level or case, OSError where
    `output` cannot be made: before anything is measured.
    """
    written, cases = [], _chosen(families, names)
    output.mkdir(parents=True, exist_ok=True)
    for family, chosen in cases.items():
        rows = []
        for name in chosen:
            for comparison in runner.run(family, name, level):
                rows += comparison
                print(report.table(comparison), end="\n\n", flush=True)
        written.append(output / f"{family}.csv")
        report.write_csv(rows, written[-1])
        print(written[-1])
    return written


def run_on_gpu(families: list[str], level: str, output: Path, names: Sequence[str] = (), *, seconds: float | None = None) -> list[Path]:
    """The same on a GPU, within `seconds` where given: cuda.csv, cuda.json and cuda.md, written anew after each comparison.

    Raises ValueError and OSError as `run`; RuntimeError without a GPU, or, when all is written, if kdfast failed anywhere.
    """
    tasks = gpu.plan(_chosen(families, names), level)
    _need_gpu()
    output.mkdir(parents=True, exist_ok=True)
    return gpu.run(tasks, output, seconds)


def compile_for_gpu(families: list[str], level: str, names: Sequence[str] = (), *, seconds: float | None = None) -> None:
    """Fill the caches of compiled kernels with what `run_on_gpu` needs, several at a time. Raises as it does."""
    tasks = gpu.plan(_chosen(families, names), level)
    _need_gpu()
    gpu.compile_all(tasks, seconds)


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("no GPU is visible to PyTorch")


def _chosen(families: list[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Names of the cases to measure, by family."""
    available = {family: list(registry.cases_of(family)) for family in dict.fromkeys(families or registry.families())}
    known = dict.fromkeys(name for cases in available.values() for name in cases)
    for name in names:
        if name not in known:
            raise ValueError(f"case must be one of {', '.join(known)}, got {name!r}")
    chosen = {family: [name for name in cases if not names or name in names] for family, cases in available.items()}
    return {family: cases for family, cases in chosen.items() if cases}
