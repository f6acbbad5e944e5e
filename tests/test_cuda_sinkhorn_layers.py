"""The CUDA kernels of sinkhorn_normalize against its definition in float64: on a GPU, elsewhere emulated on the CPU."""

import pytest
import torch
from cuda_kernels import DEVICE, EMULATED, cuda, moved  # noqa: F401  the fixture serves every test

from kdfast._ops.sinkhorn import normalize
from kdfast.functional import sinkhorn_normalize


def value_and_gradient(f, logits, weight):
    logits = logits.detach().clone().requires_grad_()
    out = f(logits)
    return out.detach(), torch.autograd.grad((out * weight.to(out)).sum(), logits)[0]


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
    [(torch.rand(1, 33, 33), 20, "32 rows"), (torch.rand(1, 4, 4), 129, "128 iterations"), (torch.rand(1, 4, 4).double(), 20, "float64")],
    ids=["rows", "iterations", "dtype"],
)
def test_what_is_refused(logits, iters, reason):
    with pytest.raises(ValueError, match=reason):
        sinkhorn_normalize(moved(logits), iters=iters, impl="cuda")


@pytest.mark.skipif(not EMULATED, reason="the emulator's order of threads")
@pytest.mark.parametrize("n", [4, 7, 20])
def test_threads_in_any_order(n, monkeypatch):
    logits, weight = torch.randn(3, n, n), torch.randn(3, n, n)
    forward = value_and_gradient(lambda x: sinkhorn_normalize(x, impl="cuda"), logits, weight)
    monkeypatch.setenv("KDFAST_EMULATE_BACKWARD", "lanes")
    for x, y in zip(value_and_gradient(lambda x: sinkhorn_normalize(x, impl="cuda"), logits, weight), forward, strict=True):
        assert torch.equal(x, y)
