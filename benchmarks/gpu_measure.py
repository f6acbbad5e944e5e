"""Times on a GPU, and the CSV, JSON and Markdown of their results."""

import csv
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch


def median_ms(step: Callable, repeats: int, device: str) -> float:
    """By CUDA events, with the L2 cache flushed in between."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if device == "cuda" else None
    times = []
    for i in range(repeats + 3):
        if flush is not None:
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            step()
            elapsed = 1e3 * (time.perf_counter() - begin)
        if i >= 3:  # compilation and warm-up
            times.append(elapsed)
    return sorted(times)[len(times) // 2]


def peak_mib(step: Callable, device: str) -> float | None:
    """What a step allocates beyond its inputs."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def attempt(measured: Callable[[], dict]) -> dict:
    """What `measured` returns, or why it could not: a peer that cannot run is a result too."""
    try:
        return measured()
    except torch.OutOfMemoryError:
        return {"problem": "out of memory"}
    except Exception as raised:
        return {"problem": f"{type(raised).__name__}: {str(raised).splitlines()[0][:120]}"}


def about(device: str, commit: str) -> dict:
    facts = {"commit": commit, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "python": platform.python_version()}
    return facts | ({"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {})


def write(folder: Path, name: str, columns: list[str], facts: dict, results: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"about": facts, "results": results}, indent=1))
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(results)

    def cell(value) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [", ".join(f"{k} {v}" for k, v in facts.items()), "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in results]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
