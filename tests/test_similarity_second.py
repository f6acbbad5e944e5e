"""impl="cpu" of similarity_softmax: the second derivative of lse by one op, against the definition's in float64."""

import pytest
import torch
import torch.nn.functional as F
from similarity_cases import assert_as_good_as, assert_directions_together, cast, everything, normal

from kdfast._core import impls
from kdfast._ops.similarity import reference, second_order
from kdfast.ops import similarity_softmax

pytestmark = pytest.mark.skipif(impls.table()["similarity_softmax"]["cpu"] is not None, reason="no compiled kernels")

SIZES = [(1, 1, 1), (3, 65, 7), (7, 257, 64), (130, 150, 20)]


@pytest.fixture
def one_op(monkeypatch):
    """No sums but the op's."""
    monkeypatch.setattr(second_order, "run_gradients", None)


def second(op, problem, leaves, dtype):
    """Gradients of <directions, gradients of <g, lse>> in the leaves and g."""
    problem = cast(problem, dtype)
    given = [problem[name].requires_grad_() for name in leaves]
    generator = torch.Generator().manual_seed(1)
    made = lambda x: torch.randn(x.shape, generator=generator).to(x.dtype)
    lse, _ = op(**problem)
    g = made(lse.detach()).requires_grad_()
    first = torch.autograd.grad(lse, given, g, create_graph=True)
    return torch.autograd.grad(first, [*given, g], [made(x) for x in given])


def fused(**problem):
    return similarity_softmax(**problem, impl="cpu")


@pytest.mark.parametrize("leaves", [("query",), ("query", "scale"), ("keys",), ("query", "keys", "scale")], ids=" ".join)
@pytest.mark.parametrize("batch", ["none", "shared keys", "keys each"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_accurate_as_the_definition(isa, one_op, size, batch, leaves):
    n, m, d = size
    lead = () if batch == "none" else (2,)
    rules = everything(n, m, d, dtype=torch.float32, batch=lead)
    del rules["start"]
    keys = normal(*(lead if batch == "keys each" else ()), m, d)
    problem = rules | dict(query=normal(*lead, n, d), keys=keys)
    if batch == "shared keys":
        problem["keys"] = keys.expand(2, m, d)
    ours = second(fused, problem, leaves, torch.float32)
    naive, truth = (second(reference.similarity_softmax, problem, leaves, dtype) for dtype in (torch.float32, torch.float64))
    for x, y, z in zip(ours, naive, truth, strict=True):
        assert_as_good_as(x, y, z)


@pytest.mark.parametrize("leaves", [("keys",), ("keys", "scale"), ("query", "keys")], ids=" ".join)
@pytest.mark.parametrize("m", [1, 40])
def test_candidates_that_hold_all_of_their_rows(isa, one_op, m, leaves):
    """A rate less the rates' mean is 0, however large both are: 1e-2 was left of them, and now 4e-9."""
    keys = F.normalize(normal(m, 33), dim=1)
    problem = dict(query=keys[torch.randint(m, (300,))] + 0.01 * normal(300, 33), keys=keys, scale=100 + 100 * torch.rand(300))
    ours = second(fused, problem, leaves, torch.float32)
    if leaves == ("keys",):
        assert ours[0].abs().max() < 1e-7
        return
    naive, truth = (second(reference.similarity_softmax, problem, leaves, dtype) for dtype in (torch.float32, torch.float64))
    for x, y, z in zip(ours, naive, truth, strict=True):
        assert_as_good_as(x, y, z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_of_short_numbers(isa, one_op, dtype):
    problem = {name: x.to(dtype).float() for name, x in dict(query=normal(70, 40), keys=normal(90, 40)).items()}
    leaves = ("query", "keys")
    found = [
        second(op, problem | dict(scale=0.2), leaves, t)[:2] for op, t in ((fused, dtype), (reference.similarity_softmax, torch.float64))
    ]
    for x, z in zip(*found, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), z, rtol=2e-2, atol=2e-2 * float(z.abs().max()))


def test_many_directions_at_once(one_op):
    assert_directions_together(lambda query, keys: fused(query=query, keys=keys)[0], [(4, 5), (9, 5)])


@pytest.mark.parametrize("moves", [True, False])
def test_opcheck(moves):
    query, keys, scale = normal(2, 4, 5), normal(2, 6, 5), torch.rand(2, 4)
    rules = torch.rand(2, 6), None, None, torch.zeros(2, 4, 1, dtype=torch.int64), None, torch.tensor([5, 6])
    lse, pooled, low = torch.ops.kdfast.similarity_softmax(query, keys, scale, rules[0], None, None, None, *rules[1:], True, 0)
    along = (normal(2, 4, 5), normal(2, 6, 5), torch.rand(2, 4)) if moves else (normal(2, 4, 5), None, None)
    given = torch.rand(2, 4), *along, lse, low, pooled, query, keys, scale, *rules, moves, 0
    torch.library.opcheck(torch.ops.kdfast.similarity_second.default, given)
