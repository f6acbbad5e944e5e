"""impl="cpu" of similarity_softmax: the second derivative of lse and the pooled output by one op, against the definition's in float64."""

import pytest
import torch
from similarity_cases import assert_as_good_as, assert_directions_together, cast, everything, normal

from kdfast._core import impls
from kdfast._ops.similarity import reference, second_order_pooled
from kdfast.ops import similarity_softmax

pytestmark = pytest.mark.skipif(impls.table()["similarity_softmax"]["cpu"] is not None, reason="no compiled kernels")

SIZES = [(1, 1, 1, 1), (7, 257, 64, 3), (130, 65, 20, 40), (70, 700, 33, 17)]


@pytest.fixture
def one_op(monkeypatch):
    """No sums but the op's."""
    monkeypatch.setattr(second_order_pooled, "_in_tiles", None)


def second(op, problem, leaves, dtype, lse=True, constant_h=False):
    """Gradients of <directions, gradients of <g, lse> + <h, pooled>> in the leaves, and g and h."""
    problem = cast(problem, dtype)
    given = [problem[name].requires_grad_() for name in leaves]
    generator = torch.Generator().manual_seed(1)
    made = lambda x: torch.randn(x.shape, generator=generator).to(x.dtype)
    outputs = op(**problem)[0 if lse else 1 :]
    upstreams = [made(x.detach()).requires_grad_(not constant_h) for x in outputs]
    first = torch.autograd.grad(outputs, given, upstreams, create_graph=True)
    return torch.autograd.grad(first, given if constant_h else [*given, *upstreams], [made(x) for x in given])


def fused(**problem):
    return similarity_softmax(**problem, impl="cpu")


def made_problem(n, m, d, dv, values, lead, keys_lead):
    rules = everything(n, m, d, dtype=torch.float32, batch=lead)
    del rules["start"]
    problem = rules | dict(query=normal(*lead, n, d), keys=normal(*keys_lead, m, d))
    return problem | (dict(values=normal(*keys_lead, m, dv)) if values else {})


@pytest.mark.parametrize("leaves", ["query", "query keys scale", "query keys values"])
@pytest.mark.parametrize("batch", ["none", "shared keys", "keys each"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_accurate_as_the_definition(isa, one_op, size, batch, leaves):
    n, m, d, dv = size
    lead = () if batch == "none" else (2,)
    problem = made_problem(n, m, d, dv, "values" in leaves, lead, lead if batch == "keys each" else ())
    if batch == "shared keys":
        problem |= {name: problem[name].expand(2, *problem[name].shape) for name in ("keys", "values") if name in problem}
    ours = second(fused, problem, leaves.split(), torch.float32)
    naive, truth = (second(reference.similarity_softmax, problem, leaves.split(), dtype) for dtype in (torch.float32, torch.float64))
    for x, y, z in zip(ours, naive, truth, strict=True):
        assert_as_good_as(x, y, z, factor=3 if isa == "base" else 2)  # whose products add up in one chain, without fused operations


@pytest.mark.parametrize("lse", [True, False])
@pytest.mark.parametrize("m", [200, 600])
def test_upstreams_that_are_constant_or_not_there(isa, one_op, m, lse):
    problem = made_problem(40, m, 24, 5, True, (), ())
    for constant in (True, False):
        ours = second(fused, problem, ("query", "keys"), torch.float32, lse, constant)
        naive, truth = (
            second(reference.similarity_softmax, problem, ("query", "keys"), dtype, lse, constant)
            for dtype in (torch.float32, torch.float64)
        )
        for x, y, z in zip(ours, naive, truth, strict=True):
            assert_as_good_as(x, y, z)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("size", [(300, 400, 64), (200, 2000, 64)], ids=str)
def test_threads(one_op, size, threads):
    """Rectangles of rows and columns, each with its part of a row's moments."""
    n, m, d = size
    problem = made_problem(n, m, d, d, False, (), ())
    leaves = ("query", "keys", "scale")
    alone = second(fused, problem, leaves, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, again = (second(fused, problem, leaves, torch.float32) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for x, y, z in zip(first, again, alone, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-5 * float(z.abs().max()))


@pytest.mark.parametrize("m", [90, 1100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_of_short_numbers(isa, one_op, dtype, m):
    problem = {name: x.to(dtype).float() for name, x in dict(query=normal(70, 40), keys=normal(m, 40)).items()}
    leaves = ("query", "keys")
    found = [
        second(op, problem | dict(scale=0.2), leaves, t)[:2] for op, t in ((fused, dtype), (reference.similarity_softmax, torch.float64))
    ]
    for x, z in zip(*found, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), z, rtol=2e-2, atol=2e-2 * float(z.abs().max()))


def test_a_row_that_admits_nothing_and_keys_beyond_valid(isa, one_op):
    query, keys = normal(3, 5).requires_grad_(), normal(8, 5)
    keys[6:] = torch.nan
    keys.requires_grad_()
    bias = torch.full((8,), -torch.inf)
    for given, zero in ((None, False), (bias, True)):
        pooled = fused(query=query, keys=keys, valid=6, bias=given)[1]
        first = torch.autograd.grad(pooled.square().sum(), (query, keys), create_graph=True)
        found = torch.autograd.grad(first, (query, keys), (normal(3, 5), torch.ones(8, 5)))
        assert all(x.isfinite().all() for x in found) and bool((found[1][6:] == 0).all())
        assert all(bool((x == 0).all()) for x in found) == zero


def test_many_directions_at_once(one_op):
    assert_directions_together(lambda query, keys: fused(query=query, keys=keys)[1], [(4, 5), (9, 5)])


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("values", [True, False])
def test_opcheck(moves, values):
    query, keys, scale = normal(2, 4, 5), normal(2, 6, 5), torch.rand(2, 4)
    v, width = (normal(2, 6, 3), 3) if values else (None, 5)
    rules = torch.rand(2, 6), v, None, None, torch.zeros(2, 4, 1, dtype=torch.int64), None, torch.tensor([5, 6])
    lse, _, low = torch.ops.kdfast.similarity_softmax(query, keys, scale, rules[0], None, v, None, *rules[2:], True, 0)
    along = (normal(2, 4, 5), normal(2, 6, 5), torch.rand(2, 4)) if moves else (normal(2, 4, 5), None, None)
    of_values = normal(2, 6, 3) if moves and values else None
    given = torch.rand(2, 4), normal(2, 4, width), *along, of_values, lse, low, query, keys, scale, *rules
    given = *given, moves, moves, moves, moves and values, 0
    torch.library.opcheck(torch.ops.kdfast.similarity_pooled_second.default, given)
