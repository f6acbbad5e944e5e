"""What the tests of Sinkhorn on a GPU, in Triton and in CUDA, share."""

import torch
from sinkhorn_cases import weights as double_weights

from kdfast._ops.sinkhorn import reference
from kdfast.ops import sinkhorn


def weights(*shape):
    return double_weights(*shape, dtype=torch.float32)


def check(cost, a, b, epsilon, iterations, *, impl, moved, method="log", rho=(None, None), anneal=None, source=None):
    """Error at most twice that of plain logsumexp iterations in float32, 4 units in the last place, and one an iteration."""
    given = {"cost": cost} if source is None else source
    given = {name: moved(x) for name, x in given.items()}
    options = {"epsilon": epsilon, "max_iters": iterations, "method": method, "rho": rho, "anneal": anneal}
    ours = sinkhorn(**given, a=moved(a), b=moved(b), **options, impl=impl)
    truth, naive = (
        reference.sinkhorn(cost.to(t), a.to(t), b.to(t), epsilon, iterations, rho=rho, anneal=anneal, proximal=method == "proximal")
        for t in (torch.float64, torch.float32)
    )
    unit = torch.finfo(torch.float32).eps * float(truth.f.abs().max() + truth.g.abs().max() + cost.abs().max())
    least = epsilon / iterations if method == "proximal" else epsilon
    steep = max(1.0, float(cost.max()) / least)  # an error of the exponents is one of the plan
    for name, slack in (("f", 1.0), ("g", 1.0), ("value", steep), ("transport_cost", steep)):
        u, v, w = (getattr(r, name).double().cpu() for r in (ours, truth, naive))
        assert float((u - v).abs().max()) <= 2 * float((w - v).abs().max()) + (4 + iterations) * unit * slack, name
    return ours


def check_padding(cost, lengths, *, impl, moved):
    """Problems of `lengths` in `cost`, with NaN beyond, against each by itself in float64."""
    sizes = list(zip(*(x.tolist() for x in lengths), strict=True))
    want = [sinkhorn(cost[i, :n, :m].double(), epsilon=0.1, max_iters=5) for i, (n, m) in enumerate(sizes)]
    for i, (n, m) in enumerate(sizes):
        cost[i, n:], cost[i, :, m:] = torch.nan, torch.nan
    ours = sinkhorn(moved(cost), epsilon=0.1, max_iters=5, lengths=tuple(map(moved, lengths)), impl=impl)
    for i, (exact, (n, m)) in enumerate(zip(want, sizes, strict=True)):
        torch.testing.assert_close(ours.value[i].cpu().double(), exact.value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.f[i, :n].cpu().double(), exact.f, rtol=1e-5, atol=1e-6)
        assert (ours.f[i, n:] == 0).all() and (ours.g[i, m:] == 0).all()


def check_relaxed_and_alone(n, m, *, impl, moved, dtype=torch.float32):
    """A relaxed row and column that no pair is allowed for keep all of their mass, and one without weight may be near all others."""
    a, b = weights(1, n), weights(1, m)
    forbidden = torch.rand(1, n, m).to(dtype)
    forbidden[:, n // 2], forbidden[..., m // 2] = torch.inf, torch.inf
    near, some = torch.rand(1, n, m).to(dtype), b.clone()
    near[..., m // 2], some[:, m // 2] = -30, 0
    for cost, weight, rho, epsilon in ((forbidden, b, (0.7, 2.0), 0.3), (near, some, (0.05, 0.05), 0.05)):
        ours = sinkhorn(moved(cost), a=moved(a), b=moved(weight), rho=rho, epsilon=epsilon, max_iters=9, impl=impl)
        want = sinkhorn(cost.double(), a=a.double(), b=weight.double(), rho=rho, epsilon=epsilon, max_iters=9, impl="torch")
        for name in ("f", "g", "value", "transport_cost", "error"):
            torch.testing.assert_close(getattr(ours, name).cpu().double(), getattr(want, name), rtol=1e-5, atol=1e-5)
