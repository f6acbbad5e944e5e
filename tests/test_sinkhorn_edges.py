"""Sinkhorn where something is nothing: pairs, rows and sides that are not allowed, weights of 0, rows that keep no mass; and
gradients of random combinations of modes, these among them, against autograd through plain iterations."""

import random

import pytest
import torch
from sinkhorn_cases import F64, close, weights
from sinkhorn_impls import every_impl  # noqa: F401

from kdfast.ops import sinkhorn

INF = torch.inf
GRADS = ("envelope", "implicit", "unrolled")


# ---- nothing is allowed, nothing is there ---------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("rho", [0.7, (0.7, None), (0.7, 2.0)], ids=["both", "rows", "unlike"])
@pytest.mark.parametrize("transposed", [False, True], ids=["row", "column"])
def test_relaxed_row_that_no_pair_is_allowed_for(transposed, rho, grad):
    """Its mass stays where it is: the rest is as without it, and the value grows by a (rho + epsilon sum b), the two KLs of 0."""
    cost, a, b = torch.rand(5, 4, dtype=F64), weights(5), weights(4)
    a = torch.cat([a, a[:1]])
    forbidden = torch.cat([cost, torch.full((1, 4), INF, dtype=F64)])

    def solve(cost, a):
        cost, a = cost.clone().requires_grad_(), a.clone().requires_grad_()
        eps, sides = torch.tensor(0.3, dtype=F64, requires_grad=True), rho if isinstance(rho, tuple) else (rho, rho)
        given = {"a": b, "b": a, "rho": sides[::-1]} if transposed else {"a": a, "b": b, "rho": sides}
        r = sinkhorn(cost.mT if transposed else cost, **given, epsilon=eps, max_iters=400, tol=1e-13, grad=grad)
        return r, torch.autograd.grad(r.value, (cost, a, eps))

    (alone, (alone_cost, alone_a, alone_eps)), (r, (in_cost, in_a, in_eps)) = solve(cost, a[:5]), solve(forbidden, a)
    assert r.converged and r.f.isfinite().all() and r.g.isfinite().all()
    close(r.value, alone.value + a[5] * (0.7 + 0.3))
    close(in_cost, torch.cat([alone_cost, torch.zeros(1, 4, dtype=F64)]))
    close(in_a, torch.cat([alone_a, torch.tensor([0.7 + 0.3])]))
    close(in_eps, alone_eps + a[5])


def test_relaxed_side_without_mass():
    """Nothing is moved and everything is paid for."""
    r = sinkhorn(torch.rand(3, 4), a=torch.tensor([0.2, 0.0, 0.5]), b=torch.zeros(4), rho=(0.5, 2.0), epsilon=0.1)
    close(r.value, 0.5 * 0.7, rtol=1e-6)
    assert not r.plan().any() and r.error < 1e-6 and r.f.isfinite().all() and r.g.isfinite().all()


@pytest.mark.parametrize("grad", ["implicit", "unrolled"])
@pytest.mark.parametrize(
    "output", [lambda r: r.plan().square().sum(), lambda r: r.apply(torch.linspace(-1, 1, 5, dtype=F64)).sin().sum()], ids=["plan", "apply"]
)
def test_gradient_in_epsilon_with_a_forbidden_pair(output, grad):
    cost = torch.rand(4, 5, dtype=F64)
    cost[1, 2] = INF
    assert torch.autograd.gradcheck(
        lambda eps: output(sinkhorn(cost, epsilon=eps, max_iters=300, grad=grad)), torch.tensor(0.5, dtype=F64, requires_grad=True)
    )


def test_second_derivative_with_a_forbidden_pair():
    cost, eps = torch.rand(3, 4, dtype=F64, requires_grad=True), torch.tensor(0.5, dtype=F64, requires_grad=True)
    forbidden = torch.arange(12).reshape(3, 4) == 5
    value = lambda cost, eps: sinkhorn(cost.masked_fill(forbidden, INF), epsilon=eps, max_iters=200).value
    assert torch.autograd.gradgradcheck(value, (cost, eps))


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_unrolled_where_relaxed_rows_keep_no_mass(dtype):
    """exp(-f/rho) is 1e-45 of the far row; its own gradient is that of a minimum all the same."""
    cost, eps, rho = torch.tensor([[25.0, 28.0, 39.0], [2.7, 1.9, 0.2], [5.6, 4.4, 1.3]], dtype=dtype), 0.2, 0.05
    cost.requires_grad_()
    r = sinkhorn(cost, epsilon=eps, rho=(rho, 30.0), max_iters=1, grad="unrolled")
    expected = -rho * eps / (rho + eps) * (-cost / eps).logsumexp(-1)
    for ours, theirs in zip(torch.autograd.grad(r.f.sum(), cost), torch.autograd.grad(expected.sum(), cost), strict=True):
        close(ours, theirs, rtol=1e-5)


def test_value_where_weights_are_0_and_potentials_overflow():
    """exp(-f/rho) is above float32's range in rows without weight, which add 0 and not NaN."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    cost = torch.tensor([[0.0, 0.1], [-30.0, -9.0]])
    r = sinkhorn(cost, a=a, b=b, rho=0.05, epsilon=0.05)
    close(r.value, sinkhorn(cost[:1, 1:], rho=0.05, epsilon=0.05).value, rtol=1e-5)


@pytest.mark.parametrize("grad", ["implicit", "unrolled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_a_half_precision_cost_is_rounded_once(dtype, grad):
    cost = torch.randn(6, 7).to(dtype)
    ours, exact = (
        torch.autograd.grad(sinkhorn(c, epsilon=0.05, max_iters=50, rho=1.0, grad=grad).transport_cost, c)[0]
        for c in (cost.clone().requires_grad_(), cost.float().requires_grad_())
    )
    torch.testing.assert_close(ours, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


# ---- all modes together ---------------------------------------------------------------------------------------------------


def half_step(cost, weight, potential, eps, rho):
    """-lambda eps log sum_j w_j exp((g_j - C_ij)/eps), differentiable where a weight is 0."""
    z = torch.where(weight > 0, (potential - cost) / eps, -INF).amax(-1, keepdim=True).detach()
    lse = (weight * torch.exp((potential - cost) / eps - z)).sum(-1).log() + z[..., 0]
    return -(eps if rho is None else rho * eps / (rho + eps)) * lse


def plain(cost, a, b, epsilon, g, iterations, rho, anneal, proximal):
    """f, g, plan, value and transport cost of one problem."""
    older, eps = torch.zeros_like(g), epsilon
    for t in range(1, iterations + 1):
        start = g
        if proximal:
            eps, start = epsilon / t, (2 * (t - 1) * g - (t - 2) * older) / t
        elif anneal is not None:
            eps = epsilon if t == iterations else epsilon.clamp_min(anneal[0] * anneal[1] ** (t - 1))
        f = half_step(cost, b, start, eps, rho[0])
        older, g = g, half_step(cost.mT, a, f, eps, rho[1])
    plan = a[:, None] * b * torch.exp((f[:, None] + g - cost) / eps)
    conjugates = (p if r is None else r * (1 - torch.exp(-p / r)) for r, p in zip(rho, (f, g), strict=True))
    paid, transport = sum((w * c).sum() for w, c in zip((a, b), conjugates, strict=True)), (plan * cost).sum()
    return f, g, plan, transport if proximal else paid - eps * (plan.sum() - a.sum() * b.sum()), transport


@pytest.mark.parametrize("seed", range(80))
def test_unrolled_gradients_of_modes_together(seed):
    rng = random.Random(seed)
    n, m, dtype = rng.choice([1, 2, 5, 9, 17]), rng.choice([1, 3, 4, 8, 18]), rng.choice([torch.float32, F64])
    method = rng.choice(["log", "kernel", "auto", "proximal"])
    proximal = method == "proximal"
    rho = (None, None) if proximal else rng.choice([(None, None), (0.7, 0.3), (None, 0.4), (0.4, None), (0.05, 20.0)])
    anneal = None if proximal else rng.choice([None, (2.0, 0.5)])
    iterations, zeros, source = rng.choice([1, 2, 9]), rng.random() < 0.6, rng.choice(["cost", "cost", "sqeuclidean", "euclidean"])
    a, b = weights(n), weights(m)
    if zeros:
        a, b = (w * (torch.rand(w.shape) > 0.4).index_fill(0, torch.tensor([0]), True) for w in (a, b))
        a, b = a / a.sum(), b / b.sum()
    given = {"a": a, "b": b, "epsilon": torch.tensor(rng.choice([0.1, 0.3]) * (4 if proximal else 1), dtype=F64)}
    if source == "cost":
        given["cost"] = rng.choice([1.0, 2.0]) * torch.rand(n, m, dtype=F64)
    else:
        given |= {"x": torch.randn(n, 3, dtype=F64) / 2, "y": torch.randn(m, 3, dtype=F64) / 2}
    given = {name: t.to(dtype) for name, t in given.items()}
    theirs, ours = ({name: t.to(d).clone().requires_grad_() for name, t in given.items()} for d in (F64, dtype))
    start = 0.1 * torch.randn(m).to(F64)
    options = {"max_iters": iterations, "rho": rho, "anneal": anneal, "method": method, "grad": "unrolled"}
    if not proximal:
        options["init"] = (torch.zeros(n, dtype=dtype), start.to(dtype))
    r = sinkhorn(**ours, **options, **({} if source == "cost" else {"metric": source}))
    cost = theirs.get("cost")
    if cost is None:
        cost = (theirs["x"][:, None] - theirs["y"]).square().sum(-1)
        cost = cost if source == "sqeuclidean" else cost.sqrt()
    start = torch.zeros_like(start) if proximal else start
    expected = plain(cost, theirs["a"], theirs["b"], theirs["epsilon"], start, iterations, rho, anneal, proximal)
    got = (r.f, r.g, r.plan(), r.value, r.transport_cost)
    along = [torch.randn_like(t) * rng.choice([0, 1]) for t in expected]
    totals = [sum((t.double() * d).sum() for t, d in zip(of, along, strict=True)) for of in (got, expected)]
    tolerance = {"rtol": 1e-7, "atol": 1e-8} if dtype == F64 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(totals[0], totals[1], **tolerance)
    gradients = [torch.autograd.grad(total, list(of.values())) for total, of in zip(totals, (ours, theirs), strict=True)]
    for name, mine, exact in zip(given, *gradients, strict=True):
        scale = float(exact.abs().max()) + 1
        torch.testing.assert_close(mine.double() / scale, exact / scale, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_implicit_gradient_of_potentials_at_uneven_weights():
    """The residual's norm hardly sees a column of little weight: at 1e-6 of it the gradient was 3e-5 off, that of iterations is 1e-6."""
    generator = torch.Generator().manual_seed(0)
    cost, along = 2 * torch.rand(8, 33, 40, generator=generator), torch.randn(8, 33, 40, generator=generator)
    a, b = ((torch.rand(8, n, generator=generator) + 0.1) ** 6 + 1e-4 for n in (33, 40))
    a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    gradients = []
    for dtype in (torch.float32, F64):
        leaf = cost.to(dtype).requires_grad_()
        r = sinkhorn(leaf, a=a.to(dtype), b=b.to(dtype), epsilon=0.2, grad="implicit")
        gradients += torch.autograd.grad((along.to(dtype) * (r.f[..., None] + r.g[..., None, :])).sum(), leaf)
    ours, truth = gradients
    assert (ours - truth).abs().amax() <= 3e-6 * truth.abs().amax()
