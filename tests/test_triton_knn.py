"""The Triton neighbour search against the float64 distance matrix: on a GPU, or where there is none under Triton's interpreter,
in a process that has TRITON_INTERPRET=1 from its start (make test)."""

import pytest
import torch

from kdfast._core import triton_runtime
from kdfast._ops.knn import reference, triton
from kdfast.bank import QueueBank
from kdfast.ops import knn

if triton_runtime.missing() is not None:
    pytest.skip(f"{triton_runtime.missing()}, and TRITON_INTERPRET is not 1", allow_module_level=True)
DEVICE = "cpu" if triton_runtime.INTERPRETED else "cuda"
METRICS = pytest.mark.parametrize("metric", ["cosine", "euclidean", "sqeuclidean"])


def moved(x):
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def found(query, bank, k, **options):
    out = knn(moved(query), moved(bank), k, impl="triton", **{name: moved(x) for name, x in options.items()})
    return tuple(x.cpu() for x in out)


def same_neighbours(ours, query, bank, k, metric, admitted=None, rtol=1e-5):
    distance, index = ours
    expected, expected_index = reference.knn(query, bank, k, metric, admitted)
    torch.testing.assert_close(index, expected_index)
    torch.testing.assert_close(distance.double(), expected, rtol=rtol, atol=1e-6)


@METRICS
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 3, 8, 9), (34, 65, 17, 4), (4, 400, 20, 3)], ids=str)
def test_matches_reference(shape, metric):
    n, m, d, k = shape
    query, bank = torch.randn(n, d), torch.randn(m, d)
    if d > 1:
        same_neighbours(found(query, bank, k, metric=metric), query, bank, k, metric)
    else:
        torch.testing.assert_close(found(query, bank, k, metric=metric)[0].double(), reference.knn(query, bank, k, metric)[0])


@METRICS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, metric):
    query, bank = torch.randn(5, 10).to(dtype), torch.randn(100, 10).to(dtype)
    same_neighbours(found(query, bank, 5, metric=metric), query, bank, 5, metric)
    tiny = (query.float() * 2e-4).to(dtype), (bank.float() * 1e-4).to(dtype)
    same_neighbours(found(*tiny, 3), *tiny, 3, "cosine")


@pytest.mark.parametrize("precision", ["bf16x3", "bf16"])
def test_products_rank_and_distances_are_exact(precision):
    query, bank = torch.randn(4, 20), torch.randn(300, 20)
    same_neighbours(found(query, bank, 5, precision=precision), query, bank, 5, "cosine")


@METRICS
def test_ties_go_to_the_lower_index(metric, monkeypatch):
    monkeypatch.setattr(triton, "_MINIMA", 1000)  # several slabs, and several parts of them
    rows = torch.randn(6, 5)
    bank = rows[torch.randint(6, (120,))]  # about 20 exact copies of each row
    same_neighbours(found(rows, bank, 8, metric=metric), rows, bank, 8, metric)


def test_more_ties_than_groups_are_kept():
    bank = torch.randint(-1, 2, (600, 2)).float()
    query = torch.randint(-1, 2, (3, 2)).float()
    same_neighbours(found(query, bank, 2, metric="sqeuclidean"), query, bank, 2, "sqeuclidean")


def test_who_may_be_a_neighbour():
    query, bank = torch.randn(12, 4), torch.randn(90, 4)
    labels, bank_labels = torch.randint(4, (12,)), torch.randint(3, (90,), dtype=torch.int32)
    own = torch.where(torch.rand(12) < 0.7, torch.randint(90, (12,)), -1)
    for same_class in ("exclude", "only"):
        same = labels[:, None] == bank_labels
        admitted = (same if same_class == "only" else ~same) & (torch.arange(90) < 61) & (torch.arange(90) != own[:, None])
        options = {"query_labels": labels, "bank_labels": bank_labels, "own_index": own, "bank_valid": torch.tensor(61)}
        same_neighbours(found(query, bank, 25, same_class=same_class, **options), query, bank, 25, "cosine", admitted)
    distance, index = found(query, bank, 3, bank_valid=0)
    assert (index == -1).all() and (distance == torch.inf).all()


def test_a_bank_object():
    queue = QueueBank(64, 4).to(DEVICE)
    queue.push(moved(torch.randn(20, 4)))
    query = torch.randn(5, 4)
    distance, index = knn(moved(query), queue, 6, impl="triton")
    same_neighbours((distance.cpu(), index.cpu()), query, queue.keys[:20].cpu(), 6, "cosine")


def test_far_off_and_near_pairs_keep_their_digits():
    query = torch.randn(5, 8) + 1000
    bank = query[torch.randint(5, (100,))] + 0.05 * torch.randn(100, 8)
    same_neighbours(found(query, bank, 5, metric="euclidean"), query, bank, 5, "euclidean")
    same_neighbours(found(query - 1000, (query - 1000) * 2, 3), query - 1000, (query - 1000) * 2, 3, "cosine")


def test_zero_rows_and_non_finite_rows():
    query, bank = torch.randn(4, 3), torch.randn(60, 3)
    query[0], bank[7] = 0, 0
    distance, _ = found(query, bank, 60)
    assert (distance[0] == 1).all()
    bank[11], bank[12, 0] = torch.nan, torch.inf
    distance, index = found(query, bank, 61, metric="euclidean")
    assert index[0, 58:].tolist() == [11, 12, -1]
    assert distance[0, 58].isnan() and distance[0, 59] == torch.inf and distance[:, :58].isfinite().all()
    query[1] = torch.nan
    distance, index = found(query, bank, 3)
    assert distance[1].isnan().all() and index[1].tolist() == [0, 1, 2] and distance[2].isfinite().all()


def test_no_queries_strides_progress_and_refusals():
    bank, query = torch.randn(40, 12), torch.randn(9, 12)
    assert found(query[:0], bank, 2)[0].shape == (0, 2)
    same_neighbours(found(query[:, ::2], bank[:, ::2], 2), query[:, ::2], bank[:, ::2], 2, "cosine")
    calls = []
    found(query, bank, 2, progress=lambda *call: calls.append(call))
    assert calls == [(1, 1)]
    with pytest.raises(ValueError, match="numpy"):
        knn(moved(query), bank.numpy(), 2, impl="triton")
    with pytest.raises(ValueError, match="float64"):
        found(query.double(), bank.double(), 2)


def test_opcheck_and_compile():
    query, bank = moved(torch.randn(5, 16)), moved(torch.randn(70, 16))
    ops = torch.ops.kdfast_triton
    parts = triton_runtime.split(query, 2, 16).parts, triton_runtime.split(bank, 2, 16).parts
    zeros = query.new_zeros(5), bank.new_zeros(70), bank.new_zeros(70)
    torch.library.opcheck(ops.knn_minima.default, (*parts, *zeros, None, None, None, None, False))
    chosen = torch.zeros(5, 2, dtype=torch.int64, device=query.device)
    torch.library.opcheck(ops.knn_distances.default, (query, bank, chosen, 0, None, None, None, None, False))
    compiled = torch.compile(lambda q: knn(q, bank, 3, impl="triton"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query), knn(query, bank, 3, impl="triton"))


def test_labels_of_any_strides():
    """A kernel reads them one beside the other."""
    query, bank = torch.randn(9, 6), torch.randn(40, 6)
    mixed = torch.randint(4, (80,))
    mine, theirs = moved(mixed)[:18:2], moved(mixed)[::2]
    strided = knn(moved(query), moved(bank), 5, query_labels=mine, bank_labels=theirs, impl="triton")
    packed = knn(moved(query), moved(bank), 5, query_labels=mine.clone(), bank_labels=theirs.clone(), impl="triton")
    assert all(torch.equal(x, y) for x, y in zip(strided, packed, strict=True)) and not theirs.is_contiguous()
