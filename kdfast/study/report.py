"""The study's table, as Markdown, and its files."""

import csv
import statistics
from pathlib import Path

from .._core import files


def table(rows: list[dict], teacher: float, baseline: str) -> list[str]:
    """Lines of a Markdown table: mean and standard deviation over seeds, the gain over `baseline` paired by seed, time a step."""
    seeds = sorted({row["seed"] for row in rows})
    scores = {name: [row["accuracy"] for row in rows if row["method"] == name] for name in dict.fromkeys(row["method"] for row in rows)}
    lines = [
        f"Accuracy in per cent, mean ± standard deviation over {len(seeds)} seeds; gain over {baseline} with the same seed; the teacher "
        f"has {teacher:.1f}. Milliseconds of processor time on one thread.",
        "",
        "| method | accuracy | gain | ms a step |",
        "|---|---|---|---|",
    ]
    for name, found in scores.items():
        gains = [score - other for score, other in zip(found, scores[baseline], strict=True)]
        gain = "" if name == baseline else _mean_and_spread(gains, sign="+")
        cost = statistics.mean(row["step_ms"] for row in rows if row["method"] == name)
        lines.append(f"| {name} | {_mean_and_spread(found)} | {gain} | {cost:.1f} |")
    return lines


def _mean_and_spread(values: list[float], sign: str = "") -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.1f} ± {spread:.1f}"


def write(rows: list[dict], lines: list[str], folder: Path) -> list[Path]:
    """results.csv and results.md in `folder`, each whole or absent."""
    paths = [folder / "results.csv", folder / "results.md"]
    with files.whole(paths[0]) as temporary, temporary.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with files.whole(paths[1]) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return paths
