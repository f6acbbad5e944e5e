"""Hooks of pytest: with KDFAST_EVERY_KERNEL=1 a session under Triton's interpreter fails where it has not run every kernel."""

import os

import pytest

from kdfast._core import triton_runtime

WATCHED = triton_runtime.INTERPRETED and os.environ.get("KDFAST_EVERY_KERNEL") == "1"
_run: set[str] = set()


def watch() -> None:
    from launched_kernels import name_of
    from triton.runtime.interpreter import InterpretedFunction

    launch = InterpretedFunction.run

    def run(kernel, *args, **kwargs):
        _run.add(name_of(kernel))
        return launch(kernel, *args, **kwargs)

    InterpretedFunction.run = run


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """What a process of pytest-xdist has run."""
    _run.update(getattr(node, "workeroutput", {}).get("kernels", ()))


def pytest_sessionfinish(session, exitstatus):
    if not WATCHED:
        return
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["kernels"] = sorted(_run)
        return
    from launched_kernels import kernels

    missing = sorted(kernels() - _run)
    if missing and exitstatus == 0:
        print("\nkernels that no test has run under the interpreter:", *missing, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


if WATCHED:
    watch()
