"""Builds kdfast._C and, for a CUDA PyTorch with nvcc of its version, kdfast._C_cuda, where it can. Without torch or a compiler the install
still succeeds, in pure Python, with one line that says so; neither module breaks the other.

KDFAST_NO_EXT=1 skips both, KDFAST_REQUIRE_EXT=1 turns a failed build of kdfast._C into an error. Install with
`pip install --no-build-isolation .`, so that the build sees the torch it will run with. Everything else is in pyproject.toml.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
#: where the reason of a missing module is left for `kdfast doctor`
REASONS = {f"kdfast.{name}": ROOT / "kdfast" / f"_build_failure{name}.txt" for name in ("_C", "_C_cuda")}
#: LibTorch stable ABI of torch 2.10: the binary serves that version and later ones
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
#: the standard by which torch builds extensions up to 2.11, later ones taking another; instruction sets are chosen by the files themselves
#: (csrc/cpu/isa), so no -march; NaN and inf must behave, so no -ffast-math
STANDARD = "-std=c++17"
FLAGS = [STANDARD, "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
#: of nvcc: what tests/test_cuda_compile.py has looked at, and for later GPUs code that their driver compiles
#: (90a: of compute capability 9.0 alone, with what csrc/cuda/hopper.cuh needs)
ARCHITECTURES = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")] + ["-gencode=arch=compute_90,code=compute_90"]


def give_up(module: str, reason: str) -> None:
    """One line for the person at the terminal and for the doctor; an error when the extension is required."""
    if module == "kdfast._C" and os.environ.get("KDFAST_REQUIRE_EXT") == "1":
        raise SystemExit(f"kdfast: the extension is required (KDFAST_REQUIRE_EXT=1) and was not built: {reason}")
    REASONS[module].write_text(reason + "\n")
    print(f"kdfast: installing without {module}: {reason}", file=sys.stderr)


def kernel_units() -> list[Path]:
    """A file for each unit of kernels (csrc/cpu/*/*_kernels.inl) and instruction set (csrc/cpu/isa), written where it is new."""
    paths = []
    for isa in ("base", "avx2", "avx512", "avx512_bf16", "avx512_amx"):
        for unit in sorted((ROOT / "csrc/cpu").glob("*/*_kernels.inl")):
            path = ROOT / "build" / "kernels" / f"{unit.stem}_{isa}.cpp"
            lines = [f'#include "isa/{isa}.h"', "#ifdef KDFAST_UNIT", f'#include "{unit.parent.name}/{unit.name}"']
            text = "\n".join([*lines, '#include "isa/end.h"', "#endif", ""])
            if not path.is_file() or path.read_text() != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            paths.append(path)
    return paths


def headers(*patterns: str) -> list[str]:
    """What a module is built again for, beside its sources."""
    return [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def toolkit(home: str | None) -> str | None:
    """The folder of the CUDA headers and libraries. torch takes that around the nvcc on the PATH, which may stand for one elsewhere."""
    if home is None or not (nvcc := Path(home, "bin", "nvcc")).is_file() or Path(home, "include", "cuda_runtime.h").is_file():
        return home
    told = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    return home if found is None else os.path.normpath(found[1].strip())


def against_cuda(torch, home: str | None) -> str | None:
    """Why CUDA kernels cannot be built (None: they can)."""
    if torch.version.hip is not None:
        return "PyTorch is built for ROCm: on AMD's GPUs the kernels are Triton's"
    if torch.version.cuda is None:
        return "PyTorch is not built for CUDA"
    if home is None or not Path(home, "bin", "nvcc").is_file():
        return "there is no nvcc (CUDA_HOME says where it is)"
    told = subprocess.run([Path(home, "bin", "nvcc"), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.", told)
    if found is None or found[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {found[1] if found else '?'}, PyTorch of {torch.version.cuda}"
    return None


def cuda_module(torch, cpp_extension, include: str):
    """kdfast._C_cuda, or None with the reason written down."""
    cpp_extension.CUDA_HOME = toolkit(cpp_extension.CUDA_HOME)
    reason = against_cuda(torch, cpp_extension.CUDA_HOME)
    if reason is not None:
        give_up("kdfast._C_cuda", reason)
        return None
    nvcc = [STANDARD, "-O3", f"--threads={len(ARCHITECTURES)}", *ARCHITECTURES]
    return cpp_extension.CUDAExtension(
        "kdfast._C_cuda",
        [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/cuda/**/*.c*")) if path.suffix in (".cpp", ".cu")],
        include_dirs=[include, str(ROOT / "csrc/cuda")],
        depends=headers("csrc/*.h", "csrc/cuda/**/*.*h"),
        extra_compile_args={"cxx": [*FLAGS, *DEFINES, "-DUSE_CUDA", f'-DKDFAST_FLAGS="{" ".join(nvcc)}"'], "nvcc": nvcc},
    )


def extension() -> dict:
    """Arguments of setup() that build the compiled modules; {} when none can be built."""
    for reason in REASONS.values():
        reason.unlink(missing_ok=True)
    if os.environ.get("KDFAST_NO_EXT") == "1":
        for module in REASONS:
            give_up(module, "KDFAST_NO_EXT=1 at install time")
        return {}
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        for module in REASONS:
            give_up(module, f"{error} at install time (install torch first, then `pip install --no-build-isolation .`)")
        return {}

    class Build(cpp_extension.BuildExtension):
        """Where the compiler fails, the package is installed without the module."""

        def run(self) -> None:
            target = Path(self.build_lib, "kdfast")
            for reason in REASONS.values():
                Path(target, reason.name).unlink(missing_ok=True)  # of an earlier build in this tree
            built, compiler, inplace = [], self.compiler, self.inplace
            for module in self.extensions:
                # run() puts an object in the compiler's name's place, and one that fails leaves `inplace` off
                self.extensions, self.compiler, self.inplace = [module], compiler, inplace
                try:
                    super().run()
                    built.append(module)
                except (Exception, SystemExit) as error:
                    give_up(module.name, f"the compiler failed at install time: {' '.join(str(error).split())[:300]}")
            self.extensions = built
            for reason in REASONS.values():
                if reason.exists() and target.is_dir():  # the wheel's other files were already collected there
                    shutil.copy(reason, target)

    flags = [*FLAGS, *DEFINES]
    sources = [*sorted(ROOT.glob("csrc/*.cpp")), *sorted(ROOT.glob("csrc/cpu/**/*.cpp")), *kernel_units()]
    module = cpp_extension.CppExtension(
        "kdfast._C",
        [str(path.relative_to(ROOT)) for path in sources],
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc/cpu")],
        depends=headers("csrc/*.h", "csrc/cpu/**/*.h", "csrc/cpu/**/*.inl"),
        extra_compile_args=[*flags, f'-DKDFAST_FLAGS="{" ".join(flags)}"'],
    )
    modules = [module, cuda_module(torch, cpp_extension, pybind11.get_include())]
    return {"ext_modules": [m for m in modules if m is not None], "cmdclass": {"build_ext": Build}}


setup(**extension())
