"""Every Triton kernel compiles for GPUs that are not here, and its object code is what the design needs."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from kdfast._core import triton_runtime  # noqa: E402

if triton_runtime.INTERPRETED:
    pytest.skip("nothing is compiled under Triton's interpreter", allow_module_level=True)

from triton_code import DOT, MATRIX_INSTRUCTION, SHARED_MEMORY, Code, architecture  # noqa: E402

from kdfast._ops.similarity import triton as launches  # noqa: E402
from kdfast._ops.similarity.triton import kernels  # noqa: E402


def constants(
    kernel, arch: int, width: int, dtype: torch.dtype, everything: bool, with_h: bool = False, value_width: int = 0
) -> tuple[dict, int]:
    """A launch's constants: nothing beside the scores, or every term there is; and its warps. `value_width`: of values, 0 none."""
    of_keys, small = kernel is kernels.grad_keys, with_h or kernel is kernels.grad_keys
    streams = 1 + with_h + (of_keys or value_width > 0)
    t = launches.tiles(
        max(width, value_width), launches.operands(dtype, small), streams, architecture(arch), of_keys * (width + value_width)
    )
    if of_keys:
        t = t._replace(rows=t.columns, columns=t.rows)
    options = triton_runtime.pipeline(t.warps, t.stages)
    warps = options.pop("num_warps")
    flags = ("BIASED", "LABELLED", "LIMITED", "COUNTED", "START_VALUE", "WANT_BIAS")
    made = {
        **dict.fromkeys(flags, everything), "INDICES": 2 if everything else 0, "OVER_KEYS": value_width == 0, "STARTED": True,
        "POOLED": True, "SPLIT": True, "WITH_H": with_h, "WANT_KEYS": True, "WANT_VALUES": value_width > 0, "ROWS": t.rows,
        "COLUMNS": t.columns, "WIDTH": width, "VALUE_WIDTH": value_width or width, "EVEN": not everything, "EVEN_VALUES": not everything,
        "DOT": DOT[launches.operands(dtype, small)][0], "PRECISION": "tf32", "INTERPRETED": False, **options,
    }  # fmt: skip
    return {name: value for name, value in made.items() if name in kernel.arg_names}, warps


NAMES = pytest.mark.parametrize("name", ["forward", "grad_rows", "grad_keys"])


@NAMES
@pytest.mark.parametrize(
    ("arch", "dtype", "width"),
    [
        (80, torch.bfloat16, 128),
        (80, torch.bfloat16, 256),
        (80, torch.float32, 128),
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


@pytest.mark.parametrize("name", ["grad_rows", "grad_keys"])
@pytest.mark.parametrize(
    ("dtype", "value_width"), [(torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float16, 128), (torch.float32, 128)], ids=str
)
def test_gradients_of_what_is_pooled_of_values_fit(name, dtype, value_width, tmp_path):
    """Up to four matrices in shared memory, and sums of keys and of values. float16 rows are multiplied as tf32. (Of the last three the
    sums of keys and values spill with Triton 3.9, not with 3.6.)"""
    kernel = getattr(kernels, name)
    made = constants(kernel, 90, 128, dtype, everything=False, with_h=True, value_width=value_width)
    code = Code(kernel, 90, dtype, *made, tmp_path)
    assert code.shared <= SHARED_MEMORY[90] and code.has("HGMMA")
    assert code.stack == 0 or (name == "grad_keys" and (dtype, value_width) != (torch.bfloat16, 128) and code.stack < 300)


def test_three_streams_of_tf32_fit_before_hopper(tmp_path):
    made = constants(kernels.grad_rows, 80, 128, torch.float32, everything=False, with_h=True, value_width=128)
    assert Code(kernels.grad_rows, 80, torch.float32, *made, tmp_path).shared <= SHARED_MEMORY[80]


@NAMES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("with_values", [False, True], ids=["keys", "values"])
def test_the_widest_rows_fit_shared_memory(name, dtype, with_values, tmp_path):
    """Those that are not cut into slabs, with every term."""
    kernel = getattr(kernels, name)
    width = launches.MAX_BYTES // launches.operands(dtype, name != "forward").itemsize
    made = constants(kernel, 90, width, dtype, everything=True, with_h=name != "forward", value_width=with_values * width)
    assert Code(kernel, 90, dtype, *made, tmp_path).shared <= SHARED_MEMORY[90]


@NAMES
@pytest.mark.parametrize("arch", [86, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_widest_rows_of_a_small_gpu_fit_shared_memory(name, dtype, arch, tmp_path):
    kernel, width = getattr(kernels, name), launches.MAX_BYTES_SMALL // dtype.itemsize
    made = constants(kernel, arch, width, dtype, everything=True, with_h=name != "forward")
    code = Code(kernel, arch, dtype, *made, tmp_path)
    assert code.shared <= SHARED_MEMORY[arch] and code.has(MATRIX_INSTRUCTION[arch])


def test_merge_compiles(tmp_path):
    made = {"POOLED": True, "ROWS": 16, "VALUE_WIDTH": 128}
    for arch in (80, 90, 100):
        assert Code(kernels.merge, arch, torch.float32, made, 4, tmp_path).local == 0
