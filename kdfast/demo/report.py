"""The demo's results: a table for the terminal, a plot, a JSON file."""

import json
import platform
import statistics
from pathlib import Path

import torch

import kdfast
from kdfast._core import files, text

MIB = 2**20


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean, and standard deviation over seeds (0 for one)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(results: dict) -> str:
    """One line a method: quality, time of a training step, and its loss's time and memory beside the plain formula's."""
    metrics = results["metrics"]
    header = ["", *metrics, "step ms", "loss ms", "(plain)", "loss MiB", "(plain)"]
    rows = [["teacher", *(f"{results['teacher'][metric]:.1f}" for metric in metrics), *[""] * 5]]
    for name, found in results["methods"].items():
        cells = [name]
        for metric in metrics:
            mean, spread = mean_and_spread(found["scores"][metric])
            cells.append(f"{mean:.2f} ± {spread:.2f}" if results["settings"]["seeds"] > 1 else f"{mean:.2f}")
        cells.append(f"{1e3 * statistics.mean(found['step_seconds']):.1f}")
        for key, scale in (("seconds", 1e3), ("extra_bytes", 1 / MIB)):
            cost = found.get("loss_cost")
            cells += [f"{cost[kind][key] * scale:.2f}" if cost else "-" for kind in ("kdfast", "plain")]
        rows.append(cells)
    lines = text.aligned([header, *rows])
    settings = results["settings"]
    legend = (
        f"(per cent, {text.over_seeds(settings['seeds'])}; step: a whole training step;\n"
        f"loss: forward and backward of a batch of {settings['batch_size']}, beside the same formula in plain PyTorch, one thread;\n"
        "MiB: its peak memory beyond the inputs)"
    )
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], legend])


def findings(results: dict) -> str:
    """What the table shows, in words, differences next to their spread; and how near the plain loss's curve is."""
    lines = []
    for metric in results["metrics"]:
        ranked = sorted(results["methods"], key=lambda name: -statistics.mean(results["methods"][name]["scores"][metric]))
        lines.append(f"{metric}: " + " > ".join(ranked))
        best, second = (results["methods"][name]["scores"][metric] for name in ranked[:2])
        gain, spread = statistics.mean(best) - statistics.mean(second), max(mean_and_spread(best)[1], mean_and_spread(second)[1])
        verdict = "more than the spread over seeds" if gain > spread else "within the spread over seeds: no difference shown"
        verdict = f"{verdict}, {spread:.2f}" if len(best) > 1 else "of one seed, which does not tell it from chance"
        lines.append(f"    {ranked[0]} over {ranked[1]}: {gain:+.2f} ({verdict})")
    same = results["same_curve"]
    lines.append(
        f"{same['method']}, seed {same['seed']}: fused and plain losses differ by at most {same['largest_difference']:.1e} "
        f"over {len(same['fused'])} steps (loss {same['plain'][0]:.2f} to {same['plain'][-1]:.2f})"
    )
    return "\n".join(lines)


def machine() -> dict:
    return {
        "kdfast": kdfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def write(results: dict, folder: Path) -> list[Path]:
    """results.json and results.png in `folder`, each whole or absent."""
    paths = [folder / "results.json", folder / "results.png"]
    with files.whole(paths[0]) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    with files.whole(paths[1]) as temporary:
        _plot(results, temporary)
    return paths


def _plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics, methods = results["metrics"], results["methods"]
    figure, axes = plt.subplots(1, len(metrics) + 1, figsize=(5 * (len(metrics) + 1), 4), layout="constrained")
    for axis, metric in zip(axes, metrics, strict=False):
        means, spreads = zip(*(mean_and_spread(found["scores"][metric]) for found in methods.values()), strict=True)
        axis.errorbar(means, list(methods), xerr=spreads, fmt="o", capsize=3, color="#1f3b57")
        axis.grid(axis="x", alpha=0.3)
        axis.invert_yaxis()
        axis.set_xlabel(f"{metric} (%), {text.over_seeds(results['settings']['seeds'])}")
    same = results["same_curve"]
    axes[-1].plot(same["plain"], label="plain PyTorch", color="#d1605e", linewidth=3)
    axes[-1].plot(same["fused"], label="kdfast", color="#1f3b57", linewidth=0.8)
    axes[-1].set_xlabel(f"step ({same['method']}, seed {same['seed']})")
    axes[-1].set_ylabel("loss")
    axes[-1].legend()
    figure.suptitle(results["title"])
    figure.savefig(path, dpi=120)
    plt.close(figure)
