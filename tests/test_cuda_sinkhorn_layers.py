"""The CUDA kernels of sinkhorn_assign and sinkhorn_normalize against float64 definitions: on a GPU, elsewhere emulated on the CPU."""

import pytest
import torch
from cuda_kernels import DEVICE, EMULATED, cuda, moved  # noqa: F401  the fixture serves every test

from kdfast._core import cuda_runtime
from kdfast._ops.sinkhorn import normalize
from kdfast.functional import sinkhorn_assign, sinkhorn_normalize


def value_and_gradient(f, logits, weight):
    logits = logits.detach().clone().requires_grad_()
    out = f(logits)
    return out.detach(), torch.autograd.grad((out * weight.to(out)).sum(), logits)[0]


def codes(scores, epsilon, iters):
    """The published loop in log space, float64."""
    log_q = scores.double() / epsilon
    for _ in range(iters):
        log_q = log_q - log_q.logsumexp(-2, keepdim=True)
        log_q = log_q - log_q.logsumexp(-1, keepdim=True)
    return log_q.exp()


# a warp; a block; blocks of a cluster; one pair of rows a block or many, ending within a pair and within a load of four
@pytest.mark.parametrize("iters", [1, 3])
@pytest.mark.parametrize(("batch", "n", "k"), [(1, 1, 1), (2, 7, 5), (1, 301, 130), (3, 2, 1000), (1, 41, 8195)], ids=str)
def test_codes(batch, n, k, iters):
    scores = torch.rand(batch, n, k) * 2 - 1
    ours, want = sinkhorn_assign(moved(scores), iters=iters, impl="cuda").cpu().double(), codes(scores, 0.05, iters)
    naive = sinkhorn_assign(moved(scores), iters=iters, impl="torch").cpu().double()
    unit = torch.finfo(torch.float32).eps * float(want.max()) * 20  # of the exponents, up to 20
    assert float((ours - want).abs().max()) <= 2 * float((naive - want).abs().max()) + 4 * unit
    torch.testing.assert_close(ours.sum(-1), torch.ones(batch, n).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_codes_of_half_precision_and_strided_scores(dtype):
    scores = (torch.rand(2, 9, 50) * 2 - 1).to(dtype)
    ours = sinkhorn_assign(moved(scores), impl="cuda")
    torch.testing.assert_close(ours.cpu().double(), codes(scores, 0.05, 3), rtol=1e-4, atol=1e-6)
    for part in (scores[:, ::2], scores[..., 3:40], scores[..., 4:40]):
        again = sinkhorn_assign(moved(part.contiguous()), impl="cuda")
        torch.testing.assert_close(sinkhorn_assign(moved(scores)[..., 3:40] if part.shape[-1] == 37 else moved(part), impl="cuda"), again)


def test_codes_of_extreme_scores():
    scores = 1000 * torch.randn(2, 12, 20)
    ours = sinkhorn_assign(moved(scores), impl="cuda").cpu().double()
    torch.testing.assert_close(ours.sum(-1), torch.ones(2, 12).double(), rtol=1e-5, atol=0)
    low = torch.rand(2, 300, 1200) - 60  # below 2^-1000
    low[..., 512:1100] = -torch.inf  # all that a warp has
    low[..., 512:1100:7] = -1000.0
    found = [sinkhorn_assign(moved(low), impl=impl) for impl in ("cuda", "torch")]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6, equal_nan=True)
    scores[0, 3, 4] = torch.nan
    ours = sinkhorn_assign(moved(scores), impl="cuda")
    assert ours[0].isnan().any() and not ours[1].isnan().any()


def test_no_scores():
    assert sinkhorn_assign(moved(torch.rand(0, 3, 4)), impl="cuda").shape == (0, 3, 4)
    assert sinkhorn_assign(moved(torch.rand(2, 0, 4)), impl="cuda").shape == (2, 0, 4)


def test_scores_that_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="float64"):
        sinkhorn_assign(moved(torch.rand(2, 3).double()), impl="cuda")
    with pytest.raises(ValueError, match="65536 columns"):
        sinkhorn_assign(moved(torch.rand(1, 65537)), impl="cuda")
    monkeypatch.setattr(cuda_runtime, "has_clusters", lambda: False)
    with pytest.raises(ValueError, match="8192 columns"):
        sinkhorn_assign(moved(torch.rand(1, 8193)), impl="cuda")


# 4, 8 and 32 lanes a matrix, filled or not; more matrices than a block has
@pytest.mark.parametrize("iters", [1, 2, 20])
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (37, 4), (2, 3), (18, 8), (3, 5), (5, 32), (2, 19)], ids=str)
def test_values_and_gradients(batch, n, iters):
    logits, weight = 3 * torch.randn(batch, n, n), torch.randn(batch, n, n)
    ours = value_and_gradient(lambda x: sinkhorn_normalize(x, iters=iters, impl="cuda"), moved(logits), weight)
    truth = value_and_gradient(lambda x: normalize.plain(x, iters, 1e-6), logits.double(), weight)
    naive = value_and_gradient(lambda x: normalize.plain(x, iters, 1e-6), logits, weight)
    for u, v, w in zip(ours, truth, naive, strict=True):
        u, w = u.cpu().double(), w.double()
        unit = torch.finfo(torch.float32).eps * max(1.0, float(v.abs().max()))
        assert float((u - v).abs().max()) <= 2 * float((w - v).abs().max()) + (4 + iters) * unit


def test_extreme_logits_and_nan():
    logits = torch.randn(4, 4, 4)
    logits[0] *= 1000
    logits[1, 2] = -torch.inf
    logits[2, 1, 1] = torch.nan
    logits[3, :, 2] = -torch.inf
    ours, want = (sinkhorn_normalize(moved(logits), impl=impl).cpu() for impl in ("cuda", "torch"))
    torch.testing.assert_close(ours, want, equal_nan=True)


def test_without_eps():
    logits = torch.randn(3, 6, 6)
    ours, want = (sinkhorn_normalize(moved(logits), eps=0.0, impl=impl).cpu() for impl in ("cuda", "torch"))
    torch.testing.assert_close(ours, want)


def test_vmap_and_compile():
    logits = moved(torch.randn(2, 3, 4, 4))
    each = torch.func.vmap(lambda x: sinkhorn_normalize(x, impl="cuda"))(logits)
    assert torch.equal(each, sinkhorn_normalize(logits, impl="cuda"))
    compiled = torch.compile(lambda x: sinkhorn_normalize(x, impl="cuda"), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(logits), each)


def test_twice_differentiable():
    logits = moved(torch.randn(2, 4, 4)).requires_grad_()
    found = []
    for impl in ("cuda", "torch"):
        (first,) = torch.autograd.grad(sinkhorn_normalize(logits, iters=3, impl=impl).square().sum(), logits, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), logits)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_an_empty_batch():
    assert sinkhorn_normalize(moved(torch.rand(0, 4, 4)), impl="cuda").shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("logits", "iters", "reason"),
    [(torch.rand(1, 33, 33), 20, "32 rows"), (torch.rand(1, 4, 4), 97, "96 iterations"), (torch.rand(1, 4, 4).double(), 20, "float64")],
    ids=["rows", "iterations", "dtype"],
)
def test_what_is_refused(logits, iters, reason):
    with pytest.raises(ValueError, match=reason):
        sinkhorn_normalize(moved(logits), iters=iters, impl="cuda")


@pytest.mark.skipif(not EMULATED, reason="the emulator's order of threads")
def test_threads_in_any_order(monkeypatch):
    small, scores = [torch.randn(3, n, n) for n in (4, 7, 20)], [torch.randn(1, n, k) for n, k in ((300, 70), (60, 600), (41, 9000))]

    def everything():
        found = [x for logits in small for x in value_and_gradient(lambda x: sinkhorn_normalize(x, impl="cuda"), logits, logits)]
        return found + [sinkhorn_assign(x, impl="cuda") for x in scores]

    forward = everything()
    for order in ("warps", "lanes"):
        monkeypatch.setenv("KDFAST_EMULATE_BACKWARD", order)
        for x, y in zip(everything(), forward, strict=True):
            assert torch.equal(x, y)
