"""The command line: arguments, exit statuses, messages."""

import subprocess
import sys

import pytest

import kdfast
from kdfast import bench, cli, demo, doctor


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "kdfast", "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.split() == ["kdfast", kdfast.__version__]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["bench", "--quick", "--full"],
        ["demo", "--seeds", "0"],
        ["demo", "--epochs", "many"],
        ["distill", "--data", "imagenet"],
    ],
    ids=" ".join,
)
def test_bad_arguments_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "usage: kdfast" in said and "_positive" not in said


def test_unknown_family_is_named(capsys):
    assert cli.main(["bench", "similarity", "nonsense"]) == 1
    assert "'nonsense'" in (message := capsys.readouterr().err) and "similarity" in message


@pytest.mark.parametrize("command", [["bench", "knn"], ["distill", "--method", "KD"], ["demo", "--quick"]], ids=" ".join)
def test_output_that_cannot_be_made_is_told_at_once(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main([*command, "--output", str(tmp_path / "file" / "folder")]) == 1
    said = capsys.readouterr()
    assert str(tmp_path / "file" / "folder") in said.err and not said.out


def test_arguments_reach_the_commands(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(bench, "run", lambda *given: calls.append(given))
    monkeypatch.setattr(demo, "run", lambda output, **given: calls.append((output, given)))
    monkeypatch.setattr(doctor, "main", lambda **given: calls.append(given) or 1)
    assert cli.main(["bench", "similarity", "--case", "clip", "--case", "lse", "--full", "--output", str(tmp_path)]) == 0
    assert cli.main(["demo", "--quick", "--seeds", "2"]) == 0
    assert cli.main(["doctor", "--json"]) == 1
    assert calls[0] == (["similarity"], "full", tmp_path, ["clip", "lse"])
    assert str(calls[1][0]) == "runs/demo-quick" and calls[1][1] == {"quick": True, "seeds": 2, "epochs": None}
    assert calls[2] == {"as_json": True}


@pytest.mark.parametrize(
    ("raised", "status", "said"), [(KeyboardInterrupt(), 130, "interrupted"), (RuntimeError("no teacher"), 1, "no teacher")]
)
def test_failures_are_told_without_a_traceback(monkeypatch, capsys, raised, status, said):
    def fail(*args, **kwargs):
        raise raised

    monkeypatch.setattr(demo, "run", fail)
    assert cli.main(["demo"]) == status
    assert said in capsys.readouterr().err
