"""The Triton kernels compile for AMD's GPUs too, with matrix instructions, without scratch memory, and fit the LDS. None has run there."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.backends import backends

from kdfast._core import triton_runtime

if triton_runtime.INTERPRETED:
    pytest.skip("nothing is compiled under Triton's interpreter", allow_module_level=True)
if "amd" not in backends:
    pytest.skip("this Triton is built without AMD's GPUs", allow_module_level=True)

import test_triton_compile as softmax
import test_triton_compile_distillation as distillation
import test_triton_compile_pairs as pairs
import test_triton_compile_sinkhorn as sinkhorn
from triton_code import MATRIX_INSTRUCTION, SHARED_MEMORY, Code, architecture

from kdfast._ops.gather.triton import kernels as gather_kernels
from kdfast._ops.knn import triton as knn
from kdfast._ops.knn.triton import kernels as knn_kernels
from kdfast._ops.triplet import triton as triplet
from kdfast._ops.triplet.triton import dense, dense_kernels, relations, relations_kernels
from kdfast._ops.triplet.triton import kernels as triplet_kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(params=["gfx942"])
def arch(request, monkeypatch) -> str:
    """Launches are made as on that GPU."""
    monkeypatch.setattr(torch.version, "hip", "7")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton_runtime, "architecture", lambda _: architecture(request.param))
    return request.param


def check(code: Code, arch: str, products: bool = True) -> None:
    assert code.stack == 0 and code.shared <= SHARED_MEMORY[arch]
    assert code.has(MATRIX_INSTRUCTION[arch]) or not products


@pytest.mark.parametrize("name", ["forward", "grad_rows", "grad_keys"])
@pytest.mark.parametrize(("dtype", "width"), [(BF16, 128), (FP16, 64), (FP32, 64)], ids=str)
def test_the_streaming_softmax(name, dtype, width, arch, tmp_path):
    kernel = getattr(softmax.kernels, name)
    made, warps = softmax.constants(kernel, arch, width, dtype, everything=False)
    assert warps == 4  # of 64 threads
    check(Code(kernel, arch, dtype, made, warps, tmp_path), arch)


@pytest.mark.parametrize("precision", ["tf32", "bf16x3"])
def test_distillation(precision, arch, tmp_path):
    check(distillation.compiled(arch, tmp_path, 128, FP32, 768, FP32, precision=precision, everything=True), arch)


@pytest.mark.parametrize(("dtype", "precision"), [(BF16, "tf32"), (FP32, "tf32"), (FP32, "ieee"), (FP32, "bf16x3")], ids=str)
def test_slabs(dtype, precision, arch, tmp_path):
    terms = {**dict.fromkeys(pairs.TERMS, False), "INDICES": 0}
    for kernel, flags in (
        (pairs.kernels.symmetric_statistics, {"CLASSES": False, "HALF": False}),
        (pairs.kernels.symmetric_weights, {"CLASSES": False, "WANTED": True}),
        (pairs.kernels.weighted_sums, {"TRANSPOSED": True, "ADD": True, "FACTORS": False}),
        (pairs.wide_kernels.wide_probabilities, {"POOLED": True}),
    ):
        narrow = kernel is pairs.kernels.weighted_sums or precision == "bf16x3"
        check(pairs.compiled(kernel, arch, dtype, tmp_path, precision=precision, narrow=narrow, **terms, **flags), arch)


def test_second_derivatives(arch, tmp_path):
    for kernel in (pairs.second_kernels.tile_moments, pairs.second_kernels.second_weights, pairs.sigmoid_second_kernels.sigmoid_second):
        check(pairs.compiled(kernel, arch, BF16, tmp_path, **pairs.second_flags(BF16, terms=True)), arch)


def test_scores_that_only_rank(arch, tmp_path):
    tiles = triton_runtime.score_tiles(128, 3)

    def compiled(kernel, t=tiles, **constants) -> Code:
        options = {**t.options(3), **constants}
        made = {name: value for name, value in options.items() if name in kernel.arg_names}
        return Code(kernel, arch, BF16, made, options["num_warps"], tmp_path)

    wanted = dict.fromkeys(triplet.FLAGS, True)
    check(compiled(triplet_kernels.extrema, BEYOND=True, EUCLIDEAN=True, **wanted), arch)
    flags = {"LABELLED": True, "ONLY": False, "OWNED": True, "DROPPED": True, "GROUP": knn.GROUP}
    check(compiled(knn_kernels.group_minima, **flags), arch)
    rules = {"RULE": 1, "MINING": 2, "METRIC": 0, "CHUNK": dense.CHUNK, "MARK_ROWS": tiles.rows, "MARK_COLUMNS": tiles.columns}
    for transposed in (False, True):
        t = dense.small_tiles(tiles, transposed)
        check(compiled(dense_kernels.gradient, t, TRANSPOSED=transposed, **rules), arch)
    t, rules = relations.tiles(0, 128), {"RULE": 0, "SAME": True, "COUNT": 3, "GRADIENT": True, "CHUNK": dense.CHUNK}
    check(compiled(relations_kernels.relation_sums, t, **rules), arch)


def test_sampled_rows(arch, tmp_path):
    sums = {"STATISTIC": 2, "OFFSET": True, "POOLED": True, "SLOTS": 32, "WIDTH": 128}
    check(Code(gather_kernels.row_sums, arch, BF16, sums, 4, tmp_path), arch, products=False)


@pytest.mark.parametrize("source", ["rows", "products"])
def test_sinkhorn(source, arch, tmp_path):
    code = sinkhorn.compiled(sinkhorn.kernels.pull_rows, source, arch, tmp_path, RELAXED=True, STEEP=True)
    check(code, arch, source == "products")
