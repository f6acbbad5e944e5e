"""Set minings that mine on one tensor and take the loss in others, on the CPU kernels, against the portable formula in float64."""

import itertools
import math

import pytest
import torch
from triplet_dense_cases import case, check, check_repeats, loss_of

from kdfast._core import extension
from kdfast._ops.triplet import cpu, distances
from kdfast.functional import triplet_loss

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))
MININGS = ("semi_hard", "multi_similarity")
OPS = torch.ops.kdfast


def layered(n, m, widths, classes, *, on=6, **more) -> dict:
    """Layers of these widths, or one tensor of one width, mined on rows of `on` elements; of small integers."""
    a = case(n, m, on, classes, **more)
    a["sample_on"] = a["x"] if m is None else (a["x"], a["ref"])
    for name, count in (("x", n), ("ref", m)):
        if name in a:
            rows = [torch.randint(-2, 3, (count, width)).float() for width in widths]
            a[name] = rows if len(rows) > 1 else rows[0]
    return a


@pytest.mark.parametrize("name", MININGS)
@pytest.mark.parametrize("direction", ["cluster", "confuse"])
@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_every_mining(isa, name, direction, bank):
    for widths, metric in (((9,), "euclidean"), ((9, 5, 12), "sqeuclidean")):
        a = layered(60, 110 if bank else None, widths, 9, metric=metric, valid=20)
        for soft, swap, reduction in (
            (False, False, "none"),
            (True, False, "mean_nonzero"),
            (False, True, "mean_nonzero"),
            (True, True, "sum"),
        ):
            check(a, soft=soft, swap=swap, mining=name, margin=1.3, epsilon=0.7, direction=direction, reduction=reduction)


@pytest.mark.parametrize("name", MININGS)
def test_unit_rows(isa, name):
    a = layered(40, 70, (21, 8), 5)
    a |= {"x": [torch.randn(40, 21), torch.randn(40, 8)], "ref": [torch.randn(70, 21), torch.randn(70, 8)]}
    a["sample_on"] = torch.randn(40, 6), torch.randn(70, 6)
    for metric, reduction in itertools.product(distances.METRICS, ("mean", "mean_nonzero")):
        check(a | {"metric": metric}, mining=name, margin=0.2, normalize=True, reduction=reduction)


# a lone row; beside a panel and a chunk of rows; several blocks of columns
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 15, 2), (17, 65, 3), (65, 63, 65), (257, 300, 130), (40, 600, 33)], ids=lambda s: "x".join(map(str, s))
)
def test_ragged_sizes(isa, shape):
    n, m, width = shape
    for a in (layered(n, m, (width,), 7), layered(n, None, (3, width), 7)):
        check(a, mining="semi_hard", margin=1.3, reduction="sum")


@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
@pytest.mark.parametrize("sizes", [(40, 36, 50), (1, 1, 60, 1, 2, 20), (3, 4, 5, 6, 7), (60,)], ids=["large", "mixed", "small", "alone"])
def test_classes_of_any_size(sizes, bank):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes))]
    a = layered(labels.numel(), labels.numel() // 2 + 1 if bank else None, (4, 7), len(sizes) + 2)
    a["labels"] = labels
    for name, swap in itertools.product(MININGS, (False, True)):
        for how in ({"reduction": "sum"}, {"max_positives": 30, "reduction": "none", "direction": "confuse"}):
            check(a, swap=swap, mining=name, margin=1.0, epsilon=0.7, **how)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_long_rows_keep_the_digits_of_their_hinges(metric):
    """Distances of thousands that differ by a little: the margin is added to their difference."""
    for soft in (False, True):
        a = layered(50, 60, (9,), 6, metric=metric)
        a |= {"x": 30 + a["x"] / 8, "ref": a["ref"] / 8 - 30}
        check(a, soft=soft, mining="semi_hard", margin=1.5, reduction="none")


@pytest.mark.parametrize("name", MININGS)
def test_nan_reaches_the_loss_of_its_anchors_only(isa, name):
    for rows, at, swap in itertools.product(("x", "ref", "on", "on_ref"), (4, 11), (False, True)):
        a = layered(40, 70, (9,), 10)
        a |= {"x": a["x"].clone(), "ref": a["ref"].clone(), "sample_on": tuple(t.clone() for t in a["sample_on"])}
        {"x": a["x"], "ref": a["ref"], "on": a["sample_on"][0], "on_ref": a["sample_on"][1]}[rows][at, 2] = math.nan
        how = dict(swap=swap, mining=name, margin=1.3, reduction="none")
        got, want = loss_of(a, "cpu", **how)[0], loss_of(a, "torch", torch.float64, **how)[0]
        assert torch.equal(got.isnan(), want.isnan())
        torch.testing.assert_close(got.double(), want, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0]], ids=["no_negative", "no_positive", "one"])
def test_no_triplet_is_zero_with_a_graph(labels):
    n = len(labels)
    a = {"x": [torch.randn(n, 3), torch.randn(n, 2)], "labels": torch.tensor(labels), "sample_on": torch.randn(n, 4)}
    for name, soft, swap in itertools.product(MININGS, (False, True), (False, True)):
        assert all((t == 0).all() for t in loss_of(a, "cpu", swap=swap, soft=soft, mining=name))


@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
@pytest.mark.parametrize("swap", [False, True], ids=["plain", "swapped"])
def test_second_derivative_is_that_of_the_portable_formula(bank, swap):
    a = layered(12, 20 if bank else None, (5, 3), 3)

    def twice(impl):
        leaves = [t.clone().requires_grad_() for t in (*a["x"], *(a["ref"] if bank else ()))]
        given = dict(ref=leaves[2:], ref_labels=a["ref_labels"], own_index=a["own_index"]) if bank else {}
        how = dict(sample_on=a["sample_on"], swap=swap, soft=True, mining="semi_hard", normalize=False, margin=1.3)
        loss = triplet_loss(leaves[:2], a["labels"], **given, **how, impl=impl)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return *first, *torch.autograd.grad(sum(t.square().sum() for t in first), leaves)

    for got, want in zip(twice("cpu"), twice("torch"), strict=True):
        torch.testing.assert_close(got, want)


def test_only_some_tensors_need_gradients():
    a = layered(30, 50, (6, 4), 8)
    for wanted in (a["ref"][1], a["x"][0]):
        wanted.requires_grad_()
        given = {name: a[name] for name in ("ref", "ref_labels", "own_index", "sample_on")}
        got, want = (
            triplet_loss(a["x"], a["labels"], **given, mining="semi_hard", margin=1.3, normalize=False, impl=i) for i in ("cpu", "torch")
        )
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(loss, wanted)[0] for loss in (got, want)))
        wanted.requires_grad_(False)


def test_what_is_mined_on_has_no_gradient_and_may_be_a_layer():
    x, y, labels = torch.randn(30, 5, requires_grad=True), torch.randn(30, 4, requires_grad=True), torch.arange(30) % 7
    got, want = (triplet_loss([x, y], labels, sample_on=y, mining="semi_hard", impl=impl) for impl in ("cpu", "torch"))
    for g, w in zip(torch.autograd.grad(got, (x, y)), torch.autograd.grad(want, (x, y)), strict=True):
        torch.testing.assert_close(g, w)
    assert torch.autograd.grad(triplet_loss(x, labels, sample_on=y, mining="semi_hard"), y, allow_unused=True)[0] is None


@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_threads_agree_and_repeat(threads, bank):
    for swap in (False, True):
        check_repeats(layered(150, 170 if bank else None, (64, 20), 40, on=32), swap=swap, mining="semi_hard", margin=1.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_rows_are_computed_as_floats(dtype):
    a = layered(60, 80, (9,), 8)
    got, want = (loss_of(a, "cpu", *of, mining="semi_hard", margin=1.3) for of in ((dtype,), ()))
    assert torch.equal(got[0], want[0])
    for g, w in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(g, w.to(dtype))


def test_graphs_may_be_kept_and_upstream_gradients_expanded():
    x, on, labels = torch.randn(40, 6, requires_grad=True), torch.randn(40, 3), torch.arange(40) % 9
    loss = triplet_loss(x, labels, sample_on=on, mining="semi_hard", reduction="none", impl="cpu")
    kept = [torch.autograd.grad(loss, x, torch.ones(()).expand(40), retain_graph=True)[0] for _ in range(2)]
    assert kept[0].equal(kept[1])
    each = [torch.autograd.grad(loss, x, g, retain_graph=True)[0] for g in torch.eye(40)]
    torch.testing.assert_close(kept[0], torch.stack(each).sum(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("swap", [False, True], ids=["plain", "swapped"])
def test_compiles_whole(swap):
    layers, labels = [torch.randint(-2, 3, (30, d)).float().requires_grad_() for d in (4, 6)], torch.arange(30) % 7
    on = torch.randint(-2, 3, (30, 5)).float()

    def loss(x, y):
        how = dict(sample_on=on, mining="semi_hard", swap=swap, normalize=False, impl="cpu", margin=1.3)
        return triplet_loss([x, y], labels, **how)

    torch._dynamo.reset()
    want = torch.autograd.grad(loss(*layers), layers)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*layers), layers)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def arguments(n=12, m=20) -> tuple:
    """Layers, references, what is mined on, and what is known of their classes: two, the references in order."""
    first, last = torch.tensor([0, m // 2]).repeat_interleave(n // 2), torch.tensor([m // 2, m]).repeat_interleave(n // 2)
    rows = [torch.randn(n, 5), torch.randn(n, 3)], [torch.randn(m, 5), torch.randn(m, 3)], torch.randn(n, 4), torch.randn(m, 4)
    return *rows, first, last, torch.full((n,), -1), torch.tensor(m)


def test_opcheck():
    x, y, on, on_ref, *runs = arguments()
    batch = (x, [], on, None, *(t // 2 for t in runs[:2]), torch.arange(12), torch.tensor(10))
    alone = (x[:1], y[:1], None, None, *runs)
    for a, want in (((x, y, on, on_ref, *runs), (True, True)), (batch, (True, False)), (alone, (False, True))):
        rule = (0, 20, 1, 1.0, 0.5, 0.1, False, True)
        torch.library.opcheck(OPS.every_triplet.default, (*a, *rule, *want))
        _, _, nearest, *kept = OPS.every_triplet(*a, *rule, *want)
        half = len(kept) // 2
        torch.library.opcheck(OPS.every_triplet_grad.default, (torch.rand(12, 1), nearest, kept[:half], kept[half:], *a, *rule, *want))


def test_bad_arguments():
    x, y, on, on_ref, *runs = arguments()
    rule = (0, 20, 1, 1.0, 0.5, 0.1, False, False, False, False)
    for change, message in (
        (([], [], on, None), "1 to 16 layers"),
        ((x, y[:1], on, on_ref), "as many references as layers"),
        ((x, y, on, None), "mine_ref must be given"),
        ((x, y, on[:11], on_ref), "expected 11"),
        (([x[0].double(), x[1]], y, on, on_ref), "dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.every_triplet(*change, *runs, *rule)
    many = [torch.randn(9, 2) for _ in range(cpu.MOST_LAYERS + 1)]
    how = dict(sample_on=many[0], mining="semi_hard")
    with pytest.raises(ValueError, match="at most 16 layers, not 17"):
        triplet_loss(many, torch.arange(9) % 3, **how, impl="cpu")
    assert triplet_loss(many, torch.arange(9) % 3, **how).isfinite()
