"""Triplets with swapped anchors and positives of the set minings on the CPU kernels, against the portable formula in float64."""

import itertools
import math

import pytest
import torch
from triplet_dense_cases import case, check, check_compiles, check_repeats, check_second_derivative, loss_of

from kdfast._core import extension
from kdfast._ops.triplet import distances, mining
from kdfast.functional import triplet_loss

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))


@pytest.mark.parametrize("name", mining.SETS)
@pytest.mark.parametrize("direction", ["cluster", "confuse"])
@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_every_mining(isa, name, direction, bank):
    for metric, soft in itertools.product(("euclidean", "sqeuclidean"), (False, True)):
        a = case(90, 150 if bank else None, 9, 20, metric=metric, valid=20)
        for reduction in ("none", "mean_nonzero"):
            check(a, swap=True, soft=soft, mining=name, margin=1.3, epsilon=0.7, direction=direction, reduction=reduction)


@pytest.mark.parametrize("name", mining.SETS)
def test_unit_rows(isa, name):
    a = case(40, 60, 21, 6)
    a |= {"x": torch.randn(40, 21), "ref": torch.randn(60, 21), "ref_labels": torch.arange(60) % 7}
    for metric in distances.METRICS:
        for reduction in ("mean", "sum"):
            check(a | {"metric": metric}, swap=True, soft=True, mining=name, margin=0.2, normalize=True, reduction=reduction)


# a lone row; beside a panel and a chunk of rows; several blocks of columns
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 15, 2), (17, 65, 3), (65, 63, 65), (257, 300, 130), (40, 600, 33)], ids=lambda s: "x".join(map(str, s))
)
def test_ragged_sizes(isa, shape):
    n, m, width = shape
    for a in (case(n, m, width, m // 5 + 1), case(n, None, width, n // 5 + 1)):
        check(a, swap=True, mining="batch_all", margin=1.3, reduction="sum")


@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_classes_of_any_size(isa, bank):
    sizes = (17, 1, 16, 15, 2, 17, 1, 60)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes))]
    a = case(60 if bank else labels.numel(), labels.numel() if bank else None, 4, len(sizes) + 1)
    a |= {"ref_labels": labels} if bank else {"labels": labels}
    a["x"][::7] = a["x"][0]
    for name in mining.SETS:
        for how in ({"reduction": "sum"}, {"max_positives": 3, "reduction": "none", "direction": "confuse"}):
            check(a, swap=True, mining=name, margin=1.0, epsilon=0.7, **how)


@pytest.mark.parametrize("name", mining.SETS)
def test_nan_reaches_the_loss_of_its_anchors_only(isa, name):
    for rows, at in (("x", 4), ("ref", 11)):
        a = case(40, 70, 9, 10)
        poisoned = a | {rows: a[rows].clone()}
        poisoned[rows][at, 2] = math.nan
        how = dict(swap=True, mining=name, margin=1.3, reduction="none")
        got, want = loss_of(poisoned, "cpu", **how)[0], loss_of(poisoned, "torch", torch.float64, **how)[0]
        assert torch.equal(got.isnan(), want.isnan())
        torch.testing.assert_close(got.double(), want, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0]], ids=["no_negative", "no_positive", "one"])
def test_no_triplet_is_zero_with_a_graph(labels):
    a = {"x": torch.randn(len(labels), 3), "labels": torch.tensor(labels), "metric": "euclidean"}
    for name, soft in itertools.product(mining.SETS, (False, True)):
        assert all((t == 0).all() for t in loss_of(a, "cpu", swap=True, soft=soft, mining=name))


@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_second_derivative_is_that_of_the_portable_formula(bank):
    check_second_derivative(bank, swap=True, mining="batch_all")


def test_only_references_need_gradients():
    a = case(30, 50, 6, 8)
    ref = a["ref"].requires_grad_()
    more = dict(ref=ref, ref_labels=a["ref_labels"], swap=True, mining="batch_all", normalize=False)
    got, want = (torch.autograd.grad(triplet_loss(a["x"], a["labels"], **more, impl=impl), ref)[0] for impl in ("cpu", "torch"))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_threads_agree_and_repeat(threads, bank):
    a = case(300, 400 if bank else None, 64, 100)
    check_repeats(a, swap=True, mining="batch_all", margin=1.3)


@pytest.mark.parametrize("name", mining.SETS)
def test_compiles_whole(name):
    check_compiles(swap=True, mining=name)


def test_units_of_several_chunks(isa):
    a = case(300, None, 9, 1)
    a["labels"][:40] = 1
    check(a, swap=True, mining="batch_all", max_positives=2, margin=1.3)


def test_units_of_more_rows_than_are_packed_together():
    """Rows so wide that those of the one large class are more than a pass takes otherwise."""
    a = case(1100, None, 600, 1)
    a["labels"][-20:] = 1
    check(a, swap=True, mining="batch_all", max_positives=2, margin=1.3)
