"""The Triton kernels of rows that the keys of their class attract: against the formula over all scores, in float64.

They run as those of test_triton_similarity.py do.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from attraction_cases import FORMS, close, formula, found, problem
from similarity_cases import assert_as_good_as

from kdfast import functional
from kdfast._core import triton_runtime
from kdfast._ops.similarity.losses import attraction
from kdfast._ops.similarity.triton import slabs as triton_slabs

if triton_runtime.missing() is not None:
    pytest.skip(f"{triton_runtime.missing()}, and TRITON_INTERPRET is not 1", allow_module_level=True)
DEVICE = "cpu" if triton_runtime.INTERPRETED else "cuda"
OPS = torch.ops.kdfast_triton
INCLUDE = pytest.mark.parametrize("include", [True, False], ids=["included", "decoupled"])


@pytest.fixture(autouse=True)
def nothing_composed(monkeypatch):
    """Where the kernels serve a call, its first derivative too is theirs."""
    monkeypatch.setattr(attraction, "_composed", lambda *_: pytest.fail("composed"))


@pytest.fixture
def small_slabs(monkeypatch):
    """Several slabs, cut along both sides."""
    for name in ("STATISTICS_PAIRS", "WEIGHTS_PAIRS"):
        monkeypatch.setattr(triton_slabs, name, 2 * 32 * 32)


def ours(inputs, options, include, reduction, **further):
    """The bias has no gradient here."""
    bias = {"bank_bias": inputs["bank_bias"]} if "bank_bias" in inputs else {}
    leaves = {name: x for name, x in inputs.items() if name not in bias}
    return found(leaves, options | bias, include, reduction, impl="triton", device=DEVICE, **further)


def expected(inputs, options, include, reduction, dtype=torch.float64):
    value, gradients = found(inputs, options, include, reduction, dtype)
    return value, [x for name, x in zip(inputs, gradients, strict=True) if name != "bank_bias"]


@INCLUDE
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("excluded", [False, True], ids=["all", "excluded"])
@pytest.mark.parametrize("size", [(1, 2, 3), (9, 17, 33), (33, 100, 20)], ids=str)
def test_it_has_the_value_and_gradients_of_the_formula(form, excluded, size, include, small_slabs):
    for reduction in ("mean", "none"):
        inputs, options = problem(form, *size, excluded=excluded)
        close(ours(inputs, options, include, reduction), expected(inputs, options, include, reduction), 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_of_half_precision_rows(form, dtype):
    inputs, options = problem(form, 20, 40, 24, excluded=True, dtype=dtype)
    close(ours(inputs, options, True, "mean"), expected(inputs, options, True, "mean"), torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("own_banks", [False, True], ids=["one bank", "own banks"])
@INCLUDE
@pytest.mark.parametrize("form", FORMS)
def test_with_leading_dimensions(form, include, own_banks):
    inputs, options = problem(form, 5, 40, 16, lead=(2, 2), own_banks=own_banks, excluded=True)
    close(ours(inputs, options, include, "none"), expected(inputs, options, include, "none"), 3e-6)


@pytest.mark.parametrize("form", ["bank", "two positives"])
def test_a_bank_without_gradient_may_change_before_the_backward(form, small_slabs):
    """And what it holds beyond its valid rows is not read."""
    inputs, options = problem(form, 33, 100, 20, excluded=True)
    leaves = {name: x.clone().to(DEVICE).requires_grad_(name not in ("bank", "bank_bias")) for name, x in inputs.items()}
    leaves["bank"][options["bank_valid"] :] = math.nan
    there = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    loss = functional.info_nce(**leaves, **there, same_class="positive", impl="triton")
    leaves["bank"].fill_(math.nan)
    wanted = [x for x in leaves.values() if x.requires_grad]
    gradients = [x.double().cpu() for x in torch.autograd.grad(loss, wanted)]
    value, exact = expected(inputs, options, True, "mean")
    close((loss.detach().double().cpu(), gradients), (value, [g for n, g in zip(inputs, exact, strict=False) if n != "bank"]), 3e-6)


@INCLUDE
def test_double_backward_is_the_definitions(include, monkeypatch):
    monkeypatch.undo()
    inputs, options = problem("two positives", 6, 11, 5, excluded=True)
    bias = inputs.pop("bank_bias")

    def second(device, dtype, **further):
        leaves = {name: x.detach().to(device, dtype).requires_grad_() for name, x in inputs.items()}
        there = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in (options | {"bank_bias": bias}).items()}
        value = functional.info_nce(**leaves, **there, same_class="positive", include_positive=include, **further)
        gradients = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
        weighted = sum((g * torch.linspace(0.5, 2, g.numel(), device=device).view_as(g)).sum() for g in gradients)
        return [x.double().cpu() for x in torch.autograd.grad(weighted, list(leaves.values()))]

    for x, y in zip(second(DEVICE, torch.float32, impl="triton"), second("cpu", torch.float64, impl="torch"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize(("spread", "scale"), [(0.02, 50.0), (0.2, 50.0), (0.02, 230.0), (1.0, 2.0)])
@pytest.mark.parametrize("name", ["bank", "batch"])
def test_tight_classes(name, spread, scale, small_slabs):
    """Losses and gradients are of differences of logits, and must not round as logits of 50 and more do. `batch`: SupCon's of a temperature
    for each row."""
    labels = torch.arange(60) // 3
    x, bank = (F.normalize(F.normalize(torch.randn(20, 40), dim=-1)[labels] + spread * torch.randn(60, 40) / 6, dim=-1) for _ in range(2))
    bank = F.normalize(x.roll(1, 0)[labels * 3] + spread * bank, dim=-1)
    temperature = torch.linspace(0.9, 1.1, 60) / scale

    def truth(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, bank, temperature)]
        if name == "bank":
            losses, _ = formula(dict(zip(("query", "bank", "temperature"), leaves, strict=True)), rules, True)
        else:
            inputs = {"query": leaves[0], "bank": leaves[0], "temperature": leaves[2]}
            losses, _ = formula(inputs, rules | {"own_index": torch.arange(60)}, True)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves, allow_unused=True)]

    def fused():
        leaves = [t.to(DEVICE).requires_grad_() for t in (x, bank, temperature)]
        options = {"temperature": leaves[2], "normalize": False, "reduction": "none", "precision": "ieee", "impl": "triton"}
        there = {key: t.to(DEVICE) for key, t in rules.items()}
        if name == "bank":
            losses = functional.info_nce(leaves[0], None, leaves[1], same_class="positive", **there, **options)
        else:
            losses = functional.sup_con(leaves[0], there["query_labels"], **options)
        return [None if t is None else t.cpu() for t in (losses.detach(), *torch.autograd.grad(losses.sum(), leaves, allow_unused=True))]

    rules = {"query_labels": labels, "bank_labels": labels}
    for got, naive, want in zip(fused(), truth(torch.float32), truth(torch.float64), strict=True):
        if want is not None:
            assert_as_good_as(got, naive, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sup_con_of_a_temperature_for_each_row(reduction, small_slabs):
    x, labels = F.normalize(torch.randn(45, 20), dim=-1), torch.randint(-6, 0, (45,)) << 34
    labels[0] = 1  # alone in its class
    temperature = torch.rand(45) + 0.05

    def results(impl, device, dtype):
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, temperature)]
        value = functional.sup_con(leaves[0], labels.to(device), temperature=leaves[1], reduction=reduction, impl=impl)
        g = torch.linspace(-1, 1, 45).to(value) if value.dim() else torch.ones_like(value)
        return [t.double().cpu() for t in (value.detach(), *torch.autograd.grad(value, leaves, g))]

    for got, want in zip(results("triton", DEVICE, torch.float32), results("torch", "cpu", torch.float64), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


def test_a_row_that_does_not_count_has_no_gradient_whatever_it_holds():
    inputs, options = problem("bank", 4, 9, 6)
    options["query_labels"][1] = 100
    inputs["query"][1] = torch.nan
    query, bank = inputs["query"].to(DEVICE).requires_grad_(), inputs["bank"].to(DEVICE)
    options = {name: x.to(DEVICE) for name, x in options.items()}
    losses = functional.info_nce(query, None, bank, **options, same_class="positive", reduction="none", impl="triton")
    gradient = torch.autograd.grad(losses.sum(), query)[0]
    assert losses.isfinite().all() and losses[1] == 0 and gradient.isfinite().all() and not gradient[1].any()


def test_nothing_counts():
    inputs, options = problem("bank", 4, 9, 6)
    options["query_labels"] = torch.full((4,), 100)
    value, gradients = ours(inputs, options, True, "mean")
    assert value == 0 and all(not x.any() for x in gradients)
    options |= {"bank_valid": 0}
    value, gradients = ours(inputs, options, True, "mean")
    assert value == 0 and all(not x.any() for x in gradients)


def test_opcheck():
    query, keys, scale = torch.randn(2, 4, 5), torch.randn(1, 6, 5).expand(2, -1, -1), torch.rand(2, 4)
    labels, index = (torch.arange(8).view(2, 4) % 3, torch.arange(12).view(2, 6) % 4), torch.tensor([[[0], [1], [-1], [2]]] * 2)
    given = query, keys, scale, torch.rand(2, 6), *labels, index, torch.tensor([5, 6])
    given = tuple(x.to(DEVICE) for x in given)
    for logits, include, pull in ((torch.rand(2, 4, 3, device=DEVICE), True, True), (None, False, False)):
        torch.library.opcheck(OPS.attracted.default, (*given, logits, include, pull, 0))
        _, statistics, *_ = OPS.attracted(*given, logits, include, pull, 0)
        torch.library.opcheck(OPS.attracted_grad.default, (torch.rand(2, 4, device=DEVICE), statistics, *given, include, True, pull, 0))


def test_under_compile_and_vmap(monkeypatch):
    monkeypatch.undo()
    inputs, options = problem("positive", 6, 11, 5, excluded=True)
    leaves = {name: x.to(DEVICE) for name, x in inputs.items()}
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}

    def loss(query):
        return functional.info_nce(**(leaves | {"query": query}), **options, same_class="positive", impl="triton")

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(leaves["query"]), loss(leaves["query"]))
    torch.testing.assert_close(torch.func.vmap(loss)(leaves["query"][None])[0], loss(leaves["query"]))
