"""symmetric_lse, in each implementation: against its definition in float64, its derivatives, transforms and checks."""

import pytest
import torch
from similarity_cases import IMPLS, SIZES, assert_as_good_as, cast, normal, serve_or_skip

from kdfast._ops.similarity import symmetric_lse
from kdfast._ops.similarity.symmetric import reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def problem(n, m, d, dtype, *, batch=(), labels=True):
    x, y = normal(*batch, n, d, dtype=dtype), normal(*batch, m, d, dtype=dtype)
    scale = torch.tensor(1.5 / d**0.5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return x, y, scale, (torch.arange(n), torch.arange(m)) if labels else None


def results(op, x, y, scale, labels, g, **options):
    """Both log-sum-exps, and the gradients of <g, them> in x, y and scale."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, y, scale)]
    lse = op(*leaves, labels=labels, **options)
    value = sum((torch.where(side.isfinite(), side, 0.0) * up.to(side.dtype)).sum() for side, up in zip(lse, g, strict=True))
    return *lse, *torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("impl", IMPLS)
def test_against_the_definition(impl, size, dtype):
    serve_or_skip(impl, dtype)
    x, y, scale, labels = problem(*size, dtype, labels=min(size[:2]) > 1)
    g = torch.randn(size[0]), torch.randn(size[1])
    ours = results(symmetric_lse, x, y, scale, labels, g, impl=impl)
    naive = results(reference, x, y, cast(scale, dtype), labels, g)
    truth = results(reference, x.double(), y.double(), scale.double(), labels, g)
    for got, plain, true in zip(ours, naive, truth, strict=True):
        assert_as_good_as(got, plain, true)
    assert [t.dtype for t in ours[2:4]] == [dtype, dtype] and ours[0].dtype == ours[1].dtype == scale.dtype


@pytest.mark.parametrize("impl", IMPLS)
def test_batches(impl):
    x, y, scale, labels = problem(9, 12, 5, torch.float32, batch=(2, 3))
    whole = symmetric_lse(x, y, scale, labels=labels, impl=impl)
    for side, want in zip(whole, reference(x, y, scale, labels), strict=True):
        torch.testing.assert_close(side, want)
    of_each = torch.vmap(torch.vmap(lambda x, y: symmetric_lse(x, y, scale, labels=labels, impl=impl)))(x, y)
    torch.testing.assert_close(of_each, whole)


def test_derivatives():
    x, y, scale, labels = problem(4, 5, 3, torch.float64)
    for leaf in (x, y, scale):
        leaf.requires_grad_()
    for rule in (None, labels):
        op = lambda x, y, scale, rule=rule: symmetric_lse(x, y, scale, labels=rule)
        assert torch.autograd.gradcheck(op, (x, y, scale))
        assert torch.autograd.gradgradcheck(op, (x, y, scale))
    assert torch.autograd.gradgradcheck(lambda x: symmetric_lse(x, y.detach(), 0.7), (x,))
    assert torch.autograd.gradgradcheck(lambda y: symmetric_lse(x.detach(), y, 0.7), (y,))


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivative_in_float32(impl):
    x, y, scale, labels = problem(20, 30, 8, torch.float32)

    def curvature(op, dtype, **options):
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x, y, scale)]
        value = sum(side.square().sum() for side in op(*leaves, labels=labels, **options))
        first = torch.autograd.grad(value, leaves, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), leaves)

    ours = curvature(symmetric_lse, torch.float32, impl=impl)
    naive, truth = (curvature(reference, dtype) for dtype in (torch.float32, torch.float64))
    for got, plain, true in zip(ours, naive, truth, strict=True):
        assert_as_good_as(got, plain, true)


def test_a_third_derivative_is_an_error():
    x = normal(3, 2, dtype=torch.float64, requires_grad=True)
    value = symmetric_lse(x, x)[0].square().sum()
    for _ in range(2):
        (value,) = torch.autograd.grad(value, x, create_graph=True)
        value = value.square().sum()
    with pytest.raises(RuntimeError, match="third"):
        torch.autograd.grad(value, x)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_from_expanded_upstream_and_strided_inputs(impl):
    x, y = normal(8, 6).mT.requires_grad_(), normal(1, 8).expand(7, 8)
    lse = symmetric_lse(x, y, 2.0, impl=impl)
    total = lse[0].sum() + lse[1].sum()  # its gradient has stride 0
    first, second = (torch.autograd.grad(total, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    dense = x.detach().contiguous().requires_grad_()
    torch.testing.assert_close(first, torch.autograd.grad(sum(side.sum() for side in reference(dense, y, 2.0)), dense)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_and_transformed(impl):
    x, y, scale, labels = problem(9, 12, 5, torch.float32)
    loss = lambda x, y, scale: sum(side.sum() for side in symmetric_lse(x, y, scale, labels=labels, impl=impl))
    leaves = [t.clone().requires_grad_() for t in (x, y, scale)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), want)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1, 2))(x, y, scale), want)
    per_scale = torch.func.vmap(torch.func.grad(loss), in_dims=(None, None, 0))(x, y, torch.stack([scale, 2 * scale]))
    torch.testing.assert_close(per_scale[0], want[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_and_bf16_round_the_operands(impl):
    x, y, scale, labels = problem(9, 12, 40, torch.float32)
    want = symmetric_lse(x.bfloat16(), y.bfloat16(), scale, labels=labels, impl="torch")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(symmetric_lse(x, y.bfloat16(), scale, labels=labels, impl=impl), want)
    torch.testing.assert_close(symmetric_lse(x, y, scale, labels=labels, impl=impl, precision="bf16"), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_nothing_left_in(impl):
    x, y = normal(6, 4), normal(5, 4)
    x[2, 1] = torch.nan
    rows, columns = symmetric_lse(x, y, impl=impl)
    assert rows.isnan().nonzero().flatten().tolist() == [2] and columns.isnan().all()
    x = normal(6, 4, requires_grad=True)
    rows, columns = symmetric_lse(x, y, labels=(torch.tensor([0, 1, 1, 1, 1, 1]), torch.zeros(5, dtype=torch.int32)), impl=impl)
    assert rows[0] == -torch.inf and rows[1:].isfinite().all() and columns.isfinite().all()
    (dx,) = torch.autograd.grad(rows[1:].sum() + columns.sum(), x)
    assert (dx[0] == 0).all() and dx.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda x, y: symmetric_lse(x.long(), y), TypeError, "x must be float"),
        (lambda x, y: symmetric_lse(x, y.double()), TypeError, "y must have the dtype"),
        (lambda x, y: symmetric_lse(x, y[:, :2]), ValueError, "y must have the width"),
        (lambda x, y: symmetric_lse(x, y[None]), ValueError, "y must have the leading dimensions"),
        (lambda x, y: symmetric_lse(x[:0], y), ValueError, "x must have at least 1 row"),
        (lambda x, y: symmetric_lse(x, y, "1"), TypeError, "scale"),
        (lambda x, y: symmetric_lse(x, y, torch.ones(6)), ValueError, "scale must be a float or a 0-d tensor"),
        (lambda x, y: symmetric_lse(x, y, labels=(torch.arange(6), torch.arange(6))), ValueError, "labels of y"),
        (lambda x, y: symmetric_lse(x, y, labels=(torch.rand(6), torch.arange(5))), TypeError, "labels of x"),
        (lambda x, y: symmetric_lse(x, y, precision="half"), ValueError, "precision"),
        (lambda x, y: symmetric_lse(x, y, impl="cuda"), ValueError, "impl"),
    ],
)
def test_bad_input_names_the_argument(call, error, name):
    with pytest.raises(error, match=name):
        call(torch.zeros(6, 4), torch.zeros(5, 4))
