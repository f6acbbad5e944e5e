"""The Triton kernels of the other families compile for GPUs that are not here, and their object code is what the design needs."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kdfast._core import triton_runtime

if triton_runtime.INTERPRETED:
    pytest.skip("nothing is compiled under Triton's interpreter", allow_module_level=True)

from triton_code import MATRIX_INSTRUCTION, SHARED_MEMORY, Code

from kdfast._ops.triplet import triton as triplet
from kdfast._ops.triplet import triton_kernels as triplet_kernels

ARCHITECTURES = pytest.mark.parametrize("arch", [80, 90, 100])


def scan_options(width: int, parts: int) -> tuple[dict, int]:
    """The constants of a launch's tiles, and its warps."""
    options = triton_runtime.score_tiles(width, parts).options(parts)
    return options, options.pop("num_warps")


def in_registers(code: Code, arch: int) -> None:
    assert code.local == 0 and code.stack == 0 and not code.has("LDL")
    assert code.shared <= SHARED_MEMORY[arch]


@ARCHITECTURES
@pytest.mark.parametrize("everything", [False, True], ids=["batch_hard", "everything"])
def test_extrema_stays_in_registers(arch, everything, tmp_path):
    options, warps = scan_options(128, 3)
    wanted = dict(zip(triplet.FLAGS, (True, everything, True, everything), strict=True))
    code = Code(
        triplet_kernels.extrema, arch, torch.float32, {**options, **wanted, "BEYOND": everything, "EUCLIDEAN": True}, warps, tmp_path
    )  # fmt: skip
    in_registers(code, arch)
    assert code.has(MATRIX_INSTRUCTION[arch])
