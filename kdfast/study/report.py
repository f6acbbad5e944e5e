"""The study's tables, as Markdown, and their files."""

import csv
import statistics
from pathlib import Path

from .._core import files, text


def table(rows: list[dict], teacher: float, baseline: str) -> list[str]:
    """Lines of a Markdown table: mean and standard deviation over seeds, gain over `baseline` paired by seed, time and memory of a step."""
    seeds = sorted({row["seed"] for row in rows})
    scores = _by(rows, "method")
    lines = [
        f"Accuracy in per cent, {text.over_seeds(len(seeds))}; gain over {baseline} with the same seed; the teacher "
        f"has {teacher:.1f}. A step: milliseconds of processor time on one thread; MiB at its peak beyond what stays between steps.",
        "",
        "| method | accuracy | gain | ms | MiB |",
        "|---|---|---|---|---|",
    ]
    alone = [row["accuracy"] for row in scores[(baseline,)]]
    for (name,), found in scores.items():
        values = [row["accuracy"] for row in found]
        gains = [score - other for score, other in zip(values, alone, strict=True)]
        gain = "" if name == baseline else _mean_and_spread(gains, sign="+")
        time, memory = (statistics.mean(row[key] for row in found) for key in ("step_ms", "step_mib"))
        lines.append(f"| {name} | {_mean_and_spread(values)} | {gain} | {time:.1f} | {memory:.1f} |")
    return lines


def weights(rows: list[dict]) -> list[str]:
    """Lines of a Markdown table: a method's mean accuracy on the validation samples at each weight, the best in bold."""
    lines = ["| method | weight: accuracy |", "|---|---|"]
    means = {key: statistics.mean(row["accuracy"] for row in found) for key, found in _by(rows, "method", "weight").items()}
    for name in dict.fromkeys(name for name, _ in means):
        mine = {weight: score for (method, weight), score in means.items() if method == name}
        best = max(mine, key=mine.get)
        shown = (f"**{weight:g}: {score:.1f}**" if weight == best else f"{weight:g}: {score:.1f}" for weight, score in mine.items())
        lines.append(f"| {name} | {', '.join(shown)} |")
    return lines


def _by(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _mean_and_spread(values: list[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{spread}"


def write(rows: list[dict], lines: list[str], folder: Path, name: str = "results") -> list[Path]:
    """NAME.csv and NAME.md in `folder`, each whole or absent."""
    paths = [folder / f"{name}.csv", folder / f"{name}.md"]
    with files.whole(paths[0]) as temporary, temporary.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with files.whole(paths[1]) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return paths
