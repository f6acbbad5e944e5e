"""kdfast.ops.sinkhorn: nothing as large as the plan is made, and no value is read where that would synchronise."""

import contextlib

import pytest
import torch
from sinkhorn_impls import AVAILABLE, every_impl  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast._ops.sinkhorn import library
from kdfast.ops import sinkhorn


@pytest.fixture
def opened(monkeypatch):
    """The operators as plain functions: a dispatch mode does not see into an operator."""
    for name in ("solve", "plan_gradient", "apply_plan", "replay", "implicit"):
        monkeypatch.setattr(library, name, getattr(library, f"_{name}"))


class Largest(TorchDispatchMode):
    """The most elements any tensor made inside had; views of the given tensors do not count."""

    def __init__(self, *given):
        super().__init__()
        self.elements, self.given = 0, {t.untyped_storage().data_ptr() for t in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.given:
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("grad", ["envelope", "implicit", "unrolled", "detached"])
def test_nothing_as_large_as_the_plan(grad, monkeypatch, opened):
    monkeypatch.setattr("kdfast._ops.sinkhorn.geometry.TILE", {"cpu": 2000})
    monkeypatch.setattr("kdfast._ops.sinkhorn.cpu.FORMED", 2000)
    x, y = torch.randn(200, 3, requires_grad=True), torch.randn(190, 3)
    with Largest() as seen:
        r = sinkhorn(x=x, y=y, epsilon=0.5, max_iters=4, grad=grad, method="log")
        with torch.no_grad():
            r.apply(y)
        (r.transport_cost if grad == "detached" else r.value).backward()
    assert seen.elements <= 2000 + 200 * 4 * 3, seen.elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_iterations_make_no_second_cost(dtype, monkeypatch, opened):
    monkeypatch.setattr("kdfast._ops.sinkhorn.geometry.TILE", {"cpu": 2000})
    cost = torch.rand(200, 190).to(dtype)
    with Largest(cost) as seen:
        sinkhorn(cost, max_iters=4, method="log")
    assert seen.elements <= 2000, seen.elements


@pytest.mark.parametrize("impl", AVAILABLE)
def test_operators(impl):
    """Schemas, fakes and mutation of every operator, for given costs, a shared ragged one, and points."""
    a, b, epsilon, g = torch.full((2, 4), 1 / 4), torch.full((2, 3), 1 / 3), torch.tensor([0.1, 0.2]), torch.zeros(2, 3)
    cost, lengths = torch.rand(2, 4, 3), (torch.tensor([3, 4]), torch.tensor([2, 3]))
    schedule = (3, None, "log", None, None)
    for p in (
        (cost, None, None, a, b, epsilon, None, None, "given", None, None, impl),
        (cost[0], None, None, a, b, epsilon, *lengths, "given", None, 0.5, impl),
        (None, torch.randn(2, 4, 2), torch.randn(2, 3, 2), a, b, epsilon, None, None, "euclidean", 0.5, None, impl),
    ):
        f, g, *_, done, history_f, history_g = library.solve(*p, torch.zeros(2, 3), *schedule, True)
        for op, arguments in (
            (library.solve, (*p, g, *schedule, True)),
            (library.plan_gradient, (*p, f, g, epsilon, None)),
            (library.plan_gradient, (*p, f, g, epsilon, epsilon)),
            (library.apply_plan, (*p, f, g, torch.randn(2, 3, 2), False)),
            (library.replay, (*p, g, history_f, history_g, done, f, g, True, *schedule)),
            (library.implicit, (*p, f, g, done, f, g, False, *schedule)),
        ) + ((library.iterate, (*p, g, 3, "log", 1.0, 0.5, True)), (library.marginals, (*p, f, g))) * (impl == "cpu"):
            torch.library.opcheck(op, arguments)


class NoReading(TorchDispatchMode):
    """Fails where a tensor's values would reach the host: on a GPU this would synchronise."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "kernel"}, {"rho": (0.5, None)}, {"anneal": (1.0, 0.5)}, {"tol": 1e-3}, {"method": "proximal", "tol": 1e-3}],
    ids=lambda o: "-".join(o) or "plain",
)
@pytest.mark.parametrize("grad", ["envelope", "implicit", "unrolled", "detached"])
def test_without_reading_values(options, grad, monkeypatch, opened):
    """The form for devices where reading a value synchronises: nothing is read, and the answers are the same."""
    x, y = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 6, 3, dtype=torch.float64)
    epsilon, results = torch.tensor([1.0, 2.0], dtype=torch.float64), []
    for readable in (("cpu",), ()):
        monkeypatch.setattr("kdfast._ops.sinkhorn.geometry.READABLE", readable)
        monkeypatch.setattr("kdfast._core.checks.readable", lambda t: False)  # the warning would read
        with contextlib.nullcontext() if readable else NoReading():
            r = sinkhorn(x=x, y=y, epsilon=epsilon, max_iters=40, grad=grad, **options)
            loss = r.transport_cost.sum() if grad == "detached" else r.value.sum()
            gradients = torch.autograd.grad(loss, x)
        results.append((r.f.detach(), r.iterations, r.error, loss, *gradients))
    for u, v in zip(*results, strict=True):
        torch.testing.assert_close(u, v, rtol=1e-7, atol=1e-10)
