"""The Triton kernels of similarity distillation's losses compile for GPUs that are not here, and stay in registers there."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kdfast._core import triton_runtime

if triton_runtime.INTERPRETED:
    pytest.skip("nothing is compiled under Triton's interpreter", allow_module_level=True)

from triton_code import DOT, MATRIX_INSTRUCTION, SHARED_MEMORY, Code, architecture

from kdfast._ops.similarity import triton
from kdfast._ops.similarity.triton import distillation as triton_distillation
from kdfast._ops.similarity.triton import distillation_kernels as kernels

BF16, FP32 = torch.bfloat16, torch.float32


def compiled(arch, tmp_path, width, dtype, teacher_width, teacher_dtype, *, precision="tf32", everything=False, **numbers) -> Code:
    number = triton.KERNELS.products[precision]
    student, teacher = torch.empty(1, width, dtype=dtype), torch.empty(1, teacher_width, dtype=teacher_dtype)
    made, _ = triton_distillation.constants(student, teacher, number, number, everything, architecture(arch))
    made |= {
        "KL": True, "STARTED": True, "BIASED": everything, "INDICES": 2 if everything else 0, "COUNTED": everything,
        "SPLIT": not everything, "INTERPRETED": False, **numbers,
    }  # fmt: skip
    of_teacher = dict.fromkeys(("teacher", "teacher_keys"), DOT[teacher_dtype][1])
    code = Code(kernels.distillation, arch, dtype, made, made.pop("num_warps"), tmp_path, **of_teacher)
    assert code.local == 0 and code.stack == 0 and not code.has("LDL")
    assert code.shared <= SHARED_MEMORY[arch]
    return code


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("everything", [False, True], ids=["scores", "every term"])
@pytest.mark.parametrize(
    "sides",
    [(128, BF16, 128, BF16), (256, BF16, 256, BF16), (128, FP32, 128, FP32), (128, BF16, 768, FP32)],
    ids=["128 bf16", "256 bf16", "128 fp32", "bf16 and fp32"],
)
def test_losses(sides, everything, arch, tmp_path):
    assert compiled(arch, tmp_path, *sides, everything=everything).has(MATRIX_INSTRUCTION[arch])


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("precision", ["ieee", "bf16x3"])
def test_exact_products_of_float32(precision, arch, tmp_path):
    code = compiled(arch, tmp_path, 512, FP32, 512, FP32, precision=precision, everything=True)
    assert code.has(MATRIX_INSTRUCTION[arch] if precision == "bf16x3" else "FFMA")


def test_a_lone_row(tmp_path):
    """Its number is one that Triton puts into the kernel."""
    compiled(90, tmp_path, 64, BF16, 64, BF16, rows=1)


def test_merge(tmp_path):
    for arch in (80, 90, 100):
        code = Code(kernels.merge_losses, arch, FP32, {"KL": True, "ROWS": 128}, 4, tmp_path)
        assert code.local == 0 and code.stack == 0
