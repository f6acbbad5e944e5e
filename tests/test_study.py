"""`kdfast distill`: its data, its loop, its table, at sizes of seconds."""

import csv

import pytest
import torch

from kdfast import cli, study
from kdfast.study import data_free, digits, report

pytest.importorskip("sklearn")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(digits, "_TEACHER_STEPS", 3)
    monkeypatch.setattr(data_free, "_SYNTHESIS_STEPS", 2)
    monkeypatch.setattr(data_free, "_ROUNDS", 1)


def test_digits(quick):
    data = digits.load()
    assert len(data.x) == 200 and len(data.test_x) == 597 and not data.teachers["one"].training
    index = torch.arange(4)

    def seen(name):
        return data.view(name, index, torch.Generator().manual_seed(0))

    assert torch.equal(seen("rotated1"), torch.rot90(seen("plain"), 1, (2, 3))) and torch.equal(seen("a"), seen("plain"))
    assert not torch.equal(seen("p"), seen("a")) and seen("p").shape == (4, 1, 8, 8)
    halves = data.teachers["halves"]
    assert [half(data.x[:1]).shape[1] for half in halves] == [5, 5]


def test_a_run_writes_a_row_a_student_and_a_table(quick, tmp_path, capsys):
    methods = ["--method", "KD", "--method", study.DATA_FREE]
    assert cli.main(["distill", *methods, "--seeds", "2", "--steps", "2", "--output", str(tmp_path)]) == 0
    with (tmp_path / "results.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in (study.BASELINE, "KD", study.DATA_FREE) for s in "01"]
    assert all(0 <= float(row["accuracy"]) <= 100 and float(row["step_ms"]) > 0 for row in rows)
    assert (tmp_path / "results.md").read_text().splitlines()[-1].startswith("| RGAL without data |")
    assert "| KD |" in capsys.readouterr().out


def test_gains_are_paired_by_seed():
    found = {"none": (80.0, 90.0), "KD": (82.0, 92.0)}
    rows = [{"method": m, "seed": i, "accuracy": a, "step_ms": 1.0} for m, accuracies in found.items() for i, a in enumerate(accuracies)]
    assert report.table(rows, 99.0, "none")[-2:] == ["| none | 85.0 ± 7.1 |  | 1.0 |", "| KD | 87.0 ± 7.1 | +2.0 ± 0.0 | 1.0 |"]


def test_unknown_names_are_named(tmp_path, capsys):
    assert cli.main(["distill", "--method", "nonsense", "--output", str(tmp_path)]) == 1
    assert "'nonsense'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="data must be one of"):
        study.run([], tmp_path, data="imagenet")
