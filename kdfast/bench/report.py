"""The rows of a benchmark: as a table for the terminal, and as CSV."""

import csv
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

import kdfast
from kdfast._core import extension, files, text

from .runner import Row

_HEADER = ("peer", "time", "20-80 %", "x kdfast", "x bare mm", "of FMA", "extra MiB", "error")


def table(rows: list[Row]) -> str:
    """One comparison (a shape and dtype): a block of lines a clock."""
    first = rows[0]
    lines = [f"{first.family} {first.case}  {first.shape}  {first.dtype}"]
    for clock in dict.fromkeys(row.clock for row in rows):
        block = [row for row in rows if row.clock == clock]
        threads = "1 thread, process-CPU" if clock == "cpu" else f"{block[0].threads} threads, wall"
        limit = f"; FMA probe {block[0].fma_rate / 1e9:.0f} GFLOP/s" if block[0].fma_rate else "; no FMA probe"
        lines.append(f"  {threads}{limit}")
        name = max(len(row.peer) for row in block)
        measured = [row for row in block if row.median is not None]
        lines += [f"    {line}" for line in text.aligned([_HEADER, *map(_cells, measured)])]
        lines += [f"    {row.peer.ljust(name)}  {row.note}" for row in block if row.median is None]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.peer,
        _seconds(row.median),
        f"{_seconds(row.low)} - {_seconds(row.high)}",
        f"{row.per_kdfast:.2f}" if row.per_kdfast else "",
        f"{row.per_bare_mm:.2f}" if row.per_bare_mm else "",
        f"{row.fraction_of_fma:.0%}" if row.fraction_of_fma else "",
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
    with files.whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*Row._fields, *facts))
        writer.writerows((*row, *facts.values()) for row in rows)
