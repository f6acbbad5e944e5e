"""kdfast.functional.transport: losses and layers over Sinkhorn iterations, against the published loops."""

import re

import pytest
import torch
import torch.distributed as dist
from ranks import needs_gloo, on_two_ranks
from sinkhorn_impls import every_impl  # noqa: F401
from torch.autograd import gradcheck, gradgradcheck

from kdfast import functional as F
from kdfast.ops import sinkhorn

F64 = torch.float64


# ---- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", ["envelope", "implicit", "unrolled", "detached"])
def test_loss_is_the_op_reduced(grad):
    x, y = torch.randn(3, 6, 4, dtype=F64, requires_grad=True), torch.randn(3, 5, 4, dtype=F64)
    unit = torch.nn.functional.normalize(x, dim=-1), torch.nn.functional.normalize(y, dim=-1)
    r = sinkhorn(x=unit[0], y=unit[1], epsilon=0.2, grad=grad)
    expected = r.transport_cost if grad == "detached" else r.value
    for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.mean())):
        loss = F.sinkhorn_loss(x, y, epsilon=0.2, grad=grad, normalize=True, reduction=reduction)
        torch.testing.assert_close(loss, value)
        assert torch.autograd.grad(loss.sum(), x)[0].abs().sum() > 0


def test_loss_in_label_space():
    """A shared cost between classes, gradient through the weights b."""
    cost, logits = torch.rand(4, 5, dtype=F64), torch.randn(7, 5, dtype=F64, requires_grad=True)
    a = torch.randn(7, 4, dtype=F64).softmax(-1)
    assert gradcheck(lambda z: sinkhorn(cost, a=a, b=z.softmax(-1), epsilon=0.5, max_iters=100).value, (logits,), fast_mode=True)


@pytest.mark.parametrize("rho", [None, 0.5], ids=["balanced", "relaxed"])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
def test_divergence(metric, rho):
    """Zero with zero gradient at equal measures (in any order), positive elsewhere."""
    x, weight = (torch.randn(2, 8, 3, dtype=F64) / 2).requires_grad_(), torch.rand(2, 8, dtype=F64)
    weight = weight / weight.sum(-1, keepdim=True)
    kw = {"metric": metric, "epsilon": 1.0, "max_iters": 200, "rho": rho}
    order = torch.randperm(8)
    same = F.sinkhorn_divergence(x, x.detach()[:, order], a=weight, b=weight[:, order], **kw)
    assert same.detach().abs() < 1e-9
    assert torch.autograd.grad(same, x)[0].abs().max() < 1e-6
    y = torch.randn(2, 7, 3, dtype=F64)
    assert (F.sinkhorn_divergence(x, y, a=weight, reduction="none", **kw) > 0).all()
    assert gradcheck(lambda x: F.sinkhorn_divergence(x, y, a=weight, **kw), (x,), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_divergence_rounds_its_gradient_once(dtype):
    """Its parts, which nearly cancel for clouds alike, were rounded each to the points' dtype: 20 times its rounding was left."""
    x = torch.randn(4, 17, 3).to(dtype).requires_grad_()
    y = torch.randn(4, 17, 3).to(dtype)
    kw = {"epsilon": 0.5, "max_iters": 100}
    got, wide = torch.autograd.grad(F.sinkhorn_divergence(x, y, **kw), x)[0], x.detach().double().requires_grad_()
    want = torch.autograd.grad(F.sinkhorn_divergence(wide, y.double(), **kw), wide)[0]
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_divergence_of_diracs_of_different_mass():
    """At one place, only the masses differ: zero for equal ones, and positive otherwise."""
    x = torch.zeros(1, 1, dtype=F64)
    a, b = torch.tensor([0.5], dtype=F64), torch.tensor([2.0], dtype=F64)
    kw = {"epsilon": 0.3, "rho": 0.7, "max_iters": 300}
    assert F.sinkhorn_divergence(x, x, a=a, b=b, **kw) > 1e-2
    assert F.sinkhorn_divergence(x, x, a=a, b=a, **kw).abs() < 1e-12


def test_divergence_ragged():
    x, y = torch.randn(2, 6, 3), torch.randn(2, 5, 3)
    lengths = torch.tensor([4, 6]), torch.tensor([5, 2])
    for rho in (None, 0.5):
        kw = {"epsilon": 0.5, "rho": rho}
        alone = [F.sinkhorn_divergence(x[i, : lengths[0][i]], y[i, : lengths[1][i]], **kw) for i in range(2)]
        padded = x.clone(), y.clone()
        padded[0][0, 4:], padded[1][1, 2:] = torch.nan, torch.nan
        torch.testing.assert_close(F.sinkhorn_divergence(*padded, lengths=lengths, reduction="none", **kw), torch.stack(alone))


def test_divergence_takes_one_rho():
    with pytest.raises(TypeError, match="rho must be None or a float in a divergence"):
        F.sinkhorn_divergence(torch.rand(3, 2), torch.rand(3, 2), rho=(1.0, None))


# ---- assignments ------------------------------------------------------------------------------------------------------


def published_codes(scores, epsilon, iters):
    """The loop of SwAV and DINOv2: prototypes (rows of Q) first, samples last."""
    q = torch.exp(scores / epsilon).T
    q = q / q.sum()
    for _ in range(iters):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("iters", [1, 3])
@pytest.mark.parametrize("tile", [None, 50], ids=["whole", "row tiles"])
def test_assign_is_the_published_loop(iters, tile, monkeypatch):
    if tile:
        monkeypatch.setattr("kdfast._ops.sinkhorn.assign.TILE", {"cpu": tile})
    scores = torch.rand(33, 7, dtype=F64) * 2 - 1
    codes = F.sinkhorn_assign(scores, iters=iters)
    torch.testing.assert_close(codes, published_codes(scores, 0.05, iters))
    batch = torch.stack([scores, scores.flip(0)])
    torch.testing.assert_close(F.sinkhorn_assign(batch, iters=iters)[1], codes.flip(0))
    assert F.sinkhorn_assign(torch.rand(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_assign_of_large_scores(dtype):
    """exp(30 / 0.05) is far beyond any dtype; the published loop gives NaN."""
    scores = (torch.randn(64, 10) * 10).to(dtype).requires_grad_()
    codes = F.sinkhorn_assign(scores, iters=5)
    assert codes.dtype == torch.float32 and not codes.requires_grad
    torch.testing.assert_close(codes.sum(-1), torch.ones(64))
    torch.testing.assert_close(codes.double(), F.sinkhorn_assign(scores.double(), iters=5), rtol=1e-3, atol=1e-3)
    assert published_codes(scores.detach().float(), 0.05, 5).isnan().any()


def rank_rows(rank: int, world: int):
    scores = torch.randn(2, 11, 6, generator=torch.Generator().manual_seed(3)) * 3
    return scores, slice(*((0, 4), (4, 11))[rank])


def codes_of_rank(rank: int):
    scores, rows = rank_rows(rank, 2)
    return F.sinkhorn_assign(scores[:, rows], iters=4, group=dist.group.WORLD)


@needs_gloo
def test_assign_over_processes():
    """Two processes with 4 and 7 samples give the rows of one process with all of them."""
    scores, _ = rank_rows(0, 2)
    torch.testing.assert_close(torch.cat(on_two_ranks(codes_of_rank), 1), F.sinkhorn_assign(scores, iters=4))


# ---- partial assignment -----------------------------------------------------------------------------------------------


def published_log_transport(scores, alpha, iters):
    n, m = scores.shape
    z = torch.cat([torch.cat([scores, alpha.expand(n, 1)], 1), alpha.expand(1, m + 1)], 0)
    norm = -torch.log(torch.tensor(n + m, dtype=scores.dtype))
    log_mu = torch.cat([norm.expand(n), torch.log(torch.tensor([float(m)], dtype=scores.dtype)) + norm])
    log_nu = torch.cat([norm.expand(m), torch.log(torch.tensor([float(n)], dtype=scores.dtype)) + norm])
    u, v = torch.zeros_like(log_mu), torch.zeros_like(log_nu)
    for _ in range(iters):
        u = log_mu - torch.logsumexp(z + v, 1)
        v = log_nu - torch.logsumexp(z + u[:, None], 0)
    return z + u[:, None] + v - norm


@pytest.mark.parametrize("iters", [1, 5, 30])
def test_log_transport_is_the_published_loop(iters):
    """Values and the gradients of truncated iterations, in scores and in the dustbin's score."""
    scores, alpha = torch.randn(6, 4, dtype=F64, requires_grad=True), torch.tensor(0.7, dtype=F64, requires_grad=True)
    ours, theirs = F.log_optimal_transport(scores, alpha, iters=iters), published_log_transport(scores, alpha, iters)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(theirs)
    for u, v in zip(*(torch.autograd.grad((o * weight).sum(), (scores, alpha)) for o in (ours, theirs)), strict=True):
        torch.testing.assert_close(u, v)


def test_log_transport_gradcheck_and_batch():
    scores, alpha = torch.randn(2, 3, 4, dtype=F64, requires_grad=True), torch.tensor([0.3], dtype=F64, requires_grad=True)
    assert gradcheck(lambda s, z: F.log_optimal_transport(s, z, iters=3), (scores, alpha))
    for i in range(2):
        torch.testing.assert_close(F.log_optimal_transport(scores, alpha)[i], F.log_optimal_transport(scores[i], alpha))


def test_log_transport_ragged():
    scores = torch.randn(3, 5, 4)
    lengths = torch.tensor([5, 2, 0]), torch.tensor([1, 4, 3])
    for i in range(3):
        scores[i, lengths[0][i] :] = torch.nan
        scores[i, :, lengths[1][i] :] = torch.nan
    scores.requires_grad_()
    out = F.log_optimal_transport(scores, 0.4, iters=20, lengths=lengths)
    assert not out.isnan().any()
    for i in range(2):
        n, m = int(lengths[0][i]), int(lengths[1][i])
        alone = published_log_transport(scores[i, :n, :m].detach(), torch.tensor(0.4), 20)
        rows, cols = [*range(n), 5], [*range(m), 4]
        torch.testing.assert_close(out[i][rows][:, cols], alone, rtol=1e-4, atol=1e-5)
        assert (out[i, n:5].detach() == -torch.inf).all() and (out[i, :, m:4].detach() == -torch.inf).all()
    out.exp()[:2].square().sum().backward()
    assert not scores.grad.isnan().any()
    assert not scores.grad[1, 2:].any() and not scores.grad[0, :, 1:].any() and scores.grad[0, :, 0].any()


@pytest.mark.parametrize("sizes", [(0, 0), (3, 4)], ids=["empty", "padding"])
def test_log_transport_of_neither_rows_nor_columns(sizes):
    """The dustbins have no mass either: the plan is 0. The other problems of a batch are as they are alone."""
    scores, alpha = torch.randn(2, *sizes, requires_grad=True), torch.tensor(0.4, requires_grad=True)
    none, some = torch.tensor([0, 0]), torch.tensor([0, min(sizes)])
    out = F.log_optimal_transport(scores, alpha, iters=5, lengths=(some, some) if any(sizes) else (none, none))
    assert out[0].eq(-torch.inf).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.exp().square().sum(), (scores, alpha)))
    if any(sizes):
        torch.testing.assert_close(out[1, [0, 1, 2, 3]][:, [0, 1, 2, 4]], F.log_optimal_transport(scores[1, :, :3], alpha, iters=5))


def test_log_transport_of_large_scores():
    scores = torch.randn(20, 20) * 200
    out = F.log_optimal_transport(scores, 1.0, iters=50)
    torch.testing.assert_close(out.double(), F.log_optimal_transport(scores.double(), 1.0, iters=50), rtol=1e-4, atol=5e-3)


# ---- doubly stochastic normalisation ----------------------------------------------------------------------------------


def published_normalize(x, iters, eps):
    x = x.softmax(-1) + eps
    x = x / (x.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        x = x / (x.sum(-1, keepdim=True) + eps)
        x = x / (x.sum(-2, keepdim=True) + eps)
    return x


@pytest.mark.parametrize("iters", [1, 2, 20])
def test_normalize_is_the_published_loop(iters):
    logits = (torch.randn(5, 3, 4, 4, dtype=F64) * 3).requires_grad_()
    ours, theirs = F.sinkhorn_normalize(logits, iters=iters), published_normalize(logits, iters, 1e-6)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(theirs)
    torch.testing.assert_close(*(torch.autograd.grad((o * weight).sum(), logits)[0] for o in (ours, theirs)))


def test_normalize_gradients():
    logits = torch.randn(2, 3, 3, dtype=F64, requires_grad=True)
    assert gradcheck(lambda x: F.sinkhorn_normalize(x, iters=4), (logits,))
    assert gradgradcheck(lambda x: F.sinkhorn_normalize(x, iters=4), (logits,), fast_mode=True)
    value = lambda x: F.sinkhorn_normalize(x, iters=4).square().sum()
    torch.testing.assert_close(torch.func.grad(value)(logits.detach()), torch.autograd.grad(value(logits), logits)[0])


def test_normalize_float32_and_memory():
    logits = torch.randn(1000, 4, 4) * 4
    single, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
    weight, saved = torch.randn(1000, 4, 4), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out = F.sinkhorn_normalize(single)
    assert sum(saved) <= 1000 * (2 * 16 + 39 * 4)  # the loop under autograd stores about 1000 * 16 * 80
    gradients = [torch.autograd.grad((o * w).sum(), x)[0] for o, w, x in (
        (out, weight, single), (published_normalize(double, 20, 1e-6), weight.double(), double))]  # fmt: skip
    plain = torch.autograd.grad((published_normalize(single, 20, 1e-6) * weight).sum(), single)[0]
    error, naive = ((g.double() - gradients[1]).norm() for g in (gradients[0], plain))
    assert error <= 2 * naive + 4 * torch.finfo(torch.float32).eps * gradients[1].norm()
    assert F.sinkhorn_normalize(logits.bfloat16()).dtype == torch.float32


# ---- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_compile(with_gradient, batch):
    def everything(x, y, scores, logits):
        return (
            F.sinkhorn_divergence(x, y, epsilon=0.5, max_iters=5, rho=1.0)
            + F.log_optimal_transport(scores, 0.5, iters=3).sum()
            + (F.sinkhorn_normalize(logits, iters=3) * F.sinkhorn_assign(logits)).sum()
        )

    tensors = [torch.randn(shape, requires_grad=with_gradient) for shape in ((*batch, 4, 2), (*batch, 5, 2), (3, 4), (2, 4, 4))]
    torch._dynamo.reset()
    eager, compiled = everything(*tensors), torch.compile(everything, backend="aot_eager", fullgraph=True)(*tensors)
    torch.testing.assert_close(compiled, eager)
    if not with_gradient:
        return
    for u, v in zip(*(torch.autograd.grad(value, tensors) for value in (compiled, eager)), strict=True):
        torch.testing.assert_close(u, v)


BAD = {
    "loss rank": (lambda: F.sinkhorn_loss(torch.rand(3), torch.rand(3, 2)), ValueError, "x must have at least 2"),
    "loss type": (lambda: F.sinkhorn_loss(torch.rand(3, 2), None), TypeError, "y must be a Tensor"),
    "loss reduction": (
        lambda: F.sinkhorn_loss(torch.rand(3, 2), torch.rand(3, 2), reduction="max"),
        ValueError,
        "reduction must be one of",
    ),
    "divergence lengths": (
        lambda: F.sinkhorn_divergence(torch.rand(2, 3, 2), torch.rand(2, 4, 2), lengths=3),
        TypeError,
        "lengths must be a pair",
    ),
    "assign epsilons": (lambda: F.sinkhorn_assign(torch.rand(3, 2), epsilon=torch.ones(3)), ValueError, "epsilon must have shape ()"),
    "assign rank": (lambda: F.sinkhorn_assign(torch.rand(3)), ValueError, "scores must have at least 2"),
    "assign epsilon": (lambda: F.sinkhorn_assign(torch.rand(3, 2), epsilon=0.0), ValueError, "epsilon must be a finite number > 0"),
    "assign large epsilon": (lambda: F.sinkhorn_assign(torch.rand(3, 2), epsilon=1e300), ValueError, "epsilon must be in the range of"),
    "transport large alpha": (lambda: F.log_optimal_transport(torch.rand(3, 2), 1e300), ValueError, "alpha must be in the range of"),
    "assign iters": (lambda: F.sinkhorn_assign(torch.rand(3, 2), iters=0), ValueError, "iters must be >= 1"),
    "transport alpha": (lambda: F.log_optimal_transport(torch.rand(3, 2), torch.rand(2)), ValueError, "alpha must be one number"),
    "transport one length": (
        lambda: F.log_optimal_transport(torch.rand(2, 3, 2), 0.1, lengths=(torch.tensor(3), torch.tensor(1))),
        ValueError,
        "lengths[0] must have shape (2,)",
    ),
    "transport lengths": (
        lambda: F.log_optimal_transport(torch.rand(1, 3, 2), 0.1, lengths=(torch.tensor([4]), torch.tensor([1]))),
        IndexError,
        "lengths[0] must lie in [0, 4)",
    ),
    "normalize shape": (lambda: F.sinkhorn_normalize(torch.rand(3, 4)), ValueError, "logits must be square"),
    "normalize eps tensor": (lambda: F.sinkhorn_normalize(torch.rand(3, 3), eps=torch.tensor(0.1)), TypeError, "eps must be a float"),
    "normalize eps": (lambda: F.sinkhorn_normalize(torch.rand(3, 3), eps=-1.0), ValueError, "eps must be a finite number >= 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=re.escape(message)):
        call()
