"""impl="cpu": the nearest negatives of a batch from half its pairs, which have the bits of those from all of them."""

import pytest
import torch

from kdfast._core import extension
from kdfast._ops.triplet import cpu, inputs

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))
_FLOAT_PRODUCTS = 0


def extremes(x, labels, metric, *, halved, precision=_FLOAT_PRODUCTS):
    """Farthest positive, nearest positive and nearest negative of each row [3, N], and where a distance is NaN [N].

    References that lie elsewhere are not known to be the batch: their pairs are all scored.
    """
    b = inputs.collect(x, labels, metric=metric, normalize=False, ready=False)
    scan = cpu._scan(x, x if halved else x.clone(), b.anchors, b.classes, metric, False)
    index, unordered = torch.ops.kdfast.triplet_extrema(*scan, 0, False, precision)
    return index[:3], unordered


def same(x, labels, metric="euclidean", precision=_FLOAT_PRODUCTS):
    expected = extremes(x, labels, metric, halved=False)
    found = extremes(x, labels, metric, halved=True, precision=precision)
    assert found[0].equal(expected[0]) and found[1].equal(expected[1])


# N, D, K rows a class: ragged blocks; more rows than are packed at a time, of width 700; classes beyond a block; one class; classes of one
@pytest.mark.parametrize("sizes", [(513, 20, 4), (1000, 700, 7), (777, 33, 300), (600, 5, 600), (640, 48, 1)], ids=str)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_half_the_pairs_find_the_same(sizes, metric, isa):
    n, d, size = sizes
    same(torch.randn(n, d), torch.randperm(n) // size, metric)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_rows(dtype, isa):
    same(torch.randn(520, 24).to(dtype), torch.arange(520) % 100)


def test_ties_go_to_the_lower_index(isa):
    rows = torch.randint(-1, 2, (40, 3)).float()  # distances exact and most of them shared
    same(rows[torch.randint(40, (900,))], torch.arange(900) % 300)
    same(torch.zeros(530, 4), torch.arange(530) % 9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e19, 3e38], ids=str)
def test_rows_that_are_not_finite_or_far_too_long(bad, isa):
    x, labels = torch.randn(520, 12), torch.arange(520) % 50
    x[17, 3] = x[300, 3] = bad
    same(x, labels)


def test_the_same_bits_for_any_number_of_threads(isa):
    x, labels = torch.randn(1100, 40), torch.arange(1100) // 4
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(extremes(x, labels, "euclidean", halved=True))
    finally:
        torch.set_num_threads(before)
    assert all(index.equal(found[0][0]) and unordered.equal(found[0][1]) for index, unordered in found[1:])


def test_rows_of_a_batch_that_are_not_contiguous(isa):
    x, labels = torch.randn(30, 520).T, torch.arange(520) % 40
    assert extremes(x, labels, "euclidean", halved=True)[0].equal(extremes(x.contiguous(), labels, "euclidean", halved=False)[0])


def test_a_permission_for_bf16_changes_nothing(isa):
    """The tiles of AMX use it and score every pair; elsewhere half of them are scored in floats."""
    x, labels = torch.randn(700, 16), torch.arange(700) // 5
    same(x, labels, precision=2)
