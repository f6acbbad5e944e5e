"""Every Triton kernel compiles for GPUs that are not here, and its object code is what the design needs."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from kdfast._core import triton_runtime  # noqa: E402

if triton_runtime.INTERPRETED:
    pytest.skip("nothing is compiled under Triton's interpreter", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kdfast._ops.similarity import triton as launches  # noqa: E402
from kdfast._ops.similarity import triton_kernels as kernels  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DOT = {torch.bfloat16: (tl.bfloat16, "*bf16"), torch.float16: (tl.float16, "*fp16"), torch.float32: (tl.float32, "*fp32")}
MATRICES = ("query", "keys", "values", "start_value")
INTEGERS = ("query_labels", "key_labels", "key_index", "valid")
NUMBERS = ("rows", "columns", "width", "value_width", "split_columns", "count", "splits")


class Code:
    """Registers, bytes of local memory, bytes of shared memory and the instructions of a kernel compiled for one architecture."""

    def __init__(self, kernel, arch: int, dtype: torch.dtype, constants: dict, warps: int, tmp_path: Path):
        signature = {name: self._type(name, constants, DOT[dtype][1]) for name in kernel.arg_names}
        aligned = {
            (i,): [["tt.divisibility", 16]]  # as for contiguous tensors whose width is a multiple of 16
            for i, name in enumerate(kernel.arg_names)
            if signature[name].startswith("*") or name in ("width", "value_width", "keys_stride", "values_stride")
        }
        target = GPUTarget("cuda", arch, 32)
        compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options={"num_warps": warps})
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        self.registers, self.stack, self.local = map(int, found.groups())
        self.shared = compiled.metadata.shared
        self.text = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout

    @staticmethod
    def _type(name: str, constants: dict, matrix: str) -> str:
        if name in constants:
            return "constexpr"
        if name in MATRICES:
            return matrix
        if name in INTEGERS:
            return "*i64"
        return "i64" if name.endswith("_stride") else "i32" if name in NUMBERS else "*fp32"

    def has(self, instruction: str) -> bool:
        return re.search(rf"\b{instruction}", self.text) is not None


def constants(kernel, arch: int, width: int, dtype: torch.dtype, everything: bool, with_h: bool = False) -> tuple[dict, int]:
    """A launch's constants: nothing beside the scores, or every term there is; and its warps."""
    t = launches.tiles(width, dtype, 1 + with_h + (kernel is kernels.grad_keys), arch)
    if kernel is kernels.grad_keys:
        t = t._replace(rows=t.columns, columns=t.rows)
    flags = ("BIASED", "LABELLED", "LIMITED", "COUNTED", "START_VALUE", "WANT_BIAS")
    made = {
        **dict.fromkeys(flags, everything), "INDICES": 2 if everything else 0, "OVER_KEYS": True, "STARTED": True, "POOLED": True,
        "SPLIT": True, "WITH_H": with_h, "WANT_KEYS": True, "WANT_VALUES": False, "ROWS": t.rows, "COLUMNS": t.columns, "WIDTH": width,
        "VALUE_WIDTH": width, "EVEN": not everything, "EVEN_VALUES": not everything, "DOT": DOT[dtype][0], "PRECISION": "tf32",
        "STAGES": t.stages, "INTERPRETED": False,
    }  # fmt: skip
    return {name: value for name, value in made.items() if name in kernel.arg_names}, t.warps


MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTC[A-Z]*MMA"}
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


NAMES = pytest.mark.parametrize("name", ["forward", "grad_rows", "grad_keys"])


@NAMES
@pytest.mark.parametrize(
    ("arch", "dtype", "width"),
    [
        (80, torch.bfloat16, 128),
        (90, torch.bfloat16, 128),
        (100, torch.bfloat16, 128),
        (90, torch.float16, 64),
        (90, torch.float32, 128),
        (90, torch.bfloat16, 256),
    ],
    ids=str,
)
def test_kernels_without_terms_stay_in_registers(arch, name, dtype, width, tmp_path):
    kernel = getattr(kernels, name)
    code = Code(kernel, arch, dtype, *constants(kernel, arch, width, dtype, everything=False), tmp_path)
    assert code.has(MATRIX_INSTRUCTION[arch])
    assert code.local == 0 and code.stack == 0 and not code.has("LDL")
    assert code.shared <= SHARED_MEMORY[arch]


@NAMES
def test_kernels_with_every_term_compile(name, tmp_path):
    kernel = getattr(kernels, name)
    made = constants(kernel, 90, 128, torch.bfloat16, everything=True, with_h=True)
    code = Code(kernel, 90, torch.bfloat16, *made, tmp_path)
    assert code.has("HGMMA") and code.shared <= SHARED_MEMORY[90]


@NAMES
@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 512), (torch.float32, 256)], ids=str)
def test_the_widest_rows_fit_shared_memory(name, dtype, width, tmp_path):
    kernel = getattr(kernels, name)
    made = constants(kernel, 90, width, dtype, everything=False, with_h=name != "forward")
    assert Code(kernel, 90, dtype, *made, tmp_path).shared <= SHARED_MEMORY[90]


def test_merge_compiles(tmp_path):
    made = {"POOLED": True, "ROWS": 16, "VALUE_WIDTH": 128}
    for arch in (80, 90, 100):
        assert Code(kernels.merge, arch, torch.float32, made, 4, tmp_path).local == 0
