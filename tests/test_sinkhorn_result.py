"""What a solve returns and when it is made: the plan's marginals, the transport cost and the error take a pass, for those who read them."""

import pytest
import torch
from sinkhorn_impls import AVAILABLE
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast._core import extension
from kdfast._ops.sinkhorn import cpu
from kdfast._ops.sinkhorn.dual import dual
from kdfast.ops import SinkhornResult, sinkhorn

NAMES = ["f", "g", "value", "transport_cost", "epsilon", "iterations", "error", "converged", "state"]
every_impl = pytest.mark.parametrize("impl", AVAILABLE)
needs_kernels = pytest.mark.skipif(extension.missing_cpu() is not None, reason=str(extension.missing_cpu()))


class Called(TorchDispatchMode):
    """Counts the calls of an operator of this family."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "kdfast_torch" and func._opname == self.name
        return func(*args, **(kwargs or {}))


@needs_kernels
@pytest.mark.parametrize("grad", ["envelope", "implicit", "unrolled", "detached"])
def test_marginals_take_a_pass_once_for_those_who_read_them(grad):
    cost = torch.rand(2, 6, 5, requires_grad=True)
    with Called("sinkhorn_marginals") as seen:
        r = sinkhorn(cost, epsilon=0.3, grad=grad, impl="cpu")
        assert r.f.shape == (2, 6) and r.g.shape == (2, 5) and seen.count == 0
        if grad == "envelope":
            r.value.sum().backward()
            assert seen.count == 0
        assert r.error is not None and seen.count == 1
        assert all(v is not None for v in (r.error, r.transport_cost, r.value)) and seen.count == 1


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "kernel"}, {"rho": (0.5, None)}, {"rho": (None, 0.7)}, {"anneal": (1.0, 0.5)}, {"lengths": True}, {"points": True}],
    ids=lambda o: "-".join(o) or "plain",
)
def test_the_pass_sees_what_the_solver_would(options, dtype):
    """To the bit; with weights of 0, whose columns' potentials are found at the end; and the value needs none of it."""
    n, m = 17, 70
    a, b = torch.rand(2, n, dtype=dtype), torch.rand(2, m, dtype=dtype)
    a[:, 3] = b[:, 5] = 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    lengths = (torch.tensor([11, n]), torch.tensor([m, 40])) if options.get("lengths") else None
    if lengths is not None:
        a, b = (w * (torch.arange(w.shape[1]) < k[:, None]) for w, k in zip((a, b), lengths, strict=True))
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    source = {"x": torch.randn(2, n, 3, dtype=dtype), "y": torch.randn(2, m, 3, dtype=dtype)} if options.get("points") else {}
    source = source or {"cost": torch.rand(2, n, m, dtype=dtype)}
    options = {k: v for k, v in options.items() if k not in ("lengths", "points")}
    call = dict(source, a=a, b=b, lengths=lengths, epsilon=0.1, max_iters=7, impl="cpu") | options
    r = sinkhorn(**call)
    p, schedule = r.state.problem, r.state.schedule
    at_once = cpu.solve(p, torch.zeros_like(p.b), schedule, False)
    for name, got in (("f", r.state.f), ("g", r.state.g), ("error", r.error), ("transport", r.transport_cost)):
        assert torch.equal(got, getattr(at_once, name)), name
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(r.value, dual(p, r.state.f, r.state.g, at_once.col), **tolerance)


@every_impl
def test_a_value_without_mass(impl):
    """No mass, and for fixed marginals no solution: what is reported is 0 less epsilon times the plan's mass, which is 0 too."""
    for a, b in ((torch.zeros(1, 4), None), (torch.zeros(1, 4), torch.zeros(1, 3))):
        assert sinkhorn(torch.rand(1, 4, 3), a=a, b=b, impl=impl).value == 0


@every_impl
@pytest.mark.parametrize("name", ["f", "transport_cost", "error", "value"])
def test_the_grad_mode_is_that_of_the_call(name, impl):
    """Wherever a field is read first."""
    cost = torch.rand(5, 4, requires_grad=True)
    for grad in ("envelope", "unrolled"):
        with torch.no_grad():
            r = sinkhorn(cost, grad=grad, impl=impl)
        assert not getattr(r, name).requires_grad
        with torch.no_grad():
            expected = getattr(sinkhorn(cost, grad=grad, impl=impl), name)
        r = sinkhorn(cost, grad=grad, impl=impl)
        with torch.no_grad():
            read = getattr(r, name)
            assert not torch.is_grad_enabled()
        torch.testing.assert_close(read.detach(), expected)
        assert read is getattr(r, name) or name == "error"
        if name == "error":
            assert not read.requires_grad
        elif grad == "envelope" and name != "value":
            with pytest.raises(RuntimeError, match=f"`{name}` needs grad="):
                read.sum().backward()
        else:
            assert torch.autograd.grad(read.sum(), cost)[0].isfinite().all()


@needs_kernels
def test_inputs_changed_in_place():
    cost, a = torch.rand(5, 4), torch.full((5,), 0.2)
    r = sinkhorn(cost, a=a, impl="cpu")
    kept = sinkhorn(cost, a=a, impl="cpu")
    error, transport_cost = kept.error, kept.transport_cost
    cost.mul_(2)
    assert torch.equal(kept.error, error) and torch.equal(kept.transport_cost, transport_cost)
    for name in ("error", "transport_cost"):
        with pytest.raises(RuntimeError, match="changed in place"):
            getattr(r, name)
    assert r.value.isfinite() and r.f.isfinite().all()


@needs_kernels
@pytest.mark.parametrize("name", ["f", "g"])
def test_potentials_changed_in_place(name):
    r = sinkhorn(torch.rand(5, 4), impl="cpu")
    getattr(r, name).add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        _ = r.error


@every_impl
@pytest.mark.parametrize("grad", ["envelope", "unrolled"])
def test_plans_of_what_was_changed_in_place(impl, grad):
    """A plan is made when it is asked for, of what is there by then: a changed one had the marginals of no problem."""
    cost, v = torch.rand(5, 4), torch.rand(5)
    r = sinkhorn(cost, grad=grad, impl=impl)
    plan = r.plan()
    torch.testing.assert_close(r.apply_t(v), plan.mT @ v)
    cost.mul_(2)
    for name, arguments in (("plan", ()), ("apply", (torch.rand(4),)), ("apply_t", (v,))):
        with pytest.raises(RuntimeError, match=rf"changed in place: call {name}\(\) before"):
            getattr(r, name)(*arguments)


@every_impl
def test_inference_tensors(impl):
    with torch.inference_mode():
        r = sinkhorn(torch.rand(5, 4), impl=impl)
    assert r.error.isfinite() and r.transport_cost.isfinite()


def test_a_sequence():
    r = sinkhorn(torch.rand(2, 5, 4), tol=1e-3)
    assert isinstance(r, SinkhornResult) and len(r) == len(NAMES)
    for name, field in zip(NAMES, r, strict=True):
        assert field is getattr(r, name) or torch.equal(field, getattr(r, name))
    f, g = r[:2]
    assert f is r.f and g is r[1] and "5 x 4" in repr(r)


@every_impl
@pytest.mark.parametrize("grad", ["envelope", "unrolled"])
def test_compiled_code_may_return_it(grad, impl):
    """Fields may be read inside or afterwards."""
    torch._dynamo.reset()
    cost = torch.rand(2, 5, 4)
    solve = lambda cost: sinkhorn(cost, epsilon=0.3, grad=grad, impl=impl)
    got, want = torch.compile(solve, backend="aot_eager", fullgraph=True)(cost), solve(cost)
    for name in NAMES[:-2]:
        torch.testing.assert_close(getattr(got, name), getattr(want, name))
    torch.testing.assert_close(got.plan(), want.plan())


@every_impl
def test_vmap_reads_inside(impl):
    cost = torch.rand(3, 2, 5, 4, dtype=torch.float64)
    read = lambda c: (lambda r: (r.error, r.transport_cost, r.f))(sinkhorn(c, epsilon=0.5, max_iters=4, impl=impl))
    for got, want in zip(torch.vmap(read)(cost), zip(*map(read, cost), strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))
