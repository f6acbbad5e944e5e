"""InfoNCE whose positives are the keys of a row's class, by the fused kernels: against the formula over all scores, in float64."""

import pytest
import torch
import torch.nn.functional as F
from attraction_cases import FORMS, close, formula, found, problem

from kdfast._core import impls
from kdfast._ops.similarity import cpu
from kdfast.functional import info_nce

pytestmark = pytest.mark.skipif(cpu.missing() is not None or impls.DEFAULT is not None, reason="of the compiled kernels")


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("include", [True, False], ids=["included", "decoupled"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("excluded", [False, True], ids=["all", "excluded"])
@pytest.mark.parametrize("size", [(1, 2, 3), (9, 17, 33), (70, 600, 20)], ids=str)
def test_it_has_the_value_and_gradients_of_the_formula(form, excluded, size, include, impl):
    for reduction in ("mean", "none"):
        inputs, options = problem(form, *size, excluded=excluded)
        close(found(inputs, options, include, reduction, impl=impl), found(inputs, options, include, reduction, torch.float64), 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_of_half_precision_rows(form, dtype):
    inputs, options = problem(form, 20, 40, 24, excluded=True, dtype=dtype)
    close(found(inputs, options, True, "mean"), found(inputs, options, True, "mean", torch.float64), torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("own_banks", [False, True], ids=["one bank", "own banks"])
@pytest.mark.parametrize("include", [True, False], ids=["included", "decoupled"])
@pytest.mark.parametrize("form", FORMS)
def test_with_leading_dimensions(form, include, own_banks):
    inputs, options = problem(form, 7, 30, 16, lead=(2, 3), own_banks=own_banks, excluded=True)
    for reduction in ("mean", "none"):
        close(found(inputs, options, include, reduction), found(inputs, options, include, reduction, torch.float64), 3e-6)


@pytest.mark.parametrize("include", [True, False], ids=["included", "decoupled"])
@pytest.mark.parametrize("form", FORMS)
def test_double_backward_is_the_definitions(form, include):
    inputs, options = problem(form, 6, 11, 5, excluded=True)

    def second(dtype, reduction, **further):
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
        value = info_nce(**leaves, **options, same_class="positive", include_positive=include, reduction=reduction, **further)
        gradients = torch.autograd.grad(value.sum(), list(leaves.values()), create_graph=True)
        return torch.autograd.grad(sum((g * torch.linspace(0.5, 2, g.numel()).view_as(g)).sum() for g in gradients), list(leaves.values()))

    for reduction in ("mean", "none"):
        for x, y in zip(second(torch.float32, reduction, impl="cpu"), second(torch.float64, reduction, impl="torch"), strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("tau", [1.0, 0.07, 0.001])
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("size", [(65, 300, 48), (65, 1300, 48)], ids=str)  # few pairs, whose gradients come with the loss, and more
def test_errors_are_within_twice_those_of_the_formula(size, tau, learnt):
    """Added up over draws: logits that nearly tie make one draw's largest error."""
    allowed, ours, ulp = [0.0] * 3, [0.0] * 3, torch.finfo(torch.float32).eps
    n, m, d = size
    for _ in range(12):
        labels, bank_labels = torch.randint(0, 20, (n,)), torch.randint(0, 20, (m,))
        query, bank, centres = (F.normalize(torch.randn(rows, d), dim=-1) for rows in (n, m, 20))
        if learnt:
            query, bank = (F.normalize(centres[c] + 0.05 * x, dim=-1) for c, x in ((labels, query), (bank_labels, bank)))
        inputs = {"query": query, "temperature": torch.full((n,), tau), "bank": bank}
        options = {"query_labels": labels, "bank_labels": bank_labels}
        expected, naive = (found(inputs, options, True, "mean", dtype) for dtype in (torch.float64, torch.float32))
        ours_now = found(
            {name: x for name, x in inputs.items() if name != "temperature"}, options | {"temperature": tau}, True, "mean", impl=None
        )
        for i, (x, y, exact) in enumerate(
            zip(*((v, *gradients[:1], gradients[-1]) for v, gradients in (ours_now, naive, expected)), strict=True)
        ):
            ours[i] += float((x - exact).abs().max())
            allowed[i] += float(2 * (y - exact).abs().max() + 4 * ulp * exact.abs().max())
    assert all(x <= y for x, y in zip(ours, allowed, strict=True)), (ours, allowed)


def test_no_row_with_a_positive_is_a_mean_of_nothing():
    inputs, options = problem("bank", 4, 9, 6)
    options["query_labels"] = torch.full((4,), 100)
    value, gradients = found(inputs, options, True, "mean")
    assert value == 0 and all(not x.any() for x in gradients)


def test_a_row_that_does_not_count_has_no_gradient_whatever_it_holds():
    inputs, options = problem("bank", 4, 9, 6)
    options["query_labels"][1] = 100
    inputs["query"][1] = torch.nan
    query = inputs["query"].requires_grad_()
    losses = info_nce(query, None, inputs["bank"], **options, same_class="positive", reduction="none", impl="cpu")
    gradient = torch.autograd.grad(losses.sum(), query)[0]
    assert losses.isfinite().all() and losses[1] == 0 and gradient.isfinite().all() and not gradient[1].any()


def test_weights_and_the_sum_of_losses():
    inputs, options = problem("bank", 9, 17, 6)
    weight, (losses, counted) = torch.rand(9), formula({k: x.double() for k, x in inputs.items()}, options, True)
    for reduction, expected in (("sum", (weight * losses).sum()), ("mean", (weight * losses).sum() / (weight * counted).sum())):
        torch.testing.assert_close(found(inputs, options, True, reduction, weight=weight)[0], expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("mean", [True, False])
def test_opcheck(mean):
    query, keys, positive = torch.randn(4, 5), torch.randn(6, 5), torch.randn(4, 2, 5)
    g, rules = torch.rand(()) if mean else torch.rand(4), (torch.arange(4) % 3, torch.arange(6) % 4, torch.tensor([[0], [1], [-1], [2]]))
    for rows, include, keep in ((positive, True, True), (None, False, True), (None, True, False)):
        bias, valid = (None, None) if keep else (torch.rand(6), torch.tensor(5))
        given = query, keys, None, bias, *rules, None, valid, rows, None, None, include, mean, True, 0, None, keep, 2.0, 0.0, True
        torch.library.opcheck(torch.ops.kdfast.info_nce.default, given)
        _, statistics, pull, kept = torch.ops.kdfast.info_nce(*given)
        assert bool(len(kept)) == (keep and mean and include)
        bank, want = (query, keys, None, bias, *rules, None, valid, None), (True, True, True, not keep, rows is not None)
        given = g, statistics, pull, *bank, *want, 0, kept, 2.0, True, True, include
        torch.library.opcheck(torch.ops.kdfast.info_nce_grad.default, given)


def test_under_compile_and_vmap():
    inputs, options = problem("positive", 6, 11, 5, excluded=True)

    def loss(query):
        return info_nce(**(inputs | {"query": query}), **options, same_class="positive")

    expected = loss(inputs["query"])
    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(inputs["query"]), expected)
    many = torch.func.vmap(loss)(torch.stack([inputs["query"]] * 2))
    torch.testing.assert_close(many, expected.expand(2))


def test_a_bank_without_gradient_may_change_before_the_backward():
    for m in (17, 1300):  # few pairs and more
        inputs, options = problem("bank", 9, m, 6)
        query, bank = inputs["query"].requires_grad_(), inputs["bank"]
        for impl in (None, "cpu"):
            call = lambda: info_nce(query, None, bank.clone(), **options, same_class="positive", impl=impl)  # noqa: B023
            expected = torch.autograd.grad(call(), query)[0]
            held = bank.clone()
            loss = info_nce(query, None, held, **options, same_class="positive", impl=impl)
            held.zero_()
            assert torch.equal(torch.autograd.grad(loss, query)[0], expected)
            loss = info_nce(query, None, held, **options, same_class="positive", impl=impl)
            held.add_(1)
            with pytest.raises(RuntimeError, match="updated in place"):
                first = torch.autograd.grad(loss, query, create_graph=True)[0]
                torch.autograd.grad(first.sum(), query)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("form", ["alone", "of a bank", "left by an index", "beside a key of another class"])
def test_the_only_candidate_of_its_row(isa, form, reduction):
    """Its logit is all of its denominator and all of its mean, two products that round apart."""
    query, tau = torch.randn(1, 64, requires_grad=True), 0.005
    bank = torch.randn(3, 64)
    options = {"bank_labels": torch.tensor([7, 0, 7]), "own_index": torch.tensor([2])}
    if form == "of a bank":
        options = {"bank_labels": torch.arange(7, 10), "bank_valid": 1}
    if form == "left by an index":
        bank, options["bank_labels"] = bank[[0, 2]], torch.tensor([7, 7])
        options["own_index"] = torch.tensor([1])
    given = (torch.randn(1, 64), None) if form == "alone" else (None, bank)
    options = {"query_labels": torch.tensor([7]), **({} if form == "alone" else options)}
    loss = info_nce(query, *given, temperature=tau, same_class="positive", reduction=reduction, **options)
    if form == "beside a key of another class":
        z = query @ bank[:2].T / tau
        torch.testing.assert_close(loss.sum(), (z.logsumexp(1) - z[:, 0]).sum(), rtol=1e-4, atol=1e-3)
    else:
        assert loss.sum() == 0
        bound = 1e-4 if form == "left by an index" else 0  # rounding errors of the sum that its key is taken off
        assert torch.autograd.grad(loss.sum(), query)[0].abs().max() <= bound
    with torch.no_grad():
        query[0, 0] = torch.nan
    assert info_nce(query, *given, temperature=tau, same_class="positive", reduction=reduction, **options).isnan().all()
