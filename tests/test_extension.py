"""The compiled module: what it says about itself, forcing an instruction set, and life without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdfast._core import extension

_C, REASON = extension.load("_C")
needs_extension = pytest.mark.skipif(_C is None, reason=str(REASON))
SETUP = Path(__file__).parent.parent / "setup.py"
KNOWN = ["avx512_amx", "avx512_bf16", "avx512", "avx2", "base"]


def python(code: str, **environment: str) -> str:
    """The output of `code` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_required_extension_is_here():
    if os.environ.get("KDFAST_REQUIRE_EXT") == "1":
        assert _C is not None, REASON


@needs_extension
def test_introspection_is_consistent():
    available = _C.isas_available()
    assert set(available) <= set(_C.isas_in_binary()) <= set(KNOWN)
    assert "base" in available
    assert _C.isa_found() in available
    assert _C.isa_in_force() in available
    info = _C.build_info()
    assert info["compiler"].startswith(("gcc", "clang"))
    assert "-ffast-math" not in info["flags"] and "-march" not in info["flags"]


@needs_extension
def test_force_isa_and_back():
    before = _C.isa_in_force()
    for isa in _C.isas_available():
        _C.force_isa(isa)
        assert _C.isa_in_force() == isa
    _C.force_isa(None)
    assert _C.isa_in_force() == _C.isa_found()
    _C.force_isa(before)


@needs_extension
def test_unknown_isa_is_an_error_that_names_the_known_ones():
    before = _C.isa_in_force()
    with pytest.raises(RuntimeError, match=r"unknown instruction set 'avx1024'; known: .*base"):
        _C.force_isa("avx1024")
    assert _C.isa_in_force() == before


@needs_extension
def test_environment_forces_an_isa():
    code = "from kdfast._core import extension; print(extension.load('_C')[0].isa_in_force())"
    assert python("import torch; " + code, KDFAST_CPU_ISA="base") == "base"


@needs_extension
def test_environment_with_an_unknown_isa_leaves_the_reason():
    code = "import torch; from kdfast._core import extension; print(extension.missing_cpu())"
    assert "KDFAST_CPU_ISA: unknown instruction set 'sse9'" in python(code, KDFAST_CPU_ISA="sse9")


def test_extension_can_be_turned_off():
    code = "import torch; from kdfast._core import extension; from kdfast._ops.similarity import cpu; print(cpu.missing())"
    assert "KDFAST_NO_EXT=1" in python(code, KDFAST_NO_EXT="1")


def test_build_failure_is_remembered(tmp_path, monkeypatch):
    """What setup.py wrote down is the reason the doctor prints."""
    package = tmp_path / "kdfast"
    (package / "_core").mkdir(parents=True)
    (package / "_build_failure_never_built.txt").write_text("the compiler failed at install time: exit status 1\n")
    monkeypatch.setattr(extension, "__file__", str(package / "_core" / "extension.py"))
    extension.load.cache_clear()
    try:
        assert extension.load("_never_built") == (
            None,
            "kdfast._never_built was not built: the compiler failed at install time: exit status 1",
        )
    finally:
        extension.load.cache_clear()


@needs_extension
def test_the_cuda_toolkit_is_that_of_the_nvcc_on_the_path(tmp_path, monkeypatch):
    """An nvcc in /usr/local/bin may be two lines that run another: the headers and libraries are not around it."""
    real, shown = tmp_path / "cuda-13.0", tmp_path / "local"
    for folder in (real / "bin", real / "include", shown / "bin"):
        folder.mkdir(parents=True)
    (real / "include" / "cuda_runtime.h").touch()
    for folder in (real, shown):
        nvcc = folder / "bin" / "nvcc"
        nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={real}/bin/..' >&2\n")
        nvcc.chmod(0o755)
    monkeypatch.setattr(pytest.importorskip("setuptools"), "setup", lambda **given: None)
    monkeypatch.setenv("KDFAST_NO_EXT", "1")
    monkeypatch.delenv("KDFAST_REQUIRE_EXT", raising=False)
    (tmp_path / "kdfast").mkdir()  # where it writes down that nothing is built
    names = {"__file__": str(tmp_path / "setup.py")}
    exec(SETUP.read_text(), names)
    assert names["toolkit"](str(shown)) == names["toolkit"](str(real)) == str(real)
    assert names["toolkit"](None) is None and names["toolkit"](str(tmp_path)) == str(tmp_path)


@needs_extension
def test_a_module_that_fails_does_not_keep_the_next_from_its_place(tmp_path, monkeypatch):
    """`setup.py build_ext --inplace`, whose run() turns `inplace` off until it has ended."""
    from setuptools import Distribution, Extension
    from torch.utils import cpp_extension

    given, seen = {}, []
    monkeypatch.setattr(pytest.importorskip("setuptools"), "setup", lambda **arguments: given.update(arguments))
    monkeypatch.delenv("KDFAST_NO_EXT", raising=False)
    monkeypatch.delenv("KDFAST_REQUIRE_EXT", raising=False)
    (tmp_path / "kdfast").mkdir()
    exec(SETUP.read_text(), {"__file__": str(tmp_path / "setup.py")})
    build = given["cmdclass"]["build_ext"](Distribution())

    def run(self):
        seen.append((self.extensions[0].name, self.inplace))
        self.inplace = False
        if len(seen) == 1:
            raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_extension.BuildExtension, "run", run)
    build.extensions = [Extension(name, []) for name in ("kdfast._C", "kdfast._C_cuda")]
    build.inplace, build.build_lib = True, str(tmp_path / "lib")
    build.run()
    assert seen == [("kdfast._C", True), ("kdfast._C_cuda", True)]


def test_fma_rate_measures_something_and_checks_its_arguments():
    assert _C.fma_rate("fp32", seconds=0.002) > 0.1
    assert _C.fma_rate("bf16", seconds=0.002, threads=2) > 0.1
    with pytest.raises(ValueError, match="dtype must be"):
        _C.fma_rate("fp8")
    with pytest.raises(ValueError, match="threads must be"):
        _C.fma_rate("fp32", threads=0)
    with pytest.raises(ValueError, match="seconds must be"):
        _C.fma_rate("fp32", seconds=0)
