"""Softplus of every triplet of the set minings on the CPU kernels, against the portable formula in float64."""

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
    for metric in ("euclidean", "sqeuclidean"):
        a = case(90, 150 if bank else None, 9, 12, metric=metric, valid=20)
        for reduction in ("none", "mean_nonzero"):
            check(a, soft=True, mining=name, margin=1.3, epsilon=0.7, direction=direction, reduction=reduction)


@pytest.mark.parametrize("name", mining.SETS)
def test_unit_rows(isa, name):
    a = case(40, 70, 21, 5)
    a |= {"x": torch.randn(40, 21), "ref": torch.randn(70, 21)}
    for metric in distances.METRICS:
        for reduction in ("mean", "sum"):
            check(a | {"metric": metric}, soft=True, mining=name, margin=0.2, normalize=True, reduction=reduction)


# a lone row; beside a vector of lanes and a group of slots; beside a panel and a chunk of rows; several blocks of columns
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 15, 2), (17, 65, 3), (65, 63, 65), (257, 300, 130), (40, 600, 33)], ids=lambda s: "x".join(map(str, s))
)
def test_ragged_sizes(isa, shape):
    n, m, width = shape
    for a in (case(n, m, width, 7), case(n, None, width, 7)):
        check(a, soft=True, mining="batch_all", margin=1.3, reduction="sum")


@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
@pytest.mark.parametrize("sizes", [(70, 66, 80), (1, 1, 90, 1, 2, 70), (3, 4, 5, 6, 7), (60,)], ids=["large", "mixed", "small", "alone"])
def test_classes_of_any_size(isa, sizes, bank):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes))]
    a = case(labels.numel(), labels.numel() // 2 + 1 if bank else None, 4, len(sizes) + 2)
    a["labels"] = labels
    for name in mining.SETS:
        for how in ({"reduction": "sum"}, {"max_positives": 40, "reduction": "none", "direction": "confuse"}):
            check(a, soft=True, mining=name, margin=1.0, epsilon=0.7, **how)


@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0, 1e4, 1e12])
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_hinges_of_any_reach(isa, scale, metric):
    """Products of exponentials where they are floats, else a softplus a triplet."""
    a = case(50, 60, 9, 6, metric=metric)
    a |= {"x": scale * a["x"], "ref": scale * a["ref"]}
    for direction in ("cluster", "confuse"):
        check(a, soft=True, mining="batch_all", margin=0.5, direction=direction, reduction="none")


def test_small_losses_keep_their_digits(isa):
    """All hinges about -15: 1 + q would leave nothing of q."""
    labels = torch.arange(24) // 3
    x = torch.eye(8).repeat_interleave(3, 0) * 11 + torch.randint(-1, 2, (24, 8)) / 4
    a = {"x": x, "labels": labels, "metric": "euclidean"}
    of = (("cpu",), ("torch", torch.float64))
    got, want = (loss_of(a, *how, soft=True, mining="batch_all", margin=0.5) for how in of)
    assert 0 < want[0] < 1e-5
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("rows", [[0, 512, -512], [0, 512, -512, 712]], ids=["products", "one by one"])
def test_a_margin_less_than_distances_are_rounded_by_counts(isa, rows):
    """d_ap = d_an, exactly: 512 + margin is 512 as a float."""
    x, labels = torch.tensor(rows, dtype=torch.float32)[:, None], torch.tensor([0, 0, 1, 1][: len(rows)])
    how = dict(soft=True, mining="batch_all", margin=1e-5, normalize=False, reduction="none", impl="cpu")
    assert triplet_loss(x, labels, **how)[0].item() == pytest.approx(math.log1p(math.exp(1e-5)), rel=1e-6)


@pytest.mark.parametrize("name", mining.SETS)
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0]], ids=["no_negative", "no_positive", "one"])
def test_no_triplet_is_zero_with_a_graph(name, labels):
    a = {"x": torch.randn(len(labels), 3), "labels": torch.tensor(labels), "metric": "euclidean"}
    for reduction in ("mean_nonzero", "none"):
        assert all((t == 0).all() for t in loss_of(a, "cpu", soft=True, mining=name, reduction=reduction))


@pytest.mark.parametrize("name", mining.SETS)
def test_nan_reaches_the_loss_of_its_anchors_only(isa, name):
    for rows, at in (("x", 4), ("ref", 11)):
        for number in (8, 3):
            a = case(40, 70, 9, number)
            poisoned = a | {rows: a[rows].clone()}
            poisoned[rows][at, 2] = math.nan
            how = dict(soft=True, mining=name, margin=1.3, reduction="none")
            got, want = loss_of(poisoned, "cpu", **how)[0], loss_of(poisoned, "torch", torch.float64, **how)[0]
            assert torch.equal(got.isnan(), want.isnan())
            torch.testing.assert_close(got.double(), want, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", mining.SETS)
@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_second_derivative_is_that_of_the_portable_formula(name, bank):
    check_second_derivative(bank, soft=True, mining=name)


def test_rows_weighed_apart():
    """Gradients made with the values serve one upstream gradient for all rows; where each has another they are made again."""
    a = case(60, 50, 7, 9)
    x, ref = a["x"].requires_grad_(), a["ref"].requires_grad_()
    more = {k: a[k] for k in ("ref", "ref_labels", "own_index")}
    rows = triplet_loss(x, a["labels"], **more, soft=True, mining="batch_all", margin=1.3, normalize=False, reduction="none", impl="cpu")
    alike = torch.autograd.grad(rows, (x, ref), torch.ones(()).expand(60), retain_graph=True)
    again = torch.autograd.grad(rows, (x, ref), torch.ones(()).expand(60), retain_graph=True)
    each = [torch.autograd.grad(rows, (x, ref), g, retain_graph=True) for g in torch.eye(60)]
    for got, same, parts in zip(alike, again, zip(*each, strict=True), strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got, torch.stack(parts).double().sum(0).float(), atol=4e-6 * got.abs().max().item(), rtol=0)


@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_threads_agree_and_repeat(threads, bank):
    a = case(300, 400 if bank else None, 64, 60)
    check_repeats(a, soft=True, mining="batch_all", margin=1.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_rows_are_computed_as_floats(dtype):
    a = case(60, 80, 9, 8)
    got, want = (loss_of(a, "cpu", *of, soft=True, mining="batch_all", margin=1.3) for of in ((dtype,), ()))
    assert torch.equal(got[0], want[0])
    for g, w in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(g, w.to(dtype))


@pytest.mark.parametrize("name", mining.SETS)
def test_compiles_whole(name):
    check_compiles(soft=True, mining=name)


def test_functional_transforms_take_the_portable_path():
    x, labels = torch.randn(9, 4), torch.arange(9) % 3
    assert torch.func.grad(lambda x: triplet_loss(x, labels, soft=True, mining="batch_all"))(x).isfinite().all()
