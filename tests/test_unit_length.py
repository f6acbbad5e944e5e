"""Rows scaled to unit length: one op each way on the CPU, against torch.nn.functional.normalize."""

import pytest
import torch
import torch.nn.functional as F
from similarity_cases import assert_as_good_as

from kdfast._core import extension
from kdfast._ops.similarity.unit_length import unit_length
from kdfast.functional import info_nce, sampled_info_nce, similarity_distillation, wasserstein_dependency

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d)[6:])
# nothing; a lone number; around vector widths (16, 8, 4); a leading batch
SHAPES = pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 63), (5, 65), (2, 3, 129)], ids=lambda s: "x".join(map(str, s)))


def formula(x):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(wide, dim=-1).to(x.dtype)


def both_ways(f, x, g):
    x = x.detach().requires_grad_()
    y = f(x)
    return y.detach(), *torch.autograd.grad(y, x, g.to(y.dtype))


@DTYPES
@SHAPES
def test_as_accurate_as_the_formula(isa, shape, dtype):
    x, g = torch.randn(shape, dtype=torch.float64).to(dtype), torch.randn(shape, dtype=torch.float64)
    for ours, naive, truth in zip(*(both_ways(f, t, g) for f, t in ((unit_length, x), (formula, x), (formula, x.double()))), strict=True):
        assert ours.dtype == dtype
        assert_as_good_as(ours, naive, truth)


@pytest.mark.parametrize("size", [0.0, 1e-14, 1e-9, 1e30, torch.inf, torch.nan])
def test_rows_of_no_length_and_of_any(isa, size):
    """Below 1e-12 the row is divided by that; 1e30 overflows its square, as in the formula."""
    x = torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.25, 3.0]])
    x[0] = torch.tensor([size, 0.0, 0.0])
    for ours, theirs in zip(*(both_ways(f, x, torch.tensor([[1.0, 2.0, -1.0]] * 2)) for f in (unit_length, formula)), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("size", [torch.inf, torch.nan])
def test_a_row_without_upstream_has_gradient_0_whatever_it_holds(isa, dtype, size):
    x, g = torch.randn(4, 67, dtype=dtype), torch.randn(4, 67, dtype=dtype)
    x[1:3, 5], g[1] = size, 0
    (dx,) = both_ways(unit_length, x, g)[1:]
    assert dx[1].eq(0).all()
    assert dx[2].isnan().any()  # it counts
    torch.testing.assert_close(dx[0::3], both_ways(unit_length, x[0::3], g[0::3])[1])


def test_second_derivatives_and_a_graph_kept():
    x = torch.randn(4, 5)
    torch.autograd.gradcheck(unit_length, x.double().requires_grad_())

    def second(f, x):
        x = x.requires_grad_()
        (once,) = torch.autograd.grad(f(x).pow(3).sum(), x)
        (first,) = torch.autograd.grad(f(x).pow(3).sum(), x, create_graph=True)
        assert torch.equal(once, first)
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    torch.testing.assert_close(second(unit_length, x.clone()), second(formula, x.double()).float(), rtol=1e-4, atol=1e-4)


def test_strides_of_inputs_and_upstreams():
    x = torch.randn(6, 8).T
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(unit_length(x), formula(x))
    torch.testing.assert_close(unit_length(x[:1].expand(5, 6)), formula(x[:1].expand(5, 6)))
    unit_length(leaf).sum().backward()  # stride 0 on the way up
    torch.testing.assert_close(leaf.grad, both_ways(formula, x, torch.ones(8, 6))[1])


def test_transforms_give_the_same():
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(torch.vmap(unit_length)(x), formula(x))
    loss = lambda x: unit_length(x).pow(3).sum()
    torch.testing.assert_close(torch.func.grad(loss)(x), both_ways(lambda x: formula(x).pow(3), x, torch.ones_like(x))[1])
    torch.testing.assert_close(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), loss(x))


@pytest.mark.skipif(extension.missing_cpu() is not None, reason="no compiled kernels")
def test_the_ops_are_described_to_the_compiler():
    x = torch.randn(3, 5)
    torch.library.opcheck(torch.ops.kdfast.unit_length, (x,))
    torch.library.opcheck(torch.ops.kdfast.unit_length_grad, (x, x, torch.ones(3)))
    with pytest.raises(RuntimeError, match="x must have 2 dimensions"):
        torch.ops.kdfast.unit_length(torch.ones(3))
    with pytest.raises(RuntimeError, match="dtype of x"):
        torch.ops.kdfast.unit_length_grad(x.bfloat16(), x, torch.ones(3))


def test_forward_mode_keeps_its_tangent():
    x, t = torch.randn(3, 5), torch.randn(3, 5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, t)
        tangents = [torch.autograd.forward_ad.unpack_dual(f(dual)).tangent for f in (unit_length, formula)]
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["compiled", "portable"])
@pytest.mark.parametrize("held", [torch.inf, torch.nan])
def test_a_banks_rows_past_its_valid_ones_stay_out_of_the_losses(dtype, held):
    bank, query = (torch.randn(n, 4, dtype=dtype) for n in (8, 3))
    bank[5:] = held
    target, bank = query.roll(1, 0), bank.requires_grad_()
    options, index = dict(bank_valid=5, normalize=True), torch.randint(0, 8, (3, 6))
    temperatures = dict(student_temperature=0.1, teacher_temperature=0.2)
    for loss in (
        info_nce(query, target, bank, **options),
        sampled_info_nce(query, target, bank, index, **options),
        wasserstein_dependency(query, target, bank, temperature=0.1, **options),
        similarity_distillation(query, target, bank, torch.randn(8, 4, dtype=dtype), **temperatures, **options),
    ):
        (gradient,) = torch.autograd.grad(loss, bank)
        assert gradient[5:].eq(0).all()
        assert gradient[:5].isfinite().all() and gradient[:5].any()
