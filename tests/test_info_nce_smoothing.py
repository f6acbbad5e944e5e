"""Label smoothing of InfoNCE, and means over the rows that have a positive, by the fused kernels: against the definition in float64 and the
formula over all scores."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast._core import impls
from kdfast._ops.similarity import cpu
from kdfast.functional import info_nce

pytestmark = pytest.mark.skipif(cpu.missing() is not None or impls.DEFAULT is not None, reason="of the compiled kernels")

FORMS = ("positive", "two positives", "targets", "some targets", "in batch")


def problem(form, n, m, d, *, lead=(), own_banks=False, excluded=False, dtype=torch.float32):
    """The tensors that have gradients, and a call of them that takes further options."""
    banks = lead if own_banks else ()
    query, bank = torch.randn(*lead, n, d).to(dtype), torch.randn(*banks, m, d).to(dtype)
    bias, tau = torch.randn(*banks, m), torch.rand(*lead, n) + 0.5
    positive = torch.randn(*lead, n, *((2,) if form == "two positives" else ()), d).to(dtype)
    options, inputs = {}, [query, positive, bank, tau]
    if "targets" in form:
        targets = torch.randint(0, m, (*lead, n))
        targets = torch.where(targets == m // 2, 0, targets)  # which a bias may drop
        options["targets"] = targets if form == "targets" else torch.where(torch.arange(n) % 3 == 1, -1, targets)
        inputs = [query, bank, tau]
    if form == "two positives":
        options["positive_weights"] = torch.rand(2)
    if form == "in batch":
        inputs = [query, positive, tau]
        options |= {"query_labels": torch.randint(0, 9, (*lead, n))} if excluded else {}
    elif excluded:
        bias[..., m // 2] = -torch.inf
        inputs.append(bias)
        own = torch.where(torch.arange(n) % 4 == 0, -1, torch.randint(0, m, (*lead, n)))
        labels = {"query_labels": torch.randint(-2, 5, (*lead, n)), "bank_labels": torch.randint(-1, 7, (*banks, m))}
        options |= {**labels, "own_index": own, "bank_valid": m - m // 5}

    def loss(inputs, **further):
        named = dict(zip(("query", "bank", "temperature", "bank_bias"), inputs, strict=False)) if "targets" in form else None
        if form == "in batch":
            named = dict(zip(("query", "positive", "temperature"), inputs, strict=True))
        elif named is None:
            named = dict(zip(("query", "positive", "bank", "temperature", "bank_bias"), inputs, strict=False))
        return info_nce(**named, **{**options, **further})

    return inputs, loss


def found(loss, inputs, dtype, **further):
    inputs = [x.to(dtype or x.dtype).requires_grad_() for x in inputs]
    value = loss(inputs, **further)
    return value.detach(), torch.autograd.grad(value.sum(), inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("excluded", [False, True], ids=["all", "excluded"])
@pytest.mark.parametrize("size", [(1, 2, 3), (9, 17, 33), (70, 600, 20)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_it_has_the_value_and_gradients_of_the_definition(form, excluded, size, smoothing):
    for reduction in ("mean", "none"):
        inputs, loss = problem(form, *size, excluded=excluded)
        options = {"label_smoothing": smoothing, "reduction": reduction}
        value, gradients = found(loss, inputs, None, **options, impl="cpu")
        expected, wanted = found(loss, inputs, torch.float64, **options, impl="torch")
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
        for x, y in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_of_half_precision_rows(form, dtype):
    inputs, loss = problem(form, 20, 40, 24, excluded=True, dtype=dtype)
    value, gradients = found(loss, inputs, None, label_smoothing=0.3, impl="cpu")
    expected, wanted = found(loss, inputs, torch.float64, label_smoothing=0.3, impl="torch")
    torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-3)
    for x, y in zip(gradients, wanted, strict=True):
        close = 4 * torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(x.double(), y, rtol=close, atol=close * float(y.abs().max()))


@pytest.mark.parametrize("own_banks", [False, True], ids=["one bank", "own banks"])
@pytest.mark.parametrize("form", FORMS)
def test_with_leading_dimensions(form, own_banks):
    inputs, loss = problem(form, 7, 30, 16, lead=(2, 3), own_banks=own_banks, excluded=True)
    for reduction in ("mean", "none"):
        options = {"label_smoothing": 0.3, "reduction": reduction}
        value, gradients = found(loss, inputs, None, **options, impl="cpu")
        expected, wanted = found(loss, inputs, torch.float64, **options, impl="torch")
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
        for x, y in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


def test_weights_of_positives_may_cancel():
    inputs, loss = problem("two positives", 7, 30, 16)
    options = {"label_smoothing": 0.3, "reduction": "none", "positive_weights": torch.tensor([1.0, -1.0])}
    value, gradients = found(loss, inputs, None, **options, impl="cpu")
    expected, wanted = found(loss, inputs, torch.float64, **options, impl="torch")
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    for x, y in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("form", ["positive", "some targets"])
def test_double_backward_is_the_definitions(form):
    inputs, loss = problem(form, 6, 11, 5, excluded=True)

    def second(inputs, impl):
        inputs = [x.clone().requires_grad_() for x in inputs]
        gradients = torch.autograd.grad(loss(inputs, label_smoothing=0.3, impl=impl), inputs, create_graph=True)
        return torch.autograd.grad(sum((g * torch.linspace(0.5, 2, g.numel()).view_as(g)).sum() for g in gradients), inputs)

    for x, y in zip(second(inputs, "cpu"), second([x.double() for x in inputs], "torch"), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


def formula(query, positive, bank, tau, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in (query, positive, bank)]
    q, k, b = leaves
    z = torch.cat([(q * k).sum(-1, keepdim=True), q @ b.T], 1) / tau
    loss = F.cross_entropy(z, torch.zeros(len(q), dtype=torch.long), label_smoothing=0.1, reduction="none")
    return loss.detach().double(), [x.double() for x in torch.autograd.grad(loss.sum(), leaves)]


@pytest.mark.parametrize("tau", [1.0, 0.07, 0.001])
@pytest.mark.parametrize("learnt", [False, True])
def test_errors_are_within_twice_those_of_the_formula(tau, learnt):
    """Added up over draws: logits that nearly tie make one draw's largest error."""
    allowed, ours, d, ulp = [0.0] * 4, [0.0] * 4, 48, torch.finfo(torch.float32).eps
    for _ in range(4):
        query, positive, bank = (F.normalize(torch.randn(n, d), dim=-1) for n in (65, 65, 700))
        if learnt:
            positive = F.normalize(query + 0.01 * torch.randn_like(query), dim=-1)
        expected, wanted = formula(query, positive, bank, tau, torch.float64)
        naive, by_formula = formula(query, positive, bank, tau, torch.float32)
        leaves = [x.clone().requires_grad_() for x in (query, positive, bank)]
        loss = info_nce(*leaves, temperature=tau, label_smoothing=0.1, reduction="none", impl="cpu")
        found = loss.detach(), *torch.autograd.grad(loss.sum(), leaves)
        for i, (x, y, exact) in enumerate(zip(found, (naive, *by_formula), (expected, *wanted), strict=True)):
            ours[i] += float((x.double() - exact).abs().max())
            allowed[i] += float(2 * (y - exact).abs().max() + 4 * ulp * exact.abs().max())
    assert all(x <= y for x, y in zip(ours, allowed, strict=True))


def test_a_key_that_its_class_hides_leaves_no_rounding():
    """Rows of a class that fills the bank but for one key: the sum over the others is that key."""
    n, m, d = 5, 4000, 32
    query, positive, bank = torch.randn(n, d), torch.randn(n, d), torch.randn(m, d) * 100
    labels = torch.zeros(m, dtype=torch.long)
    labels[7] = 1
    options = dict(
        query_labels=torch.zeros(n, dtype=torch.long), bank_labels=labels, label_smoothing=0.5, reduction="none", temperature=1.0
    )
    ours = info_nce(query, positive, bank, **options, impl="cpu")
    alone = info_nce(query, positive, bank[7:8], label_smoothing=0.5, reduction="none", temperature=1.0, impl="cpu")
    torch.testing.assert_close(ours, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_no_row_with_a_target_is_a_mean_of_nothing(smoothing):
    inputs, loss = problem("targets", 4, 9, 6)
    value, gradients = found(loss, inputs, None, targets=torch.full((4,), -1), label_smoothing=smoothing, impl="cpu")
    assert value == 0 and all(not x.any() for x in gradients)


@pytest.mark.parametrize("mean", [True, False])
def test_opcheck(mean):
    query, keys, positive, columns = torch.randn(4, 5), torch.randn(6, 5), torch.randn(4, 2, 5), torch.tensor([[0], [1], [-1], [2]])
    g, rules = torch.rand(()) if mean else torch.rand(4), (None, None, columns, None, torch.tensor(5))
    for rows, chosen in ((positive, None), (None, columns)):
        given = query, keys, None, torch.rand(6), *rules, rows, chosen, None, True, mean, True, 0, None, False, 2.0, 0.1
        torch.library.opcheck(torch.ops.kdfast.info_nce.default, given)
        _, statistics, pull, _ = torch.ops.kdfast.info_nce(*given)
        bank = query, keys, None, torch.rand(6), *rules, chosen
        torch.library.opcheck(torch.ops.kdfast.info_nce_grad.default, (g, statistics, pull, *bank, *(True,) * 5, 0, None, 2.0, True))
        rows = g, statistics, pull, query, None, True, True, True, 2.0, True
        torch.library.opcheck(torch.ops.kdfast.info_nce_grad_rows.default, rows)


def test_under_compile_and_vmap():
    inputs, loss = problem("some targets", 6, 11, 5)
    expected = loss(inputs, label_smoothing=0.3)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(inputs, label_smoothing=0.3), expected)
    many = torch.func.vmap(lambda q: loss([q, *inputs[1:]], label_smoothing=0.3))(torch.stack([inputs[0]] * 2))
    torch.testing.assert_close(many, expected.expand(2))


@pytest.mark.parametrize("valid", [None, 500])
def test_nothing_is_added_up_in_an_order_that_is_not_fixed(valid):
    """On a GPU scatter_add and its like are float atomics: without labels no sum takes one, forward or backward."""
    names = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    query, bank = torch.randn(5, 8, requires_grad=True), torch.randn(600, 8, requires_grad=True)
    with Seen():
        loss = info_nce(query, query.detach(), bank, bank_valid=valid, temperature=0.5, label_smoothing=0.1, impl="torch")
        torch.autograd.grad(loss, (query, bank))
    assert len(names) > 5 and not [name for name in names if "scatter" in name or "index_put" in name or "index_add" in name], names
