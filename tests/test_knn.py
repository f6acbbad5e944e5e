"""kdfast.ops.knn against the float64 distance matrix."""

import numpy as np
import pytest
import torch

from kdfast._core import impls
from kdfast._ops.knn import cpu, portable, reference
from kdfast.bank import IndexedBank, QueueBank
from kdfast.ops import knn

METRICS = ["cosine", "euclidean", "sqeuclidean"]


@pytest.fixture(params=["torch", "cpu"])
def impl(request, monkeypatch):
    """Calls that name no implementation go to this one."""
    if request.param == "cpu" and cpu.missing():
        pytest.skip(cpu.missing())
    monkeypatch.setattr(impls, "DEFAULT", request.param)
    return request.param


@pytest.fixture(params=["small-blocks", "one-block"])
def blocks(request, monkeypatch, impl):
    """Small blocks: neighbours come from many tiles, ragged ones among them; and the same within one tile."""
    if request.param == "small-blocks":
        monkeypatch.setattr(cpu, "_BANK_BLOCK", 50)
        monkeypatch.setattr(cpu, "_QUERY_SLAB", 7)
        monkeypatch.setattr(portable, "_BANK_BLOCK", 50)
        monkeypatch.setattr(portable, "_QUERY_BLOCK", 7)
        monkeypatch.setattr(portable, "_GATHER", 400)


def same_neighbours(ours, query, bank, k, metric, admitted=None, rtol=1e-5):
    distance, index = ours
    expected, expected_index = reference.knn(query, bank, k, metric, admitted)
    torch.testing.assert_close(index, expected_index)
    torch.testing.assert_close(distance.double(), expected, rtol=rtol, atol=1e-6)


# N, M, D, k: one of each; k = M and k > M; ragged blocks (65, 257); groups of 16 columns in use (2000).
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 4, 5), (5, 3, 8, 9), (63, 65, 17, 4), (65, 257, 16, 10), (9, 2000, 8, 3)], ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_matches_reference(blocks, shape, metric, dtype):
    n, m, d, k = shape
    query, bank = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    distance, index = knn(query, bank, k, metric=metric)
    assert distance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and index.dtype == torch.int64
    expected, expected_index = reference.knn(query, bank, k, metric)
    torch.testing.assert_close(distance.double(), expected, rtol=1e-5, atol=1e-6)
    # at one dimension all cosines are ties up to rounding: distances decide
    agree = (index == expected_index) | ((distance.double() - expected).abs() < 1e-6)
    assert agree.all() and (index == expected_index).double().mean() > (0.99 if d > 1 else 0)


@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_lower_index(blocks, metric):
    rows = torch.randn(6, 5)
    bank = rows[torch.randint(6, (300,))]  # about 50 exact copies of each row, over all blocks
    same_neighbours(knn(rows, bank, 8, metric=metric), rows, bank, 8, metric)


def test_rows_of_nan_are_last_whatever_their_bits():
    query, bank = torch.randn(4, 5, dtype=torch.float64), torch.randn(60, 5, dtype=torch.float64)
    bank[:40] = torch.full((40, 5), -1).view(torch.float64)  # a NaN with every bit set
    distance, index = knn(query, bank, 3, metric="sqeuclidean")
    assert distance.isfinite().all() and (index >= 40).all()


def test_integer_lattice_ties(blocks):
    # every distance is exact in float32 and most are shared: the order is decided by the index alone
    query, bank = torch.randint(-2, 3, (20, 3)).float(), torch.randint(-2, 3, (400, 3)).float()
    same_neighbours(knn(query, bank, 12, metric="sqeuclidean"), query, bank, 12, "sqeuclidean")


def test_self_is_left_out_by_index(blocks):
    bank = torch.randn(70, 4)
    bank[40] = bank[3]
    admitted = ~torch.eye(70, dtype=torch.bool)
    distance, index = knn(bank, bank, 3, metric="euclidean", own_index=True)
    same_neighbours((distance, index), bank, bank, 3, "euclidean", admitted)
    assert index[3, 0] == 40 and index[40, 0] == 3 and distance[3, 0] == 0
    own = torch.arange(70, dtype=torch.int32)
    own[10:] = -1
    admitted[range(10, 70), range(10, 70)] = True
    same_neighbours(knn(bank, bank, 3, metric="euclidean", own_index=own), bank, bank, 3, "euclidean", admitted)


@pytest.mark.parametrize("valid", [None, 0, 30, torch.tensor(61)], ids=str)
@pytest.mark.parametrize("same_class", ["exclude", "only"])
def test_classes_and_prefix(blocks, valid, same_class):
    query, bank = torch.randn(20, 4), torch.randn(90, 4)
    labels, bank_labels = torch.randint(4, (20,)), torch.randint(3, (90,), dtype=torch.int32)
    same = labels[:, None] == bank_labels
    admitted = (same if same_class == "only" else ~same) & (torch.arange(90) < (90 if valid is None else valid))
    ours = knn(query, bank, 25, query_labels=labels, bank_labels=bank_labels, same_class=same_class, bank_valid=valid)
    same_neighbours(ours, query, bank, 25, "cosine", admitted)


def test_banks(blocks):
    queue = QueueBank(64, 4, labels=True)
    queue.push(torch.randn(20, 4), torch.arange(20) % 3)
    query = torch.randn(5, 4)
    same_neighbours(knn(query, queue, 6), query, queue.keys, 6, "cosine")
    labels = torch.zeros(5, dtype=torch.int64)
    ours = knn(query, queue, 6, query_labels=labels)
    same_neighbours(ours, query, queue.keys, 6, "cosine", (queue.labels[:20] != 0).expand(5, 20))
    empty = IndexedBank(9, 4, init="empty")
    empty.update(torch.tensor([2, 7]), torch.randn(2, 4))
    _, index = knn(query, empty, 3)
    assert set(index[:, :2].flatten().tolist()) <= {2, 7} and (index[:, 2] == -1).all()


def test_sources_on_disk(blocks, tmp_path):
    query, bank = torch.randn(9, 6), torch.randn(130, 6)
    np.save(tmp_path / "bank.npy", bank.numpy())
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    torch.save(bank, tmp_path / "bank.pt")
    expected = knn(query, bank, 4)
    for source in (mapped, torch.load(tmp_path / "bank.pt", mmap=True)):
        torch.testing.assert_close(knn(query, source, 4), expected)
    torch.testing.assert_close(knn(mapped, mapped, 4, own_index=True), knn(bank, bank, 4, own_index=True))


def test_scores_are_never_stored_whole(monkeypatch, impl):
    monkeypatch.setattr(portable, "_BANK_BLOCK", 64)
    monkeypatch.setattr(portable, "_QUERY_BLOCK", 64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    query, bank = torch.randn(500, 4), torch.randn(600, 4)
    monkeypatch.setattr(portable, "_GATHER", 4096)
    with Watch():
        knn(query, bank, 2)
    assert largest <= 500 * (18 if impl == "torch" else 82) < 500 * 600  # the list of candidates


def test_far_off_and_near_pairs_keep_their_digits():
    query = torch.randn(20, 8) + 1000  # the plain ||q||^2 + ||k||^2 - 2 q.k has no digits left here
    bank = query[torch.randint(20, (200,))] + 0.05 * torch.randn(200, 8)
    same_neighbours(knn(query, bank, 5, metric="euclidean"), query, bank, 5, "euclidean")
    same_neighbours(knn(query - 1000, (query - 1000) * 2, 3), query - 1000, (query - 1000) * 2, 3, "cosine")


def test_zero_rows_and_non_finite_rows(blocks):
    query, bank = torch.randn(4, 3), torch.randn(60, 3)
    query[0], bank[7] = 0, 0
    distance, _ = knn(query, bank, 60)
    assert (distance[0] == 1).all()
    bank[11], bank[12, 0] = torch.nan, torch.inf
    distance, index = knn(query, bank, 61, metric="euclidean")
    assert index[0, 58:].tolist() == [11, 12, -1]  # neither is ordered among the others; the missing one is last
    assert distance[0, 58].isnan() and distance[0, 59] == torch.inf and distance[:, :58].isfinite().all()
    query[1] = torch.nan
    distance, index = knn(query, bank, 3)
    assert distance[1].isnan().all() and (index[1] >= 0).all() and distance[2].isfinite().all()


def test_no_queries_no_gradient_and_strides(impl):
    bank = torch.randn(30, 8, requires_grad=True)
    distance, index = knn(bank[:0], bank, 3)
    assert distance.shape == index.shape == (0, 3)
    distance, index = knn(bank, bank, 3)
    assert not distance.requires_grad
    torch.testing.assert_close(knn(bank.T.contiguous().T, bank[:, None].expand(30, 1, 8)[:, 0], 3), (distance, index))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(knn(bank, bank, 3), (distance, index))


def test_progress(impl):
    seen = []
    query, bank = torch.randn(1100, 2), torch.randn(17000, 2)
    knn(query, bank, 1, progress=lambda done, total: seen.append((done, total)))
    total = {"torch": 27, "cpu": 2}[impl]
    assert seen == [(i, total) for i in range(1, total + 1)]
    knn(query[:2], bank[:2], 1, progress=True)


def test_compiles_whole(impl):
    query, bank = torch.randn(5, 4), torch.randn(40, 4)
    compiled = torch.compile(knn, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, bank, 3, own_index=True), knn(query, bank, 3, own_index=True))


@pytest.mark.parametrize("precision", ["ieee", "bf16x3", "bf16"])
@pytest.mark.parametrize("metric", METRICS)
def test_neighbours_hidden_by_rounding_are_found(metric, precision):
    """600 rows within a hair of one another: their products round to the same number, at any precision below float64's."""
    if cpu.missing():
        pytest.skip(cpu.missing())
    query = torch.randn(5, 24)
    bank = query[torch.randint(5, (600,))] + 1e-4 * torch.randn(600, 24)
    same_neighbours(knn(query, bank, 7, metric=metric, precision=precision, impl="cpu"), query, bank, 7, metric, rtol=1e-2)


def test_opcheck():
    if cpu.missing():
        pytest.skip(cpu.missing())
    rows, bank, base = torch.randn(5, 8), torch.randn(40, 8), torch.ones(5)
    state = (torch.empty(5, 48), *(torch.zeros(5, c, dtype=torch.int64).squeeze(1) for c in (48, 1, 1)), torch.full((5,), torch.inf))
    lists = (3, 16, *state, 0, base, 0.0, 1e-6)
    labels, own = (torch.randint(3, (5,)), torch.randint(3, (40,))), torch.arange(5)
    columns = (torch.full((40,), -1.0), torch.zeros(40))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.kdfast.knn_scan, (rows, bank, *columns, *labels, False, own, 0, 0, *lists), test_utils=tests)
    torch.ops.kdfast.knn_scan(rows, bank, *columns, *labels, False, own, 0, 0, *lists)
    torch.library.opcheck(torch.ops.kdfast.knn_refine, (rows, bank, *lists), test_utils=tests)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_lower_precision_is_permission(precision, impl):
    query, bank = torch.randn(5, 4), torch.randn(80, 4)
    torch.testing.assert_close(knn(query, bank, 3, precision=precision), knn(query, bank, 3))


q, b = torch.zeros(3, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "query", lambda: knn([1.0], b, 1)),
        (TypeError, "query", lambda: knn(q.long(), b, 1)),
        (ValueError, "query", lambda: knn(q[0], b, 1)),
        (TypeError, "bank", lambda: knn(q, None, 1)),
        (TypeError, "bank", lambda: knn(q, b.numpy().astype(np.int64), 1)),
        (TypeError, "dtype of query", lambda: knn(q, b.double(), 1)),
        (ValueError, "width", lambda: knn(q, b[:, 1:], 1)),
        (ValueError, "at least 1 row", lambda: knn(q, b[:0], 1)),
        (ValueError, "k must", lambda: knn(q, b, 0)),
        (TypeError, "k must", lambda: knn(q, b, 1.5)),
        (ValueError, "metric", lambda: knn(q, b, 1, metric="dot")),
        (ValueError, "same_class", lambda: knn(q, b, 1, same_class="positive")),
        (ValueError, "bank_labels", lambda: knn(q, b, 1, query_labels=torch.zeros(3).long())),
        (ValueError, "query_labels", lambda: knn(q, b, 1, bank_labels=torch.zeros(5).long())),
        (ValueError, "query_labels", lambda: knn(q, b, 1, query_labels=torch.zeros(2).long(), bank_labels=torch.zeros(5).long())),
        (ValueError, "own_index", lambda: knn(b, b[:2], 1, own_index=True)),
        (IndexError, "own_index", lambda: knn(q, b, 1, own_index=torch.tensor([0, 5, -1]))),
        (ValueError, "bank_valid", lambda: knn(q, b, 1, bank_valid=6)),
        (TypeError, "bank_valid", lambda: knn(q, b, 1, bank_valid=2.0)),
        (ValueError, "precision", lambda: knn(q, b, 1, precision="fp8")),
        (ValueError, "impl", lambda: knn(q, b, 1, impl="faiss")),
        (TypeError, "progress", lambda: knn(q, b, 1, progress="bar")),
    ],
)
def test_bad_input(error, match, call):
    with pytest.raises(error, match=match):
        call()
