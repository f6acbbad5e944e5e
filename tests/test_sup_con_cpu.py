"""sup_con of a batch as one op each way: against the formula, in every dtype and under every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from similarity_cases import assert_as_good_as
from torch import Tensor

from kdfast._core import impls
from kdfast.functional import sup_con

pytestmark = pytest.mark.skipif(impls.table()["sup_con"]["cpu"] is not None, reason="no compiled kernels")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
# a lone row; two and three; around vector and panel widths; on both sides of 64 rows, where floats change from vectors to tiles; many
SIZES = pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 7), (64, 33), (65, 128), (257, 65)], ids=lambda s: "x".join(map(str, s)))


def formula(x: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    own = torch.eye(len(x), dtype=torch.bool)
    z = scale * (x @ x.T).to(scale.dtype)
    positive = (labels[:, None] == labels) & ~own
    log_p = z.masked_fill(own, -torch.inf).log_softmax(-1)
    losses = -log_p.masked_fill(~positive, 0).sum(-1) / positive.sum(-1).clamp(min=1)
    return torch.where(positive.any(-1), losses, 0.0)


def fused(x: Tensor, scale: Tensor, labels: Tensor, **options) -> Tensor:
    return sup_con(x, labels, temperature=1 / scale, normalize=False, impl="cpu", **options)


def rows_of(*leaves):
    return fused(*leaves, reduction="none")


def problem(n: int, d: int, dtype=torch.float32, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(-classes, 0, (n,)) << 34  # beyond 32 bits
    centres = torch.randn(classes, d, dtype=torch.float64)
    x = F.normalize(centres[labels >> 34] + torch.randn(n, d, dtype=torch.float64), dim=-1)
    return x.to(dtype), torch.tensor(8.0), labels


def gradients(loss, inputs, g, dtype=None) -> tuple[Tensor, ...]:
    """Row losses and gradients in x and scale, of x cast to `dtype`."""
    x, scale, labels = inputs
    x = x.detach().to(dtype or x.dtype).requires_grad_()
    scale = scale.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    losses = loss(x, scale, labels)
    return losses, *torch.autograd.grad(losses, (x, scale), g.to(losses.dtype))


@pytest.mark.parametrize("how", ["cpu", "torch", "vmap", "compiled"])
@pytest.mark.parametrize(("spread", "scale"), [(0.02, 50.0), (0.2, 50.0), (0.02, 230.0), (1.0, 2.0)])
def test_tight_classes(how, spread, scale):
    """The loss of nearly equal rows is the log of their number: a sum of their logits must not round as logits of 50 and more do."""
    torch.manual_seed(0)
    unit = lambda rows: F.normalize(torch.randn(rows, 64), dim=-1)
    labels = torch.arange(400) // 4
    x, scale = F.normalize(unit(100)[labels] + spread * unit(400), dim=-1), torch.tensor(scale)

    def loss(x, impl="torch"):
        return sup_con(x, labels, temperature=1 / scale, normalize=False, reduction="none", impl=impl)

    if how == "vmap":
        losses = torch.vmap(loss)(x[None])[0]
    elif how == "compiled":
        losses = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    else:
        losses = loss(x, how)
    tau = (1 / scale).double()
    assert_as_good_as(losses, formula(x, 1 / (1 / scale), labels), formula(x.double(), 1 / tau, labels))


def compare(ours, naive, truth, g: Tensor, dtype: torch.dtype) -> None:
    """Losses as log p, whose digits are those of 1 + log p; the gradient in the scale as a sum of terms of either sign, one a row."""
    assert_as_good_as(*(1 + losses for losses, *_ in (ours, naive, truth)))
    assert_as_good_as(ours[1], naive[1], truth[1])
    assert (ours[2] - truth[2]).abs() <= 2 * (naive[2] - truth[2]).abs() + torch.finfo(dtype).eps * g.norm()


@DTYPES
@SIZES
def test_as_accurate_as_the_formula(isa, size, dtype):
    inputs = problem(*size, dtype)
    g = torch.randn(size[0])
    compare(gradients(rows_of, inputs, g), gradients(formula, inputs, g, dtype), gradients(formula, inputs, g, torch.float64), g, dtype)


def test_learnt_classes_leave_no_gradient(isa):
    """Rows of a class are equal and the others far away: p is 1 / n to the last digits, and two sums of it would not be."""
    labels = torch.arange(72) // 4
    x, scale = torch.eye(18, dtype=torch.float32)[labels], torch.tensor(30.0)
    inputs = (x, scale, labels)
    ours, truth = (gradients(loss, inputs, torch.ones(72), dtype) for loss, dtype in ((rows_of, None), (formula, torch.float64)))
    for a, b in zip(ours[1:], truth[1:], strict=True):
        assert (a.double() - b).abs().max() < 2e-5


def test_logits_far_from_each_other(isa):
    """Beyond 2^32 of each other, rows and columns have exponentials of their own. A weight has the digits that its logit has."""
    x, _, labels = problem(70, 20)
    inputs = (x * torch.logspace(-1, 1.5, 70)[:, None], torch.tensor(7.3), labels)
    g = torch.randn(70)
    ours, truth = gradients(rows_of, inputs, g), gradients(formula, inputs, g, torch.float64)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=4 * eps, atol=4 * eps * 7300)
    for a, b in zip(ours[1:], truth[1:], strict=True):
        assert (a - b).abs().max() <= 7300 * eps * b.abs().max()


def test_reductions():
    inputs = problem(20, 16, classes=12)
    rows = fused(*inputs, reduction="none")
    counted = rows != 0
    assert 0 < counted.sum() < 20
    weight = torch.rand(20)
    torch.testing.assert_close(fused(*inputs), rows.sum() / counted.sum())
    torch.testing.assert_close(fused(*inputs, reduction="sum"), rows.sum())
    torch.testing.assert_close(fused(*inputs, weight=weight), (rows * weight).sum() / weight[counted].sum())
    of_mean = gradients(lambda *leaves: fused(*leaves).expand(20), inputs, torch.full((20,), 1 / 20))[1:]  # stride 0 on the way up
    g = torch.full((20,), 1 / counted.sum())
    for x, y in zip(of_mean, gradients(rows_of, inputs, g)[1:], strict=True):
        torch.testing.assert_close(x, y)


def test_rows_of_no_class_beside_them_are_not_counted():
    x, scale, _ = problem(9, 4)
    loss, *grads = gradients(fused, (x, scale, torch.arange(9)), torch.ones(()))
    assert loss == 0 and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_and_a_graph_kept(reduction):
    inputs = problem(6, 9, classes=2)
    directions = [torch.randn_like(t) for t in inputs[:2]]

    def second(loss, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs[:2]]
        value = loss(*leaves, inputs[2])
        once = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
        first = torch.autograd.grad(value.sum(), leaves, create_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(once, first, strict=True))
        along = sum((x * v.to(dtype)).sum() for x, v in zip(first, directions, strict=True))
        return (*first, *torch.autograd.grad(along, leaves))

    definition = lambda *leaves: formula(*leaves).mean() if reduction == "mean" else formula(*leaves)
    ours = second(lambda *leaves: fused(*leaves, reduction=reduction), torch.float32)
    for x, y in zip(ours, second(definition, torch.float64), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


def test_only_what_is_wanted():
    x, scale, labels = problem(70, 12)
    _, dx, dscale = gradients(fused, (x, scale, labels), torch.ones(()))
    (alone,) = torch.autograd.grad(fused(leaf := x.clone().requires_grad_(), scale, labels), leaf)
    torch.testing.assert_close(alone, dx)
    (alone,) = torch.autograd.grad(fused(x, leaf := scale.clone().requires_grad_(), labels), leaf)
    torch.testing.assert_close(alone, dscale)
    assert not fused(x, scale, labels).requires_grad


def test_inputs_that_are_not_contiguous():
    x, scale, labels = problem(12, 20)
    spread = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0].requires_grad_()
    (ours,) = torch.autograd.grad(fused(spread, scale, torch.stack([labels, labels], -1)[:, 0]), spread)
    assert torch.equal(ours, gradients(fused, (x, scale, labels), torch.ones(()))[1])
    one = labels[:1].expand(12)
    torch.testing.assert_close(fused(x, scale, one), formula(x, scale, one).mean())


def test_nan_and_infinity_are_lost_as_in_the_formula():
    for bad in (torch.nan, torch.inf):
        x, scale, labels = problem(70, 20)
        x[3, 4] = bad
        assert torch.equal(fused(x, scale, labels, reduction="none").isfinite(), formula(x, scale, labels).isfinite())


def test_same_bits_every_time(threads):
    inputs = problem(400, 130)
    runs = [gradients(fused, inputs, torch.ones(())) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_transforms_give_the_same():
    x, scale, labels = problem(7, 9, classes=2)
    loss = lambda x: fused(x, scale, labels)
    (expected,) = torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), loss(x))
    several = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.vmap(loss)(several), torch.stack([loss(one) for one in several]))


@DTYPES
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_temperature_for_each_row(reduction, weighted, dtype):
    """Values and gradients, a row alone in its class among them."""
    x, _, labels = problem(12, 20, dtype)
    labels[3] = 7
    weight, upstream = torch.rand(12) if weighted else None, torch.randn(12) if reduction == "none" else torch.tensor(1.5)

    def definition(x, temperature):
        losses = formula(x, (1 / temperature)[:, None], labels) * (1 if weight is None else weight)
        total = ((torch.ones(12) if weight is None else weight) * (torch.arange(12) != 3)).sum()
        return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / total}[reduction]

    def ours(x, temperature):
        return sup_con(x, labels, temperature=temperature, normalize=False, reduction=reduction, weight=weight)

    def derivatives(loss, *leaves):
        leaves = [x.detach().requires_grad_() for x in leaves]
        value = loss(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))

    temperature = 0.1 + torch.rand(12)
    naive, truth = derivatives(definition, x, temperature), derivatives(definition, x.double(), temperature.double())
    for mine, its, wanted in zip(derivatives(ours, x, temperature), naive, truth, strict=True):
        assert_as_good_as(mine, its, wanted)


def test_the_ops_are_described_to_the_compiler():
    x, scale, labels = problem(6, 9, classes=2)
    for mean in (True, False):
        statistics = torch.ops.kdfast.sup_con(x, scale, labels, mean, 0)[1]
        torch.library.opcheck(torch.ops.kdfast.sup_con, (x, scale, labels, mean, 0))
        g = torch.ones(()) if mean else torch.ones(6)
        torch.library.opcheck(torch.ops.kdfast.sup_con_grad, (g, statistics, x, scale, labels, True, True, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(6)}, "x must have 2 dimensions"),
        ({"scale": torch.ones(6)}, "scale must have 0 dimensions"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, "labels has size 5"),
    ],
)
def test_bad_tensors_are_refused(change, message):
    arguments = {"x": torch.ones(6, 9), "scale": torch.ones(()), "labels": torch.zeros(6, dtype=torch.long)} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kdfast.sup_con(*arguments.values(), True, 0)


@pytest.mark.parametrize("width", [3, 33, 300])
def test_two_rows_of_one_class_alone_lose_nothing(isa, width):
    """Their one logit is the sum of its class and its own log-sum, to the bit, however far below the rows' own squares."""
    x = F.normalize(torch.randn(2, width), dim=-1)
    for temperature in (1.0, 0.07, 0.01):
        loss = sup_con(x, torch.zeros(2, dtype=torch.int64), temperature=temperature, normalize=False, impl="cpu")
        assert loss == 0
