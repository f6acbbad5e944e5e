"""impl="cpu" of kdfast.ops.knn against the float64 distance matrix, under every instruction set."""

import pytest
import torch

from kdfast._core import extension
from kdfast._ops.knn import cpu, reference
from kdfast.ops import knn

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))
METRICS = ("cosine", "euclidean", "sqeuclidean")
PRECISIONS = ("ieee", "bf16x3", "bf16")


def check(query, bank, k, metric="cosine", admitted=None, rtol=1e-5, **options):
    """The k least distances of float64, each that of the row named, no row twice and equal distances by index."""
    distance, index = knn(query, bank, k, metric=metric, impl="cpu", **options)
    expected, _ = reference.knn(query, bank, k, metric, admitted)
    torch.testing.assert_close(distance.double(), expected, rtol=rtol, atol=1e-6)
    found = index >= 0
    assert found.equal(expected < torch.inf)
    of_rows = reference.distances(query, bank, metric).gather(1, index.clamp_min(0))
    torch.testing.assert_close(distance.double()[found], of_rows[found], rtol=rtol, atol=1e-6)
    later = (distance[:, 1:] > distance[:, :-1]) | (index[:, 1:] > index[:, :-1])
    assert later[found[:, 1:]].all()
    return distance, index


# N, M, D, k: one of each; a panel and one; several blocks, lists that are cut often; k beyond what a list takes in at first.
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 65, 5, 2), (65, 1300, 24, 5), (33, 2000, 130, 100)], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_ragged_sizes(shape, metric, precision, isa):
    n, m, d, k = shape
    check(torch.randn(n, d), torch.randn(m, d), k, metric, precision=precision)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_rows(dtype, isa):
    check(torch.randn(20, 40).to(dtype), torch.randn(700, 40).to(dtype), 6, "euclidean", precision="bf16")


def banks() -> dict[str, torch.Tensor]:
    """600 rows in orders and shapes that are hard on a list of candidates."""
    rows = torch.randn(600, 24)
    near = reference.distances(torch.ones(1, 24), rows, "euclidean")[0].argsort()
    return {
        "nearest_last": rows[near.flip(0)],  # every column is nearer than all before it
        "nearest_first": rows[near],
        "copies": rows[torch.arange(600) % 7],  # more that are equally near than a list has room for
        "one_crowd": 1 + 1e-3 * rows,  # products cannot tell them apart
        "one_crowd_among_others": torch.cat([rows[:500], 1 + 1e-3 * rows[500:]]),
        "far_from_the_origin": 1000 + rows,
        "lengths_of_all_sizes": rows * torch.logspace(-4, 4, 600)[:, None],
        "zero": 0 * rows,
    }


@pytest.mark.parametrize("bank", banks())
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("metric", METRICS)
def test_banks_that_are_hard_on_lists(bank, metric, precision, isa):
    rows = banks()[bank]
    queries = torch.cat([torch.ones(1, 24), rows[::150]])
    check(queries, rows, 5, metric, precision=precision, rtol=1e-3 if metric == "cosine" else 1e-5)  # 1 - cos of float rows far off


def test_few_columns_admitted(isa):
    query, bank = torch.randn(30, 8), torch.randn(500, 8)
    bank[7:300:3] = bank[4]  # duplicates of the query's own row stay
    labels, bank_labels = torch.randint(4, (30,)), torch.randint(300, (500,))
    own = torch.randint(500, (30,))
    own[0], query[0] = 4, bank[4]
    admitted = (labels[:, None] == bank_labels) & (torch.arange(500) != own[:, None])
    check(
        query,
        bank,
        9,
        "sqeuclidean",
        admitted,
        precision="bf16",
        query_labels=labels,
        bank_labels=bank_labels,
        same_class="only",
        own_index=own,
    )
    distance, index = check(query, bank, 9, "euclidean", torch.arange(500) != own[:, None], precision="bf16", own_index=own)
    assert (distance[0] == 0).all() and index[0].equal(torch.arange(7, 34, 3))


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_not_finite_comes_last(metric, isa):
    query, bank = torch.randn(6, 20), torch.randn(300, 20)
    bank[::7, 3], bank[::11, 5] = torch.nan, torch.inf
    query[2], query[4, 0] = torch.nan, torch.inf
    wanted = bank.isfinite().all(1).sum()
    distance, index = knn(query, bank, int(wanted) + 5, metric=metric, precision="bf16", impl="cpu")
    kept = torch.tensor([0, 1, 3, 5])
    assert distance[kept, :wanted].isfinite().all() and not distance[kept, wanted:].isfinite().any()
    expected, _ = reference.knn(query[kept], bank[bank.isfinite().all(1)], int(wanted), metric)
    torch.testing.assert_close(distance[kept, :wanted].double(), expected, rtol=1e-5, atol=1e-6)
    assert distance[2].isnan().all() and (index >= 0).all()


def test_most_queries_are_searched_once(isa, monkeypatch):
    """Of random unit rows few candidates lie within the rounding of bf16 products of the k-th."""
    query, bank = torch.randn(200, 64), torch.randn(3000, 64)
    slabs = []
    whole = cpu._slab
    monkeypatch.setattr(cpu, "_slab", lambda p, *args: slabs.append(len(p.query)) or whole(p, *args))
    check(query, bank, 5, precision="bf16")
    assert slabs[0] == 200 and sum(slabs[1:]) < 10


def test_the_same_bits_for_any_number_of_threads(isa):
    query, bank = torch.randn(333, 48), torch.randn(700, 48)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(knn(query, bank, 5, metric="euclidean", precision="bf16", impl="cpu"))
    finally:
        torch.set_num_threads(before)
    for distance, index in found[1:]:
        assert distance.equal(found[0][0]) and index.equal(found[0][1])
