"""The Triton kernels of the relations against the float64 definitions: on a GPU, or where there is none under Triton's interpreter, in a
process that has TRITON_INTERPRET=1 from its start (make test)."""

import pytest
import torch
from similarity_kernel_cases import assert_accurate

from kdfast._core import triton_runtime
from kdfast.functional import mmd_rbf, rkd_angle, rkd_distance

if triton_runtime.missing() is not None:
    pytest.skip(f"{triton_runtime.missing()}, and TRITON_INTERPRET is not 1", allow_module_level=True)
DEVICE = "cpu" if triton_runtime.INTERPRETED else "cuda"


def run(loss, tensors, impl, dtype=torch.float32, device=DEVICE):
    leaves = [t.to(device, dtype).requires_grad_() for t in tensors]
    if loss in (rkd_distance, rkd_angle):
        leaves[1] = leaves[1].detach()
    value = loss(*leaves, impl=impl)
    return [t.detach().cpu() for t in (value, *torch.autograd.grad(value, [t for t in leaves if t.requires_grad]))]


def check(loss, *tensors, extra=0.0):
    runs = run(loss, tensors, "triton"), run(loss, tensors, "torch", torch.float64, "cpu"), run(loss, tensors, "torch", device="cpu")
    for got, want, naive in zip(*runs, strict=True):
        assert_accurate(got, want, naive, extra)


def mmd(x, y, impl):
    return mmd_rbf(x, y, sigmas=(0.5, 1.0, 3.0), impl=impl)


# one row; ragged tiles of both sides; rows wider than a chunk of the gradient
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 33, 5), (40, 17, 20), (5, 6, 140)], ids=str)
def test_kernel_means(shape):
    n, m, width = shape
    check(mmd, torch.randn(n, width), torch.randn(m, width) + 0.3, extra=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 4), (33, 20, 7), (6, 140, 9)], ids=str)
def test_distances_and_angles(shape):
    n, width, teacher_width = shape
    for loss in (rkd_distance, rkd_angle):
        check(loss, torch.randn(n, width), torch.randn(n, teacher_width), extra=1e-6)


def test_equal_rows_and_rows_far_from_the_origin():
    x = torch.randn(12, 6) + 50
    x[3] = x[7]
    x[4] = x[8] + 1e-3 * torch.randn(6)  # the angles at near neighbours
    check(rkd_distance, x, torch.randn(12, 5), extra=1e-5)
    check(rkd_angle, x, torch.randn(12, 5), extra=1e-5)
    check(mmd, x, x + 0.1, extra=1e-4)
    same = torch.ones(4, 3)
    for loss in (rkd_distance, rkd_angle):
        assert run(loss, (same, torch.randn(4, 3)), "triton")[1].eq(0).all()
    assert run(mmd, (x, x), "triton")[0].abs() < 1e-6


def test_columns_split_over_programs_meet(monkeypatch):
    monkeypatch.setattr(triton_runtime, "splits", lambda *_: 3)
    check(mmd, torch.randn(5, 4), torch.randn(50, 4), extra=1e-6)


@pytest.mark.parametrize("loss", [mmd, rkd_distance, rkd_angle], ids=lambda f: f.__name__)
def test_half_precision_and_second_derivative(loss):
    x, y = torch.randn(9, 4).bfloat16(), torch.randn(9, 4).bfloat16()
    found = []
    for impl in ("triton", "torch"):
        leaf = x.to(DEVICE).requires_grad_()
        value = loss(leaf, y.to(DEVICE), impl=impl)
        (first,) = torch.autograd.grad(value, leaf, create_graph=True)
        found.append((value, first, *torch.autograd.grad(first.float().square().sum(), leaf)))
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-2 if got.dim() else 1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", [mmd, rkd_distance, rkd_angle], ids=lambda f: f.__name__)
def test_nan_and_no_gradient(loss):
    x = torch.randn(8, 4)
    with torch.no_grad():
        assert loss(x.to(DEVICE), x.flip(0).to(DEVICE), impl="triton").isfinite()
    x[2, 1] = torch.nan
    assert run(loss, (x, torch.randn(8, 4)), "triton")[0].isnan()


def test_opcheck_and_compile():
    x, y = torch.randn(7, 4, device=DEVICE), torch.randn(9, 4, device=DEVICE)
    ops = torch.ops.kdfast_triton
    for same, gradient in ((True, False), (False, True)):
        torch.library.opcheck(ops.gaussian_sums.default, (x, x.clone() if same else y, [0.5, 1.0], same, gradient))
        torch.library.opcheck(ops.rkd_distance.default, (x, y[:7], gradient))
        torch.library.opcheck(ops.rkd_angle.default, (x, y[:7], gradient))

    def loss(x):
        return mmd(x, y, "triton") + rkd_distance(x, y[:7], impl="triton") + rkd_angle(x, y[:7], impl="triton")

    x.requires_grad_()
    torch.testing.assert_close(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), loss(x))
