"""kdfast.ops.sinkhorn: the four gradient modes, in float64 against finite differences and autograd through the reference."""

import pytest
import torch
from sinkhorn_impls import every_impl  # noqa: F401
from torch.autograd import gradcheck, gradgradcheck

from kdfast._ops.sinkhorn import reference, sinkhorn

F64 = torch.float64
SOURCES = ("cost", "shared", "sqeuclidean", "euclidean", "cosine")
RELAXED = {"balanced": (None, None), "relaxed": (0.7, 0.4), "one side": (None, 0.5)}


def problem(source="cost", batch=2, n=4, m=5, d=3):
    """Keyword arguments of one small problem, every tensor a leaf that requires grad."""
    a, b = torch.rand(batch, n, dtype=F64) + 0.3, torch.rand(batch, m, dtype=F64) + 0.3
    given = {"a": a / a.sum(-1, keepdim=True), "b": b / b.sum(-1, keepdim=True), "epsilon": torch.tensor([0.4, 0.6], dtype=F64)[:batch]}
    if source in ("cost", "shared"):
        given["cost"] = torch.rand(*((batch,) if source == "cost" else ()), n, m, dtype=F64)
    else:
        given |= {"x": torch.randn(batch, n, d, dtype=F64) / 2, "y": torch.randn(batch, m, d, dtype=F64) / 2}
    return {name: t.requires_grad_() for name, t in given.items()}


def solver(given, outputs, source, **options):
    """(function of the tensors alone, the tensors); weights move along sum-zero directions: their mean change is taken out."""
    names, start = list(given), {k: v.detach().clone() for k, v in given.items()}
    if source not in ("cost", "shared"):
        options["metric"] = source

    def run(*tensors):
        kw = dict(zip(names, tensors, strict=True))
        for w in ("a", "b"):
            if options.get("fixed_mass", True) and w in kw:
                kw[w] = kw[w] - (kw[w] - start[w]).mean(-1, keepdim=True)
        r = sinkhorn(**kw, **{k: v for k, v in options.items() if k != "fixed_mass"})
        return tuple(outputs(r))

    return run, tuple(given.values())


def observe(r):
    """Outputs that do not depend on the free constant of the potentials."""
    return r.value, r.transport_cost, r.plan(), r.f[..., None] + r.g[..., None, :]


@pytest.mark.parametrize("rho", RELAXED.values(), ids=RELAXED)
@pytest.mark.parametrize("source", SOURCES)
def test_envelope(source, rho):
    run, tensors = solver(problem(source), lambda r: (r.value,), source, max_iters=100, rho=rho)
    assert gradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("source", SOURCES)
def test_envelope_twice(source):
    run, tensors = solver(problem(source, n=3, m=3), lambda r: (r.value,), source, max_iters=100)
    assert gradgradcheck(run, tensors, fast_mode=True)


def test_envelope_twice_relaxed():
    run, tensors = solver(problem(n=3, m=3), lambda r: (r.value,), "cost", max_iters=100, rho=(0.7, None))
    assert gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("rho", RELAXED.values(), ids=RELAXED)
@pytest.mark.parametrize("source", SOURCES)
def test_implicit(source, rho):
    run, tensors = solver(problem(source, n=3, m=4), observe, source, max_iters=100, rho=rho, grad="implicit")
    assert gradcheck(run, tensors, fast_mode=True)


def test_implicit_proximal():
    """A large beta, so that the plan at beta/T is not yet a permutation; convergence is slow, whence the tolerances."""
    given = problem(n=3, m=4)
    given["epsilon"] = torch.tensor([30.0, 50.0], dtype=F64, requires_grad=True)
    run, tensors = solver(given, observe, "cost", max_iters=150, method="proximal", grad="implicit")
    assert gradcheck(run, tensors, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_unrolled_truncated(source):
    run, tensors = solver(problem(source, n=3, m=4), observe, source, max_iters=3, grad="unrolled", fixed_mass=False)
    assert gradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize(
    "options",
    [{"rho": (0.7, 0.4)}, {"rho": (None, 0.4)}, {"anneal": (1.0, 0.5)}, {"method": "proximal"}, {"method": "log"}, {"method": "kernel"}],
    ids=lambda o: "-".join(o),
)
@pytest.mark.parametrize("tiles", ["one tile", "row tiles"])
def test_unrolled_is_autograd_through_the_reference(options, tiles, monkeypatch):
    """Row tiles of two rows exercise the accumulation over tiles and blocks."""
    if tiles == "row tiles":
        monkeypatch.setattr("kdfast._ops.sinkhorn.geometry.TILE", {"cpu": 10})
    given = problem(n=5)
    r = sinkhorn(**given, max_iters=4, grad="unrolled", **options)
    q = reference.sinkhorn(
        given["cost"],
        given["a"],
        given["b"],
        given["epsilon"],
        4,
        rho=options.get("rho", (None, None)),
        anneal=options.get("anneal"),
        proximal=options.get("method") == "proximal",
    )
    for ours, theirs in (
        (r.value, q.value),
        (r.transport_cost, q.transport_cost),
        (r.f.sin(), q.f.sin()),
        (r.g.cos(), q.g.cos()),
        (r.plan(), q.plan),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        weight = torch.randn_like(theirs)
        ours, theirs = (torch.autograd.grad((o * weight).sum(), tuple(given.values()), retain_graph=True) for o in (ours, theirs))
        for u, v in zip(ours, theirs, strict=True):
            torch.testing.assert_close(u, v, rtol=1e-9, atol=1e-11)


def test_unrolled_freezes_each_problem_at_its_own_iteration():
    given = problem()
    r = sinkhorn(**given, max_iters=200, tol=1e-4, grad="unrolled")
    assert r.iterations[0] != r.iterations[1]
    ours = torch.autograd.grad(r.plan().square().sum(), tuple(given.values()))
    for i in range(2):
        alone = [t[i].detach().requires_grad_() for t in given.values()]
        kw = dict(zip(given, alone, strict=True))
        single = sinkhorn(**kw, max_iters=int(r.iterations[i]), grad="unrolled")
        for u, v in zip(ours, torch.autograd.grad(single.plan().square().sum(), alone), strict=True):
            torch.testing.assert_close(u[i], v, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rho", [None, 1.0, (0.5, None), (None, 2.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_implicit_equals_unrolled_at_convergence(dtype, rho):
    given = {k: t.detach().to(dtype).requires_grad_() for k, t in problem("sqeuclidean", n=17, m=13).items()}
    gradients = []
    for grad in ("implicit", "unrolled"):
        r = sinkhorn(**given, max_iters=300, grad=grad, rho=rho)
        loss = (r.plan() * torch.linspace(-1, 1, 13, dtype=dtype)).square().sum() + r.transport_cost.sum()
        gradients.append(torch.autograd.grad(loss, tuple(given.values())))
    for name, u, v in zip(given, *gradients, strict=True):
        if name in ("a", "b") and rho is None:
            u, v = u - u.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
        # what 300 float32 steps add to the gradients in a and b is rounded 300 times
        assert (u - v).norm() <= (3e-5 if dtype == torch.float32 and name in ("a", "b") else 1e-5) * v.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_implicit_where_rows_keep_no_mass(dtype):
    """Row marginals of about exp(-100): the potentials there still have a gradient."""
    given = {k: t.detach().to(dtype).requires_grad_() for k, t in problem().items()}
    given["cost"] = (given["cost"].detach() + 50).requires_grad_()
    gradients = []
    for grad in ("implicit", "unrolled"):
        r = sinkhorn(**given, max_iters=60, grad=grad, rho=0.05)
        assert (r.plan() < 1e-30).all()
        gradients.append(torch.autograd.grad(r.f.square().sum() + r.g.sum(), tuple(given.values())))
    for u, v in zip(*gradients, strict=True):
        assert v.norm() > 0
        torch.testing.assert_close(u, v, rtol=1e-4, atol=1e-6)


def test_envelope_is_the_plan_and_the_potentials():
    """Not twice the plan (a known error elsewhere), and the potentials without a folded log weight."""
    given = problem()
    r = sinkhorn(**given, max_iters=300)
    dc, da, db = torch.autograd.grad(r.value.sum(), (given["cost"], given["a"], given["b"]))
    with torch.no_grad():
        torch.testing.assert_close(dc, r.plan())
        for gradient, potential in ((da, r.f), (db, r.g)):
            torch.testing.assert_close(gradient, potential)


def test_proximal_envelope_and_detached_share_the_cost_gradient():
    given = problem()
    r = sinkhorn(**given, method="proximal", max_iters=60)
    s = sinkhorn(**given, method="proximal", max_iters=60, grad="detached")
    assert torch.equal(r.value.detach(), r.transport_cost.detach())
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), given["cost"])[0] for v in (r.value, s.transport_cost)))


def test_detached_is_the_plan_and_not_the_gradient_of_transport_cost():
    given = problem()
    detached, full = (sinkhorn(**given, max_iters=300, grad=grad).transport_cost.sum() for grad in ("detached", "unrolled"))
    ours = torch.autograd.grad(detached, given["cost"])[0]
    torch.testing.assert_close(ours, sinkhorn(**given, max_iters=300, grad="detached").plan())
    theirs = torch.autograd.grad(full, given["cost"])[0]
    assert (ours - theirs).norm() > 0.1 * theirs.norm()


@pytest.mark.parametrize(
    "grad, allowed",
    [("envelope", {"value"}), ("detached", {"transport_cost"}), ("implicit", None), ("unrolled", None)],
    ids=lambda v: str(v),
)
def test_other_outputs_refuse_a_graph(grad, allowed):
    given = problem()
    r = sinkhorn(**given, max_iters=50, grad=grad)
    outputs = {name: getattr(r, name) for name in ("f", "g", "value", "transport_cost")} | {"apply()": r.apply(torch.ones(2, 5, dtype=F64))}
    if grad == "detached":
        assert not outputs.pop("apply()").requires_grad and not r.plan().requires_grad
    else:
        outputs["plan()"] = r.plan()
    for name, out in outputs.items():
        if allowed is None or name in allowed:
            torch.autograd.grad(out.sum(), given["cost"], retain_graph=True)
        else:
            with pytest.raises(RuntimeError, match="grad="):
                out.sum().backward()


@pytest.mark.parametrize("grad", ["envelope", "unrolled", "implicit"])
def test_zero_weights_have_gradients(grad):
    """The derivative in a weight that is 0 is its potential: finite, and what a small weight tends to."""
    given = problem(n=5, m=6)
    a = given["a"].detach().clone()
    a[:, 2] = 0
    given["a"] = (a / a.sum(-1, keepdim=True)).requires_grad_()
    r = sinkhorn(**given, max_iters=300, grad=grad)
    for t in torch.autograd.grad(r.value.sum(), tuple(given.values()), retain_graph=True):
        assert t.isfinite().all()
    da = torch.autograd.grad(r.value.sum(), given["a"])[0]
    with torch.no_grad():
        step = 1e-6 * (torch.nn.functional.one_hot(torch.tensor(2), 5) - a)  # towards all weight at 2, mass kept
        moved = sinkhorn(**{**given, "a": given["a"] + step}, max_iters=300)
        base = sinkhorn(**given, max_iters=300)
    torch.testing.assert_close((da * step).sum(-1), moved.value - base.value, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("grad", ["envelope", "implicit", "unrolled", "detached"])
@pytest.mark.parametrize("source", ["cost", "sqeuclidean", "euclidean", "cosine", "callable"])
def test_ragged_gradients(grad, source):
    """Padding is NaN: the gradients there are exactly 0, and elsewhere those of each problem alone."""
    given = problem(source, n=5, m=6)
    lengths = torch.tensor([3, 5]), torch.tensor([6, 4])
    padded = {}
    for name, t in given.items():
        t = t.detach().clone()
        for i in range(2):
            n, m = lengths[0][i], lengths[1][i]
            if name in ("cost", "x", "a"):
                t[i, n:] = torch.nan
            if name in ("y", "b"):
                t[i, m:] = torch.nan
            if name == "cost":
                t[i, :, m:] = torch.nan
        padded[name] = t.requires_grad_()
    squares = lambda x, y: reference.cost_matrix(x, y, "sqeuclidean")
    metric = {} if source == "cost" else {"metric": squares if source == "callable" else source}
    pick = (lambda r: r.transport_cost) if grad == "detached" else (lambda r: r.value)
    total = pick(sinkhorn(**padded, **metric, max_iters=30, lengths=lengths, grad=grad))
    wanted = [k for k in given if not (grad == "detached" and k in ("a", "b", "epsilon"))]
    ours = dict(zip(wanted, torch.autograd.grad(total.sum(), [padded[k] for k in wanted]), strict=True))
    for i in range(2):
        n, m = lengths[0][i], lengths[1][i]
        cut = {"cost": (slice(n), slice(m)), "x": slice(n), "a": slice(n), "y": slice(m), "b": slice(m), "epsilon": ()}
        alone = {k: t[i].detach()[cut[k]].clone().requires_grad_() for k, t in given.items()}
        value = pick(sinkhorn(**alone, **metric, max_iters=30, grad=grad))
        torch.testing.assert_close(total[i], value)
        for k, v in zip(wanted, torch.autograd.grad(value, [alone[k] for k in wanted]), strict=True):
            torch.testing.assert_close(ours[k][i][cut[k]], v, rtol=1e-8, atol=1e-10)
            if k != "epsilon":
                torch.testing.assert_close(ours[k][i].sum(), v.sum())  # nothing, and no NaN, in the padding


@pytest.mark.parametrize("grad", ["envelope", "implicit", "unrolled", "detached"])
def test_empty_problems(grad):
    """A problem without points among others is worth 0 and gets no gradient; so does an empty batch."""
    x, y = torch.randn(2, 4, 2, requires_grad=True), torch.randn(3, 2)
    for source, batch in ((x, 2), (torch.zeros(0, 4, 2, requires_grad=True), 0)):
        lengths = torch.tensor([0, 4])[:batch], torch.tensor([3, 3])[:batch]
        r = sinkhorn(x=source, y=y, lengths=lengths, epsilon=0.5, grad=grad)
        value = r.transport_cost if grad == "detached" else r.value
        gradient = torch.autograd.grad(value.sum(), source)[0]
        assert not value[:1].any() and not gradient[:1].any() and gradient.isfinite().all()


def test_works_under_no_grad_and_leaves_the_mode_alone():
    given = problem()
    with torch.no_grad():
        for grad in ("envelope", "implicit", "unrolled", "detached"):
            r = sinkhorn(**given, grad=grad)
            assert not r.value.requires_grad and not r.plan().requires_grad
            assert not torch.is_grad_enabled()
    r = sinkhorn(**given)
    assert torch.is_grad_enabled() and r.value.requires_grad


def test_retained_graph_and_expanded_upstream_gradient():
    given = problem()
    total = sinkhorn(**given, grad="implicit").transport_cost.sum()
    first = torch.autograd.grad(total, given["cost"], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, given["cost"])[0])


@pytest.mark.parametrize("grad", ["implicit", "unrolled"])
def test_apply_follows_the_mode(grad):
    given, v = problem(), torch.randn(2, 5, 3, dtype=F64, requires_grad=True)
    r = sinkhorn(**given, max_iters=20, grad=grad)
    for ours, theirs in ((r.apply(v), r.plan() @ v), (r.apply_t(v[:, :4]), r.plan().mT @ v[:, :4])):
        weight = torch.randn_like(theirs)
        for p, q in zip(
            *(torch.autograd.grad((o * weight).sum(), (given["cost"], v), retain_graph=True) for o in (ours, theirs)), strict=True
        ):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("grad", ["envelope", "implicit", "unrolled", "detached"])
@pytest.mark.parametrize("source", ["cost", "sqeuclidean"])
def test_ragged_apply(source, grad):
    """Padding of v is NaN, and so is the upstream gradient at padding of the product: neither is read, nor given gradient."""
    given, lengths = problem(source, n=5, m=6), (torch.tensor([3, 5]), torch.tensor([6, 4]))
    if grad == "envelope":  # products follow nothing but v there
        given = {name: t.detach() for name, t in given.items()}
    r = sinkhorn(**given, max_iters=5, lengths=lengths, grad=grad)
    for product, size, columns, rows in ((r.apply, 6, lengths[1], lengths[0]), (r.apply_t, 5, lengths[0], lengths[1])):
        v, padding = torch.randn(2, size, 3, dtype=F64), torch.arange(size) >= columns[:, None]
        clean, poisoned = (v.masked_fill(padding[..., None], fill).requires_grad_() for fill in (0.0, torch.nan))
        expected, out = product(clean), product(poisoned)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        torch.testing.assert_close(product(poisoned[..., 0]), out[..., 0])
        outside = (torch.arange(out.shape[1]) >= rows[:, None])[..., None]
        assert not out.masked_select(outside).any()
        leaves = [t for t in given.values() if t.requires_grad and grad != "detached"]
        truth = torch.autograd.grad(expected.square().sum(), [clean, *leaves], retain_graph=True)
        ours = torch.autograd.grad(out, [poisoned, *leaves], (2 * out).detach().masked_fill(outside, torch.nan), retain_graph=True)
        for u, t in zip(ours, truth, strict=True):
            torch.testing.assert_close(u, t)
        assert not ours[0].masked_select(padding[..., None]).any()


@pytest.mark.parametrize("grad", ["implicit", "unrolled"])
@pytest.mark.parametrize("source", ["cost", "sqeuclidean"])
def test_ragged_plan(source, grad):
    """The upstream gradient at padding of the plan is NaN: it reaches nothing."""
    given, (rows, cols) = problem(source, n=5, m=6), (torch.tensor([3, 5]), torch.tensor([6, 4]))
    plan = sinkhorn(**given, max_iters=5, lengths=(rows, cols), grad=grad).plan()
    outside = (torch.arange(5) >= rows[:, None])[..., None] | (torch.arange(6) >= cols[:, None])[:, None]
    assert not plan[outside].any()
    truth = torch.autograd.grad(plan.square().sum(), tuple(given.values()), retain_graph=True)
    ours = torch.autograd.grad(plan, tuple(given.values()), (2 * plan).detach().masked_fill(outside, torch.nan))
    for u, t in zip(ours, truth, strict=True):
        torch.testing.assert_close(u, t)


def test_apply_is_differentiable_in_its_argument():
    given, v = problem(), torch.randn(2, 5, dtype=F64, requires_grad=True)
    r = sinkhorn(**{k: t.detach() for k, t in given.items()})
    assert gradcheck(r.apply, (v,)) and gradcheck(r.apply_t, (torch.randn(2, 4, 2, dtype=F64, requires_grad=True),))
    assert gradgradcheck(r.apply, (v,))


def test_unrolled_stores_no_plans():
    """Saved for backward: potentials of each step, not T x n x m."""
    n, steps, saved = 60, 12, []
    x, y = torch.randn(n, 2, requires_grad=True), torch.randn(n, 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        sinkhorn(x=x, y=y, max_iters=steps, grad="unrolled").value.backward()
    assert max(saved) < n * n and sum(saved) < 4 * steps * 2 * n


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_float32_is_as_accurate_as_autograd(metric, epsilon):
    """At epsilon 0.05 the squared distances span a thousand nats: unnormalised steps would lose a digit."""
    x, y = torch.randn(60, 16), torch.randn(50, 16) + 0.3
    a, b = torch.full((60,), 1 / 60), torch.full((50,), 1 / 50)

    def outputs(solve, dtype):
        leaf = x.to(dtype).requires_grad_()
        r = solve(leaf, y.to(dtype))
        plan = r.plan() if callable(r.plan) else r.plan
        gradients = [torch.autograd.grad(t, leaf, retain_graph=True)[0] for t in (r.value, plan.square().sum())]
        return [t.detach().double() for t in (r.value, r.f, plan, *gradients)]

    def plain(x, y):
        return reference.sinkhorn(reference.cost_matrix(x, y, metric), a.to(x), b.to(x), epsilon, 30)

    truth, naive = outputs(plain, F64), outputs(plain, torch.float32)
    for method in ("log", "kernel"):
        options = {"metric": metric, "epsilon": epsilon, "max_iters": 30, "grad": "unrolled", "method": method}
        ours = outputs(lambda x, y, options=options: sinkhorn(x=x, y=y, **options), torch.float32)
        for t, u, v in zip(truth, ours, naive, strict=True):
            assert (u - t).norm() <= 2 * (v - t).norm() + 4 * torch.finfo(torch.float32).eps * t.norm()


@pytest.mark.parametrize("nats", [10, 100, 1000])
def test_float32_gradient_in_epsilon(nats):
    """Sums of potentials and costs, of which it is the small difference, would lose three digits."""
    x, y = torch.randn(8, 48, 3), torch.randn(8, 60, 3) + 1
    cost = reference.cost_matrix(x, y, "sqeuclidean")
    cost *= nats / cost.max()
    a, b = torch.full((8, 48), 1 / 48), torch.full((8, 60), 1 / 60)

    def gradients(solve, dtype):
        epsilon = torch.ones(8, dtype=dtype, requires_grad=True)
        r = solve(epsilon, *(t.to(dtype) for t in (cost, a, b)))
        return [torch.autograd.grad(t.sum(), epsilon, retain_graph=True)[0].double() for t in (r.value, r.transport_cost)]

    def plain(epsilon, cost, a, b):
        return reference.sinkhorn(cost, a, b, epsilon, 15)

    def ours(epsilon, cost, a, b):
        return sinkhorn(cost, a=a, b=b, epsilon=epsilon, max_iters=15, method="log", grad="unrolled")

    for t, u, v in zip(gradients(plain, F64), gradients(ours, torch.float32), gradients(plain, torch.float32), strict=True):
        assert (u - t).norm() <= 2 * (v - t).norm() + 4 * torch.finfo(torch.float32).eps * t.norm()


def test_half_precision_gradients():
    cost = torch.rand(3, 8, 9)
    for dtype in (torch.bfloat16, torch.float16):
        low = cost.to(dtype).requires_grad_()
        full = low.detach().double().requires_grad_()
        gradients = [torch.autograd.grad(sinkhorn(c, epsilon=0.1, grad="unrolled").value.sum(), c)[0] for c in (low, full)]
        assert gradients[0].dtype == dtype
        torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("name", ["envelope", "implicit", "unrolled"])
def test_func_grad(name):
    given = problem("sqeuclidean")
    kw = {k: t.detach() for k, t in given.items() if k != "x"}
    value = lambda x: sinkhorn(x=x, **kw, max_iters=30, grad=name).value.sum()
    torch.testing.assert_close(torch.func.grad(value)(given["x"].detach()), torch.autograd.grad(value(given["x"]), given["x"])[0])


@pytest.mark.parametrize("grad", ["envelope", "implicit", "unrolled", "detached"])
def test_vmap(grad):
    """Over a cost, over points, and over weights with one shared cost, alone and with gradients inside and outside."""
    cost, x, y = torch.rand(3, 2, 5, 4, dtype=F64), torch.randn(3, 2, 5, 2, dtype=F64), torch.randn(2, 4, 2, dtype=F64)
    a, shared = torch.rand(3, 5, dtype=F64).softmax(-1), torch.rand(5, 4, dtype=F64)

    def total(**kw):
        r = sinkhorn(**kw, epsilon=0.5, max_iters=7, grad=grad)
        return (r.transport_cost if grad == "detached" else r.value).sum()

    for call, batched in ((lambda c: total(cost=c), cost), (lambda p: total(x=p, y=y), x), (lambda c: total(cost=c, a=a), cost[:, 0])):
        torch.testing.assert_close(torch.vmap(call)(batched), torch.stack([call(t) for t in batched]))
        leaf = batched.clone().requires_grad_()
        expected = torch.autograd.grad(sum(call(t) for t in leaf), leaf)[0]
        torch.testing.assert_close(torch.vmap(torch.func.grad(call))(batched), expected)
        torch.testing.assert_close(torch.autograd.grad(torch.vmap(call)(leaf).sum(), leaf)[0], expected)
    leaf = shared.requires_grad_()
    inside, outside = torch.vmap(lambda w: total(cost=leaf, a=w))(a).sum(), sum(total(cost=leaf, a=w) for w in a)
    torch.testing.assert_close(*(torch.autograd.grad(v, leaf)[0] for v in (inside, outside)))


@pytest.mark.parametrize("grad", ["envelope", "implicit", "unrolled", "detached"])
@pytest.mark.parametrize(
    "options",
    [{"x": 3}, {"x": 3, "rho": (0.5, None)}, {}, {"method": "kernel", "anneal": (1.0, 0.5)}, {"method": "proximal"}],
    ids=lambda o: "-".join(o) or "cost",
)
def test_compile(grad, options):
    """In one graph, with gradients and without: potentials, plan and products too."""
    width, options = options.get("x"), {k: v for k, v in options.items() if k != "x"}
    if grad == "implicit" and options.get("method") == "proximal":
        options["epsilon"] = 5.0  # or its last epsilon, a twentieth, is far from converged
    leaf = torch.rand(2, 9, 7 if width is None else width, requires_grad=True)
    other = None if width is None else torch.rand(2, 7, width)

    def outputs(leaf):
        source = {"cost": leaf} if width is None else {"x": leaf, "y": other}
        r = sinkhorn(**source, **({"epsilon": 0.3, "max_iters": 20} | options), grad=grad)
        return r.value, r.transport_cost, r.f, r.g, r.plan(), r.apply(torch.ones(2, 7)), r.error

    def loss(leaf):
        value, transport_cost, *_ = outputs(leaf)
        return (transport_cost if grad == "detached" else value).sum()

    torch._dynamo.reset()
    eager, got = loss(leaf), torch.compile(loss, backend="aot_eager", fullgraph=True)(leaf)
    torch.testing.assert_close(got, eager)
    torch.testing.assert_close(torch.autograd.grad(got, leaf)[0], torch.autograd.grad(eager, leaf)[0])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(outputs, backend="aot_eager", fullgraph=True)(leaf), outputs(leaf))


@pytest.mark.parametrize("grad", ["implicit", "unrolled"])
def test_never_counts_on_the_tile_size(grad, monkeypatch):
    given = {k: t.detach().requires_grad_() for k, t in problem("sqeuclidean", n=7, m=6).items()}
    results = []
    for size in (10**6, 13):
        monkeypatch.setattr("kdfast._ops.sinkhorn.geometry.TILE", {"cpu": size})
        monkeypatch.setattr("kdfast._ops.sinkhorn.cpu.FORMED", size)
        r = sinkhorn(**given, max_iters=30, grad=grad, method="log")
        results.append((r.value, r.f, *torch.autograd.grad(r.transport_cost.sum(), tuple(given.values()))))
    for u, v in zip(*results, strict=True):
        torch.testing.assert_close(u, v, rtol=1e-9, atol=1e-11)
