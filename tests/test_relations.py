"""mmd_rbf, rkd_distance and rkd_angle against the float64 reference, and what they allocate."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast._ops.triplet import blocks, reference
from kdfast.functional import mmd_rbf, rkd_angle, rkd_distance

SIGMAS = (0.5, 1.0, 2.0)
OURS = {"mmd_rbf": lambda x, z: mmd_rbf(x, z, sigmas=SIGMAS), "rkd_distance": rkd_distance, "rkd_angle": rkd_angle}
THEIRS = {
    "mmd_rbf": lambda x, z: reference.mmd_rbf(x, z, SIGMAS),
    "rkd_distance": reference.rkd_distance,
    "rkd_angle": reference.rkd_angle,
}


@pytest.fixture(params=[2**19, 30], ids=["one_block", "many_blocks"])
def budget(request, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BUDGET", request.param)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("n", [1, 2, 3, 17])
def test_values_and_gradients(name, n, budget):
    x = torch.randn(n, 4, dtype=torch.float64)
    if n == 17:
        x[5] = x[2]  # coinciding rows: distance 0, angle 0, gradient 0
    x.requires_grad_()
    z = torch.randn(n, 4 if name == "mmd_rbf" else 6, dtype=torch.float64)
    if n == 1 and name == "rkd_distance":
        assert rkd_distance(x, z) == 0  # the plain formula divides 0 by 0
        return
    got, want = OURS[name](x, z), THEIRS[name](x, z)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    (a,), (b,) = torch.autograd.grad(got, x), torch.autograd.grad(want, x)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", OURS)
def test_gradients_and_compile(name, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BUDGET", 60)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    z = torch.randn(5, 3, dtype=torch.float64)

    def loss(x):
        return OURS[name](x, z)

    assert torch.autograd.gradcheck(loss, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (x,), fast_mode=True)
    monkeypatch.setattr(blocks, "CPU_BUDGET", 2**19)
    torch._dynamo.reset()
    (want,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), want)


def test_mmd_of_other_sizes_and_of_a_cloud_with_itself():
    x = torch.randn(7, 3, dtype=torch.float64)
    y = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    got, want = mmd_rbf(x, y, sigmas=SIGMAS), reference.mmd_rbf(x, y, SIGMAS)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(*(torch.autograd.grad(v, y)[0] for v in (got, want)), rtol=0, atol=1e-10)
    unit = [torch.nn.functional.normalize(t, dim=-1) for t in (x, y)]
    torch.testing.assert_close(mmd_rbf(x, y, sigmas=SIGMAS, normalize=True), reference.mmd_rbf(*unit, SIGMAS))
    assert mmd_rbf(x, x.flip(0), sigmas=SIGMAS).abs() < 1e-12


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_far_from_the_origin(name, dtype):
    """Rows 100 away: without centring the products cancel four digits."""
    x, z = ((torch.randn(33, 8) + 100).to(dtype) for _ in range(2))
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    got, want = OURS[name](x, z), THEIRS[name](exact, z.double())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    (a,), (b,) = torch.autograd.grad(got, x), torch.autograd.grad(want, exact)
    assert a.dtype == dtype
    torch.testing.assert_close(a.double(), b, rtol=0, atol=float(b.abs().max()) * max(torch.finfo(dtype).eps, 1e-4))


class Largest(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("impl", [None, "torch"])
@pytest.mark.parametrize("widths", [(1, 1), (1, 3), (3, 1)], ids=str)
def test_rows_of_one_number_that_are_near(widths, impl):
    """Of 300 numbers many pairs are nearer than inner products tell from 0; the mean of the distances that are not 0 counts them."""
    student, teacher = (torch.randn(300, d) for d in widths)
    student.requires_grad_()
    (value, slope), (want, wanted) = (
        (loss, *torch.autograd.grad(loss, student))
        for loss in (rkd_distance(student, teacher, impl=impl), reference.rkd_distance(student.double(), teacher.double()))
    )
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(slope, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", OURS)
def test_neither_pairs_nor_triples_are_allocated(name, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BUDGET", 512)
    n = 48
    x, z = torch.randn(n, 4, requires_grad=True), torch.randn(n, 4)
    with Largest() as seen:
        OURS[name](x, z).backward()
    assert seen.size <= 1024 < n * n


def test_empty_and_wrong_arguments():
    x = torch.randn(4, 3, requires_grad=True)
    assert rkd_distance(x[:0], x[:0]) == 0 and rkd_angle(x[:0], x[:0]).requires_grad
    for loss in (rkd_distance, rkd_angle):
        with pytest.raises(ValueError, match="teacher must have the rows"):
            loss(x, torch.randn(3, 3))
        with pytest.raises(ValueError, match="student must have 2 dimensions"):
            loss(x[0], x)
        with pytest.raises(ValueError, match="impl"):
            loss(x, x, impl="cuda")
    for given, message in (
        (dict(sigmas=()), "sigmas must be a sequence"),
        (dict(sigmas=1.0), "sigmas must be a sequence"),
        (dict(sigmas=None), "sigmas must be a sequence"),
        (dict(sigmas=(s for s in (1.0, 2.0))), "sigmas must be a sequence"),
        (dict(sigmas=(0.0,)), "sigmas must be a finite number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            mmd_rbf(x, x, **given)
    with pytest.raises(ValueError, match="y must have at least 1 row"):
        mmd_rbf(x, x[:0], sigmas=SIGMAS)
    with pytest.raises(ValueError, match="y must have the width"):
        mmd_rbf(x, torch.randn(4, 2), sigmas=SIGMAS)
