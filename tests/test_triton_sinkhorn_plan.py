"""The Triton kernels of the plan against float64 formulas: on a GPU, or where there is none under Triton's interpreter, in a process that
has TRITON_INTERPRET=1 from its start (make test)."""

import pytest
import torch
from sinkhorn_gpu_cases import weights

from kdfast._core import triton_runtime
from kdfast._ops.sinkhorn import adjoint, arguments
from kdfast._ops.sinkhorn.triton import plan as triton_plan
from kdfast.ops import sinkhorn

if triton_runtime.missing() is not None:
    pytest.skip(f"{triton_runtime.missing()}, and TRITON_INTERPRET is not 1", allow_module_level=True)
DEVICE = "cpu" if triton_runtime.INTERPRETED else "cuda"


def moved(x):
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def problem(source, a=None, b=None, epsilon=0.3, lengths=None, metric="sqeuclidean", dtype=torch.float32):
    def of(x):
        return x.to(DEVICE, dtype if x.is_floating_point() and x.dtype != torch.bfloat16 else x.dtype)

    cost, x, y = (None if source.get(name) is None else of(source[name]) for name in ("cost", "x", "y"))
    given = (None if w is None else of(w) for w in (a, b))
    lengths = None if lengths is None else tuple(map(moved, lengths))
    impl = "triton" if dtype == torch.float32 else "torch"
    return arguments.problem(cost, x, y, metric, *given, epsilon, (None, None), lengths, "ieee", impl)[0]


def same(got, want, slack=1.0):
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        if y.numel():
            torch.testing.assert_close(x.double(), y.double(), rtol=2e-5 * slack, atol=2e-5 * slack * float(y.abs().max()))


NEAR = torch.rand(2, 19, 7)
SOURCES = {
    "cost": {"cost": torch.rand(2, 19, 37)},
    "one cost for all": {"cost": torch.rand(19, 37)},
    "transposed": {"cost": torch.rand(2, 37, 19).mT},
    "sqeuclidean": {"x": torch.rand(2, 19, 7), "y": torch.rand(2, 37, 7)},
    "euclidean": {"x": torch.rand(2, 19, 7), "y": torch.rand(2, 37, 7), "metric": "euclidean"},
    "nearly meeting": {"x": NEAR, "y": torch.cat((NEAR + 1e-4 * torch.randn(2, 19, 7), torch.rand(2, 18, 7)), 1), "metric": "euclidean"},
    "few dimensions": {"x": torch.rand(2, 19, 2), "y": torch.rand(2, 37, 2)},
    "wide": {"x": 0.2 * torch.rand(2, 19, 70), "y": 0.2 * torch.rand(2, 37, 70)},
    "cosine": {"x": torch.randn(2, 19, 7), "y": torch.randn(2, 37, 7), "metric": "cosine"},
}


@pytest.mark.parametrize("name", SOURCES)
def test_as_the_formulas_in_float64(name):
    source = dict(SOURCES[name])
    metric, a, b = source.pop("metric", "sqeuclidean"), weights(2, 19), weights(2, 37)
    ours, exact = (problem(source, a, b, metric=metric, dtype=dtype) for dtype in (torch.float32, torch.float64))
    f, g = moved(0.3 * torch.rand(2, 19)), moved(0.3 * torch.rand(2, 37))
    w0, w1 = moved(torch.rand(2)), moved(torch.randn(2))
    wide = [t.double() for t in (f, g, w0, w1)]
    assert triton_plan.serves(ours) and not triton_plan.serves(exact)
    same([triton_plan.plan(ours, f, g)], [adjoint.plan(exact, *wide[:2])])
    for slope, wide_slope in ((None, None), (w1, wide[3])):
        got = triton_plan.plan_gradient(ours, f, g, w0, slope)
        same(got, adjoint.plan_gradient(exact, *wide[:3], wide_slope), slack=4.0)
        assert all(x.dtype == torch.float32 for x in got)
    for transpose, size in ((False, 37), (True, 19)):
        for width in (1, 70):
            v = moved(torch.randn(2, size, width))
            same([triton_plan.apply_plan(ours, f, g, v, transpose)], [adjoint.apply_plan(exact, *wide[:2], v.double(), transpose)])


def test_padding_is_not_read_and_forbidden_pairs_have_no_mass():
    cost = torch.rand(2, 19, 37)
    cost[0, 3, 4:9] = torch.inf
    cost[0, 13:], cost[1, :, 25:] = torch.nan, torch.nan
    lengths = torch.tensor([13, 19]), torch.tensor([37, 25])
    p = problem({"cost": cost}, lengths=lengths)
    plan = triton_plan.plan(p, 0 * p.a, 0 * p.b)
    assert plan.isfinite().all() and (plan[0, 13:] == 0).all() and (plan[1, :, 25:] == 0).all() and (plan[0, 3, 4:9] == 0).all()
    one = torch.ones_like(p.epsilon)
    got, want = (
        m.plan_gradient(p._replace(impl=impl), 0 * p.a, 0 * p.b, one, one) for m, impl in ((triton_plan, "triton"), (adjoint, "torch"))
    )
    same(got, want)


def test_a_gradient_has_the_dtype_of_its_cost():
    p = problem({"cost": torch.rand(2, 19, 37).bfloat16()})
    assert triton_plan.plan_gradient(p, 0 * p.a, 0 * p.b, torch.ones_like(p.epsilon), None).cost.dtype == torch.bfloat16


def test_what_is_not_finite_shows():
    p = problem({"cost": torch.rand(1, 19, 37)})
    v = moved(torch.ones(1, 37, 2))
    v[0, 5, 1] = torch.nan
    out = triton_plan.apply_plan(p, 0 * p.a, 0 * p.b, v, False)
    assert out[..., 0].isfinite().all() and out[..., 1].isnan().all()
    f = moved(torch.zeros(1, 19))
    f[0, 2] = torch.nan
    assert triton_plan.plan(p, f, 0 * p.b)[0, 2].isnan().all()


@pytest.mark.parametrize("grad", ["envelope", "detached", "implicit"])
def test_results_use_them(grad, monkeypatch):
    """Through the public functions: the plan, products and gradients of each kind."""
    cost, v = torch.rand(2, 8, 12), torch.randn(2, 12, 3)
    found = []
    for impl in ("triton", "torch"):
        leaf, vector = moved(cost).requires_grad_(), moved(v).requires_grad_()
        out = sinkhorn(leaf, epsilon=0.2, max_iters=10, grad=grad, impl=impl)
        scalar = out.value if grad == "envelope" else out.transport_cost
        product = out.apply(vector.detach()) if grad != "detached" else out.apply(vector)
        found.append((out.plan().detach(), product.detach(), *torch.autograd.grad(scalar.sum(), leaf)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_an_empty_batch():
    p = problem({"cost": torch.rand(0, 3, 5)})
    one = torch.ones_like(p.epsilon)
    assert triton_plan.plan(p, p.a, p.b).shape == (0, 3, 5)
    assert triton_plan.plan_gradient(p, p.a, p.b, one, one).row.shape == (0, 3)
    assert triton_plan.apply_plan(p, p.a, p.b, p.a.new_zeros(0, 5, 2), False).shape == (0, 3, 2)


def test_opcheck_and_vmap():
    p = problem({"cost": torch.rand(2, 5, 7)})
    f, g = moved(torch.rand(2, 5)), moved(torch.rand(2, 7))
    torch.library.opcheck(torch.ops.kdfast_torch.sinkhorn_plan.default, (*p, f, g), test_utils=("test_schema", "test_faketensor"))
    cost = moved(torch.rand(3, 2, 5, 7))
    plans = torch.func.vmap(lambda c: sinkhorn(c, epsilon=0.3, max_iters=2, impl="triton", grad="detached").plan())(cost)
    torch.testing.assert_close(plans[1], sinkhorn(cost[1], epsilon=0.3, max_iters=2, impl="triton").plan().detach())
