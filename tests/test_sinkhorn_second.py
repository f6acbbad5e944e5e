"""kdfast.ops.sinkhorn and the functions over it: a second derivative is right or raises, whichever tensors it is asked for.

Autograd leaves out branches that lead to no tensor asked for. So every first derivative is differentiated in every tensor
by itself, and what does not raise is compared with finite differences of that first derivative.
"""

import pytest
import torch
from sinkhorn_impls import every_impl  # noqa: F401
from torch.autograd import gradgradcheck

from kdfast import functional as F
from kdfast.ops import sinkhorn

F64 = torch.float64
STEP = 1e-5
OUTPUTS = {
    "value": lambda r: r.value,
    "transport_cost": lambda r: r.transport_cost,
    "f": lambda r: r.f,
    "g": lambda r: r.g,
    "plan": lambda r: r.plan(),
    "apply": lambda r: r.apply(torch.linspace(-1, 1, 4, dtype=F64)),
    "apply_t": lambda r: r.apply_t(torch.linspace(1, 2, 3, dtype=F64)),
}


def problem(source="cost"):
    """Leaves of a small problem; `weight` is for the output, so that the upstream gradient has derivatives too."""
    a, b = torch.rand(3, dtype=F64) + 0.5, torch.rand(4, dtype=F64) + 0.5
    given = {"a": a / a.sum(), "b": b / b.sum(), "epsilon": torch.tensor(0.5, dtype=F64), "weight": torch.rand((), dtype=F64)}
    if source == "cost":
        given["cost"] = torch.rand(3, 4, dtype=F64)
    else:
        given |= {"x": torch.randn(3, 2, dtype=F64) / 2, "y": torch.randn(4, 2, dtype=F64) / 2}
    return {name: t.requires_grad_() for name, t in given.items()}


def all_right(total, given, firsts=None, rtol=1e-5, atol=1e-8):
    """d^2 total / d first d then along random directions, for every pair: autograd's, each asked for alone, and finite differences."""
    along = {name: torch.randn_like(t) for name, t in given.items()}
    for name in along.keys() & {"a", "b"}:  # moved without changing the sum: their gradients are defined up to one constant
        along[name] -= along[name].mean()
    firsts = list(given if firsts is None else firsts)

    def slopes(then, step):
        at = given | {then: (given[then] + step * along[then]).detach().requires_grad_()}
        return [(d * along[k]).sum() for k, d in zip(firsts, torch.autograd.grad(total(**at), [at[k] for k in firsts]), strict=True)]

    differences = {then: [(p - q) / (2 * STEP) for p, q in zip(slopes(then, STEP), slopes(then, -STEP), strict=True)] for then in given}
    for i, first in enumerate(firsts):
        (gradient,) = torch.autograd.grad(total(**given), given[first], create_graph=True)
        for then in given:
            (ours,) = torch.autograd.grad((gradient * along[first]).sum(), given[then], retain_graph=True)
            note = lambda text, pair=(first, then): f"{pair}: {text}"
            torch.testing.assert_close((ours * along[then]).sum(), differences[then][i], rtol=rtol, atol=atol, msg=note)


def all_refused(total, given, sources):
    """Every gradient in one of `sources`, asked for alone, refuses to be differentiated in anything."""
    for first in sources:
        (gradient,) = torch.autograd.grad(total(**given), given[first], create_graph=True)
        for then in given:
            with pytest.raises(RuntimeError, match="differentiated twice"):
                torch.autograd.grad(gradient.square().sum(), given[then], retain_graph=True)


def of(output, **options):
    """The function of a problem's leaves to differentiate."""
    return lambda weight, **kw: (weight * OUTPUTS[output](sinkhorn(**kw, **options))).sin().sum()


@pytest.mark.parametrize("rho", [None, 0.7, (0.7, None)], ids=["balanced", "relaxed", "one side"])
@pytest.mark.parametrize("source", ["cost", "points"])
def test_value_of_the_envelope(source, rho):
    all_right(of("value", max_iters=100, rho=rho), problem(source))


def test_value_of_the_proximal_envelope():
    """At convergence, which takes proximal steps far longer: with a large beta the plan is still a smooth function of the cost."""
    given = problem()
    given["epsilon"] = torch.tensor(40.0, dtype=F64, requires_grad=True)
    everything_but = {k: t for k, t in given.items() if k not in ("epsilon", "weight")}
    value = lambda **kw: sinkhorn(**kw, epsilon=40.0, max_iters=200, method="proximal").value
    all_right(value, everything_but, rtol=1e-3, atol=1e-5)


def test_third_derivatives_are_refused():
    given = problem()
    gradient = torch.autograd.grad(of("value")(**given), given["cost"], create_graph=True)[0]
    again = torch.autograd.grad(gradient.square().sum(), given["a"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(again.sum(), given["cost"])


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("grad", ["implicit", "unrolled"])
@pytest.mark.parametrize("source, method", [("cost", "auto"), ("cost", "proximal"), ("points", "auto")], ids=["cost", "proximal", "points"])
def test_other_outputs_and_modes(source, method, grad, output):
    given = problem(source)
    all_refused(of(output, max_iters=3, grad=grad, method=method), given, given.keys() - {"weight"})


@pytest.mark.parametrize("source", ["cost", "points"])
def test_detached(source):
    """Its plan is a constant for first derivatives; a second one would depend on how it changes."""
    given = problem(source)
    all_refused(of("transport_cost", max_iters=3, grad="detached"), given, given.keys() & {"cost", "x", "y"})


@pytest.mark.parametrize("then", ["weight", "cost"])
def test_no_upstream_gradient_escapes(then):
    """Through .backward() as well, and with only one tensor that requires a gradient."""
    given = {name: t.detach() for name, t in problem().items()}
    given |= {name: given[name].requires_grad_() for name in ("cost", then)}
    (gradient,) = torch.autograd.grad(of("transport_cost", grad="implicit")(**given), given["cost"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("grad", ["implicit", "unrolled"])
def test_apply_in_its_argument_first(grad):
    """The gradient in v is P^T u: how it depends on the cost is a first derivative of the plan."""
    v = torch.randn(4, dtype=F64, requires_grad=True)
    total = lambda v, weight, **kw: (weight * sinkhorn(**kw, max_iters=60, grad=grad).apply(v)).sin().sum()
    all_right(total, problem() | {"v": v}, firsts=["v"])


def test_func_transforms():
    given = {name: t.detach() for name, t in problem().items() if name != "weight"}
    cost = given.pop("cost")
    twice = lambda pick, **options: torch.func.grad(
        lambda c: torch.func.grad(lambda c: pick(sinkhorn(c, **given, max_iters=100, **options)))(c).square().sum()
    )(cost)
    leaf = cost.clone().requires_grad_()
    gradient = torch.autograd.grad(sinkhorn(leaf, **given, max_iters=100).value, leaf, create_graph=True)[0]
    expected = torch.autograd.grad(gradient.square().sum(), leaf)[0]
    torch.testing.assert_close(twice(OUTPUTS["value"]), expected)
    for grad in ("implicit", "unrolled", "detached"):
        with pytest.raises(RuntimeError, match="differentiated twice"):
            twice(OUTPUTS["transport_cost"], grad=grad)


# ---- the functions over it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("rho", [None, 0.7], ids=["balanced", "relaxed"])
def test_divergence(metric, rho):
    """Of unequal masses where these are free; points coincide with themselves in two of the three solves."""
    x, y = (torch.randn(n, 2, dtype=F64, requires_grad=True) for n in (3, 4))
    a, b = torch.full((3,), 0.4, dtype=F64, requires_grad=True), torch.full((4,), 0.25, dtype=F64, requires_grad=True)

    def divergence(x, y, a, b):
        if rho is None:
            a, b = a / a.sum(), b / b.sum()
        return F.sinkhorn_divergence(x, y, a=a, b=b, metric=metric, epsilon=1.0, max_iters=100, rho=rho)

    assert gradgradcheck(divergence, (x, y, a, b), fast_mode=True)


@pytest.mark.parametrize("grad", ["implicit", "unrolled", "detached"])
@pytest.mark.parametrize("loss", [F.sinkhorn_loss, F.sinkhorn_divergence], ids=lambda f: f.__name__)
def test_losses_refuse_in_other_modes(loss, grad):
    given = {"x": torch.randn(3, 2, requires_grad=True), "y": torch.randn(4, 2, requires_grad=True)}
    all_refused(lambda x, y: loss(x, y, epsilon=1.0, max_iters=3, grad=grad), given, given)


def test_log_optimal_transport():
    given = {"scores": torch.randn(2, 3, 4, requires_grad=True), "alpha": torch.tensor(0.3, requires_grad=True)}
    given["weight"] = torch.rand((), requires_grad=True)
    total = lambda scores, alpha, weight: (weight * F.log_optimal_transport(scores, alpha, iters=4)).square().sum()
    all_refused(total, given, ("scores", "alpha"))


def test_normalize():
    given = {"logits": torch.randn(2, 3, 3, dtype=F64, requires_grad=True), "weight": torch.rand((), dtype=F64, requires_grad=True)}
    all_right(lambda logits, weight: (weight * F.sinkhorn_normalize(logits, iters=3)).sin().sum(), given)
