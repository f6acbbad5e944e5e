"""benchmarks/gpu.sh with a Python that only pretends: its steps, its limit, and what it leaves when some fail."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"
if sys.platform != "linux" or not all(map(shutil.which, ("bash", "timeout"))):
    pytest.skip("it is for Linux, bash and timeout", allow_module_level=True)

PRETENDING = """#!/bin/bash
echo "$@" >>"$CALLS"
case "$*" in
  *is_available*) [ $NO_GPU = 0 ] || exit 1; echo "A GPU" ;;
  *xdist*) exit 1 ;;
  *setup.py*) echo "no compiler"; exit 3 ;;
  *--compile-only*) sleep 60 ;;
  *"kdfast bench"*) echo "| kdfast | 1 ms |" >"$OUT/cuda.md" ;;
  *pytest*) trap 'echo interrupted; exit 2' INT; sleep 60 & wait ;;
  *doctor*) echo "all ops agree" ;;
esac
"""


def run(folder: Path, **environment) -> subprocess.CompletedProcess:
    python = folder / "python"
    python.write_text(PRETENDING)
    python.chmod(0o755)
    given = {"PYTHON": python, "OUT": folder / "out", "CALLS": folder / "calls", "COMMIT": "abc", "LIMIT": 12, "NO_GPU": 0, **environment}
    return subprocess.run(
        ["bash", SCRIPT], env=os.environ | {name: str(value) for name, value in given.items()}, capture_output=True, text=True, timeout=60
    )


def test_it_ends_in_time_and_tells_what_failed(tmp_path):
    start = time.monotonic()
    done = run(tmp_path)
    assert time.monotonic() - start < 15 and done.returncode == 1, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summary.md", "log.txt", "cuda.md"}
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert summary.startswith("# A GPU, abc, 20") and summary.endswith("| kdfast | 1 ms |\n")
    told = [line.removeprefix("- ").partition(" after ")[0] for line in summary.splitlines() if line.startswith("- ")]
    told = [line.partition(" in ")[0] for line in told]
    assert told[:3] == ["build: failed (3)", "compile: ended by its limit", "triton: done"]
    assert told[3:] == ["check: ended by its limit", "bench: done", "tests: ended by its limit", "doctor: done"]
    log = (tmp_path / "out" / "log.txt").read_text()
    for part, told in (("build", "no compiler"), ("triton", "all ops agree"), ("check", "interrupted"), ("doctor", "all ops agree")):
        assert f"== {part}\n{told}" in log


def test_compiled_kernels_are_checked_before_anything_is_timed(tmp_path):
    """Every test of them; those of other kernels after it."""
    run(tmp_path)
    calls = (tmp_path / "calls").read_text().splitlines()
    words = ("test_cuda_similarity.py", "--output", "test_triton_gpu.py")
    check, bench, tests = (next(i for i, call in enumerate(calls) if word in call) for word in words)
    assert check < bench < tests
    named = {word for call in (calls[check], calls[tests]) for word in call.split() if word.startswith("tests/")}
    folder = SCRIPT.parent.parent
    here = {str(path.relative_to(folder)) for path in (folder / "tests").glob("test_cuda_*.py")} - {"tests/test_cuda_compile.py"}
    assert {name for name in named if "cuda" in name} == here and all((folder / name).exists() for name in named)


def test_without_a_gpu_nothing_is_done(tmp_path):
    done = run(tmp_path, NO_GPU=1)
    assert done.returncode == 1 and "no GPU is visible" in done.stderr
    assert not (tmp_path / "out").exists() and len((tmp_path / "calls").read_text().splitlines()) == 1
