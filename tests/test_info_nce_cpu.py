"""impl="cpu" of info_nce: the fused kernels of the row losses against the formula, in every form, dtype and instruction set."""

import pytest
import torch
import torch.nn.functional as F
from similarity_cases import assert_as_good_as

from kdfast._core import impls
from kdfast._ops.similarity import cpu
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


@pytest.mark.parametrize("form", [explicit, targets], ids=lambda form: form.__name__)
def test_the_second_derivative_makes_no_forward_pass(monkeypatch, form):
    problem = form(5, 33, 8, torch.float32)
    query = problem["query"]
    (first,) = torch.autograd.grad(info_nce(**problem, temperature=0.3), query, create_graph=True)
    monkeypatch.setattr(cpu, "forward", None)
    assert torch.autograd.grad(first.square().sum(), query)[0].isfinite().all()


def test_second_derivatives_from_what_slopes_leave():
    """Positives that are all but certain, whose slopes are 0 or nearly so, and a row without one."""
    query, bank, index = unit(40, 16), unit(33, 16, grad=False), torch.arange(40) % 33
    temperature = torch.logspace(-3, 0, 40)
    with torch.no_grad():
        query.copy_(F.normalize(bank[index] + 0.3 * query, dim=-1))
    index[7] = -1

    def second(loss, query, bank, temperature):
        losses = loss(query, bank, temperature)
        (first,) = torch.autograd.grad(losses, query, torch.ones_like(losses), create_graph=True)
        return torch.autograd.grad(first, query, torch.linspace(-1, 1, first.numel(), dtype=first.dtype).view_as(first))[0]

    def plain(query, bank, temperature):
        return F.cross_entropy(query @ bank.T / temperature[:, None], index.clamp(min=0), reduction="none") * (index >= 0)

    def fused(query, bank, temperature):
        return info_nce(query, bank=bank, targets=index, temperature=temperature, reduction="none", impl="cpu")

    truth = second(plain, query.detach().double().requires_grad_(), bank.double(), temperature.double())
    ours = second(fused, query, bank, temperature)
    assert_as_good_as(ours, second(plain, query, bank, temperature), truth)
    assert (ours[7] == 0).all() and (ours[:5].abs() < 1e-12).all()  # as close to 0 as they are


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


QUERY, KEYS, SCALE = torch.randn(4, 5), torch.randn(3, 5), torch.ones(4)
POSITIVE, COLUMNS, WEIGHTS = torch.randn(4, 2, 5), torch.tensor([[0], [1], [-1], [2]]), torch.rand(4, 2)
NO_RULES = dict.fromkeys(("query_labels", "key_labels", "key_index", "limit", "valid"))


def forward(**given):
    """kdfast::info_nce with its arguments by name, those not given at their simplest."""
    arguments = dict(query=QUERY, keys=KEYS, scale=SCALE, bias=None, **NO_RULES, positive=None, columns=None, weights=None)
    options = dict(include_positive=True, mean=False, pull=True, precision=0)
    return {**arguments, **options, **given}


def backward(**given):
    """kdfast::info_nce_grad, likewise."""
    saved = dict(g=torch.rand(4), statistics=torch.rand(3, 1, 4), pull=torch.rand(1, 4, 5))
    arguments = dict(query=QUERY, keys=KEYS, scale=SCALE, bias=None, **NO_RULES, columns=COLUMNS)
    wanted = {f"want_{name}": True for name in ("query", "keys", "scale", "bias", "positive")}
    return {**saved, **arguments, **wanted, "precision": 0, **given}


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "rows"])
def test_opcheck(mean):
    def check(op, arguments, lead=()):
        saved = ("statistics", "pull")
        lift = lambda name, x: x[None] if lead and isinstance(x, torch.Tensor) and name not in saved and x.dim() else x
        torch.library.opcheck(op.default, tuple(lift(name, x) for name, x in arguments.items()))

    for lead in ((), (1,)):
        check(torch.ops.kdfast.info_nce, forward(positive=POSITIVE, weights=WEIGHTS, mean=mean), lead)
        check(torch.ops.kdfast.info_nce, forward(columns=COLUMNS, bias=torch.rand(3), mean=mean, include_positive=False, pull=False), lead)
        check(torch.ops.kdfast.info_nce, forward(positive=POSITIVE, mean=mean, panels=None, keep_keys=True), lead)
        check(torch.ops.kdfast.info_nce_grad, backward(**(dict(g=torch.rand(())) if mean else {})), lead)
        if mean and not lead:
            kept = dict(g=torch.rand(()), columns=None, want_bias=False, kept_keys=torch.rand(3, 5))
            check(torch.ops.kdfast.info_nce_grad, backward(**kept), lead)
        check(torch.ops.kdfast.info_nce_grad, backward(pull=torch.empty(0), want_query=False, want_scale=False, want_keys=False), lead)


@pytest.mark.parametrize("lead", [(), (2,)], ids=["rows", "batch"])
def test_gradients_of_the_rows_alone_are_those_beside_the_banks(lead):
    one = lead or (1,)
    query, scale, columns = torch.randn(*lead, 4, 5), torch.rand(*lead, 4), torch.zeros(*lead, 4, 2, dtype=torch.int64)
    g, statistics, pull = torch.rand(*lead, 4), torch.rand(4, *one, 4), torch.randn(*one, 4, 5)
    saved = dict(g=g, statistics=statistics, pull=pull, query=query, scale=scale)
    every = torch.ops.kdfast.info_nce_grad(
        **backward(**saved, keys=torch.randn(*lead, 3, 5), columns=columns, want_bias=False, want_keys=False)
    )
    wanted = dict(want_query=True, want_scale=True, want_positive=True)
    alone = torch.ops.kdfast.info_nce_grad_rows(**saved, **wanted)
    dquery, dkeys, dscale, dbias, dpositive = every
    assert dkeys.shape == dbias.shape == (0,)
    for x, y in zip(alone, (dquery, dscale, dpositive), strict=True):
        assert torch.equal(x, y)
    torch.library.opcheck(torch.ops.kdfast.info_nce_grad_rows.default, (*saved.values(), True, True, True))
    filled = dict(saved, scale=torch.full_like(scale, 3.0))
    for x, y in zip(
        torch.ops.kdfast.info_nce_grad_rows(**saved | {"scale": None}, **wanted, factor=3.0),
        torch.ops.kdfast.info_nce_grad_rows(**filled, **wanted),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "copies"), [((1, 1, 7), 1), ((65, 63, 33), 2), ((7, 257, 64), 1), ((70, 200, 20), 3)], ids=str)
def test_few_pairs_have_both_gradients_from_the_scores_of_the_loss(isa, size, copies, dtype):
    """The mean's, beside those of the rows, each of a pass of its own."""
    n, m, d = size
    for factor in (1.0, 60.0):  # logits that lie far apart
        inputs = [
            (x * factor).detach().requires_grad_()
            for x in (unit(n, d, dtype=dtype), unit(n, copies, d, dtype=dtype), unit(m, d, dtype=dtype))
        ]
        temperature = torch.rand(n).add(0.1).requires_grad_()
        every = [*inputs, temperature]
        for include in (True, False):
            options = dict(temperature=temperature, include_positive=include, impl="cpu")
            kept = torch.autograd.grad(info_nce(*inputs, **options), every, torch.tensor(0.7))
            apart = torch.autograd.grad(info_nce(*inputs, reduction="none", **options), every, torch.full((n,), 0.7 / n))
            for x, y in zip(kept, apart, strict=True):
                close = 5e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
                torch.testing.assert_close(x, y, rtol=close, atol=close * float(y.abs().max()))


@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_of_different_dtypes(isa, dtype, other):
    query, positive, keys = QUERY.to(dtype), POSITIVE.to(other), KEYS.to(other)
    ours = torch.ops.kdfast.info_nce(**forward(query=query, keys=keys, positive=positive))
    wide = torch.ops.kdfast.info_nce(**forward(query=query.float(), keys=keys.float(), positive=positive.float()))
    for x, y in zip(ours, wide, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(), "positive or columns must be given, and not both"),
        (dict(positive=POSITIVE, columns=COLUMNS), "positive or columns must be given, and not both"),
        (dict(positive=POSITIVE, query=QUERY[0]), "query must have 2 or 3 dimensions"),
        (dict(positive=POSITIVE, query=QUERY.double()), "takes float32, bfloat16 or float16"),
        (dict(positive=POSITIVE.double()), "takes float32, bfloat16 or float16"),
        (dict(positive=POSITIVE[..., :4]), "positive has size"),
        (dict(positive=POSITIVE[0, 0]), "positive must have 2 or 3 dimensions"),
        (dict(positive=POSITIVE, scale=SCALE.double()), "scale has dtype"),
        (dict(positive=POSITIVE, weights=WEIGHTS[:, :1]), "weights has size"),
        (dict(columns=COLUMNS, keys=KEYS[:2]), r"columns must be in \[-1, 2\)"),
        (dict(columns=COLUMNS.int()), "columns has dtype"),
        (dict(columns=COLUMNS, bias=torch.rand(2)), "bias has size"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kdfast.info_nce(**forward(**given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(g=torch.rand(3)), "g has size"),
        (dict(statistics=torch.rand(1, 1, 4)), "statistics must have 3 dimensions, 2 rows or more"),
        (dict(pull=torch.empty(0)), "pull must have 3 dimensions"),
        (dict(statistics=torch.rand(3, 1, 3)), "statistics has size"),
        (dict(columns=COLUMNS + 1), r"columns must be in \[-1, 3\)"),
        (dict(kept_keys=torch.rand(3, 5)), "kept for the mean"),
        (dict(g=torch.rand(()), columns=None, want_bias=False, kept_keys=torch.rand(2, 5)), "kept_keys has size"),
    ],
)
def test_bad_arguments_of_the_gradient(given, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kdfast.info_nce_grad(**backward(**given))


def formula_gradients(query, positive, bank, dtype):
    query, positive, bank = (x.detach().to(dtype).requires_grad_() for x in (query, positive, bank))
    z = torch.cat([(query * positive).sum(-1, keepdim=True), query @ bank.T], 1)
    return torch.autograd.grad(F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long)), (query, positive, bank))


@pytest.mark.parametrize("shape", [(40_000, 1, 4), (20, 3000, 4), (64, 500, 4), (500, 64, 4)])
def test_gradients_at_the_bounds_of_few_pairs(isa, shape):
    gradients_are_as_good_as_the_formulas(*shape, size=1.0)


def test_logits_of_many_digits(isa):
    """The log-sum-exp of 1e7 has a low digit of half a unit."""
    gradients_are_as_good_as_the_formulas(16, 24, 32, size=1e3)


def gradients_are_as_good_as_the_formulas(n, m, d, size):
    torch.manual_seed(0)
    query, positive, bank = ((torch.randn(k, d) * size).requires_grad_() for k in (n, n, m))
    got = torch.autograd.grad(info_nce(query, positive, bank, temperature=1.0, impl="cpu"), (query, positive, bank))
    exact, naive = (formula_gradients(query, positive, bank, dtype) for dtype in (torch.float64, torch.float32))
    for g, e, f in zip(got, exact, naive, strict=True):
        assert (g - e).norm() <= 2 * (f - e).norm() + 4e-7 * e.norm()
