"""impl="cpu" of info_nce: the fused kernels of the row losses against the formula, in every form, dtype and instruction set."""

import functools

import pytest
import torch
import torch.nn.functional as F
from similarity_cases import assert_as_good_as

from kdfast._core import impls
from kdfast.functional import info_nce

pytestmark = pytest.mark.skipif(impls.table()["info_nce"]["cpu"] is not None, reason="no compiled kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# around vector (16, 8, 4) and panel widths; a row alone; a bank of one block and of several
SIZES = [(1, 1, 1), (3, 65, 7), (65, 63, 33), (7, 257, 64)]


def unit(*shape, dtype=torch.float32, grad=True):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype).requires_grad_(grad)


def in_batch(n, m, d, dtype):
    return dict(query=unit(n + 1, d, dtype=dtype), positive=unit(n + 1, d, dtype=dtype))


def explicit(n, m, d, dtype):
    return dict(query=unit(n, d, dtype=dtype), positive=unit(n, d, dtype=dtype), bank=unit(m, d, dtype=dtype))


def several(n, m, d, dtype):
    bank = unit(m, d, dtype=dtype, grad=False)
    return dict(query=unit(n, d, dtype=dtype), positive=unit(n, 3, d, dtype=dtype), bank=bank, positive_weights=torch.rand(3))


def targets(n, m, d, dtype):
    index = torch.randint(-1, m, (n,))
    index[0] = 0
    return dict(query=unit(n, d, dtype=dtype), bank=unit(m, d, dtype=dtype), targets=index, bank_bias=torch.randn(m).requires_grad_())


FORMS = [in_batch, explicit, several, targets]


def formula(query, positive=None, bank=None, *, temperature, targets=None, positive_weights=None, bank_bias=None, include_positive=True):
    """Row losses over the written-out scores, 0 where there is no target, in the dtype of the inputs' products."""
    n = len(query)
    own = torch.full((n,), -1)
    if bank is None:
        bank, own = positive, torch.arange(n)
    rows = bank[targets.clamp(min=0)] if targets is not None else positive
    z = (query @ bank.T).to(temperature.dtype) / temperature
    z = z if bank_bias is None else z + bank_bias
    rows = rows[:, None] if rows.dim() == 2 else rows
    z_positive = (query[:, None] * rows).sum(-1).to(temperature.dtype) / temperature
    if targets is not None:
        own = targets
        z_positive = z_positive if bank_bias is None else z_positive + bank_bias[targets.clamp(min=0)][:, None]
    z = z.masked_fill(torch.arange(len(bank)) == own[:, None], -torch.inf)
    losses = []
    for j in range(rows.shape[1]):
        candidates = torch.cat([z_positive[:, j : j + 1], z], 1) if include_positive else z
        losses.append(torch.logsumexp(candidates, 1) - z_positive[:, j])
    weights = torch.full((len(losses),), 1 / len(losses), dtype=z.dtype) if positive_weights is None else positive_weights.to(z.dtype)
    loss = (torch.stack(losses, 1) * weights).sum(1)
    return loss if targets is None else torch.where(targets >= 0, loss, 0.0)


def gradients(function, problem, temperature, g, dtype=None):
    """Row losses and their gradients in everything that takes one, of the problem cast to `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cast = lambda x: x if dtype is None or not x.is_floating_point() else x.detach().to(dtype).requires_grad_(x.requires_grad)
    problem = {name: cast(x) for name, x in problem.items()}
    temperature = temperature.detach().to(wide).requires_grad_()
    losses = function(**problem, temperature=temperature)
    leaves = [x for x in (*problem.values(), temperature) if x.requires_grad]
    return losses, *torch.autograd.grad(losses, leaves, g.to(losses.dtype))


def fused(**problem):
    return info_nce(**problem, reduction="none", impl="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_as_accurate_as_the_formula(isa, form, size, dtype):
    problem = form(*size, dtype)
    g, tau = torch.randn(len(problem["query"])), torch.tensor(0.2)
    ours = gradients(fused, problem, tau, g)
    # biases are the accumulator's in both
    naive = gradients(formula, problem, tau, g, dtype)
    truth = gradients(formula, problem, tau, g, torch.float64)
    for x, y, z in zip(ours, naive, truth, strict=True):
        assert_as_good_as(x, y, z)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_without_the_positive_in_the_denominator(form):
    problem, tau = form(7, 65, 8, torch.float32), torch.tensor(0.3)
    g = torch.randn(len(problem["query"]))
    ours = gradients(lambda **p: fused(**p, include_positive=False), problem, tau, g)
    truth = gradients(lambda **p: formula(**p, include_positive=False), problem, tau, g, torch.float64)
    for x, z in zip(ours, truth, strict=True):
        torch.testing.assert_close(x.double(), z.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False], ids=["shared bank", "a bank each"])
def test_leading_dimensions_and_exclusions_as_the_portable_passes(shared):
    batch = (2, 3)
    query, positive = unit(*batch, 5, 8), unit(*batch, 5, 2, 8)
    bank = unit(*(() if shared else batch), 33, 8)
    options = dict(
        bank_bias=torch.randn(33).requires_grad_(),
        bank_valid=torch.tensor(31) if shared else torch.tensor([[31, 30, 1], [0, 33, 2]]),
        query_labels=torch.randint(4, (*batch, 5)),
        bank_labels=torch.randint(4, bank.shape[:-1]),
        own_index=torch.randint(-1, 33, (*batch, 5)),
        false_negative_margin=0.4,
        temperature=(0.2 + torch.rand(*batch, 5)).requires_grad_(),
        positive_weights=torch.rand(*batch, 5, 2),
        weight=torch.rand(*batch, 5),
        label_smoothing=0.0,
    )
    leaves = [query, positive, bank, options["bank_bias"], options["temperature"]]
    one, other = (info_nce(query, positive, bank, impl=impl, **options) for impl in ("cpu", "torch"))
    torch.testing.assert_close(one, other)
    for x, y in zip(torch.autograd.grad(one, leaves), torch.autograd.grad(other, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_second_derivatives_and_a_graph_kept(form, reduction):
    problem = form(5, 33, 8, torch.float32)
    problem.pop("positive_weights", None)
    leaves = [x for x in problem.values() if x.requires_grad]
    directions = [torch.randn_like(x) for x in leaves]

    def second(impl):
        loss = info_nce(**problem, temperature=0.3, reduction=reduction, impl=impl).sum()
        once = torch.autograd.grad(loss, leaves, retain_graph=True)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        for x, y in zip(once, first, strict=True):
            assert torch.equal(x, y)
        return first, torch.autograd.grad(sum((x * v).sum() for x, v in zip(first, directions, strict=True)), leaves)

    for ours, theirs in zip(second("cpu"), second("torch"), strict=True):
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_only_what_is_wanted():
    q, k, bank = unit(6, 8), unit(6, 8), unit(20, 8)
    everything = torch.autograd.grad(info_nce(q, k, bank), [q, k, bank])
    for i, leaf in enumerate((q, k, bank)):
        alone = [x if x is leaf else x.detach() for x in (q, k, bank)]
        torch.testing.assert_close(torch.autograd.grad(info_nce(*alone), leaf)[0], everything[i])
    with torch.no_grad():
        assert not info_nce(q, k, bank).requires_grad
    weights = torch.rand(1, requires_grad=True)
    (slope,) = torch.autograd.grad(info_nce(q, k, bank, positive_weights=weights), weights)
    torch.testing.assert_close(slope[0], info_nce(q, k, bank))


def test_a_bank_updated_before_the_backward():
    q, k, bank = unit(6, 8), unit(6, 8, grad=False), unit(20, 8, grad=False)
    (expected,) = torch.autograd.grad(info_nce(q, k, bank), q)
    loss = info_nce(q, k, bank)
    bank.fill_(torch.nan)
    (first,) = torch.autograd.grad(loss, q, create_graph=True)
    torch.testing.assert_close(first, expected)
    with pytest.raises(RuntimeError, match="updated in place"):
        first.sum().backward()
    q, k, bank = unit(6, 8), unit(6, 8, grad=False), unit(20, 8)
    loss = info_nce(q, k, bank)
    with torch.no_grad():
        bank.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_third_derivative_is_refused():
    q, k = unit(5, 8), unit(5, 8)
    (first,) = torch.autograd.grad(info_nce(q, k), q, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="a third was asked for"):
        second.sum().backward()


def test_transforms_give_the_same():
    q, k, bank = unit(5, 8, grad=False), unit(5, 8, grad=False), unit(33, 8, grad=False)
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(info_nce(leaf, k, bank), leaf)
    loss = lambda q, k: info_nce(q, k, bank)
    torch.testing.assert_close(torch.func.grad(loss)(q, k), expected)
    many = torch.vmap(torch.func.grad(loss), in_dims=(0, None))(torch.stack([q, q]), k)
    torch.testing.assert_close(many, torch.stack([expected, expected]))
    torch.testing.assert_close(torch.compile(loss, backend="aot_eager", fullgraph=True)(q, k), loss(q, k))


def test_extreme_logits_and_nan(isa):
    q = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [torch.nan, 0.0]], requires_grad=True)
    k = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    bank = torch.tensor([[0.5, 0.0], [0.25, 0.0]])
    losses = info_nce(q, k, bank, temperature=1e-3, reduction="none", impl="cpu")
    torch.testing.assert_close(losses, torch.tensor([0.0, 1500.0, 750.0, torch.nan]), equal_nan=True)
    (dq,) = torch.autograd.grad(losses.sum(), q)
    torch.testing.assert_close(dq[:3, 0], torch.tensor([0.0, 1500.0, -750.0]))
    assert dq[3].isnan().all()
    nothing = info_nce(q[:3], k[:3], bank, bank_valid=0, reduction="none", impl="cpu")
    assert torch.equal(nothing, torch.zeros(3))
    assert torch.equal(torch.autograd.grad(nothing.sum(), q)[0][:3], torch.zeros(3, 2))


def test_any_number_of_threads_gives_the_same_bits():
    q, k = unit(4100, 512), unit(4100, 512, grad=False)
    bank = unit(3, 512, grad=False)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        loss = info_nce(q, k, bank, reduction="none", impl="cpu")
        found.append((loss, *torch.autograd.grad(loss.sum(), q)))
    torch.set_num_threads(before)
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


ops = torch.ops.kdfast
LSE, SCALE, G = torch.zeros(1, 4), torch.ones(1, 4), torch.ones(1, 4)
rows = functools.partial(ops.info_nce_rows, LSE, None)
QUERY, ROWS = torch.ones(1, 4, 5), torch.ones(1, 4, 2, 5)
COLUMNS, SLOPES = torch.tensor([0, 1, -1, 2]).view(1, 4, 1), torch.ones(1, 4, 2)


def test_opcheck():
    check = torch.library.opcheck
    check(ops.info_nce_rows.default, (LSE, torch.ones(1, 4, 5), QUERY, SCALE, ROWS, None, None, torch.ones(1, 4, 2), True))
    check(ops.info_nce_rows.default, (LSE, None, QUERY, SCALE, torch.ones(1, 3, 5), COLUMNS, torch.ones(1, 3), None, False))
    check(ops.info_nce_grad_rows.default, (G, SLOPES, torch.ones(1, 4, 5), QUERY, SCALE, True, True, True, True))
    check(ops.info_nce_grad_rows.default, (torch.ones(()), SLOPES, None, QUERY, SCALE, False, False, True, False))
    check(
        ops.info_nce_grad_candidates.default, (G, SLOPES[..., :1].clone(), QUERY, SCALE, COLUMNS, torch.zeros(1, 3, 5), torch.zeros(1, 3))
    )


@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_of_different_dtypes(isa, dtype, other):
    query, positives = torch.randn(1, 4, 5).to(dtype), torch.randn(1, 4, 2, 5).to(other)
    ours = rows(query, SCALE, positives, None, None, None, True)
    wide = rows(query.float(), SCALE, positives.float(), None, None, None, True)
    assert torch.equal(ours[0], wide[0]) and torch.equal(ours[1], wide[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rows(QUERY[0], SCALE, ROWS, None, None, None, True), "query must have 3 dimensions"),
        (lambda: rows(QUERY.double(), SCALE, ROWS, None, None, None, True), "takes float32, bfloat16 or float16"),
        (lambda: rows(QUERY, SCALE, ROWS.double(), None, None, None, True), "takes float32, bfloat16 or float16"),
        (lambda: rows(QUERY, SCALE, ROWS[..., :4], None, None, None, True), "candidates has size"),
        (lambda: rows(QUERY, SCALE, ROWS.mT.contiguous().mT, None, None, None, True), "candidates must be contiguous"),
        (lambda: rows(QUERY, SCALE, ROWS, None, LSE, None, True), "bias needs columns"),
        (lambda: rows(QUERY, SCALE, torch.ones(1, 2, 5), COLUMNS, None, None, True), r"columns must be in \[-1, 2\)"),
        (lambda: rows(QUERY, SCALE, ROWS, COLUMNS, None, None, True), "candidates must have 3 dimensions"),
        (lambda: ops.info_nce_grad_rows(G, SLOPES, None, QUERY, SCALE, True, False, False, False), "need pull"),
        (lambda: ops.info_nce_grad_rows(G[:, :3], SLOPES, None, QUERY, SCALE, False, False, True, False), "g has size"),
        (lambda: ops.info_nce_grad_candidates(G, SLOPES, QUERY, SCALE, COLUMNS, None, None), "dcandidates or dbias must be given"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
