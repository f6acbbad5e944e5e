"""Triton kernels compiled for GPUs that are not here, and what their object code has."""

import re
import subprocess
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdfast._core.architectures import Architecture, named

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DOT = {torch.bfloat16: (tl.bfloat16, "*bf16"), torch.float16: (tl.float16, "*fp16"), torch.float32: (tl.float32, "*fp32")}
POINTERS = {
    **dict.fromkeys(("query", "keys", "values", "start_value", "bank", "cost", "x", "y", "teacher", "student"), "matrix"),
    **dict.fromkeys(("query_labels", "key_labels", "key_index", "valid", "label", "own", "query_label", "key_label"), "*i64"),
    **dict.fromkeys(("index", "chosen", "row_count", "column_count", "x_labels", "y_labels", "positive", "done"), "*i64"),
    **dict.fromkeys(("first", "last", "exist", "found", "order", "nearest", "farthest", "block"), "*i64"), "uniform_row": "*i1",
    **dict.fromkeys(("exists", "dropped", "needed"), "*i1"), "position": "*i32", "classes": "*i32", "rho": "fp32",
    **dict.fromkeys(("active", "unordered", "number"), "*i32"), "marks": "*u8",
    **dict.fromkeys(("alpha", "beta", "tolerance", "margin", "sign", "low", "high", "least", "real_width", "now", "before"), "fp32"),
}  # fmt: skip
NUMBERS = (
    *("rows", "columns", "width", "value_width", "split_columns", "count", "splits", "batch"),
    *("slots", "split_slots", "size", "groups", "kept", "begin", "end", "start", "taken", "mark_columns"),
    *("entries", "first_row", "first_column", "leading", "inner", "first_inner", "split_inner", "parts", "teacher_width"),
    *("step", "steps"),
)
MATRIX_INSTRUCTION = {
    **{80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTC[A-Z]*MMA", 120: "HMMA"},
    **dict.fromkeys(("gfx90a", "gfx942", "gfx950"), "v_mfma_f32_"), "gfx1100": "v_wmma_f32_",
}  # fmt: skip
SHARED_MEMORY = {
    **{80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10},
    **dict.fromkeys(("gfx90a", "gfx942", "gfx1100"), 64 << 10), "gfx950": 160 << 10,
}  # fmt: skip


def architecture(arch: int | str) -> Architecture:
    return named(arch if isinstance(arch, str) else f"sm_{arch}")


class Code:
    """Registers, bytes of local memory, bytes of shared memory and the instructions of a kernel compiled for one architecture.

    `arch`: a compute capability as two digits, or AMD's name of a GPU, whose scratch memory is the stack here.
    """

    def __init__(self, kernel, arch: int | str, dtype: torch.dtype, constants: dict, warps: int, tmp_path: Path, **pointers: str):
        signature = {name: pointers.get(name) or self._type(name, constants, DOT[dtype][1]) for name in kernel.arg_names}
        aligned = {
            (i,): [["tt.divisibility", 16]]  # as for contiguous tensors whose width is a multiple of 16
            for i, name in enumerate(kernel.arg_names)
            if name not in constants
            and (signature[name].startswith("*") or name in ("width", "value_width", "leading") or name.endswith("_stride"))
        }
        target = GPUTarget("hip" if architecture(arch).amd else "cuda", arch, architecture(arch).lanes)
        compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options={"num_warps": warps})
        self.shared = compiled.metadata.shared
        if architecture(arch).amd:
            self.text = compiled.asm["amdgcn"]
            told = (re.search(rf"\.{name}: +(\d+)", self.text) for name in ("vgpr_count", "private_segment_fixed_size"))
            (self.registers, self.stack), self.local = (int(found[1]) for found in told), 0
            return
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        self.registers, self.stack, self.local = map(int, found.groups())
        self.text = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout

    @staticmethod
    def _type(name: str, constants: dict, matrix: str) -> str:
        if name in constants:
            return "constexpr"
        if name in NUMBERS:
            return "i32"
        if name.endswith("_stride"):
            return "i64"
        given = POINTERS.get(name, "*fp32")
        return matrix if given == "matrix" else given

    def has(self, instruction: str) -> bool:
        return re.search(rf"\b{instruction}", self.text) is not None
