"""Builds kdfast._C where it can. Without torch or a compiler the install still succeeds, in pure Python, with one line that says so.

KDFAST_NO_EXT=1 skips the extension, KDFAST_REQUIRE_EXT=1 turns a failed build into an error. Install with
`pip install --no-build-isolation .`, so that the build sees the torch it will run with. Everything else is in pyproject.toml.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
#: where the reason of a missing extension is left for `kdfast doctor`
REASON = ROOT / "kdfast" / "_build_failure.txt"
#: LibTorch stable ABI of torch 2.10: the binary serves that version and later ones
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
#: instruction sets are chosen by the files themselves (csrc/cpu/isa), so no -march; NaN and inf must behave, so no -ffast-math
FLAGS = ["-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]


def give_up(reason: str) -> None:
    """One line for the person at the terminal and for the doctor; an error when the extension is required."""
    if os.environ.get("KDFAST_REQUIRE_EXT") == "1":
        raise SystemExit(f"kdfast: the extension is required (KDFAST_REQUIRE_EXT=1) and was not built: {reason}")
    REASON.write_text(reason + "\n")
    print(f"kdfast: installing without compiled kernels: {reason}", file=sys.stderr)


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


def extension() -> dict:
    """Arguments of setup() that build kdfast._C; {} when it cannot be built."""
    REASON.unlink(missing_ok=True)
    if os.environ.get("KDFAST_NO_EXT") == "1":
        give_up("KDFAST_NO_EXT=1 at install time")
        return {}
    try:
        import pybind11
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        give_up(f"{error} at install time (install torch first, then `pip install --no-build-isolation .`)")
        return {}

    class Build(BuildExtension):
        """Where the compiler fails, the package is installed without the extension."""

        def run(self) -> None:
            Path(self.build_lib, "kdfast", REASON.name).unlink(missing_ok=True)  # of an earlier build in this tree
            try:
                super().run()
            except (Exception, SystemExit) as error:
                give_up(f"the compiler failed at install time: {' '.join(str(error).split())[:300]}")
                self.extensions = []
                target = Path(self.build_lib, "kdfast")  # the wheel's other files were already collected there
                if target.is_dir():
                    shutil.copy(REASON, target)

    flags = [*FLAGS, *DEFINES]
    sources = [*sorted(ROOT.glob("csrc/*.cpp")), *sorted(ROOT.glob("csrc/cpu/**/*.cpp")), *kernel_units()]
    module = CppExtension(
        "kdfast._C",
        [str(path.relative_to(ROOT)) for path in sources],
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc/cpu")],
        depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/cpu/**/*.h")) + sorted(ROOT.glob("csrc/cpu/**/*.inl"))],
        extra_compile_args=[*flags, f'-DKDFAST_FLAGS="{" ".join(flags)}"'],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(**extension())
