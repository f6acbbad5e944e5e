"""Grids of the Triton launches: what grows with the data is on the first axis, for the others end at 65,535 programs.

Under Triton's interpreter, in a process that has TRITON_INTERPRET=1 from its start (make test). Kernels do not run here.
"""

import importlib

import pytest
import torch

from kdfast import functional, ops
from kdfast._core import triton_runtime
from kdfast._ops.knn import triton as knn
from kdfast._ops.sinkhorn import arguments
from kdfast._ops.sinkhorn import triton as sinkhorn

if not triton_runtime.INTERPRETED or triton_runtime.missing() is not None:
    pytest.skip("it takes Triton, and TRITON_INTERPRET=1", allow_module_level=True)

KERNELS = {
    "_core.triton_split": ("split_rows",),
    "_ops.knn.triton.kernels": ("group_minima", "group_distances", "row_norms"),
    "_ops.similarity.triton.kernels": ("forward", "merge", "grad_rows", "grad_keys"),
    "_ops.similarity.triton.distillation_kernels": ("distillation", "merge_losses"),
    "_ops.similarity.triton.wide_kernels": ("wide_probabilities", "wide_weights"),
    "_ops.similarity.triton.second_kernels": ("tile_moments", "merge_moments", "second_weights"),
    "_ops.similarity.triton.pairs_kernels": (
        "merge_statistics",
        "weighted_sums",
        "symmetric_statistics",
        "symmetric_weights",
        "sigmoid_pairs",
    ),
    "_ops.gather.triton.kernels": ("scores", "row_sums"),
    "_ops.sinkhorn.triton.kernels": ("half_step", "cost_rows"),
    "_ops.triplet.triton.kernels": ("extrema",),
    "_ops.triplet.triton.relations_kernels": ("relation_sums",),
}
MANY = 70_000


@pytest.fixture
def grids(monkeypatch):
    """{kernel: grid} of what is launched."""
    launched = {}

    class Launch:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            launched[self.name] = grid
            return lambda *args, **options: None

    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(importlib.import_module(f"kdfast.{module}"), name, Launch(name))
    return launched


def legal(grids, *names):
    assert set(names) <= set(grids)
    for name, (first, *others) in grids.items():
        assert first < 2**31 and all(size <= 65_535 for size in others), (name, first, others)


def test_neighbours_of_many_queries(grids):
    query, bank, none = torch.zeros(MANY, 1), torch.zeros(3 * 16, 1), (None, None, None, None, False)
    knn.distances(query, bank, torch.zeros(MANY, 3, dtype=torch.int64), 0, *none)
    knn.minima(query[None].bfloat16(), bank[None].bfloat16(), query[:, 0], bank[:, 0], bank[:, 0], *none)
    legal(grids, "group_distances", "row_norms", "group_minima")
    assert grids["group_distances"] == (3 * MANY,)


def test_costs_of_many_points(grids):
    points = torch.zeros(1, 33 * MANY, 1)
    problem, *_ = arguments.problem(
        None, torch.zeros(1, 5, 1), points, "sqeuclidean", None, None, 1.0, (None, None), None, "ieee", "triton"
    )
    sinkhorn.costs(problem, 0, 5)
    legal(grids, "cost_rows")


def test_many_problems(grids):
    ops.sinkhorn(torch.zeros(MANY, 1, 1), epsilon=1.0, max_iters=1, impl="triton")
    legal(grids, "half_step")


@pytest.mark.parametrize(
    ("precision", "names"),
    [("tf32", ("forward", "grad_keys")), ("ieee", ("wide_probabilities", "weighted_sums"))],
    ids=["narrow rows", "slabs"],
)
def test_many_batch_entries(grids, precision, names):
    query, keys = torch.zeros(MANY, 1, 1, requires_grad=True), torch.zeros(MANY, 2, 1, requires_grad=True)
    lse, pooled = ops.similarity_softmax(query, keys, scale=1.0, precision=precision, impl="triton")
    torch.autograd.grad(lse.sum(), (query, keys), retain_graph=True)
    legal(grids, *names)
    first = torch.autograd.grad(pooled.sum(), (query, keys), create_graph=True)
    torch.autograd.grad(first, (query, keys), (query, keys))
    legal(grids, "tile_moments", "merge_moments", "second_weights", "weighted_sums")


def test_many_rows_of_everything(grids):
    x, labels = torch.zeros(MANY, 2), torch.zeros(MANY, dtype=torch.int64)
    ops.gather_similarity(x, x, labels[:, None].expand(-1, 2), impl="triton")
    functional.sampled_info_nce(x, x, x, labels[:, None].expand(-1, 2), temperature=1.0, impl="triton")
    ops.row_extrema(x, x, labels, labels, impl="triton")
    functional.mmd_rbf(x, x, sigmas=(1.0,), impl="triton")
    functional.similarity_distillation(x, x, x, student_temperature=1.0, teacher_temperature=1.0, impl="triton")
    legal(grids, "split_rows", "scores", "extrema", "relation_sums", "distillation")
