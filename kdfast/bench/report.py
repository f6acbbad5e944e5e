"""The rows of a benchmark: as a table for the terminal, and as files."""

import csv
import datetime
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

import kdfast
from kdfast._core import extension, files, text

from .runner import Row

_HEADER = ("peer", "time", "20-80 %", "x kdfast", "x bare mm", "of FMA", "extra MiB", "error")
_GPU_HEADER = ("peer", "time", "20-80 %", "x kdfast", "x bare mm", "TFLOP/s", "extra MiB", "error")


def table(rows: list[Row]) -> str:
    """One comparison (a shape and dtype): a block of lines a clock."""
    first, on_gpu = rows[0], any(row.clock == "cuda" for row in rows)
    lines = [f"{first.family} {first.case}  {first.shape}  {first.dtype}"]
    for clock in dict.fromkeys(row.clock for row in rows):
        block = [row for row in rows if row.clock == clock]
        lines.append(f"  {_about_clock(block[0], on_gpu)}{'; the machine was busy: these say little' if _waited(rows, block) else ''}")
        name = max(len(row.peer) for row in block)
        measured = [row for row in block if row.median is not None]
        lines += [f"    {line}" for line in text.aligned([_GPU_HEADER if on_gpu else _HEADER, *(_cells(row, on_gpu) for row in measured)])]
        lines += [f"    {row.peer.ljust(name)}  {row.note}" for row in block if row.note]
    return "\n".join(lines)


def _about_clock(row: Row, on_gpu: bool) -> str:
    if on_gpu:
        return f"the GPU's time, caches flushed{_state(row)}" if row.clock == "cuda" else "the host's time"
    threads = "1 thread, process-CPU" if row.clock == "cpu" else f"{row.threads} threads, wall"
    return threads + (f"; FMA probe {row.fma_rate / 1e9:.0f} GFLOP/s" if row.fma_rate else "; no FMA probe")


def _state(row: Row) -> str:
    return f"; {row.sm_mhz:.0f} MHz, {row.watts:.0f} W, {row.celsius:.0f} C" if row.sm_mhz is not None else ""


def _waited(rows: list[Row], block: list[Row]) -> bool:
    """Whether all threads took half as long again, on the wall, as one of them has processor time to do: other programs had the rest."""
    alone = {row.peer: row.median for row in rows if row.clock == "cpu" and row.median}
    return any(row.clock == "wall" and row.median and row.median > 1.5 * alone.get(row.peer, float("inf")) for row in block[:1])


def _cells(row: Row, on_gpu: bool) -> tuple[str, ...]:
    of_fma = f"{row.fraction_of_fma:.0%}" if row.fraction_of_fma else ""
    rate = f"{row.flop_rate / 1e12:.3g}" if row.flop_rate else ""
    return (
        row.peer,
        _seconds(row.median),
        f"{_seconds(row.low)} - {_seconds(row.high)}",
        f"{row.per_kdfast:.2f}" if row.per_kdfast else "",
        f"{row.per_bare_mm:.2f}" if row.per_bare_mm else "",
        rate if on_gpu else of_fma,
        f"{row.extra_bytes / 2**20:.1f}" if row.extra_bytes is not None else "",
        f"{row.error:.0e}" if row.error is not None else "",
    )


def _seconds(value: float) -> str:
    scale, unit = (1e3, "ms") if value >= 1e-3 else (1e6, "us")
    return f"{value * scale:.3g} {unit}" if value < 1 else f"{value:.3g} s"


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Long form: one line a peer, clock, dtype and shape, the machine's facts on each. Whole or absent."""
    module, _ = extension.load("_C")
    facts = {
        "kdfast": kdfast.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "isa": module.isa_in_force() if module else "",
    }
    _write_csv(rows, facts, path)


def _write_csv(rows: Iterable[Row], facts: dict[str, str], path: Path) -> None:
    with files.whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*Row._fields, *facts))
        writer.writerows((*row, *facts.values()) for row in rows)


def gpu_facts() -> dict[str, str]:
    """Of results on a GPU: what they were measured on, and of what. The environment's COMMIT names a tree that is no checkout."""
    commit = os.environ.get("COMMIT") or _told("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD")
    facts = {"kdfast": kdfast.__version__, "commit": commit}
    facts |= {"date": datetime.date.today().isoformat(), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    facts |= {"cuda": torch.version.cuda or "", "driver": _told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")}
    triton = importlib.util.find_spec("triton")
    return facts | {"triton": importlib.import_module("triton").__version__ if triton else ""}


def _told(*command: str) -> str:
    """The first line that a command prints, "" where it cannot."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0].strip()


def write_gpu(rows: list[Row], folder: Path, facts: dict[str, str], failed: list[str], left: Iterable) -> list[Path]:
    """cuda.csv and cuda.json, every row, and cuda.md, a table a comparison; with what failed and what was left for lack of time."""
    paths = [folder / f"cuda.{kind}" for kind in ("csv", "json", "md")]
    _write_csv(rows, facts, paths[0])
    left = [str(task) for task in left]
    with files.whole(paths[1]) as temporary:
        results = {"about": facts, "failed": failed, "left": left, "rows": [row._asdict() for row in rows]}
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    with files.whole(paths[2]) as temporary:
        temporary.write_text(_markdown(rows, facts, failed, left))
    return paths


def _markdown(rows: list[Row], facts: dict[str, str], failed: list[str], left: list[str]) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in facts.items() if value), ""]
    lines += [f"Failed: {task}" for task in failed] + [f"Left for lack of time: {task}" for task in left]
    for which in dict.fromkeys((row.family, row.case, row.shape, row.dtype) for row in rows):
        state = next(_state(row) for row in rows if (row.family, row.case, row.shape, row.dtype) == which)
        lines += ["", "### {} {}, {}, {}".format(*which) + state, "", "| peer | GPU | host | x kdfast | TFLOP/s | extra MiB | error | |"]
        lines.append("|---" * 8 + "|")
        of_peer: dict[str, dict[str, Row]] = {}
        for row in rows:
            if (row.family, row.case, row.shape, row.dtype) == which:
                of_peer.setdefault(row.peer, {})[row.clock] = row
        for peer, clocks in of_peer.items():
            by_gpu, by_host = clocks["cuda"], clocks["wall"]
            if by_gpu.median is None:
                lines.append(f"| {peer} | | | | | | | {by_gpu.note} |")
                continue
            _, time, _, ratio, _, rate, memory, error = _cells(by_gpu, on_gpu=True)
            note = by_gpu.note and f"{by_gpu.note} "
            lines.append(f"| {peer} | {time} | {_seconds(by_host.median)} | {ratio} | {rate} | {memory} | {error} | {note}|")
    return "\n".join(lines) + "\n"
