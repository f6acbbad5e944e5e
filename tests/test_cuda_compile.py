"""The CUDA sources compile for GPUs that are not here: kernels keep to their registers, bindings to the stable ABI."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc/cuda"
KERNELS, BINDINGS = sorted(CUDA.rglob("*.cu")), sorted(CUDA.rglob("bind_*.cpp"))
ARCHITECTURES = {80: "80", 90: "90a", 100: "100"}
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
#: bytes of a stack that ptxas may make for what a loop does not touch; none on the GPUs that kernels are written for
STACK = {80: 0, 90: 0, 100: 16}
CUOBJDUMP = shutil.which("cuobjdump", path=f"{os.environ['PATH']}:{Path(torch.__file__).parent.parent}/triton/backends/nvidia/bin")
NVCC = shutil.which("nvcc") or ("/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").is_file() else None)


class Usage(NamedTuple):
    kernel: str
    arch: int
    stack: int
    spilled: int
    registers: int
    shared: int


def usages(report: str) -> list[Usage]:
    """What `nvcc -Xptxas -v` says of each kernel."""
    found = re.findall(
        r"entry function '(\w+)' for 'sm_(\d+)a?'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers(.*?)\n",
        report, re.DOTALL,
    )  # fmt: skip
    sizes = [re.search(r"(\d+) bytes smem", rest) for *_, rest in found]
    return [Usage(name, *map(int, numbers), int(size[1]) if size else 0) for (name, *numbers, _), size in zip(found, sizes, strict=True)]


def read_with_includes(source: Path) -> dict[Path, str]:
    """A source and those of csrc/cuda that it includes, with their text."""
    found, left = {}, [source]
    while left:
        path = left.pop()
        found[path] = path.read_text()
        included = (CUDA / name for name in re.findall(r'#include "([^"]+)"', found[path]))
        left += [path for path in included if path.is_file() and path not in found]
    return found


def kernels_of(source: Path) -> list[str]:
    return re.findall(r"__global__ void(?: __launch_bounds__\([^)]*\))? (\w+)\(", "\n".join(read_with_includes(source).values()))


def test_every_kernel_belongs_to_what_is_compiled():
    compiled = [read_with_includes(source) for source in KERNELS]
    for path in CUDA.rglob("*"):
        if path.is_file() and "__global__ void" in path.read_text():
            assert any(path in texts for texts in compiled), path
    assert sum(len(kernels_of(source)) for source in KERNELS) >= 9


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_kernels_stay_in_registers(source, tmp_path):
    if NVCC is None:
        assert os.environ.get("KDFAST_REQUIRE_EXT") != "1", "nvcc is required to check the CUDA kernels"
        pytest.skip("nvcc is not here")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES.values()]
    options = ["-c", "-std=c++17", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings", f"-I{CUDA}", "-o", tmp_path / "out.o"]
    done = subprocess.run([NVCC, *options, *targets, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = usages(done.stderr)
    for name in kernels_of(source):
        assert {usage.arch for usage in found if re.match(rf"_Z\w*\d{name}[A-Z]", usage.kernel)} == set(ARCHITECTURES), name
    for usage in found:
        assert usage.stack <= STACK[usage.arch] and usage.registers < 255 and usage.shared <= SHARED_MEMORY[usage.arch], usage
        if usage.arch == 90 and re.search(r"(softmax|keys)_kernel", usage.kernel):  # of fewer, those that ask for more would wait for ever
            assert usage.registers == 168, usage


def test_hopper_kernels_use_its_matrix_units_and_its_copies(tmp_path):
    """What csrc/cuda/hopper.cuh is for, in the object code; registers move from the warpgroup that loads to those that multiply."""
    if NVCC is None or CUOBJDUMP is None:
        pytest.skip("nvcc and cuobjdump are not here")
    source = tmp_path / "kernels.cu"
    kernel = "template __global__ void softmax_kernel<Element::kBFloat16, Tile<{}>, true, false>(const __grid_constant__ SoftmaxParams);"
    kernels = "\n".join(kernel.format(tile) for tile in ("64", "128", "256", "64, true", "128, true"))
    includes = '#include "similarity/softmax.cuh"\n#include "similarity/keys.cu"\n'
    source.write_text(f"{includes}namespace kdfast {{ namespace {{\n{kernels}\n}} }}\n")
    options = ["-cubin", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", f"-I{CUDA}"]
    subprocess.run([NVCC, *options, "-o", tmp_path / "out.cubin", source], check=True)
    text = subprocess.run([CUOBJDUMP, "-sass", tmp_path / "out.cubin"], capture_output=True, text=True, check=True).stdout
    kernels = [code for code in text.split("Function : ") if re.match(r"\w*(softmax|keys)_kernel", code)]
    assert len(kernels) == 5 + 5  # values of their own at two of three widths, exclusions in the bank's gradient as well
    for code in kernels:
        width = int(re.search(r"Li(\d+)ELb", code)[1])
        boxes = 2 + bool(re.search(r"TileILi\d+ELb1", code))  # rows, columns, values
        assert len(re.findall(r"\bUTMALDG\.3D", code)) >= boxes and len(re.findall(r"\bUSETMAXREG", code)) == 2
        products = len(re.findall(r"\bHGMMA\.64x", code))
        assert products >= 2 * width // 16
        assert len(re.findall(r"\bWARPGROUP\.DEPBAR", code)) < products / 3  # a wait for each is what ptxas makes of what it cannot follow
        assert not re.search(r"\b(LDL|STL|HMMA|ATOM|RED)\b", code)


@pytest.mark.parametrize("arch", [80, 90])
def test_blocks_of_a_grid_see_what_others_have_written(arch, tmp_path):
    """The emulator has no caches: that what a block has written is in the second level before its signal, that nobody keeps numbers in the
    first level beyond a wait, and that none comes by the path for what never changes (LDG.CONSTANT), is seen in the object code alone."""
    if NVCC is None or CUOBJDUMP is None:
        pytest.skip("nvcc and cuobjdump are not here")
    options = ["-cubin", "-std=c++17", "-O3", f"-arch=sm_{ARCHITECTURES[arch]}", f"-I{CUDA}", "-o", tmp_path / "out.cubin"]
    subprocess.run([NVCC, *options, CUDA / "sinkhorn/streamed.cu"], check=True)
    text = subprocess.run([CUOBJDUMP, "-sass", tmp_path / "out.cubin"], capture_output=True, text=True, check=True).stdout
    order = re.findall(r"MEMBAR\.[A-Z.]*GPU|REDG?\.E\.ADD\.STRONG\.GPU|LDG?\.E\.STRONG\.GPU|CCTL\.IVALL", text)
    signals, waits = ([i for i, word in enumerate(order) if re.match(kind, word)] for kind in ("RED", "LD"))
    assert len(signals) == len(waits) >= 4
    assert all(order[i - 1].startswith("MEMBAR") for i in signals) and all(order[i + 1] == "CCTL.IVALL" for i in waits)
    assert not re.search(r"\bLDG\S*\.(CONSTANT|NC)\b", text)


@pytest.mark.parametrize("source", BINDINGS, ids=lambda path: path.stem)
def test_bindings_compile_against_any_pytorch(source):
    """Of CUDA they use what the stable ABI has, whose headers are in CPU builds of PyTorch too."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no compiler {compiler}")
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes = [f"-I{CUDA}", f"-I{Path(torch.__file__).parent / 'include'}"]
    done = subprocess.run([compiler, *flags, *includes, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bindings_use_names_that_every_supported_pytorch_has():
    """TORCH_TARGET_VERSION hides newer functions of the stable ABI, not renamed macros: up to 2.11 this one is TORCH_ERROR_CODE_CHECK."""
    for path in sorted((ROOT / "csrc").rglob("bind*")):
        assert not re.search(r"\b(STABLE_)?TORCH_ERROR_CODE_CHECK\b", path.read_text()), path


def test_kernels_know_nothing_of_torch():
    for path in sorted(CUDA.rglob("*")):
        if path.suffix in (".cu", ".cuh", ".h") and path.name != "bind.h":
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path
