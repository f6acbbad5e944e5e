"""The Triton kernels of the other families compile for GPUs that are not here, and their object code is what the design needs."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kdfast._core import triton_runtime

if triton_runtime.INTERPRETED:
    pytest.skip("nothing is compiled under Triton's interpreter", allow_module_level=True)

from triton_code import MATRIX_INSTRUCTION, SHARED_MEMORY, Code

from kdfast._core.triton_split import split_rows
from kdfast._ops.gather.triton import kernels as gather_kernels
from kdfast._ops.knn import triton as knn
from kdfast._ops.knn.triton import kernels as knn_kernels
from kdfast._ops.sinkhorn import triton as sinkhorn
from kdfast._ops.sinkhorn.triton import kernels as sinkhorn_kernels
from kdfast._ops.sinkhorn.triton import plan as triton_plan
from kdfast._ops.sinkhorn.triton import plan_kernels
from kdfast._ops.triplet import triton as triplet
from kdfast._ops.triplet.triton import dense, dense_kernels, mining_kernels, relations, relations_kernels
from kdfast._ops.triplet.triton import kernels as triplet_kernels

GENERATIONS = pytest.mark.parametrize("arch", [80, 90, 100])


def scan_options(width: int, parts: int) -> tuple[dict, int]:
    """The constants of a launch's tiles, and its warps."""
    options = triton_runtime.score_tiles(width, parts).options(parts)
    return options, options.pop("num_warps")


def in_registers(code: Code, arch: int) -> None:
    assert code.local == 0 and code.stack == 0 and not code.has("LDL")
    assert code.shared <= SHARED_MEMORY[arch]


@pytest.mark.parametrize(("everything", "arch"), [(False, 80), (True, 80), (True, 90), (True, 100)])
def test_extrema_stays_in_registers(everything, arch, tmp_path):
    options, warps = scan_options(128, 3)
    wanted = dict(zip(triplet.FLAGS, (True, everything, True, everything), strict=True))
    code = Code(
        triplet_kernels.extrema, arch, torch.bfloat16, {**options, **wanted, "BEYOND": everything, "EUCLIDEAN": True}, warps, tmp_path
    )  # fmt: skip
    in_registers(code, arch)
    assert code.has(MATRIX_INSTRUCTION[arch])


@pytest.mark.parametrize(("rule", "arch"), [("pairs", 90), ("similarity", 90), ("triplets", 80), ("triplets", 90), ("triplets", 100)])
def test_losses_of_all_pairs_stay_in_registers(rule, arch, tmp_path):
    rules = {"RULE": ("extremes", "pairs", "similarity", "triplets").index(rule), "MINING": 2, "METRIC": 0}
    tiles = triton_runtime.score_tiles(128, 3)

    def check(kernel, t, **more):
        options = t.options(3)
        warps = options.pop("num_warps")
        made = {name: value for name, value in {**options, **rules, **more}.items() if name in kernel.arg_names}
        code = Code(kernel, arch, torch.bfloat16, made, warps, tmp_path)
        in_registers(code, arch)
        assert code.has(MATRIX_INSTRUCTION[arch])

    check(dense_kernels.row_sums, tiles)
    marked = {"CHUNK": dense.CHUNK, "MARK_ROWS": tiles.rows, "MARK_COLUMNS": tiles.columns}
    for transposed in (False, True):
        check(dense_kernels.gradient, dense.small_tiles(tiles, transposed and arch < 100), TRANSPOSED=transposed, **marked)
    if rule == "triplets":
        check(dense_kernels.positive_distances, dense.small_tiles(tiles))


@pytest.mark.parametrize(("rule", "arch"), [("gaussians", 90), ("ratios", 80), ("ratios", 90), ("ratios", 100)])
def test_relations_stay_in_registers(rule, arch, tmp_path):
    index = ("gaussians", "distances", "ratios").index(rule)
    options = relations.tiles(index, 128).options(3)
    warps = options.pop("num_warps")
    rules = {"RULE": index, "SAME": True, "COUNT": 3, "GRADIENT": True, "CHUNK": dense.CHUNK}
    code = Code(relations_kernels.relation_sums, arch, torch.bfloat16, {**options, **rules}, warps, tmp_path)
    in_registers(code, arch)
    assert code.has(MATRIX_INSTRUCTION[arch])


@GENERATIONS
@pytest.mark.parametrize("apex", [True, False])
def test_angles_stay_in_registers(apex, arch, tmp_path):
    rules = {"APEX": apex, "GRADIENT": True, "ROWS": relations.ANGLES[0], "COLUMNS": relations.ANGLES[1]}
    in_registers(Code(relations_kernels.angle_sums, arch, torch.float32, rules, 4, tmp_path), arch)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_minings_of_a_negative_a_pair_stay_in_registers(arch, tmp_path):
    tiles = triton_runtime.score_tiles(128, 3)
    for kernel, t in ((mining_kernels.nearest_beyond, tiles), (mining_kernels.weight_blocks, dense.small_tiles(tiles))):
        options = t.options(3)
        warps = options.pop("num_warps")
        code = Code(kernel, arch, torch.bfloat16, {**options, "METRIC": 1}, warps, tmp_path)
        in_registers(code, arch)
        assert code.has(MATRIX_INSTRUCTION[arch])
    in_registers(Code(mining_kernels.draw, arch, torch.float32, {"COLUMNS": t.columns, "DEPTH": 64}, 4, tmp_path), arch)


@pytest.mark.parametrize(
    ("parts", "dtype", "arch"), [(3, torch.bfloat16, 80), (3, torch.bfloat16, 90), (3, torch.bfloat16, 100), (1, torch.float16, 90)]
)
def test_group_minima_stay_in_registers(parts, dtype, arch, tmp_path):
    options, warps = scan_options(128, parts)
    rules = {"LABELLED": True, "ONLY": False, "OWNED": True, "DROPPED": True, "GROUP": knn.GROUP}
    code = Code(knn_kernels.group_minima, arch, dtype, {**options, **rules}, warps, tmp_path)
    in_registers(code, arch)
    assert code.has(MATRIX_INSTRUCTION[arch])


@GENERATIONS
@pytest.mark.parametrize("metric", [0, 1])
def test_group_distances_stay_in_registers(metric, arch, tmp_path):
    rules = {"METRIC": metric, "LABELLED": True, "ONLY": False, "OWNED": True, "DROPPED": True, "GROUP": knn.GROUP, "DEPTH": 128}
    in_registers(Code(knn_kernels.group_distances, arch, torch.bfloat16, rules, 4, tmp_path), arch)
    in_registers(Code(knn_kernels.row_norms, arch, torch.bfloat16, {"ROWS": 16, "DEPTH": 128}, 4, tmp_path), arch)


@GENERATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_in_parts_stay_in_registers(dtype, arch, tmp_path):
    made = {"PARTS": 3 if dtype == torch.float32 else 1, "ROWS": 16, "EACH": 64}
    matrix = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    in_registers(Code(split_rows, arch, dtype, made, 4, tmp_path, x=matrix, out="*bf16", square="*fp32", padded="i32"), arch)


@pytest.mark.parametrize(("statistic", "arch"), [(0, 80), (0, 90), (0, 100), (1, 90), (2, 80), (2, 90), (2, 100)])
def test_sampled_rows_stay_in_registers(statistic, arch, tmp_path):
    sums = {"STATISTIC": statistic, "OFFSET": True, "POOLED": True, "SLOTS": 32, "WIDTH": 128}
    code = Code(gather_kernels.row_sums, arch, torch.bfloat16, sums, 4, tmp_path)
    in_registers(code, arch)
    assert code.has(r"LDG\.E\.128")  # eight of a row's numbers at a time
    if statistic == 0:
        in_registers(Code(gather_kernels.scores, arch, torch.bfloat16, {"SLOTS": 32, "DEPTH": 128}, 4, tmp_path), arch)


@pytest.mark.parametrize(
    ("source", "arch"), [("rows", 90), ("columns", 90), ("differences", 90), ("products", 80), ("products", 90), ("products", 100)]
)
def test_sinkhorn_half_steps_stay_in_registers(source, arch, tmp_path):
    given = source in ("rows", "columns")
    options = sinkhorn.tiles(given, source != "columns", 64).options(3)
    warps = options.pop("num_warps")
    flags = {"GIVEN": given, "DIRECT": source == "differences", "ROOT": source == "differences", "DOT": False, "PADDED": given}
    unit = {"column_stride" if source == "rows" else "row_stride": 1} if given else {}
    made = {**options, **flags, **unit, "RELAXED": True, "WITH_COST": True}
    code = Code(sinkhorn_kernels.half_step, arch, torch.bfloat16 if source == "products" else torch.float32, made, warps, tmp_path)
    in_registers(code, arch)
    assert code.has(MATRIX_INSTRUCTION[arch]) or source != "products"


@pytest.mark.parametrize(("source", "arch"), [("rows", 80), ("rows", 90), ("products", 80), ("products", 90), ("products", 100)])
def test_sinkhorn_plans_stay_in_registers(source, arch, tmp_path):
    given = source == "rows"
    flags = {"GIVEN": given, "DIRECT": False, "ROOT": not given, "DOT": False, "PADDED": given, **({"column_stride": 1} if given else {})}

    def check(name, tiles, **made):
        options = tiles.options(3)
        warps = options.pop("num_warps")
        code = Code(getattr(plan_kernels, name), arch, torch.bfloat16, {**options, **flags, **made}, warps, tmp_path, cost="*fp32")
        in_registers(code, arch)
        return code

    usual = sinkhorn.tiles(given, True, 64)
    check("plan_entries", usual, SLOPED=True, TOTAL=False)
    check("row_moments", usual)
    products = check("plan_products", triton_plan.product_tiles(64), SLOPED=True, OVER_COST=not given, CHUNK=triton_plan.CHUNK)
    assert products.has(MATRIX_INSTRUCTION[arch])


@GENERATIONS
@pytest.mark.parametrize("direct", [False, True])
def test_costs_of_points_stay_in_registers(direct, arch, tmp_path):
    options = sinkhorn.tiles(False, True, 64).options(3)
    warps = options.pop("num_warps")
    made = {**options, "DIRECT": direct, "ROOT": direct, "DOT": False}
    in_registers(Code(sinkhorn_kernels.cost_rows, arch, torch.float32 if direct else torch.bfloat16, made, warps, tmp_path), arch)
