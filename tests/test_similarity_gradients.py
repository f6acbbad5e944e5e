"""Gradients of the similarity ops: both orders in float64, accuracy by dtype, transforms, a bank updated before backward."""

import pytest
import torch
from similarity_cases import IMPLS, assert_as_good_as, cast, everything, normal, serve_or_skip
from torch.autograd import gradcheck, gradgradcheck

from kdfast._ops.similarity import portable, reference, similarity_lse
from kdfast._ops.similarity.losses import sigmoid
from kdfast._ops.similarity.losses.sigmoid import sigmoid_pair_loss
from kdfast.ops import KeyIndex, SameLabel, similarity_softmax

both = pytest.mark.parametrize("op", [similarity_softmax, similarity_lse], ids=["softmax", "lse"])
every_impl = pytest.mark.parametrize("impl", IMPLS)


def leaves(query, keys, kwargs):
    """All differentiable tensors of a problem, requiring grad."""
    start_logit, start_value = kwargs["start"]
    named = dict(query=query, keys=keys, scale=kwargs["scale"], bias=kwargs["bias"], start_logit=start_logit, start_value=start_value)
    if "values" in kwargs:
        named["values"] = kwargs["values"]
    return {name: x.requires_grad_() for name, x in named.items()}


# float64, both orders


@pytest.mark.parametrize("batch", [(), (2,)], ids=["one bank", "a bank each"])
@pytest.mark.parametrize("dv", [None, 2], ids=["values are keys", "values"])
def test_softmax_gradcheck_with_everything(batch, dv):
    n, m, d = 3, 7, 4
    kwargs = everything(n, m, d, dtype=torch.float64, dv=dv, batch=batch)
    if dv is not None:
        kwargs["values"] = normal(*batch, m, dv, dtype=torch.float64)
    kwargs["exclude"] = kwargs["exclude"][:2]  # finite differences may step over a margin
    tensors = leaves(normal(*batch, n, d, dtype=torch.float64), normal(*batch, m, d, dtype=torch.float64), kwargs)

    def op(query, keys, scale, bias, start_logit, start_value, values=None):
        changed = dict(kwargs, scale=scale, bias=bias, start=(start_logit, start_value), values=values)
        return similarity_softmax(query, keys, **changed)

    assert gradcheck(op, tuple(tensors.values()), fast_mode=True)
    assert gradgradcheck(op, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("bank_grad", [True, False], ids=["bank with gradient", "bank without"])
def test_lse_gradcheck_with_everything(bank_grad):
    kwargs = everything(3, 7, 4, dtype=torch.float64)
    kwargs["exclude"] = kwargs["exclude"][:2]
    tensors = leaves(normal(3, 4, dtype=torch.float64), normal(7, 4, dtype=torch.float64), kwargs)
    tensors["start_value"].requires_grad_(False)
    for name in ("keys", "bias"):
        tensors[name].requires_grad_(bank_grad)

    def op(query, keys, scale, bias, start_logit, start_value):
        return similarity_lse(query, keys, **dict(kwargs, scale=scale, bias=bias, start=(start_logit, start_value)))[0]

    assert gradcheck(op, tuple(tensors.values()), fast_mode=True)
    assert gradgradcheck(op, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("batch", [(), (2,)], ids=["one bank", "a bank each"])
def test_sigmoid_pair_loss_gradcheck(batch):
    query, keys = (normal(*batch, n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 7))
    scale, shift = torch.tensor(1.3, dtype=torch.float64, requires_grad=True), normal(*batch, 3, dtype=torch.float64, requires_grad=True)
    index = torch.randint(-1, 7, (*batch, 3))

    def op(*args):
        return sigmoid_pair_loss(*args, index)

    assert gradcheck(op, (query, keys, scale, shift), fast_mode=True)
    assert gradgradcheck(op, (query, keys, scale, shift), fast_mode=True)


def test_second_order_over_several_tiles():
    """gradgradcheck's problems fit one tile; here rows and columns both span several, and every cotangent is given."""
    kwargs = everything(300, 1100, 4, dtype=torch.float64, dv=3)
    kwargs["values"] = normal(1100, 3, dtype=torch.float64)
    tensors = leaves(normal(300, 4, dtype=torch.float64), normal(1100, 4, dtype=torch.float64), kwargs)
    inputs = tuple(tensors.values())
    weights = [normal(300, dtype=torch.float64), normal(300, 3, dtype=torch.float64)]

    def second(op):
        outputs = op(tensors["query"], tensors["keys"], **kwargs)
        first = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, outputs, strict=True)), inputs, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    for ours, truth in zip(second(similarity_softmax), second(reference.similarity_softmax), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)


@both
def test_double_backward_in_bfloat16(op):
    """The sums are formed in float32, so only the first-order gradients' own rounding to bfloat16 shows."""
    inputs = normal(7, 8, dtype=torch.bfloat16, requires_grad=True), normal(65, 8, dtype=torch.bfloat16, requires_grad=True)

    def second(op, inputs):
        lse, pooled = op(*inputs, scale=0.3)
        first = torch.autograd.grad(lse.sum() + (pooled.sum() if pooled is not None else 0), inputs, create_graph=True)
        return torch.autograd.grad(first[0].float().square().sum() + first[1].float().square().sum(), inputs)

    def plain(query, keys, scale):
        lse, pooled = reference.similarity_softmax(query, keys, scale=scale)
        return lse, pooled if op is similarity_softmax else None

    truth = second(plain, [x.detach().double().requires_grad_() for x in inputs])
    for ours, expected in zip(second(op, inputs), truth, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


def test_a_third_derivative_is_refused():
    query, keys = normal(3, 4, requires_grad=True), normal(7, 4)
    lse, _ = similarity_lse(query, keys)
    (first,) = torch.autograd.grad(lse.sum(), query, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="first and second derivatives only"):
        torch.autograd.grad(second.sum(), query)


# accuracy


@every_impl
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_as_accurate_as_the_formula(op, dtype, impl):
    serve_or_skip(impl, dtype)
    kwargs = everything(65, 257, 16, dtype=dtype)
    kwargs["exclude"] = kwargs["exclude"][:2]
    tensors = leaves(normal(65, 16, dtype=dtype), normal(257, 16, dtype=dtype), kwargs)
    upstream = normal(65), normal(65, 16)

    def gradients(op, tensors, wanted, **options):
        changed = dict(scale=tensors["scale"], bias=tensors["bias"], start=(tensors["start_logit"], tensors["start_value"]))
        lse, pooled = op(tensors["query"], tensors["keys"], **{**kwargs, **changed, **options})
        loss = (lse * upstream[0]).sum() + ((pooled * upstream[1]).sum() if wanted == len(tensors) else 0)
        return torch.autograd.grad(loss, list(tensors.values())[:wanted])

    wanted = 6 if op is similarity_softmax else 5  # lse does not depend on the start's value
    ours = gradients(op, tensors, wanted, impl=impl)
    naive = gradients(reference.similarity_softmax, {k: x.detach().to(dtype).requires_grad_() for k, x in tensors.items()}, wanted)
    truth = gradients(reference.similarity_softmax, {k: x.detach().double().requires_grad_() for k, x in tensors.items()}, wanted)
    for name, x, y, z in zip(tensors, ours, naive, truth, strict=False):
        assert x.dtype == tensors[name].dtype, name
        assert_as_good_as(x, y, z)


@pytest.mark.skipif("cpu" not in IMPLS, reason="needs the compiled kernels")
@pytest.mark.parametrize("wanted", ["keys", "bias", "keys and bias"])
def test_the_bank_gradient_of_lse_is_the_kernels(monkeypatch, wanted):
    monkeypatch.setattr(portable, "gradients", lambda *args: pytest.fail("ran the portable pass"))
    query, keys, bias = normal(3, 9, 8, requires_grad=True), normal(65, 8), normal(3, 65)
    leaves = [x.requires_grad_() for name, x in (("keys", keys), ("bias", bias)) if name in wanted]
    for options in ({}, {"precision": "bf16"}):
        ours = torch.autograd.grad(similarity_lse(query, keys, bias=bias, impl="cpu", **options)[0].sum(), leaves)
        truth = torch.autograd.grad(reference.similarity_softmax(query, keys, bias=bias)[0].sum(), leaves)
        tolerance = {"rtol": 3e-2, "atol": 3e-2} if options else {}
        torch.testing.assert_close(ours, truth, **tolerance)


@every_impl
def test_learnable_temperature_and_low_cosines_at_scale_150(impl):
    query = torch.nn.functional.normalize(normal(5, 16), dim=-1).requires_grad_()
    keys = torch.nn.functional.normalize(normal(257, 16), dim=-1)
    scale = torch.tensor(150.0, requires_grad=True)

    def gradients(op, *inputs, **options):
        inputs = [x.detach().requires_grad_() for x in inputs]
        lse, _ = op(inputs[0], keys.to(inputs[0].dtype), scale=inputs[1], **options)
        return torch.autograd.grad(lse.sum(), inputs)

    ours = gradients(similarity_lse, query, scale, impl=impl)
    naive = gradients(reference.similarity_softmax, query, scale)
    for x, y, z in zip(ours, naive, gradients(reference.similarity_softmax, query.double(), scale.double()), strict=True):
        assert_as_good_as(x, y, z)


@pytest.mark.skipif("cpu" not in IMPLS, reason="needs the compiled kernels")
@pytest.mark.parametrize("case", ["pooled", "values", "lse beside values", "lse with a start value"])
def test_first_order_is_the_kernels(monkeypatch, case):
    """Every first-order case, whatever is differentiated; the portable pass is never run for impl="cpu"."""
    monkeypatch.setattr(portable, "gradients", lambda *args: pytest.fail("ran the portable pass"))
    query, keys, values = (x.requires_grad_() for x in (normal(9, 8), normal(65, 8), normal(65, 5)))
    start = normal(9).requires_grad_(), normal(9, 5 if "values" in case else 8).requires_grad_()
    options = {"start": start} if case != "pooled" else {}
    if "values" in case:
        options["values"] = values
    upstream = normal(9), normal(9, 5 if "values" in case else 8)

    def gradients(op, **more):
        lse, pooled = op(query, keys, **options, **more)
        loss = (lse * upstream[0]).sum() + (0 if case.startswith("lse") else (pooled * upstream[1]).sum())
        return torch.autograd.grad(loss, [query, keys, *([start[0]] if "start" in options else [])])

    torch.testing.assert_close(gradients(similarity_softmax, impl="cpu"), gradients(reference.similarity_softmax), rtol=1e-4, atol=1e-5)


def second_order_of_lse(op, tensors, weights, **options):
    """The gradient of a function of every first-order gradient of lse."""
    leaves = [x for x in tensors.values() if x.requires_grad]
    named = dict(tensors)
    if "start_logit" in named:
        named["start"] = (named.pop("start_logit"), options.pop("start_value", None))
    lse, _ = op(named.pop("query"), named.pop("keys"), **named, **options)
    first = torch.autograd.grad((lse * weights).sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum((x.double().square() * (i + 1)).sum() for i, x in enumerate(first)), leaves)


@every_impl
@pytest.mark.parametrize("tangents", ["query", "query and start", "keys", "everything"])
def test_second_order_of_lse_is_as_accurate_as_the_formula(impl, tangents):
    rules = {"exclude": (KeyIndex(torch.arange(33)), SameLabel(torch.arange(33) % 5, torch.arange(130) % 7)), "valid": 120}
    tensors = {"query": normal(33, 16, requires_grad=True), "keys": normal(130, 16, requires_grad=tangents in ("keys", "everything"))}
    if tangents != "query":
        tensors["start_logit"] = normal(33, requires_grad=True)
    if tangents == "everything":
        tensors |= {"bias": normal(130, requires_grad=True), "scale": (0.5 + torch.rand(33)).requires_grad_()}
    weights = normal(33)
    start = {"start_value": normal(33, 16)} if "start_logit" in tensors else {}
    ours = second_order_of_lse(similarity_lse, tensors, weights, impl=impl, **rules, **start)
    wide = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    truth = second_order_of_lse(reference.similarity_softmax, wide, weights.double(), **rules, **cast(start, torch.float64))
    naive = second_order_of_lse(reference.similarity_softmax, tensors, weights, **rules, **start)
    for x, y, z in zip(ours, naive, truth, strict=True):
        assert_as_good_as(x, y, z)


@pytest.mark.skipif("cpu" not in IMPLS, reason="needs the compiled kernels")
@pytest.mark.parametrize("keys_grad", [True, False], ids=["bank with gradient", "bank without"])
def test_second_order_of_lse_is_the_kernels(monkeypatch, keys_grad):
    monkeypatch.setattr(portable, "gradients", lambda *args: pytest.fail("ran the portable pass"))
    tensors = {"query": normal(9, 8, requires_grad=True), "keys": normal(65, 8, requires_grad=keys_grad)}
    ours = second_order_of_lse(similarity_lse, tensors, torch.ones(9), impl="cpu")
    truth = second_order_of_lse(reference.similarity_softmax, tensors, torch.ones(9))
    torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-3)


@every_impl
def test_one_candidate_dominates_at_a_large_lse(impl):
    """lse near 100 has a unit in the last place of 8e-6; with its low digits p = 1 errs by less."""
    keys = torch.nn.functional.normalize(normal(40, 16), dim=-1)
    query = (keys[:20] + 0.01 * normal(20, 16)).requires_grad_()
    keys.requires_grad_()

    def gradients(op, query, keys, **options):
        return torch.autograd.grad(op(query, keys, scale=torch.tensor(100.0, dtype=query.dtype), **options)[0].sum(), (query, keys))

    ours, naive = gradients(similarity_lse, query, keys, impl=impl), gradients(reference.similarity_softmax, query, keys)
    for x, y, z in zip(ours, naive, gradients(reference.similarity_softmax, query.double(), keys.double()), strict=True):
        assert_as_good_as(x, y, z)


# use


@every_impl
@both
def test_upstream_gradients_of_stride_zero_and_a_graph_kept(op, impl):
    query, keys = normal(7, 8, requires_grad=True), normal(65, 8, requires_grad=True)
    total = op(query, keys, impl=impl)[0].sum()
    first = torch.autograd.grad(total, (query, keys), retain_graph=True)
    again = torch.autograd.grad(total, (query, keys))
    truth = torch.autograd.grad(torch.logsumexp(query @ keys.T, -1).sum(), (query, keys))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    torch.testing.assert_close(first, truth)


@every_impl
def test_only_one_output_is_used(impl):
    """Either upstream may be missing; with a start or other values the pooled output is not lse's gradient."""
    query, keys = normal(7, 8, requires_grad=True), normal(65, 8, requires_grad=True)
    start = normal(7), normal(7, 8)
    for output in (0, 1):
        ours = torch.autograd.grad(similarity_softmax(query, keys, start=start, impl=impl)[output].sum(), (query, keys))
        truth = torch.autograd.grad(reference.similarity_softmax(query, keys, start=start)[output].sum(), (query, keys))
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)
    values = normal(65, 8)
    ours = torch.autograd.grad(similarity_softmax(query, keys, values=values)[0].sum(), (query, keys))
    torch.testing.assert_close(ours, torch.autograd.grad(torch.logsumexp(query @ keys.T, -1).sum(), (query, keys)))


@every_impl
def test_first_backward_never_reads_a_bank_without_gradient(impl):
    query, keys, bias, valid = normal(7, 8, requires_grad=True), normal(65, 8), normal(65), torch.tensor(60)
    rule = SameLabel(torch.arange(7), torch.arange(65) % 9)
    expected = torch.autograd.grad(reference.similarity_softmax(query, keys, bias=bias, valid=60, exclude=(rule,))[0].sum(), query)
    lse, _ = similarity_lse(query, keys, bias=bias, valid=valid, exclude=(rule,), impl=impl)
    for x in (keys, bias):
        x.fill_(torch.nan)
    valid.zero_()
    rule.key_labels.zero_()
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), query, retain_graph=True), expected)
    (first,) = torch.autograd.grad(lse.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="updated in place"):
        first.sum().backward()


@every_impl
def test_a_bank_with_gradient_must_not_change(impl):
    query, keys = normal(7, 8, requires_grad=True), normal(65, 8, requires_grad=True)
    lse, _ = similarity_lse(query, keys, impl=impl)
    with torch.no_grad():
        keys.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lse.sum().backward()


def test_a_bank_made_in_inference_mode():
    with torch.inference_mode():
        keys = normal(65, 8)
    query = normal(7, 8, requires_grad=True)
    (first,) = torch.autograd.grad(similarity_lse(query, keys)[0].sum(), query, create_graph=True)
    first.sum().backward()
    assert query.grad.isfinite().all()


def test_rows_with_nothing_admitted_have_zero_gradients_of_both_orders():
    query, keys = normal(3, 8, requires_grad=True), normal(65, 8, requires_grad=True)
    rule = SameLabel(torch.tensor([0, 1, 0]), torch.zeros(65, dtype=torch.int64))
    lse, pooled = similarity_softmax(query, keys, exclude=(rule,))
    first = torch.autograd.grad(lse.sum() + pooled.square().sum(), (query, keys), create_graph=True)
    second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (query, keys))
    for dquery, dkeys in (first, second):
        assert (dquery[::2] == 0).all() and dquery[1].abs().sum() > 0 and dkeys.isfinite().all()


# compiled code and transforms


def loss_of(op):
    labels = SameLabel(torch.randint(0, 5, (5,)), torch.randint(0, 5, (65,)))

    def loss(query, keys, scale):
        lse, pooled = op(query, keys, scale=scale, exclude=(labels, KeyIndex(torch.arange(5))), valid=60, start=(query.sum(-1), query))
        return lse.mean() + (0 if op is similarity_lse else pooled.square().mean())

    return loss


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("bank_grad", [True, False], ids=["bank with gradient", "bank without"])
@both
def test_compile_fullgraph(op, bank_grad):
    inputs = normal(5, 8, requires_grad=True), normal(65, 8, requires_grad=bank_grad), torch.tensor(0.7, requires_grad=True)
    wanted = [x for x in inputs if x.requires_grad]
    loss = loss_of(op)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, ours = loss(*inputs), compiled(*inputs)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, wanted), torch.autograd.grad(expected, wanted))


def test_compile_fullgraph_sigmoid():
    inputs = normal(5, 8, requires_grad=True), normal(65, 8, requires_grad=True), torch.tensor(0.7, requires_grad=True)

    def loss(query, keys, scale):
        return sigmoid_pair_loss(query, keys, scale, -1.0, torch.arange(5)).mean()

    expected, ours = loss(*inputs), torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs))


COMPILED_FORMS = ["similarity_forward", "similarity_gradients", "sigmoid_forward", "sigmoid_gradients"]


@pytest.mark.parametrize("op", [getattr(torch.ops.kdfast_torch, name) for name in COMPILED_FORMS], ids=COMPILED_FORMS)
def test_opcheck_of_the_compiled_form(op):
    query, keys, scale, g, none = normal(2, 3, 4), normal(2, 7, 4), torch.ones(2, 3), torch.ones(2, 3), (None,) * 4
    pairs = (query, keys, scale, torch.zeros(2, 3), torch.tensor([[0, 1, 2], [3, -1, 6]]))
    problem = (query, keys, scale, torch.zeros(2, 7), None, None, None)
    args = {
        torch.ops.kdfast_torch.similarity_forward: (*problem[:6], *none, torch.tensor([7, 5]), True, None, torch.float32),
        torch.ops.kdfast_torch.similarity_gradients: (
            *(g, normal(2, 3, 4), *problem[:4], normal(2, 7, 4), torch.ones(2, 3), torch.zeros(2, 3), *none, None),
            *([True, True, True, True], torch.float32),
        ),
        torch.ops.kdfast_torch.sigmoid_forward: (*pairs, torch.float32),
        torch.ops.kdfast_torch.sigmoid_gradients: (g, *pairs, True, True, torch.float32),
    }[op]
    torch.library.opcheck(op, args)


@both
def test_func_grad_hessian_and_vmap(op):
    loss, (query, keys, scale) = loss_of(op), (normal(5, 8), normal(65, 8), torch.tensor(0.7))

    def expected(*inputs):
        inputs = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(loss(*inputs), inputs)

    every = (0, 1, 2)
    torch.testing.assert_close(torch.func.grad(loss, every)(query, keys, scale), expected(query, keys, scale))
    hessian = torch.func.jacrev(torch.func.grad(loss))(query, keys, scale)
    truth = torch.autograd.functional.hessian(lambda x: loss(x, keys, scale), query)
    torch.testing.assert_close(hessian, truth)
    queries, banks = normal(3, 5, 8), normal(3, 65, 8)
    shared = torch.func.vmap(torch.func.grad(loss, every), (0, None, None))(queries, keys, scale)
    own = torch.func.vmap(torch.func.grad(loss, every), (0, 0, None))(queries, banks, scale)
    for i in range(3):
        torch.testing.assert_close(tuple(x[i] for x in shared), expected(queries[i], keys, scale), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(tuple(x[i] for x in own), expected(queries[i], banks[i], scale), rtol=1e-4, atol=1e-6)


@every_impl
@pytest.mark.parametrize("form", ["lse", "softmax", "values"])
def test_batched_upstream_gradients(form, impl):
    """is_grads_batched: vmap over the backward, of a bank with gradient too."""
    query, keys, values = normal(5, 8, requires_grad=True), normal(65, 8, requires_grad=True), normal(65, 3, requires_grad=True)
    op = similarity_lse if form == "lse" else similarity_softmax
    outputs = op(query, keys, impl=impl, **({"values": values} if form == "values" else {}))
    outputs = [x for x in outputs if x is not None and x.requires_grad]
    inputs = [query, keys, *([values] if form == "values" else [])]
    upstream = [normal(4, *x.shape) for x in outputs]
    together = torch.autograd.grad(outputs, inputs, upstream, is_grads_batched=True, retain_graph=True)
    for i in range(4):
        alone = torch.autograd.grad(outputs, inputs, [g[i] for g in upstream], retain_graph=True)
        torch.testing.assert_close(tuple(x[i] for x in together), alone, rtol=1e-4, atol=1e-5)


@every_impl
@both
def test_hessian_vector_product(op, impl):
    query, keys, direction = normal(5, 8), normal(65, 8), normal(5, 8)

    def loss(op, query, **options):
        lse, pooled = op(query, keys, **options)
        return lse.square().sum() + (pooled.square().sum() if pooled is not None else 0)

    def plain(query, keys):
        lse, pooled = reference.similarity_softmax(query, keys)
        return lse, pooled if op is similarity_softmax else None

    ours = torch.func.vjp(torch.func.grad(lambda q: loss(op, q, impl=impl)), query)[1](direction)
    truth = torch.func.vjp(torch.func.grad(lambda q: loss(plain, q)), query)[1](direction)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


def test_vmap_over_rows_of_a_shared_bank():
    query, keys = normal(5, 3, 8), normal(65, 8)
    per_sample = torch.func.vmap(torch.func.grad(lambda q: similarity_lse(q, keys)[0].sum()))(query)
    torch.testing.assert_close(per_sample, torch.softmax(query @ keys.T, -1) @ keys)
    lse = torch.func.vmap(lambda q: similarity_lse(q, keys)[0], in_dims=1, out_dims=1)(query)
    torch.testing.assert_close(lse, torch.logsumexp(query @ keys.T, -1))


# the sigmoid pair loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n, m", [(1, 7), (3, 65), (300, 1100)])
@every_impl
def test_sigmoid_pair_loss_is_as_accurate_as_the_formula(impl, n, m, dtype):
    index = torch.randint(-1, m, (n,))
    inputs = normal(n, 16, dtype=dtype), normal(m, 16, dtype=dtype), torch.tensor(10.0), torch.tensor(-10.0)

    def run(op, *inputs, **options):
        inputs = [x.requires_grad_() for x in inputs]
        loss = op(*inputs, index, **options)
        return loss, *torch.autograd.grad(loss.sum(), inputs)

    ours = run(sigmoid_pair_loss, *cast(inputs, dtype)[:2], *inputs[2:], impl=impl)
    same = torch.float32 if impl == "torch" else dtype  # the kernel rounds the weights to bf16 as well
    naive, truth = (run(sigmoid.reference, *cast(inputs, wide)) for wide in (same, torch.float64))
    for x, y, z in zip(ours, naive, truth, strict=True):
        assert_as_good_as(x, y.to(x.dtype), z)


def test_sigmoid_pair_loss_bad_input():
    q, k, i = normal(3, 8), normal(5, 8), torch.zeros(3, dtype=torch.int64)
    for error, word, args in [
        (ValueError, "keys must have the width of query", (q, normal(5, 7), 1.0, 0.0, i)),
        (TypeError, "keys must have the dtype of query", (q, k.double(), 1.0, 0.0, i)),
        (TypeError, "scale must be a float", (q, k, None, 0.0, i)),
        (ValueError, "shift must be a float, 0-d", (q, k, 1.0, normal(4), i)),
        (ValueError, "positive_index must have shape", (q, k, 1.0, 0.0, i[:2])),
        (IndexError, "positive_index must lie in", (q, k, 1.0, 0.0, i + 5)),
    ]:
        with pytest.raises(error, match=word):
            sigmoid_pair_loss(*args)
