"""The C++ kernels of losses over all negatives against the portable formula in float64, under every instruction set of this machine."""

import itertools
import math

import pytest
import torch
from triplet_dense_cases import case, check, check_compiles, check_repeats, check_second_derivative, loss_of

from kdfast._core import extension
from kdfast._ops.triplet import classes, dense, distances, mining
from kdfast.functional import contrastive_loss, margin_loss, multi_similarity_loss, triplet_loss

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))
OPS = torch.ops.kdfast
REDUCTIONS = ("mean_nonzero", "mean", "sum", "none")


@pytest.mark.parametrize("direction", ["cluster", "confuse"])
@pytest.mark.parametrize("name", mining.SETS)
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_every_mining(isa, name, metric, direction, bank):
    a = case(90, 150 if bank else None, 9, 12, metric=metric, valid=20)
    for reduction in ("none", "mean"):
        check(a, mining=name, margin=1.3, epsilon=0.7, direction=direction, reduction=reduction)


@pytest.mark.parametrize("name", mining.SETS)
def test_every_reduction(name):
    for reduction in REDUCTIONS:
        check(case(40, 60, 9, 8), mining=name, margin=1.3, epsilon=0.7, reduction=reduction)


@pytest.mark.parametrize("name", mining.SETS)
def test_cosine_and_unit_rows(isa, name):
    a = case(40, 70, 21, 5)
    a |= {"x": torch.randn(40, 21), "ref": torch.randn(70, 21)}
    for metric in distances.METRICS:
        check(a | {"metric": metric}, mining=name, margin=0.2, normalize=True)


# a lone row; beside a vector of lanes and a group of slots; beside a panel and a chunk of rows; several blocks of columns
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 15, 2), (17, 65, 3), (65, 63, 65), (257, 300, 130), (40, 600, 33)], ids=lambda s: "x".join(map(str, s))
)
def test_ragged_sizes(isa, shape):
    n, m, width = shape
    for a in (case(n, m, width, 7), case(n, None, width, 7)):
        check(a, mining="batch_all", margin=1.3, reduction="sum")


@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_large_classes(isa, bank):
    """More positives than are compared one by one."""
    for n, m, number, direction in ((70, 60, 4, "cluster"), (130, 100, 2, "confuse")):
        a = case(n, m if bank else None, 12, number)
        for name in mining.SETS:
            check(a, mining=name, margin=1.3, epsilon=0.7, direction=direction)


def test_classes_of_hundreds(isa):
    """Windows in trees deeper than registers hold, with many levels at a window's end."""
    a = case(500, None, 9, 2)
    for name in mining.SETS:
        check(a, mining=name, margin=1.0, epsilon=0.7)


@pytest.mark.parametrize("bound", [1, 5, 20])
def test_a_bound_on_positives(bound):
    a = case(120, None, 12, 4)
    for name in mining.SETS:
        check(a, mining=name, margin=1.3, epsilon=0.7, max_positives=bound)


# the first two in one block of columns; singletons and a class alone beside classes of hundreds; one class, which has no negative
@pytest.mark.parametrize(
    "sizes", [(70, 66, 80), (1, 1, 90, 1, 2, 70), (130, 1, 300, 1, 1, 90), (200,)], ids=["large", "mixed", "blocks", "alone"]
)
@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_classes_with_ties_and_duplicates(isa, sizes, bank):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes))]
    a = case(labels.numel(), labels.numel() // 2 if bank else None, 4, len(sizes) + 2)
    a["labels"] = labels
    a["x"][::7] = a["x"][0]
    if bank:
        a["ref"][::5] = a["x"][0]
        a["ref_labels"] = labels[: a["ref"].shape[0]]
    for name in mining.SETS:
        for how in ({"reduction": "sum"}, {"direction": "confuse"}, {"max_positives": 40, "reduction": "none"}):
            check(a, mining=name, margin=1.0, epsilon=0.7, **how)


@pytest.mark.parametrize("name", mining.SETS)
def test_rows_of_large_classes_weighed_apart(name):
    """Gradients made with the values serve one upstream gradient for all rows; where each has another they are made again."""
    a = case(90, 80, 7, 3)
    x, ref = a["x"].requires_grad_(), a["ref"].requires_grad_()
    more = {k: a[k] for k in ("ref", "ref_labels", "own_index")}
    rows = triplet_loss(x, a["labels"], **more, mining=name, margin=1.3, epsilon=0.7, normalize=False, reduction="none", impl="cpu")
    alike = torch.autograd.grad(rows, (x, ref), torch.full((90,), 2.0), retain_graph=True)
    each = [torch.autograd.grad(rows, (x, ref), g, retain_graph=True) for g in 2 * torch.eye(90)]
    for got, parts in zip(alike, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(parts).double().sum(0).float(), atol=4e-6 * got.abs().max().item(), rtol=0)
    (only,) = torch.autograd.grad(rows, ref, torch.full((90,), 2.0), retain_graph=True)
    assert torch.equal(only, alike[1])
    assert torch.autograd.grad(rows, x, torch.full((90,), math.nan))[0].isnan().any()


def test_large_classes_in_parts(threads):
    """Rows in several tasks, whose sums of columns meet."""
    a = case(900, None, 6, 2)
    check(a, mining="batch_all", margin=0.3)
    assert all(torch.equal(x, y) for x, y in zip(*(loss_of(a, "cpu", mining="batch_all") for _ in range(2)), strict=True))


def test_tiles_without_an_active_triplet_are_skipped(isa):
    n = 800
    x = 100 * torch.randint(-2, 3, (4, 8)).float().repeat_interleave(n // 4, 0) + torch.randint(-2, 3, (n, 8))
    a = {"x": x, "labels": torch.arange(n) // 5, "metric": "euclidean"}
    check(a, mining="batch_all", margin=1.3, reduction="sum")
    order = dense.by_label(*_related(a["labels"]), True)
    tiles = OPS.triplet_hinges(x, None, order.first, order.last, order.own, order.exist, 0, 4, 0, 1.0, 1.3, 0.0, False, False, False)[3]
    assert 0 < tiles.float().mean() < 0.8


def _related(labels):
    return classes.relate(labels, labels, torch.arange(labels.numel()))


@pytest.mark.parametrize("name", mining.SETS)
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0]], ids=["no_negative", "no_positive", "one"])
def test_no_triplet_is_zero_with_a_graph(name, labels):
    a = {"x": torch.randn(len(labels), 3), "labels": torch.tensor(labels), "metric": "euclidean"}
    for reduction in REDUCTIONS:
        assert all((t == 0).all() for t in loss_of(a, "cpu", mining=name, reduction=reduction))


@pytest.mark.parametrize("name", mining.SETS)
def test_nan_reaches_the_loss_of_its_anchors_only(isa, name):
    for (rows, at), number, direction in itertools.product((("x", 4), ("ref", 11)), (8, 3), ("cluster", "confuse")):
        a = case(40, 70, 9, number)
        poisoned = a | {rows: a[rows].clone()}
        poisoned[rows][at, 2] = math.nan
        how = dict(mining=name, margin=1.3, direction=direction, reduction="none")
        got, want = loss_of(poisoned, "cpu", **how)[0], loss_of(poisoned, "torch", torch.float64, **how)[0]
        assert torch.equal(got.isnan(), want.isnan())
        torch.testing.assert_close(got.double(), want, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_second_derivative_is_that_of_the_portable_formula(bank):
    check_second_derivative(bank, mining="batch_all")


@pytest.mark.parametrize(("rows", "classes_of"), [(24, 6), (60, 2)])
@pytest.mark.parametrize("loss", [
    lambda x, labels, **ref: triplet_loss(x, labels, mining="batch_hard", normalize=False, **ref),
    lambda x, labels, **ref: triplet_loss(x, labels, mining="batch_all", normalize=False, **ref),
    lambda x, labels, **ref: triplet_loss(x, labels, mining="multi_similarity", normalize=False, **ref),
    lambda x, labels, **ref: margin_loss(x, labels, normalize=False, **ref),
    lambda x, labels, **ref: contrastive_loss(x, labels, normalize=False, **ref),
    lambda x, labels, **ref: multi_similarity_loss(x, labels, normalize=False, **ref),
])  # fmt: skip
@pytest.mark.parametrize("shift", [0, 1])
def test_the_embeddings_as_their_own_bank(rows, classes_of, loss, shift):
    """The same tensor, under labels that may be others: not the batch, whose pairs' classes are mutual."""
    x, labels = torch.randn(rows, 8, requires_grad=True), torch.arange(rows) % classes_of
    bank_labels = (labels + shift) % classes_of
    value = loss(x, labels, ref=x, ref_labels=bank_labels)
    expected = loss(x, labels, ref=x.clone(), ref_labels=bank_labels, impl="torch")
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(expected, x), rtol=1e-4, atol=1e-6)


def test_only_references_need_gradients():
    a = case(30, 50, 6, 4)
    ref = a["ref"].requires_grad_()
    loss = triplet_loss(a["x"], a["labels"], ref=ref, ref_labels=a["ref_labels"], mining="batch_all", normalize=False, impl="cpu")
    (got,) = torch.autograd.grad(loss, ref)
    loss = triplet_loss(a["x"], a["labels"], ref=ref, ref_labels=a["ref_labels"], mining="batch_all", normalize=False, impl="torch")
    torch.testing.assert_close(got, torch.autograd.grad(loss, ref)[0])


@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_threads_agree_and_repeat(threads, bank):
    a = case(500, 700 if bank else None, 40, 60)
    check_repeats(a, mining="batch_all", margin=1.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_rows_are_computed_as_floats(dtype):
    a = case(60, 80, 9, 8)
    got, want = loss_of(a, "cpu", dtype, mining="semi_hard", margin=1.3), loss_of(a, "cpu", mining="semi_hard", margin=1.3)
    assert torch.equal(got[0], want[0])
    for g, w in zip(got[1:], want[1:], strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g, w.to(dtype))


def test_layouts_and_a_graph_kept():
    a = case(33, None, 12, 4)
    x = a["x"].t().contiguous().t().requires_grad_()
    loss = triplet_loss(x, a["labels"], mining="batch_all", reduction="none", impl="cpu")
    first, again = (torch.autograd.grad(loss, x, torch.ones(()).expand(33), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    expanded = torch.randn(1, 6).expand(9, 6)
    assert triplet_loss(expanded, torch.arange(9) % 2, mining="batch_all", margin=0.5, impl="cpu") == 0.5


@pytest.mark.parametrize("name", mining.SETS)
def test_compiles_whole(name):
    check_compiles(mining=name)


def test_functional_transforms_take_the_portable_path():
    x, labels = torch.randn(9, 4), torch.arange(9) % 3
    assert torch.func.grad(lambda x: triplet_loss(x, labels, mining="batch_all"))(x).isfinite().all()
    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.grad(lambda x: triplet_loss(x, labels, mining="batch_all", impl="cpu"))(x)


def arguments(n=12, m=20, width=5) -> tuple:
    """x, y and what is known of their classes: two classes, the references in order."""
    first, last = torch.tensor([0, m // 2]).repeat_interleave(n // 2), torch.tensor([m // 2, m]).repeat_interleave(n // 2)
    return torch.randn(n, width), torch.randn(m, width), first, last, torch.full((n,), -1), torch.tensor(m)


def test_opcheck():
    x, y, *runs = arguments()
    own = torch.arange(12)
    wants = [(True, False), (True, True), (False, True), (False, False)]
    batch = (x, None, *(t // 2 for t in runs[:2]), own, torch.tensor(10))
    for a, soft in itertools.product(((x, y, *runs), batch), (False, True)):
        rule = (0, 20, 0, 1.0, 0.5, 0.1, soft)
        for want in wants[::3] if a[1] is None else wants[1:2] if soft else wants:
            torch.library.opcheck(OPS.triplet_hinges.default, (*a, *rule, *want))
            *_, nearest, tiles, dx, dy = OPS.triplet_hinges(*a, *rule, *want)
            if any(want):
                torch.library.opcheck(OPS.triplet_hinges_grad.default, (torch.rand(12, 1), nearest, tiles, dx, dy, *a, *rule, *want))


def test_bad_arguments():
    x, y, first, last, own, exist = arguments()
    rule = (0, 20, 0, 1.0, 0.5, 0.1, False)
    for change, message in (
        ((x.double(), y, first, last, own, exist), "x has dtype"),
        ((x, y[:, :4].contiguous(), first, last, own, exist), "y has size"),
        ((x, y, first, last + 1, own, exist), "out of range"),
        ((x, y, first, last, own + 30, exist), "out of range"),
        ((x, y, first, last, own, exist + 1), "columns must be in"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.triplet_hinges(*change, *rule, False, False)
    *_, nearest, tiles, _, dy = OPS.triplet_hinges(x, y, first, last, own, exist, *rule, True, True)
    g = torch.rand(12, 1)
    for made, message in (
        ((torch.zeros(11, 5), torch.zeros(20, 5)), "dx has size 11"),
        ((torch.zeros(12, 5), torch.zeros(20, 4)), "dy has size 4"),
        ((torch.zeros(12, 5).double(), dy), "dx has dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.triplet_hinges_grad(g, nearest, tiles, *made, x, y, first, last, own, exist, *rule, True, True)
    with pytest.raises(RuntimeError, match="mining must be"):
        OPS.triplet_hinges(x, y, first, last, own, exist, 0, 20, 3, 1.0, 0.5, 0.1, False, False, False)
