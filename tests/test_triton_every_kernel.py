"""No Triton kernel is missing from what is compiled without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from kdfast._core import triton_runtime

if triton_runtime.INTERPRETED:
    pytest.skip("nothing is compiled under Triton's interpreter", allow_module_level=True)

import launched_kernels

TESTS = Path(__file__).parent


def test_every_kernel_is_compiled_for_every_generation():
    files = sorted(TESTS.glob("test_triton_compile*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "launched_kernels", "-p", "no:xdist", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    compiled = {tuple(entry) for entry in json.loads(done.stdout.strip().splitlines()[-1])}
    wanted = {(name, arch) for name in launched_kernels.kernels() for arch in (80, 90, 100)}
    assert len(wanted) > 60 and not wanted - compiled
