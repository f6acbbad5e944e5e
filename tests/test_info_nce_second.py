"""The second derivative of InfoNCE's fused losses, against the formula differentiated twice in float64."""

import pytest
import torch
import torch.nn.functional as F
from similarity_cases import assert_as_good_as

from kdfast._core import impls
from kdfast._ops.similarity.losses import info_nce as losses_module
from kdfast.functional import info_nce

pytestmark = pytest.mark.skipif(impls.table()["info_nce"]["cpu"] is not None, reason="no compiled kernels")

# around vector (16, 8, 4) and panel widths; a row alone; a bank of one block and of several; rows of one chunk and of several
SIZES = [(1, 1, 1), (3, 65, 7), (65, 63, 33), (7, 257, 64), (130, 150, 20)]


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).float()


def explicit(n, m, d):
    return dict(query=unit(n, d), positive=unit(n, d), bank=unit(m, d))


def near(n, m, d):
    """Three positives each, close to the query."""
    query = unit(n, d)
    return dict(query=query, positive=F.normalize(query[:, None] + 0.1 * unit(n, 3, d), dim=-1), bank=unit(m, d))


def targets(n, m, d):
    """Of which some are none; a key beside them."""
    index = torch.randint(-1, m, (n,))
    index[0] = 0
    return dict(query=unit(n, d), bank=unit(m + 1, d), bank_bias=torch.randn(m + 1), targets=index)


FORMS = [explicit, near, targets]


def formula(query, bank, temperature, positive=None, bank_bias=None, targets=None, include_positive=True):
    """Row losses over the written-out scores."""
    bias = 0.0 if bank_bias is None else bank_bias
    temperature = temperature.to(torch.promote_types(query.dtype, torch.float32))[:, None]
    z = query @ bank.mT / temperature + bias
    if targets is None:
        rows = positive if positive.dim() == 3 else positive[:, None]
        own = (query[:, None] * rows).sum(-1) / temperature
    else:
        at = targets.clamp(min=0)
        own = (query * bank[at]).sum(-1, keepdim=True) / temperature + (0.0 if bank_bias is None else bank_bias[at, None])
        z = z.masked_fill(torch.arange(len(bank)) == targets[:, None], -torch.inf)
    lse = z.logsumexp(-1, keepdim=True)
    losses = (torch.logaddexp(lse, own) if include_positive else lse) - own
    return losses.mean(-1) if targets is None else torch.where(targets >= 0, losses[:, 0], 0.0)


def fused(temperature, **problem):
    return info_nce(**problem, temperature=temperature, reduction="none", impl="cpu")


def second(loss, problem, leaves, dtype, rounding=torch.float32):
    """Gradients of <directions, gradients of <g, losses>> in the leaves and g, with directions that `rounding` holds."""
    cast = {name: x.to(dtype) if x.is_floating_point() and name not in ("bank_bias", "temperature") else x for name, x in problem.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cast |= {name: problem[name].to(wide) for name in ("bank_bias", "temperature") if name in problem}
    given = [cast[name].detach().requires_grad_() for name in leaves]
    cast |= dict(zip(leaves, given, strict=True))
    generator = torch.Generator().manual_seed(1)
    made = lambda x: torch.randn(x.shape, generator=generator).to(rounding).to(x.dtype)
    losses = loss(**cast)
    g = made(losses.detach()).requires_grad_()
    first = torch.autograd.grad(losses, given, g, create_graph=True)
    return torch.autograd.grad(first, [*given, g], [made(x) for x in given])


@pytest.fixture
def no_definition(monkeypatch):
    """Neither the definition nor another forward pass."""
    monkeypatch.setattr(losses_module, "_definition", None)


def learnt(problem, *names):
    return [name for name in (*names, "temperature") if name in problem]


@pytest.mark.parametrize("bank", [["bank"], []], ids=["bank's gradient", "bank held"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_as_accurate_as_the_formula(isa, no_definition, form, size, dtype, bank):
    problem = form(*size) | dict(temperature=torch.linspace(0.2, 0.5, size[0]))
    rounded = {name: x.to(dtype).float() if name in ("query", "positive", "bank") else x for name, x in problem.items()}
    leaves = learnt(problem, "query", "positive", *bank)
    found = [second(loss, rounded, leaves, t, dtype) for loss, t in ((fused, dtype), (formula, dtype), (formula, torch.float64))]
    for ours, naive, truth in zip(*found, strict=True):
        assert_as_good_as(ours, naive, truth)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_without_the_positive_in_the_denominator(no_definition, form):
    problem = form(7, 65, 8) | dict(temperature=torch.linspace(0.2, 1, 7))
    leaves = learnt(problem, "query", "positive", "bank")
    ours = second(lambda **p: fused(include_positive=False, **p), problem, leaves, torch.float32)
    truth = second(lambda **p: formula(include_positive=False, **p), problem, leaves, torch.float64)
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("leaves", [["query"], ["temperature"], ["query", "bank"]], ids=" and ".join)
def test_some_directions(no_definition, leaves):
    problem = explicit(5, 33, 8) | dict(temperature=torch.full((5,), 0.3))
    ours, truth = second(fused, problem, leaves, torch.float32), second(formula, problem, leaves, torch.float64)
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("moving", "wanted"), [("query", "bank"), ("bank", "query"), ("bank", "bank"), ("query", "query")])
def test_a_direction_of_one_side_and_a_gradient_of_one(no_definition, moving, wanted):
    problem = explicit(9, 70, 8)

    def found(loss, dtype):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in problem.items()}
        (first,) = torch.autograd.grad(loss(**leaves).square().sum(), leaves[moving], create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaves[wanted])[0].double()

    truth = found(lambda **p: formula(temperature=torch.full((9,), 0.2), **p), torch.float64)
    torch.testing.assert_close(found(lambda **p: fused(0.2, **p), torch.float32), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bank", [["bank"], []], ids=["bank's gradient", "bank held"])
def test_exclusions_as_the_portable_passes(no_definition, bank):
    problem = near(9, 70, 8)
    rules = dict(query_labels=torch.arange(18)[::2] % 4, bank_labels=torch.arange(70) % 5, bank_valid=61, own_index=torch.arange(9) - 1)

    def found(impl):
        return second(lambda **p: info_nce(**p, **rules, impl=impl, reduction="none"), problem, ["query", "positive", *bank], torch.float32)

    for x, y in zip(found("cpu"), found("torch"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(600, 70, 1030), (200, 450, 96)], ids=["wide", "threads"])
def test_rows_taken_in_parts(no_definition, size):
    problem, threads = explicit(*size), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        ours, again = (second(lambda **p: fused(0.1, **p), problem, list(problem), torch.float32) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    truth = second(lambda **p: formula(temperature=torch.full(size[:1], 0.1), **p), problem, list(problem), torch.float64)
    for x, y, z in zip(ours, again, truth, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x.double(), z, rtol=1e-4, atol=1e-5 * float(z.abs().max()))


def test_an_infinity_is_lost_as_in_the_formula(no_definition):
    problem = explicit(70, 40, 8)
    problem["bank"][3, 2] = torch.inf
    for x in second(lambda **p: fused(0.5, **p), problem, list(problem), torch.float32):
        assert not x.isfinite().any()


def test_the_mean_of_a_plain_call_with_an_expanded_direction_and_a_bank_apart(no_definition):
    query, positive, bank = unit(6, 8).requires_grad_(), unit(6, 8), unit(33, 8)

    def found(loss, *inputs):
        (first,) = torch.autograd.grad(loss(*inputs), inputs[0], create_graph=True)
        return torch.autograd.grad(first.sum(), inputs[0])[0].double()

    wide = [x.detach().double() for x in (query, positive, bank)]
    truth = found(lambda q, k, b: formula(q, b, torch.full((6,), 0.1), k).mean(), wide[0].requires_grad_(), *wide[1:])
    apart = bank.repeat_interleave(2, 0)[::2]
    assert not apart.is_contiguous()
    for rows in (bank, apart):
        ours = found(lambda q, k, b: info_nce(q, k, b, temperature=0.1), query, positive, rows)
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_many_directions_at_once():
    query, positive, bank = unit(4, 5).requires_grad_(), unit(4, 5), unit(9, 5)
    (first,) = torch.autograd.grad(info_nce(query, positive, bank), query, create_graph=True)
    directions = torch.randn(3, 4, 5)
    together = torch.autograd.grad(first, query, directions, is_grads_batched=True, retain_graph=True)[0]
    for x, direction in zip(together, directions, strict=True):
        assert torch.equal(x, torch.autograd.grad(first, query, direction, retain_graph=True)[0])


@pytest.mark.parametrize("mean", [True, False])
def test_opcheck(mean):
    query, keys, positive, columns = torch.randn(4, 5), torch.randn(6, 5), torch.randn(4, 2, 5), torch.tensor([[0], [1], [-1], [2]])
    g, rules = torch.rand(()) if mean else torch.rand(4), (None, None, columns, None, torch.tensor(5))
    for rows, chosen in ((positive, None), (None, columns)):
        bank = query, keys, None, torch.rand(6), *rules
        _, statistics, pull, _ = torch.ops.kdfast.info_nce(*bank, rows, chosen, None, True, mean, True, 0, None, False, 2.0)
        along = torch.randn(4, 5), torch.randn(6, 5), torch.randn(4), None if rows is None else torch.randn(4, 2, 5)
        given = g, *along, statistics, pull, *bank, rows, chosen, True, True, True, True, rows is not None, 0, 2.0
        torch.library.opcheck(torch.ops.kdfast.info_nce_second.default, given)


@pytest.mark.parametrize("options", [dict(same_class="positive"), dict(label_smoothing=0.2)], ids=["attract", "smoothed"])
def test_own_rows_past_the_valid_ones(options):
    query, positive, bank = unit(6, 4).requires_grad_(), unit(6, 4), unit(9, 4)
    given = dict(own_index=torch.tensor([0, 4, 5, 8, -1, 2]), query_labels=torch.arange(6) % 2, bank_labels=torch.arange(9) % 3) | options
    found = []
    for more in (dict(bank_valid=5), dict(bank_valid=5, impl="cpu")):
        (first,) = torch.autograd.grad(info_nce(query, positive, bank, **given, **more), query, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), query)))
    torch.testing.assert_close(*found)
