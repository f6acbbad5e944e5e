"""Plain calls of `similarity_softmax`, of whole matrices and one scale, which have a short way of their own to the kernels."""

import pytest
import torch
from similarity_cases import assert_as_good_as, normal
from similarity_kernel_cases import DTYPES

from kdfast._core import extension
from kdfast._ops import similarity
from kdfast._ops.similarity import plain_pooled, reference
from kdfast.ops import KeyIndex, SameLabel, similarity_softmax

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))


@pytest.fixture
def only_plain(monkeypatch):
    """A call that takes the general way fails."""
    monkeypatch.setattr(similarity, "problem", lambda *args: pytest.fail("took the general way"))


def matrices(n, m, d, width, dtype=torch.float32):
    """Queries, keys and, with a width, values."""
    made = [torch.nn.functional.normalize(normal(n, d), dim=-1), torch.nn.functional.normalize(normal(m, d), dim=-1)]
    return [x.to(dtype).requires_grad_() for x in (made if width is None else [*made, normal(m, width)])]


def gradients(op, leaves, upstream, **options):
    """Both outputs and the gradients of <outputs, upstream>, an upstream None being left out."""
    query, keys, *values = leaves
    outputs = op(query, keys, values=values[0] if values else None, scale=5.0, **options)
    loss = sum((x * u.to(x.dtype)).sum() for x, u in zip(outputs, upstream, strict=True) if u is not None)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(loss, leaves, allow_unused=True)]


# Few pairs, whose scores are kept: ragged, beside a block and a chunk; from rows read in place; wide. The last are too many.
SHAPES = [(64, 256, 128), (1, 1, 1), (97, 129, 33), (200, 300, 16), (5, 70, 17), (70, 9, 17), (9, 17, 700), (130, 700, 20)]


@DTYPES
@pytest.mark.parametrize("width", [None, 20], ids=["values are keys", "values"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_the_formula(isa, only_plain, dtype, shape, width):
    n, m, d = shape
    leaves = matrices(n, m, d, width, dtype)
    upstream = normal(n), normal(n, width or d)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    ours, naive = (gradients(op, leaves, upstream) for op in (similarity_softmax, reference.similarity_softmax))
    for x, y, z in zip(ours, naive, gradients(reference.similarity_softmax, wide, upstream), strict=True):
        assert_as_good_as(x, y, z)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)], ids=["both", "lse", "pooled"])
def test_whatever_has_a_gradient(only_plain, wanted, given):
    leaves = matrices(20, 70, 16, 12)
    upstream = [u if there else None for u, there in zip((normal(20), normal(20, 12)), given, strict=True)]
    every = gradients(reference.similarity_softmax, leaves, upstream)[2:]
    for i, x in enumerate(leaves):
        x.requires_grad_(i in wanted)
    outputs = similarity_softmax(leaves[0], leaves[1], values=leaves[2], scale=5.0)
    pairs = [(x, u) for x, u in zip(outputs, upstream, strict=True) if u is not None]
    if wanted == (2,) and not given[1]:
        return  # lse does not depend on values
    ours = torch.autograd.grad(sum((x * u).sum() for x, u in pairs), [leaves[i] for i in wanted], allow_unused=True)
    for i, x in zip(wanted, ours, strict=True):
        expected = torch.zeros_like(leaves[i]) if every[i] is None else every[i]
        torch.testing.assert_close(torch.zeros_like(leaves[i]) if x is None else x, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 256, 16), (300, 400, 16)], ids=["scores are kept", "they are not"])
def test_a_graph_kept_gives_the_same_bits_and_upstreams_may_have_stride_zero(only_plain, shape):
    query, keys, values = leaves = matrices(*shape, 12)
    total = sum(x.sum() for x in similarity_softmax(query, keys, values=values, scale=5.0))
    first, again = torch.autograd.grad(total, leaves, retain_graph=True), torch.autograd.grad(total, leaves)
    truth = torch.autograd.grad(sum(x.sum() for x in reference.similarity_softmax(query, keys, values=values, scale=5.0)), leaves)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    torch.testing.assert_close(first, truth, rtol=1e-4, atol=1e-5)


def test_calls_that_are_not_plain_are_left_to_the_general_way(monkeypatch):
    query, keys, values = matrices(20, 70, 16, 12)
    truth = reference.similarity_softmax(query, keys, values=values, scale=5.0)
    monkeypatch.setattr(plain_pooled.PooledSoftmax, "apply", lambda *args: pytest.fail("taken for a plain call"))
    count, wide = torch.tensor(70), torch.tensor(5.0, dtype=torch.float64)
    for options in (
        {"scale": wide},
        {"valid": count},
        {"impl": "cpu"},
        {"precision": "ieee"},
        {"exclude": (KeyIndex(torch.full((20,), -1)),)},
    ):
        options = {"scale": 5.0} | options
        torch.testing.assert_close(similarity_softmax(query, keys, values=values, **options), truth)
    nested = similarity_softmax(query[None], keys, values=values, scale=5.0)
    torch.testing.assert_close([x[0] for x in nested], list(truth))
    for bad in (values[:60], values.double()):
        with pytest.raises((ValueError, TypeError), match="values"):
            similarity_softmax(query, keys, values=bad, scale=5.0)


def test_rows_that_are_not_contiguous(only_plain):
    leaves = [x.detach().T.contiguous().T.requires_grad_() for x in matrices(20, 70, 16, 12)]
    upstream = normal(20), normal(12, 20).T
    ours, truth = (gradients(op, leaves, upstream) for op in (similarity_softmax, reference.similarity_softmax))
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [None, 12], ids=["values are keys", "values"])
def test_second_derivative(only_plain, width):
    def second(op, leaves):
        query, keys, *values = leaves
        lse, pooled = op(query, keys, values=values[0] if values else None, scale=5.0)
        first = torch.autograd.grad(lse.square().sum() + pooled.pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() * (i + 1) for i, x in enumerate(first)), leaves)

    leaves = matrices(20, 70, 16, width)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    ours, naive = (second(op, leaves) for op in (similarity_softmax, reference.similarity_softmax))
    for x, y, z in zip(ours, naive, second(reference.similarity_softmax, wide), strict=True):
        assert_as_good_as(x, y, z)


FORMS = {
    "scale": lambda n, m: dict(scale=torch.tensor(5.0, requires_grad=True)),
    "scales": lambda n, m: dict(scale=normal(n).mul(5).index_fill(0, torch.tensor([3]), 0.0).requires_grad_()),
    "bias": lambda n, m: dict(scale=5.0, bias=normal(m).requires_grad_()),
    "valid": lambda n, m: dict(scale=5.0, valid=m - 7),
    "labels": lambda n, m: dict(scale=5.0, exclude=(SameLabel(torch.arange(n) % 5, torch.arange(m) % 7),)),
    "nothing admitted": lambda n, m: dict(scale=5.0, exclude=(SameLabel(torch.arange(n) % 2, torch.zeros(m, dtype=torch.long)),)),
    "all": lambda n, m: FORMS["scales"](n, m) | FORMS["bias"](n, m) | FORMS["labels"](n, m) | dict(valid=m - 7),
}


@DTYPES
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)], ids=["both", "lse", "pooled"])
@pytest.mark.parametrize("width", [None, 12], ids=["values are keys", "values"])
@pytest.mark.parametrize("form", FORMS)
def test_what_a_plain_call_may_have_beside_matrices(monkeypatch, form, width, given, dtype):
    """Both derivatives of every input that may have one: as the general way's, the first ones as good as the formula's."""
    n, m = 20, 70
    leaves, options = matrices(n, m, 16, width, dtype), FORMS[form](n, m)
    upstream = normal(n), normal(n, width or 16)

    def derivatives(op, leaves, options, dtype):
        learnt = [x for x in (options.get("scale"), options.get("bias")) if isinstance(x, torch.Tensor)]
        outputs = op(*leaves[:2], values=leaves[2] if width else None, **options)
        terms = [(x[rows] * u[rows].to(x.dtype)).sum() for x, u, there in zip(outputs, upstream, given, strict=True) if there]
        inputs = [*(leaves if given[1] else leaves[:2]), *learnt]
        once = torch.autograd.grad(sum(terms), inputs, retain_graph=True)
        first = torch.autograd.grad(sum(terms), inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.to(torch.float64).square().sum() for x in first), inputs)
        return [*(x[rows] for x in outputs), *once, *second]

    def cast(x, dtype):
        return x.detach().to(dtype).requires_grad_() if isinstance(x, torch.Tensor) and x.requires_grad else x

    wide = [cast(x, torch.float64) for x in leaves], {k: cast(v, torch.float64) for k, v in options.items()}
    rows = torch.isfinite(reference.similarity_softmax(*wide[0][:2], **wide[1])[0])
    naive = leaves, {k: cast(v, dtype) for k, v in options.items()}
    general = derivatives(similarity_softmax, leaves, options | dict(impl="cpu"), dtype)
    monkeypatch.setattr(similarity, "problem", lambda *args: pytest.fail("took the general way"))
    found = derivatives(similarity_softmax, leaves, options, dtype)
    for ours, its in zip(found, general, strict=True):
        close = 16 * torch.finfo(ours.dtype).eps
        size = max(float(its.abs().max()), 1.0 if its.dim() == 0 else 0.0)  # a scale's is a sum of terms of about 1, which may cancel
        torch.testing.assert_close(ours, its, rtol=close, atol=close * size)
    formulas = derivatives(reference.similarity_softmax, *naive, dtype), derivatives(reference.similarity_softmax, *wide, torch.float64)
    for ours, its, truth in zip(found[: 2 + len(leaves)], *formulas, strict=False):
        assert_as_good_as(ours, its, truth)


def test_batched_upstream_gradients(only_plain):
    query, keys, values = leaves = matrices(20, 70, 16, 12)
    upstream = normal(3, 20, 12)
    pooled = similarity_softmax(query, keys, values=values, scale=5.0)[1]
    ours = torch.autograd.grad(pooled, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        torch.testing.assert_close([x[i] for x in ours], list(torch.autograd.grad(pooled, leaves, upstream[i], retain_graph=True)))


def test_without_gradients_nothing_is_kept(only_plain):
    query, keys, values = matrices(20, 70, 16, 12)
    with torch.no_grad():
        lse, pooled = similarity_softmax(query, keys, values=values, scale=5.0)
    assert lse.grad_fn is None and pooled.grad_fn is None
    torch.testing.assert_close((lse, pooled), tuple(x.detach() for x in similarity_softmax(query, keys, values=values, scale=5.0)))


def test_opcheck():
    for shape in ((64, 100, 16), (300, 400, 16)):
        query, keys, values = (x.detach() for x in matrices(*shape, 12))
        for v, width in ((values, 12), (None, 16)):
            torch.library.opcheck(torch.ops.kdfast.pooled_softmax.default, (query, keys, v, 5.0, True, 0))
            lse, pooled, lse_low, scores = torch.ops.kdfast.pooled_softmax(query, keys, v, 5.0, True, 0)
            args = torch.randn_like(lse), normal(len(query), width), pooled, lse, lse_low, scores, query, keys, v, 5.0
            torch.library.opcheck(torch.ops.kdfast.pooled_softmax_grad.default, (*args, True, True, v is not None, 0))
            rules = torch.rand(len(query)), normal(len(keys)), torch.arange(len(query)) % 3, torch.arange(len(keys)) % 5
            torch.library.opcheck(torch.ops.kdfast.pooled_softmax.default, (query, keys, v, 1.0, True, 0, *rules))
            lse, pooled, lse_low, scores = torch.ops.kdfast.pooled_softmax(query, keys, v, 1.0, True, 0, *rules)
            args = torch.randn_like(lse), None, pooled, lse, lse_low, scores, query, keys, v, 1.0, True, True, False, 0
            torch.library.opcheck(torch.ops.kdfast.pooled_softmax_grad.default, (*args, *rules, True))
