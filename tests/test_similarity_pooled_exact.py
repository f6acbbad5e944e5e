"""Gradients of the pooled output that are differences of what is nearly alike, in tight classes and large logits: every implementation."""

import pytest
import torch
import torch.nn.functional as F

from kdfast._core import impls
from kdfast.ops import similarity_softmax

IMPLS = [name for name, missing in impls.table()["similarity_softmax"].items() if missing is None and name in ("cpu", "torch")]


def near(count, width, noise, centre):
    return F.normalize(centre + noise * torch.randn(count, width), dim=-1)


def worst(ours, naive, truth, least=0.0):
    """The largest error over what the project's bar allows, and `least`."""
    ratios = []
    for a, b, c in zip(ours, naive, truth, strict=True):
        off, allowed = (float((x.double() - c).abs().max()) for x in (a, b))
        ratios.append(off / (2 * allowed + 4 * torch.finfo(torch.float32).eps * float(c.abs().max()) + least))
    return max(ratios)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("size", [(64, 256, 128), (300, 500, 40)], ids=["few", "many"])
def test_gradients_in_bfloat16_of_a_tight_class(impl, noise, size):
    """h.v is a product of rounded numbers, a mean of it h.pooled is not: what they differ by is no part of the gradient."""
    n, m, width = size
    centre = F.normalize(torch.randn(1, width), dim=-1)
    query, keys, h = near(n, width, noise, centre), near(m, width, noise, centre), torch.randn(n, width)

    def gradient(softmax, dtype):
        leaf = query.to(dtype, copy=True).requires_grad_()
        return torch.autograd.grad(softmax(leaf, keys.to(dtype)), leaf, h.to(dtype))

    def exact(query, keys):
        return torch.softmax(14 * (query @ keys.T), -1) @ keys

    def plain(query, keys):
        p = torch.softmax(14 * (query.bfloat16() @ keys.bfloat16().T).float(), -1)
        return (p.bfloat16() @ keys.bfloat16()).float()

    def ours(query, keys):
        return similarity_softmax(query, keys, scale=14.0, precision="bf16", impl=impl)[1]

    truth = gradient(exact, torch.float64)
    assert worst(gradient(ours, torch.float32), gradient(plain, torch.float32), truth) <= 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("noise", [None, 1e-1])
@pytest.mark.parametrize("scale", [10.0, 50.0, 200.0])
def test_second_derivatives_of_large_logits(impl, noise, scale):
    """Of five problems the middle one meets the bar, and none is far from it."""
    ratios = []
    for seed in range(5):
        torch.manual_seed(seed)
        n, m, width = [(64, 256, 64), (100, 70, 33)][seed % 2]
        centre = torch.zeros(1, width) if noise is None else F.normalize(torch.randn(1, width), dim=-1)
        query, keys = near(n, width, noise or 1.0, centre), near(m, width, noise or 1.0, centre)
        h, along = torch.randn(n, width), (torch.randn(n, width), torch.randn(m, width))

        def second(pool, dtype, query=query, keys=keys, h=h, along=along):
            at = query.to(dtype, copy=True).requires_grad_(), keys.to(dtype, copy=True).requires_grad_()
            first = torch.autograd.grad(pool(*at), at, h.to(dtype), create_graph=True)
            return torch.autograd.grad(first, at, [u.to(dtype) for u in along])

        def plain(query, keys):
            return torch.softmax(scale * (query @ keys.T), -1) @ keys

        def ours(query, keys):
            return similarity_softmax(query, keys, scale=scale, impl=impl)[1]

        ratios.append(worst(second(ours, torch.float32), second(plain, torch.float32), second(plain, torch.float64)))
    assert sorted(ratios)[2] <= 1.2 and max(ratios) <= 2.5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("values", [False, True], ids=["keys", "values"])
@pytest.mark.parametrize("scale", [20.0, 50.0, 512.0])
@pytest.mark.parametrize("size", [(64, 256, 64), (40, 1300, 20), (200, 70, 33)], ids=str)
def test_second_derivatives_of_one_candidate(impl, size, scale, values):
    """Where it holds all of a row to 1e-9 or 1e-100, so does what its rate, slope and value differ from their means by."""
    n, m, width = size
    keys = F.normalize(torch.randn(m, width), dim=-1)
    given = [keys[torch.randint(m, (n,))] + 0.01 * torch.randn(n, width), keys, *([torch.randn(m, 12)] if values else [])]
    h, along = torch.randn(n, given[-1].shape[1]), [torch.randn_like(x) for x in given]

    def second(pool, dtype):
        at = [x.to(dtype, copy=True).requires_grad_() for x in given]
        upstream = h.to(dtype, copy=True).requires_grad_()
        first = torch.autograd.grad(pool(*at), at, upstream, create_graph=True)
        return torch.autograd.grad(first, [*at, upstream], [u.to(dtype) for u in along])

    def plain(query, keys, values=None):
        return torch.softmax(scale * (query @ keys.T), -1) @ (keys if values is None else values)

    def ours(query, keys, values=None):
        return similarity_softmax(query, keys, values=values, scale=scale, impl=impl)[1]

    found = [second(op, dtype) for op, dtype in ((ours, torch.float32), (plain, torch.float32), (plain, torch.float64))]
    assert worst(*found, least=1e-12) <= 1  # float64 itself loses what is less
