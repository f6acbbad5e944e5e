"""The Triton kernels of Sinkhorn's gradients compile for GPUs that are not here, and their object code is what the design needs."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kdfast._core import triton_runtime

if triton_runtime.INTERPRETED:
    pytest.skip("nothing is compiled under Triton's interpreter", allow_module_level=True)

from triton_code import MATRIX_INSTRUCTION, SHARED_MEMORY, Code, architecture

from kdfast._ops.sinkhorn.triton import adjoint as triton_adjoint
from kdfast._ops.sinkhorn.triton import adjoint_kernels as kernels
from kdfast._ops.sinkhorn.triton import plan as triton_plan
from kdfast._ops.sinkhorn.triton.conjugate_kernels import conjugate_step


def compiled(kernel, source, arch, tmp_path, *, tiles=None, dtype=None, **constants):
    """For a cost along its "rows" or "columns", or points of 64 numbers by "products" or "differences"."""
    given, direct = source in ("rows", "columns"), source == "differences"
    flags = {"GIVEN": given, "DIRECT": direct, "ROOT": direct, "DOT": False, "PADDED": given}
    options = (tiles or triton_adjoint.adjoint_tiles(flags, source != "columns", 64, architecture(arch))).options(3)
    warps = options.pop("num_warps")
    unit = {"column_stride" if source == "rows" else "row_stride": 1} if given else {}
    made = {name: value for name, value in {**options, **flags, **unit, **constants}.items() if name in kernel.arg_names}
    dtype = dtype or (torch.bfloat16 if source == "products" else torch.float32)
    code = Code(kernel, arch, dtype, made, warps, tmp_path)
    assert code.local == 0 and code.stack == 0 and not code.has("LDL")
    assert code.shared <= SHARED_MEMORY[arch]
    return code


@pytest.mark.parametrize(
    ("source", "arch"),
    [
        ("rows", 80),
        ("rows", 90),
        ("rows", 100),
        ("products", 80),
        ("products", 90),
        ("products", 100),
        ("products", 120),
        ("differences", 90),
    ],
)
def test_reverse_iterations_stay_in_registers(source, arch, tmp_path):
    of_columns = "columns" if source == "rows" else source  # a given cost is read along its rows, which the columns' launch sums over
    found = [
        compiled(kernels.pull_rows, source, arch, tmp_path, RELAXED=True, STEEP=True),
        compiled(kernels.pull_columns, of_columns, arch, tmp_path, RELAXED=True, STEEP=True, THROUGH=True, NEXT=True),
        compiled(kernels.adjoint_entries, source, arch, tmp_path, TOTAL=False),
        compiled(kernels.plan_sums, of_columns, arch, tmp_path),
    ]
    assert all(code.has(MATRIX_INSTRUCTION[arch]) for code in found) or source != "products"


@pytest.mark.parametrize("apart", [False, True], ids=["products", "differences"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_products_with_what_is_stored_stay_in_registers(arch, apart, tmp_path):
    tiles, dtype = triton_plan.product_tiles(16), torch.float32 if apart else torch.bfloat16
    made = {"APART": apart, "CHUNK": triton_plan.CHUNK}
    code = compiled(kernels.matrix_products, "rows", arch, tmp_path, tiles=tiles, dtype=dtype, **made)
    assert apart or code.has(MATRIX_INSTRUCTION[arch])


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("block", [16, 2048])
def test_a_step_of_conjugate_gradients_stays_in_registers(arch, block, tmp_path):
    made = {"PROJECT": True, "BLOCK": block}
    pointers = {"active": "*i1", "share": "*fp32", **dict.fromkeys(("residual", "solution", "direction", "sent", "best", "least"), "*fp32")}
    code = Code(conjugate_step, arch, torch.float32, made, 8 if block > 1024 else 4, tmp_path, **pointers)
    assert code.local == 0 and code.stack == 0
