"""Weights of rows, sums and single losses: inside the ops of InfoNCE and of matching losses, and on the short way of plain calls."""

import itertools
from functools import partial

import pytest
import torch

from kdfast._core import impls
from kdfast._ops.similarity import cpu
from kdfast._ops.similarity.losses import plain_info_nce, plain_matching
from kdfast.functional import clip_loss, info_nce, nt_xent, siglip_loss

pytestmark = pytest.mark.skipif(cpu.missing() is not None or impls.DEFAULT is not None, reason="of the compiled kernels")

ROWS, KEYS, WIDTH = 9, 17, 6
LABELS, KEY_LABELS = torch.arange(ROWS) % 4, torch.arange(KEYS) % 5 - 1
TARGETS = torch.tensor([0, 16, 3, -1, 3, 7, 1, -1, 2])
CLASSES = {"query_labels": LABELS, "bank_labels": KEY_LABELS}
ALL_ALIKE = {"query_labels": torch.tensor([2, *[1] * (ROWS - 1)]), "bank_labels": torch.ones(KEYS, dtype=torch.int64)}
OWN = torch.tensor([3, -1, 0, 16, 5, 5, -1, 2, 8])


def with_bank(*names, **options):
    """A loss of the tensors called so, with the rest given."""
    return lambda x, **more: info_nce(x["query"], **{name: x[name] for name in names}, **options, **more)


def views(x, **more):
    more.pop("weight", None)
    return nt_xent(x["query"], x["positive"], temperature=0.5, **more)


# each with whether a call without `impl` goes the short way
FORMS = {
    "positive": (with_bank("positive", "bank", "temperature"), True),
    "targets": (with_bank("bank", "temperature", targets=TARGETS), True),
    "no target": (with_bank("bank", "temperature", targets=torch.full((ROWS,), -1)), True),
    "smoothed": (with_bank("positive", "bank", "temperature", label_smoothing=0.2), True),
    "classes left out": (with_bank("positive", "bank", "temperature", **CLASSES), True),
    "classes attract": (with_bank("bank", "temperature", **CLASSES, same_class="positive"), True),
    "classes attract beside": (with_bank("positive", "bank", "temperature", **CLASSES, same_class="positive"), True),
    "own row": (with_bank("positive", "bank", "temperature", own_index=OWN), True),
    "decoupled": (with_bank("positive", "bank", "temperature", include_positive=False, **ALL_ALIKE), True),
    "decoupled targets": (with_bank("bank", "temperature", include_positive=False, targets=TARGETS, **ALL_ALIKE), True),
    "decoupled attraction": (with_bank("bank", "temperature", include_positive=False, same_class="positive", **ALL_ALIKE), True),
    "margin": (with_bank("positive", "bank", "temperature", false_negative_margin=0.1), False),
    "in batch": (with_bank("positive", "temperature"), True),
    "in batch, smoothed": (with_bank("positive", "temperature", label_smoothing=0.2), True),
    "in batch, classes": (with_bank("positive", "temperature", query_labels=LABELS), True),
    "in batch, decoupled": (with_bank("positive", "temperature", query_labels=torch.arange(ROWS) // 8, include_positive=False), True),
    "in batch, alone": (with_bank("positive", "temperature", query_labels=torch.ones(ROWS).long(), include_positive=False), True),
    "in batch, classes attract": (with_bank("positive", "temperature", query_labels=LABELS, same_class="positive"), True),
    "clip": (lambda x, **more: clip_loss(x["query"], x["positive"], 1 / x["temperature"], **more), True),
    "clip, smoothed": (lambda x, **more: clip_loss(x["query"], x["positive"], 1 / x["temperature"], label_smoothing=0.2, **more), True),
    "siglip": (lambda x, **more: siglip_loss(x["query"], x["positive"], 1 / x["temperature"], x["temperature"], **more), True),
    "nt_xent": (views, False),
}
REDUCTIONS = [(r, w) for r, w in itertools.product(("mean", "sum", "none"), (None, "weights", "zeros"))]


@pytest.fixture
def taken(monkeypatch):
    """For each call that might be plain, whether it went the short way."""
    seen = []
    for module, name in ((plain_info_nce, "info_nce_loss"), (plain_matching, "matching_loss")):
        way = getattr(module, name)

        def watched(*args, way=way):
            loss = way(*args)
            seen.append(loss is not None)
            return loss

        monkeypatch.setattr(module, name, watched)
    return seen


def problem(dtype=torch.float32, learnt=("query", "positive", "bank", "temperature")):
    torch.manual_seed(0)
    made = {"query": torch.randn(ROWS, WIDTH), "positive": torch.randn(ROWS, WIDTH), "bank": torch.randn(KEYS, WIDTH)}
    made = {name: torch.nn.functional.normalize(x, dim=-1).to(dtype) for name, x in made.items()} | {"temperature": torch.tensor(0.3)}
    return {name: x.requires_grad_(name in learnt) for name, x in made.items()}


def weights(kind):
    if kind is None:
        return None
    return torch.linspace(0, 2, ROWS) if kind == "weights" else torch.zeros(ROWS)


def derivatives(loss, inputs):
    """The value, its gradients, and those of their squares' sum, for upstream gradients that rows do not share."""
    leaves = [x for x in inputs.values() if x.requires_grad]
    g = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    first = torch.autograd.grad(loss, leaves, g, create_graph=True, allow_unused=True)
    squares = sum(x.double().square().sum() for x in first if x is not None)
    second = torch.autograd.grad(squares, leaves, allow_unused=True)
    return [loss, *(torch.zeros_like(x) if d is None else d for d, x in zip((*first, *second), leaves * 2, strict=True))]


@pytest.mark.parametrize(("reduction", "kind"), REDUCTIONS, ids=lambda x: str(x))
@pytest.mark.parametrize("form", FORMS)
def test_every_form_agrees_with_its_definition(taken, form, reduction, kind):
    call, short = FORMS[form]
    inputs = problem()
    options = {"reduction": reduction, "weight": weights(kind)}
    found = derivatives(call(inputs, **options), inputs)
    assert taken in ([], [short])
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = derivatives(call(wide, **options), wide)
    for ours, true in zip(found, expected, strict=True):
        assert ours.shape == true.shape
        torch.testing.assert_close(ours.double(), true, rtol=2e-4, atol=2e-4 * max(1e-3, true.abs().max().item()))


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("learnt", [("query",), ("bank",), ("query", "positive", "bank")], ids=str)
@pytest.mark.parametrize("form", [name for name, (_, short) in FORMS.items() if short])
def test_the_short_way_has_the_bits_of_the_general_one(taken, form, learnt, dtype):
    call, _ = FORMS[form]
    for reduction, kind in REDUCTIONS:
        inputs = problem(dtype, learnt)
        leaves = [x for x in inputs.values() if x.requires_grad]
        results = []
        for impl in (None, "cpu"):
            loss = call(inputs, impl=impl, reduction=reduction, weight=weights(kind))
            grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True) if loss.requires_grad else ()
            results.append((loss, *(x for x in grads if x is not None)))
        for x, y in zip(*results, strict=True):
            assert torch.equal(x, y)
    assert taken == [True] * len(REDUCTIONS)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", ["positive", "targets", "smoothed", "classes attract"])
def test_a_temperature_of_each_row(taken, form, reduction):
    call, _ = FORMS[form]
    inputs = problem() | {"temperature": torch.linspace(0.2, 0.5, ROWS).requires_grad_()}
    found = derivatives(call(inputs, reduction=reduction), inputs)
    assert taken == [True]
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    for ours, true in zip(found, derivatives(call(wide, reduction=reduction), wide), strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=2e-4, atol=2e-4 * true.abs().max().item())


@pytest.mark.parametrize("labelled", [False, True])
def test_the_first_rows_of_a_bank(taken, labelled):
    inputs = problem(learnt=("query", "positive"))
    classes = {"query_labels": LABELS, "bank_labels": KEY_LABELS} if labelled else {}
    call = partial(info_nce, inputs["query"], inputs["positive"], inputs["bank"], bank_valid=11, own_index=OWN, **classes)
    losses = [call(impl=impl) for impl in (None, "cpu")]
    torch.testing.assert_close(*losses)
    leaves = [inputs["query"], inputs["positive"]]
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses))
    assert taken == [True]
    cut = {name: x[:11] for name, x in classes.items() if name == "bank_labels"}
    own = torch.where(OWN < 11, OWN, -1)
    alone = info_nce(inputs["query"], inputs["positive"], inputs["bank"][:11], own_index=own, **classes | cut)
    torch.testing.assert_close(losses[0], alone)


@pytest.mark.parametrize("impl", [None, "cpu"])
@pytest.mark.parametrize("form", ["in batch", "in batch, attracting", "with a bank"])
def test_classes_and_weights_lie_in_memory_as_they_like(form, impl):
    inputs = problem()
    bank = inputs["bank"] if form == "with a bank" else None
    more = {"same_class": "positive"} if form == "in batch, attracting" else {}
    call = partial(info_nce, inputs["query"], inputs["positive"], bank, temperature=0.3, impl=impl, **more)
    leaves = [inputs["query"], inputs["positive"]]
    for lie in (lambda x: torch.stack([x, x], 1)[:, 0], lambda x: x[:1].expand(x.shape)):
        given = {"query_labels": lie(LABELS), "weight": lie(weights("weights") + 1)}
        given |= {} if bank is None else {"bank_labels": lie(KEY_LABELS)}
        results = []
        for kept in (given, {name: x.contiguous() for name, x in given.items()}):
            loss = call(**kept)
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            results.append((loss, *first, *torch.autograd.grad(sum(x.square().sum() for x in first), leaves)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("form", ["positive", "in batch", "clip", "classes attract"])
def test_weights_may_change_before_the_backward_and_not_before_a_second_one(form):
    call, _ = FORMS[form]
    inputs, weight = problem(learnt=("query",)), torch.rand(ROWS)
    (expected,) = torch.autograd.grad(call(inputs, weight=weight), inputs["query"])
    changed, twice = call(inputs, weight=weight), call(inputs, weight=weight)
    (first,) = torch.autograd.grad(twice, inputs["query"], create_graph=True)
    weight.zero_()
    assert torch.equal(torch.autograd.grad(changed, inputs["query"])[0], expected)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


@pytest.mark.parametrize("rows", [9, 200])  # gradients that come with the losses, and those that read the labels again
def test_classes_within_a_batch_are_not_to_change_before_the_backward(rows):
    query, positive, labels = torch.randn(rows, 32, requires_grad=True), torch.randn(rows, 32), torch.arange(rows) % 4
    loss = info_nce(query, positive, query_labels=labels)
    labels.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("weight", [torch.ones(ROWS - 1), torch.ones(ROWS, dtype=torch.complex64), 1.0], ids=["short", "complex", "float"])
@pytest.mark.parametrize("form", FORMS)
def test_wrong_weights_are_named(form, weight):
    if form == "nt_xent":
        pytest.skip("it has 2N rows")
    with pytest.raises((TypeError, ValueError), match="weight must"):
        FORMS[form][0](problem(), weight=weight)


@pytest.mark.parametrize("form", FORMS)
def test_an_unknown_reduction_is_refused(form):
    with pytest.raises(ValueError, match="reduction must be"):
        FORMS[form][0](problem(), reduction="average")


@pytest.mark.parametrize("own", [-2, KEYS])
def test_an_own_row_out_of_range_is_an_index_error(own):
    with pytest.raises(IndexError, match="own_index"):
        with_bank("positive", "bank", own_index=torch.full((ROWS,), own))(problem())


@pytest.mark.parametrize("weight", [None, torch.rand(4)], ids=["", "weights"])
def test_the_ops_are_described_to_the_compiler(weight):
    query, keys, columns = torch.randn(4, 5), torch.randn(6, 5), torch.tensor([[0], [1], [-1], [2]])
    for mean, summed in ((True, False), (True, True), (False, False)):
        rows = query, keys, None, None, None, None, columns, None, None, None, columns, None
        given = *rows, True, mean, True, 0, None, True, 2.0, 0.0, False, weight, summed
        torch.library.opcheck(torch.ops.kdfast.info_nce.default, given)
        for scale, keep, smoothing, include in ((torch.tensor(2.0), False, 0.1, True), (None, False, 0.0, False), (None, True, 0.0, False)):
            given = query, query.clone(), scale, None, None, mean, keep, keep, 0, True, smoothing, 3.0, include, weight, summed
            torch.library.opcheck(torch.ops.kdfast.matching_loss.default, given)
            _, statistics, *kept = torch.ops.kdfast.matching_loss(*given)
            if not (keep and mean):
                g = torch.rand(()) if mean else torch.rand(4)
                options = True, True, scale is not None, False, 0, True, smoothing, 3.0, *(kept if keep else ())
                torch.library.opcheck(torch.ops.kdfast.matching_loss_grad.default, (g, statistics, *given[:5], *options))
