"""The relations' kernels on every instruction set against the float64 reference, in whole and ragged blocks."""

import pytest
import torch
import torch.nn.functional as F

from kdfast._core import extension
from kdfast._ops.triplet import reference
from kdfast.functional import mmd_rbf, rkd_angle, rkd_distance

pytestmark = pytest.mark.skipif(extension.missing_cpu() is not None, reason="compiled kernels are not built")

SIGMAS = (1.0, 2.0, 6.0)


def mmd(x, z, impl=None):
    return mmd_rbf(x, z, sigmas=SIGMAS, impl=impl)


OURS = {"rkd_angle": rkd_angle, "rkd_distance": rkd_distance, "mmd_rbf": mmd}
THEIRS = {
    "rkd_angle": reference.rkd_angle,
    "rkd_distance": reference.rkd_distance,
    "mmd_rbf": lambda x, z: reference.mmd_rbf(x, z, SIGMAS),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every = pytest.mark.parametrize("name", OURS)
distillation = pytest.mark.parametrize("name", ["rkd_angle", "rkd_distance"])


def pair(name, n, width=9, dtype=torch.float32):
    """Student and teacher, of another width; or two clouds."""
    generator = torch.Generator().manual_seed(n)
    x, z = (torch.randn(n, d, generator=generator) for d in (width, width if name == "mmd_rbf" else 20))
    return x.to(dtype), z.to(dtype)


def step(loss, x, z, **options):
    """The value, and the gradient in x and, of clouds, in z."""
    leaves = [t.detach().requires_grad_() for t in (x, z)][: 2 if loss in (OURS["mmd_rbf"], THEIRS["mmd_rbf"]) else 1]
    value = loss(*leaves, *(x, z)[len(leaves) :], **options)
    return value.detach(), *torch.autograd.grad(value, leaves)


def check(name, x, z, tolerance=2e-6):
    """Each result relative to its largest entry; a kernel mean to the kernels it is the difference of."""
    got, want = step(OURS[name], x, z, impl="cpu"), step(THEIRS[name], x.double(), z.double())
    assert got[0].dtype == torch.float32 and got[1].dtype == x.dtype
    for at, (a, b) in enumerate(zip(got, want, strict=True)):
        scale = len(SIGMAS) if name == "mmd_rbf" and at == 0 else max(float(b.abs().max()), 1e-6)
        rounding = torch.finfo(x.dtype).eps if at else 0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=(tolerance + rounding) * scale)


# 63, 64, 65: around a block of the angles; 129: three blocks, ragged ones of pairs; 1, 2, 3: less than a vector
@every
@pytest.mark.parametrize("n", [1, 2, 3, 17, 63, 64, 65, 129])
def test_sizes(isa, name, n):
    if n == 1 and name == "rkd_distance":
        assert rkd_distance(torch.ones(1, 3), torch.ones(1, 3), impl="cpu") == 0  # the plain formula divides 0 by 0
        return
    x, z = pair(name, n)
    if n == 17:
        x[5], z[7] = x[2], z[4]  # coinciding rows: distance 0, angle 0, gradient 0
    check(name, x, z)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 16, 65])
def test_dtypes_and_widths(isa, name, dtype, width):
    check(name, *pair(name, 33, width, dtype), tolerance=8e-6)


@distillation
def test_a_teacher_of_another_dtype_and_layout(name):
    x, z = torch.randn(5, 20).T, torch.randn(1, 20, dtype=torch.float64).T.expand(20, 7)
    check(name, x, z + torch.eye(20, 7, dtype=torch.float64))
    check(name, x[:1].expand(20, 5) + x, z)


def test_clouds_of_other_sizes(isa):
    check("mmd_rbf", torch.randn(40, 9), torch.randn(150, 9) + 0.5)
    z = torch.randn(7, 9, requires_grad=True)
    values = [mmd(torch.randn(40, 9, generator=torch.Generator().manual_seed(0)), z, impl=impl) for impl in ("cpu", "torch")]
    torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in values))  # of one side alone


@distillation
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_any_unit(isa, name, size):
    x, z = pair(name, 20)
    check(name, size * x, z / size)


@every
def test_far_from_the_origin(isa, name):
    x, z = pair(name, 33)
    check(name, x + 1000, z + 1000)


def test_angles_of_near_neighbours(isa):
    """Pairs of rows a thousandth apart: the Gram matrix in floats loses three digits of their angles, and far distances hide them."""

    def by_differences(x, z):
        def cosines(x):
            direction = F.normalize(x[None] - x[:, None], dim=-1)
            return direction @ direction.mT

        return F.smooth_l1_loss(cosines(x), cosines(z))

    x = torch.randn(30, 16).repeat_interleave(2, 0) + 1e-3 * torch.randn(60, 16)
    z = torch.randn(60, 16)
    want = step(reference.rkd_angle, x.double(), z.double())
    for got, plain, exact in zip(step(rkd_angle, x, z, impl="cpu"), step(by_differences, x, z), want, strict=True):
        allowed = 2 * float((plain - exact).abs().max()) + 4 * torch.finfo(torch.float32).eps * float(exact.abs().max())
        assert float((got - exact).abs().max()) <= allowed


@every
def test_threads(isa, name, threads):
    x, z = pair(name, 300, 24)
    first, second = (step(OURS[name], x, z, impl="cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    if isa != "base":
        check(name, x, z)


@every
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_is_lost(isa, name, bad):
    x, z = pair(name, 20)
    x[3, 2] = bad
    value, gradient, *_ = step(OURS[name], x, z, impl="cpu")
    assert value.isnan() and gradient[3].isnan().any()


@distillation
def test_coinciding_rows_have_no_gradient(isa, name):
    value, gradient = step(OURS[name], torch.ones(20, 6), torch.randn(20, 6), impl="cpu")
    assert value.isfinite() and torch.equal(gradient, torch.zeros(20, 6))


@every
def test_gradients(name):
    """Upstream gradient, retained graph, no graph, a second derivative, vmap, torch.func.grad, torch.compile."""
    x, z = pair(name, 12)
    x.requires_grad_()

    def loss(x, impl="cpu"):
        return OURS[name](x, z, impl=impl)

    value = loss(x)
    (once,) = torch.autograd.grad(value, x, retain_graph=True)
    (again,) = torch.autograd.grad(value, x, torch.tensor(3.0), retain_graph=True)
    torch.testing.assert_close(again, 3 * once)
    with torch.no_grad():
        torch.testing.assert_close(loss(x), value)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), once)
    both = torch.stack([x, 2 * x + 1]).detach()
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(both)[0], once)
    torch.testing.assert_close(torch.vmap(loss)(both)[0], value)

    def of_gradient(impl):
        (first,) = torch.autograd.grad(loss(x, impl), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(of_gradient("cpu"), of_gradient("torch"), rtol=1e-3, atol=1e-6)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], once)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), value)


@every
def test_autocast_changes_nothing(name):
    x, z = pair(name, 20)
    plain = step(OURS[name], x, z, impl="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(step(OURS[name], x, z, impl="cpu"), plain, strict=True))


@distillation
def test_empty(name):
    x = torch.empty(0, 4, requires_grad=True)
    value = OURS[name](x, torch.empty(0, 4), impl="cpu")
    assert value == 0 and torch.autograd.grad(value, x)[0].shape == (0, 4)


def test_ops():
    x, z = torch.randn(20, 5), torch.randn(20, 7)
    ops = torch.ops.kdfast
    for gradient in (True, False):
        torch.library.opcheck(ops.rkd_angle.default, (x, z, gradient))
        torch.library.opcheck(ops.rkd_distance.default, (x, z, gradient))
        torch.library.opcheck(ops.gaussian_sums.default, (x, x, SIGMAS, True, gradient))
    for op in (ops.rkd_angle, ops.rkd_distance):
        with pytest.raises(RuntimeError, match="teacher"):
            op(x, z[:3], True)
    with pytest.raises(RuntimeError, match="y has size 7"):
        ops.gaussian_sums(x, z, SIGMAS, False, True)


@every
def test_float64_is_not_served(name):
    x, z = pair(name, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"cannot serve {name}: it takes float32"):
        OURS[name](x, z, impl="cpu")


def test_a_narrow_kernels_gradient_keeps_nothing_of_rows_that_coincide(isa):
    """The weight of a pair at distance 0 is 1 / sigma^2 = 10^4, that of a row with itself too: neither may leave its rounding."""
    x = torch.randn(2, 65, requires_grad=True)
    (gradient,) = torch.autograd.grad(mmd_rbf(x, x.detach().clone(), sigmas=[0.01], impl="cpu"), x)
    assert gradient.eq(0).all()  # the two rows are far from one another

    x = torch.tensor([[0.0], [0.05], [0.2]], requires_grad=True)
    y = torch.full((1, 1), 9.0)
    got, want = (
        torch.autograd.grad(mmd_rbf(t, y.to(t.dtype), sigmas=[0.01], impl=impl), x)[0] for t, impl in ((x, "cpu"), (x.double(), "torch"))
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
