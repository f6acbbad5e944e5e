"""The Triton kernels of losses over all pairs compile for GPUs that are not here, and their object code is what the design needs."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kdfast._core import triton_runtime

if triton_runtime.INTERPRETED:
    pytest.skip("nothing is compiled under Triton's interpreter", allow_module_level=True)

from triton_code import DOT, MATRIX_INSTRUCTION, SHARED_MEMORY, Code, architecture

from kdfast._ops.similarity.triton import attraction_kernels as class_kernels
from kdfast._ops.similarity.triton import pairs_kernels as kernels
from kdfast._ops.similarity.triton import second_kernels, sigmoid_second_kernels, wide_kernels
from kdfast._ops.similarity.triton import slabs as launches
from kdfast._ops.similarity.triton.formats import KERNELS

CASES = pytest.mark.parametrize(
    ("arch", "dtype"),
    [(80, torch.bfloat16), (90, torch.bfloat16), (100, torch.bfloat16), (90, torch.float32)],
    ids=str,
)


TERMS = ("BIASED", "LABELLED", "LIMITED", "COUNTED")


def compiled(kernel, arch: int, dtype: torch.dtype, tmp_path, **flags) -> Code:
    """For rows of 512, with tf32 products of float32 unless `precision` is another."""
    x = torch.empty(1, 256, 512, dtype=dtype)
    narrow = (
        flags.pop("narrow", False) or flags.get("CLASSES", False) or (kernel is kernels.symmetric_weights and architecture(arch).blackwell)
    )
    precision = flags.pop("precision", "tf32")
    crowded = precision == "bf16x3" and not architecture(arch).from_shared
    part = launches.Part(
        x, x, launches.tiles(dtype, narrow), launches.format_of(dtype, KERNELS.products[precision], architecture(arch)), crowded
    )
    weights = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[part.format.weights]
    options = {**part.options, "COUNTED": False, "FACTORS": False, "WIDTH": 128, **flags}
    if kernel is kernels.weighted_sums:
        options |= {"DOT": DOT[part.format.weights][0], "DEPTH": part.depth_of_sums(part.format.weights)}
    if kernel is wide_kernels.wide_weights:
        options |= {"EVEN_VALUES": True, "DOT_VALUES": DOT[part.format.weights][0]}
    warps = options.pop("num_warps")
    pointers = {name: options.pop(name) for name, given in flags.items() if str(given).startswith("*")}
    made = {k: v for k, v in options.items() if k in kernel.arg_names}
    return Code(kernel, arch, dtype, made, warps, tmp_path, weights=weights, **pointers)


def assert_in_registers(code: Code, arch: int) -> None:
    assert code.has(MATRIX_INSTRUCTION[arch])
    assert code.local == 0 and code.stack == 0 and not code.has("LDL")
    assert code.shared <= SHARED_MEMORY[arch]


@CASES
@pytest.mark.parametrize("flags", [{"LABELLED": True, "CLASSES": False}, {"LABELLED": False, "CLASSES": True}], ids=["clip", "sup_con"])
def test_softmaxes_of_both_sides(arch, dtype, flags, tmp_path):
    assert_in_registers(compiled(kernels.symmetric_statistics, arch, dtype, tmp_path, HALF=flags["CLASSES"], **flags), arch)
    assert_in_registers(compiled(kernels.symmetric_weights, arch, dtype, tmp_path, WANTED=True, **flags), arch)


@CASES
def test_softmax_of_two_views(arch, dtype, tmp_path):
    flags = {"LABELLED": True, "CLASSES": False, "x_labels": "*i32", "y_labels": "*i32"}
    assert_in_registers(compiled(kernels.symmetric_statistics, arch, dtype, tmp_path, HALF=True, **flags), arch)
    assert_in_registers(compiled(kernels.symmetric_weights, arch, dtype, tmp_path, WANTED=True, **flags), arch)


@CASES
@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_sigmoid_of_every_pair(arch, dtype, gradient, tmp_path):
    assert_in_registers(compiled(kernels.sigmoid_pairs, arch, dtype, tmp_path, GRADIENT=gradient, WANTED=True), arch)


@CASES
@pytest.mark.parametrize("transposed", [False, True], ids=["of rows", "of columns"])
def test_sums_that_weights_make(arch, dtype, transposed, tmp_path):
    code = compiled(
        kernels.weighted_sums, arch, dtype, tmp_path, TRANSPOSED=transposed, ADD=True, FACTORS=not transposed, COUNTED=not transposed
    )
    assert_in_registers(code, arch)


@CASES
@pytest.mark.parametrize("terms", [False, True], ids=["scores", "every term"])
def test_softmax_of_wide_rows(arch, dtype, terms, tmp_path):
    flags = {**dict.fromkeys(TERMS, terms), "INDICES": 2 if terms else 0, "narrow": terms}
    assert_in_registers(compiled(wide_kernels.wide_probabilities, arch, dtype, tmp_path, POOLED=True, **flags), arch)
    flags |= {"WITH_H": terms, "narrow": terms, "BY_SCALE": True, "PLAIN": False, "WANT_BIAS": terms}
    assert_in_registers(compiled(wide_kernels.wide_weights, arch, dtype, tmp_path, **flags), arch)


def second_flags(dtype: torch.dtype, terms: bool) -> dict:
    """Of a launch of second.py, everything wanted of keys that are the values and move."""
    given, stored = DOT[dtype][1], DOT[torch.bfloat16 if dtype == torch.bfloat16 else torch.float32]
    return {
        **dict.fromkeys((*TERMS, "BIAS_MOVES", "WANT_BIAS"), terms), "INDICES": 2 if terms else 0, "narrow": True, "EVEN_VALUES": True,
        **dict.fromkeys(("KEYS_MOVE", "VALUES_MOVE", "WANT_SLOPES", "WANT_RATES", "WANT_VALUES"), True), "DOT": stored[0],
        **dict.fromkeys(("direction", "h", "of_slopes", "of_rates", "of_values"), stored[1]), "moments": "*fp64",
        **dict.fromkeys(("keys_direction", "values_direction"), given),
    }  # fmt: skip


@CASES
def test_second_derivatives(arch, dtype, tmp_path):
    for kernel in (second_kernels.tile_moments, second_kernels.second_weights, sigmoid_second_kernels.sigmoid_second):
        assert_in_registers(compiled(kernel, arch, dtype, tmp_path, **second_flags(dtype, terms=True)), arch)


@pytest.mark.parametrize(("arch", "dtype"), [(86, torch.float16), (120, torch.bfloat16)], ids=str)
def test_second_derivatives_on_small_gpus(arch, dtype, tmp_path):
    code = compiled(second_kernels.second_weights, arch, dtype, tmp_path, **second_flags(dtype, terms=False))
    assert code.has(MATRIX_INSTRUCTION[arch]) and code.shared <= SHARED_MEMORY[arch] and code.stack < 256


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float32), (100, torch.bfloat16), (120, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("terms", [False, True], ids=["scores", "every term"])
def test_attraction_within_classes(arch, dtype, terms, tmp_path):
    flags = {"BIASED": terms, "COUNTED": terms, "INDICES": 2 if terms else 0, "INCLUDED": not terms, "narrow": True}
    assert_in_registers(compiled(class_kernels.class_statistics, arch, dtype, tmp_path, **flags), arch)
    assert_in_registers(compiled(class_kernels.class_weights, arch, dtype, tmp_path, WANTED=True, **flags), arch)


@pytest.mark.parametrize("precision", ["ieee", "bf16x3"])
def test_exact_products_of_float32(precision, tmp_path):
    flags = {**dict.fromkeys(TERMS, False), "INDICES": 0, "precision": precision}
    for kernel, more in (
        (wide_kernels.wide_probabilities, {"POOLED": True}),
        (wide_kernels.wide_weights, {"WITH_H": False, "BY_SCALE": True, "PLAIN": False, "WANT_BIAS": True}),
        (kernels.weighted_sums, {"TRANSPOSED": False, "ADD": True, "FACTORS": True}),
        (kernels.weighted_sums, {"TRANSPOSED": True, "ADD": True, "FACTORS": False}),
    ):
        code = compiled(kernel, 90, torch.float32, tmp_path, **flags, **more)
        assert code.stack == 0 and code.has("HGMMA" if precision == "bf16x3" else "FFMA")


@pytest.mark.parametrize("arch", [80, 120])
def test_three_products_from_registers(arch, tmp_path):
    """Of tiles as narrow as triton_slabs.parts makes them there."""
    flags = {**dict.fromkeys(TERMS, False), "INDICES": 0, "precision": "bf16x3", "narrow": True}
    for kernel, more in (
        (wide_kernels.wide_probabilities, {"POOLED": True}),
        (wide_kernels.wide_weights, {"WITH_H": False, "BY_SCALE": True, "PLAIN": False, "WANT_BIAS": False}),
        (kernels.symmetric_statistics, {"CLASSES": False, "HALF": False}),
        (kernels.symmetric_weights, {"CLASSES": False, "WANTED": True}),
        (kernels.sigmoid_pairs, {"GRADIENT": True, "WANTED": True}),
        (kernels.weighted_sums, {"TRANSPOSED": False, "ADD": True, "FACTORS": True}),
        (kernels.weighted_sums, {"TRANSPOSED": False, "ADD": True, "FACTORS": False}),
        (kernels.weighted_sums, {"TRANSPOSED": True, "ADD": True, "FACTORS": False}),
    ):
        assert_in_registers(compiled(kernel, arch, torch.float32, tmp_path, **flags, **more), arch)


def test_merging_moments(tmp_path):
    made = {"VALUES_MOVE": True, "PARTS": 32, "COUNT": 32}
    for arch in (80, 90, 100):
        assert Code(second_kernels.merge_moments, arch, torch.float32, made, 4, tmp_path, moments="*fp64").stack == 0


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_merging_statistics(arch, tmp_path):
    for factors in (True, False):
        made = {"FACTORS": factors, "CLASSES": not factors, "PARTS": 32, "COUNT": 128}
        code = Code(kernels.merge_statistics, arch, torch.float32, made, 4, tmp_path)
        assert code.local == 0 and code.stack == 0
