"""Optimal transport between points that nearly meet, or do: costs and gradients are as exact as those of differences, x - y."""

import pytest
import torch
from sinkhorn_impls import every_impl  # noqa: F401

from kdfast.ops import sinkhorn

EPSILON = 0.1
#: What a differentiable cost is: x - y, as the plain formula has it.
PLAIN = {
    "euclidean": lambda x, y: torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist"),
    "sqeuclidean": lambda x, y: (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1),
}
#: Metric and numbers of coordinates.
CASES = [("euclidean", d) for d in (1, 2, 3, 8, 65)] + [("sqeuclidean", d) for d in (1, 2, 5, 16)]


def points(layout, n, m, width):
    """Far from 0, so that rounding of a mean would show."""
    g = torch.Generator().manual_seed(width)
    if layout == "uniform":
        return torch.rand(1, n, width, generator=g), torch.rand(1, m, width, generator=g)
    if layout == "nearly the same":
        x = 3 + torch.rand(1, n, width, generator=g)
        return x, x[:, torch.arange(m) % n] + 1e-3 * torch.randn(1, m, width, generator=g)
    centres = torch.randn(4, width, generator=g)
    return tuple((centres[torch.arange(k) % 4] + 1e-2 * torch.randn(k, width, generator=g))[None] for k in (n, m))


def gradients(make, grad, scalar, dtype, x, y, upstream):
    """[dx, dy] of `scalar` of make(x, y, **options)."""
    x, y = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
    result = make(x, y, epsilon=EPSILON, max_iters=5, grad=grad)
    if scalar == "potentials":
        return torch.autograd.grad([result.f, result.g], (x, y), [u.to(dtype) for u in upstream])
    return torch.autograd.grad(getattr(result, scalar).sum(), (x, y))


@pytest.mark.parametrize("layout", ["uniform", "nearly the same", "tight groups"])
@pytest.mark.parametrize(("metric", "width"), CASES)
def test_gradients_of_points_that_nearly_meet(metric, width, layout):
    """No more than twice what autograd's are off through the matrix of differences, in each way of taking them."""
    x, y = points(layout, 61, 70, width)
    upstream = torch.randn(1, 61), torch.randn(1, 70)

    def ours(x, y, **options):
        return sinkhorn(x=x, y=y, metric=metric, **options)

    def plain(x, y, **options):
        return sinkhorn(PLAIN[metric](x, y), impl="torch", **options)

    for grad, scalar in (("envelope", "value"), ("unrolled", "potentials"), ("detached", "transport_cost")):
        exact = gradients(plain, grad, scalar, torch.float64, x, y, upstream)
        got, naive = (gradients(make, grad, scalar, torch.float32, x, y, upstream) for make in (ours, plain))
        for of, a, b, c in zip("xy", got, naive, exact, strict=True):
            most = float(c.abs().max())
            allowed = 2 * float((b.double() - c).abs().max()) + 16 * torch.finfo(torch.float32).eps * most
            assert float((a.double() - c).abs().max()) <= allowed, (grad, of)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_points_that_meet_push_nothing(metric):
    """A set against itself: the diagonal's distance is 0, its gradient taken as 0, and what else there is stays finite."""
    x, _ = points("tight groups", 40, 1, 3)
    leaf = x.clone().requires_grad_()
    result = sinkhorn(x=leaf, y=x, metric=metric, epsilon=EPSILON, max_iters=5)
    (ours,) = torch.autograd.grad(result.value.sum(), leaf)
    wide = x.double().requires_grad_()
    result = sinkhorn(PLAIN[metric](wide, x.double()), epsilon=EPSILON, max_iters=5, impl="torch")
    (exact,) = torch.autograd.grad(result.value.sum(), wide)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))


@pytest.mark.parametrize(("n", "m", "width"), [(1, 1, 1), (1, 7, 17), (5, 1, 2)])
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_few_points(metric, n, m, width):
    x, y = torch.rand(1, n, width, requires_grad=True), torch.rand(1, m, width, requires_grad=True)
    result = sinkhorn(x=x, y=y, metric=metric, epsilon=EPSILON, max_iters=2)
    assert all(
        g.isfinite().all() and g.shape == p.shape for g, p in zip(torch.autograd.grad(result.value.sum(), (x, y)), (x, y), strict=True)
    )
