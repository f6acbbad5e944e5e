"""clip_loss, info_nce within a batch, nt_xent and siglip_loss as one op each way: against the formulas, under every instruction set."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from similarity_cases import assert_as_good_as
from torch import Tensor

from kdfast._core import impls
from kdfast.functional import clip_loss, info_nce, nt_xent, siglip_loss

pytestmark = pytest.mark.skipif(impls.table()["matching_loss"]["cpu"] is not None, reason="no compiled kernels")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
# a lone pair; around vector (16, 8, 4) and panel widths; on both sides of 64 rows, where floats change from vectors to tiles; many rows
SIZES = pytest.mark.parametrize("size", [(1, 1), (3, 7), (64, 33), (65, 128), (257, 65)], ids=lambda s: "x".join(map(str, s)))


def clip(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor | None = None, **options) -> Tensor:
    z, own = scale * (x @ y.T).to(scale.dtype), torch.arange(len(x))
    return (F.cross_entropy(z, own, reduction="none", **options) + F.cross_entropy(z.T, own, reduction="none", **options)) / 2


def rows_alone(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor | None = None, **options) -> Tensor:
    return F.cross_entropy(scale * (x @ y.T).to(scale.dtype), torch.arange(len(x)), reduction="none", **options)


def two_views(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    features = torch.cat([x, y])
    z = scale * (features @ features.T).to(scale.dtype)
    return F.cross_entropy(z.fill_diagonal_(-torch.inf), torch.arange(len(z)).roll(len(x)), reduction="none")


def sigmoid(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    z = scale * (x @ y.T).to(scale.dtype) + shift
    return -F.logsigmoid((2 * torch.eye(len(x), dtype=z.dtype) - 1) * z).sum(1)


def fused_clip(x, y, scale, shift=None, **options):
    return clip_loss(x, y, scale, impl="cpu", **options)


def fused_rows_alone(x, y, scale, shift=None, **options):
    return info_nce(x, y, temperature=1 / scale, impl="cpu", **options)


def fused_two_views(x, y, scale, shift=None, **options):
    return nt_xent(x, y, temperature=1 / scale, normalize=False, impl="cpu", **options)


def fused_sigmoid(x, y, scale, shift, **options):
    return siglip_loss(x, y, scale, shift, impl="cpu", **options)


def smoothed(*losses):
    return tuple(partial(loss, label_smoothing=0.3) for loss in losses)


LOSSES = pytest.mark.parametrize(
    ("fused", "formula"),
    [
        (fused_clip, clip),
        (fused_rows_alone, rows_alone),
        smoothed(fused_clip, clip),
        smoothed(fused_rows_alone, rows_alone),
        (fused_two_views, two_views),
        (fused_sigmoid, sigmoid),
    ],
    ids=["clip", "info_nce", "clip smoothed", "info_nce smoothed", "nt_xent", "siglip"],
)


def problem(n: int, d: int, dtype=torch.float32) -> tuple[Tensor, ...]:
    x, noise = (F.normalize(torch.randn(n, d, dtype=torch.float64), dim=-1) for _ in range(2))
    y = F.normalize(x + noise, dim=-1)
    return x.to(dtype), y.to(dtype), torch.tensor(8.0), torch.tensor(-3.0)


def gradients(loss, inputs, g, dtype=None) -> tuple[Tensor, ...]:
    """Row losses and gradients in whatever they depend on, of the matrices cast to `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [t.detach().to(dtype or t.dtype) if t.dim() else t.detach().to(wide) for t in inputs]
    leaves = [t.requires_grad_() for t in leaves]
    losses = loss(*leaves)
    found = torch.autograd.grad(losses, leaves, g.to(losses.dtype), allow_unused=True)
    return losses, *(x for x in found if x is not None)


@DTYPES
@SIZES
@LOSSES
def test_as_accurate_as_the_formula(isa, fused, formula, size, dtype):
    inputs = problem(*size, dtype)
    g = torch.randn(len(formula(*inputs)))
    ours = gradients(lambda *leaves: fused(*leaves, reduction="none"), inputs, g)
    for x, naive, truth in zip(ours, gradients(formula, inputs, g, dtype), gradients(formula, inputs, g, torch.float64), strict=True):
        assert_as_good_as(x, naive, truth)


@SIZES
@LOSSES
def test_the_mean_is_as_accurate(isa, fused, formula, size):
    """Few pairs have their gradients from the scores of the loss."""
    inputs, g = problem(*size), torch.tensor(0.7)
    ours = gradients(fused, inputs, g)
    mean = lambda *leaves: formula(*leaves).mean()
    for x, naive, truth in zip(ours, gradients(mean, inputs, g), gradients(mean, inputs, g, torch.float64), strict=True):
        assert_as_good_as(x, naive, truth)


@DTYPES
@LOSSES
def test_the_mean_of_few_pairs_is_that_of_the_rows(isa, fused, formula, dtype):
    """Logits that lie far apart, samples of all lengths, operands that are not finite."""
    for scale, bad in ((300.0, 0.0), (1e-3, 0.0), (8.0, torch.nan), (8.0, torch.inf)):
        x, y, _, shift = problem(70, 20)
        x, y = x * torch.logspace(-3, 0.5, 70)[:, None], y * torch.logspace(0.5, -3, 70)[:, None]
        x[3, 4] += bad
        inputs = x.to(dtype), y.to(dtype), torch.tensor(scale), shift
        rows = len(fused(*inputs, reduction="none"))
        kept = gradients(fused, inputs, torch.ones(()))
        apart = gradients(lambda *leaves: fused(*leaves, reduction="none"), inputs, torch.full((rows,), 1 / rows))
        torch.testing.assert_close(kept[0], apart[0].mean(), equal_nan=True)
        for a, b in zip(kept[1:], apart[1:], strict=True):
            close = 5e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps  # logits in the hundreds, rounded in two ways
            torch.testing.assert_close(a, b, rtol=close, atol=close * float(b.abs().nan_to_num(0, 0, 0).max()), equal_nan=True)


@LOSSES
def test_reductions(fused, formula):
    inputs = problem(20, 16)
    rows = fused(*inputs, reduction="none")
    weight = torch.rand(len(rows))
    torch.testing.assert_close(fused(*inputs), rows.mean())
    torch.testing.assert_close(fused(*inputs, reduction="sum"), rows.sum())
    torch.testing.assert_close(fused(*inputs, weight=weight), (rows * weight).sum() / weight.sum())
    g = torch.full_like(rows, 1 / len(rows))
    of_mean = gradients(lambda *leaves: fused(*leaves).expand(len(rows)), inputs, g)[1:]  # stride 0 on the way up
    for x, y in zip(of_mean, gradients(lambda *leaves: fused(*leaves, reduction="none"), inputs, g)[1:], strict=True):
        torch.testing.assert_close(x, y)


@LOSSES
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_and_a_graph_kept(fused, formula, reduction):
    inputs = problem(6, 9)
    used = inputs if formula is sigmoid else inputs[:3]
    directions = [torch.randn_like(t) for t in used]

    def second(loss, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        value, wanted = loss(*leaves), leaves[: len(used)]
        once = torch.autograd.grad(value.sum(), wanted, retain_graph=True)
        first = torch.autograd.grad(value.sum(), wanted, create_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(once, first, strict=True))
        along = sum((x * v.to(dtype)).sum() for x, v in zip(first, directions, strict=True))
        return (*first, *torch.autograd.grad(along, wanted))

    definition = lambda *leaves: formula(*leaves).mean() if reduction == "mean" else formula(*leaves)
    ours = second(lambda *leaves: fused(*leaves, reduction=reduction), torch.float32)
    for x, y in zip(ours, second(definition, torch.float64), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


@LOSSES
def test_only_what_is_wanted(fused, formula):
    inputs = problem(70, 12)
    everything = gradients(fused, inputs, torch.ones(()))[1:]
    for at, expected in enumerate(everything):
        leaves = [t.detach().requires_grad_(i == at) for i, t in enumerate(inputs)]
        (alone,) = torch.autograd.grad(fused(*leaves), leaves[at])
        torch.testing.assert_close(alone, expected)
    assert not fused(*inputs).requires_grad


@LOSSES
def test_inputs_that_are_not_contiguous(fused, formula):
    x, y, scale, shift = problem(12, 20)
    spread = [torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0].requires_grad_() for t in (x, y)]
    ours = torch.autograd.grad(fused(*spread, scale, shift), spread)
    for a, b in zip(ours, gradients(fused, (x, y, scale, shift), torch.ones(()))[1:3], strict=True):
        assert torch.equal(a, b)


@LOSSES
def test_nan_and_infinity_are_lost_as_in_the_formula(fused, formula):
    for bad in (torch.nan, torch.inf):
        x, y, scale, shift = problem(70, 20)
        x[3, 4] = bad
        lost = ~formula(x, y, scale, shift).isfinite()
        assert torch.equal(fused(x, y, scale, shift, reduction="none").isfinite(), ~lost)


def test_views_of_samples_of_one_class_are_left_out():
    x, y, scale, _ = problem(70, 12)
    classes = torch.arange(70) // 3
    features, labels = torch.cat([x, y]).double(), classes.repeat(2)
    z = scale * features @ features.T
    match = z[torch.arange(140), torch.arange(140).roll(70)]
    others = z.masked_fill(labels[:, None] == labels, -torch.inf).logsumexp(-1)
    ours = nt_xent(x, y, temperature=1 / scale, normalize=False, labels=classes, reduction="none", impl="cpu")
    torch.testing.assert_close(ours.double(), F.softplus(others - match), rtol=1e-5, atol=1e-5)


@LOSSES
def test_same_bits_every_time(fused, formula, threads):
    inputs = problem(400, 130)
    runs = [gradients(fused, inputs, torch.ones(())) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@LOSSES
def test_transforms_give_the_same(fused, formula):
    x, y, scale, shift = problem(7, 9)
    loss = lambda x: fused(x, y, scale, shift)
    (expected,) = torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), loss(x))


def test_the_ops_are_described_to_the_compiler():
    x, y, scale, shift = problem(6, 9)
    for given in ((y, scale, None, None), (None, scale, None, torch.arange(6) % 3), (y, scale, shift, None)):
        for mean in (True, False):
            for keep in ((True, given[0] is not None), (False, False)):
                _, statistics, *kept = torch.ops.kdfast.matching_loss(x, *given, mean, *keep, 0)
                torch.library.opcheck(torch.ops.kdfast.matching_loss, (x, *given, mean, *keep, 0))
                if kept[0].numel() and mean:
                    continue
                left = (False, 0.0, 1.0, *kept) if kept[0].numel() else ()  # what is kept of each row
                g = torch.ones(()) if mean else torch.ones(6)
                want = (True, given[0] is not None, True, given[2] is not None)
                torch.library.opcheck(torch.ops.kdfast.matching_loss_grad, (g, statistics, x, *given, *want, 0, *left))
    for mean in (True, False):
        given = y, scale, None, None
        for options in ((True,), (True, 0.1), (False, 0.1)):
            for keep in {mean, False}:
                torch.library.opcheck(torch.ops.kdfast.matching_loss, (x, *given, mean, keep, keep, 0, *options))
            _, statistics, *_ = torch.ops.kdfast.matching_loss(x, *given, mean, False, False, 0, *options)
            g = torch.ones(()) if mean else torch.ones(6)
            torch.library.opcheck(torch.ops.kdfast.matching_loss_grad, (g, statistics, x, *given, True, True, True, False, 0, *options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(6)}, "x must have 2 or 3 dimensions"),
        ({"y": torch.ones(5, 9)}, "y has size 5"),
        ({"y": torch.ones(6, 9, dtype=torch.bfloat16)}, "dtype of x"),
        ({"y": None, "x": torch.ones(5, 9)}, "as many rows of one view"),
        ({"scale": torch.ones(6)}, "scale must have 0 dimensions"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, "labels has size 5"),
        ({"y": None, "shift": torch.zeros(())}, "shift needs y"),
        ({"y": None, "rows_alone": True}, "rows_alone needs y"),
        ({"y": None, "smoothing": 0.1}, "smoothing needs y"),
        ({"shift": torch.zeros(()), "smoothing": 0.1}, "smoothing needs y, and no shift"),
    ],
)
def test_bad_tensors_are_refused(change, message):
    arguments = {"x": torch.ones(6, 9), "y": torch.ones(6, 9), "scale": torch.ones(())} | dict.fromkeys(("shift", "labels")) | change
    sides = arguments.pop("rows_alone", False), arguments.pop("smoothing", 0.0)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kdfast.matching_loss(*arguments.values(), True, False, False, 0, *sides)


def test_scalars_live_with_the_rows():
    """Whatever device new tensors are made on."""
    x, y = torch.randn(2, 6, 8)
    with torch.device("meta"):
        losses = clip_loss(x, y, 2.0), siglip_loss(x, y, 2.0, -1.0)
    torch.testing.assert_close(losses, (clip_loss(x, y, 2.0), siglip_loss(x, y, 2.0, -1.0)))


def test_logits_of_many_digits(isa):
    """The log-sum-exp of 1e7 has a low digit of half a unit."""
    torch.manual_seed(0)
    x, y = (1e3 * torch.randn(2, 24, 32)).unbind()
    grads = {}
    for name, dtype in (("got", torch.float32), ("exact", torch.float64)):
        rows = [v.to(dtype).requires_grad_() for v in (x, y)]
        z, own = rows[0] @ rows[1].T, torch.arange(24)
        formula = (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2
        grads[name] = torch.cat(torch.autograd.grad(clip_loss(*rows, 1.0, impl="cpu") if name == "got" else formula, rows))
    assert (grads["got"] - grads["exact"]).norm() <= 1e-6 * grads["exact"].norm()


@pytest.mark.parametrize("rows", [1, 2, 5, 300])
def test_scale_and_shift_of_sigmoid_pairs_that_fit(rows):
    """A positive's slope is as small as its pair fits well: its gradients are that, not 0, nor what a negative's slope rounds by."""
    x = F.normalize(torch.randn(rows, 24), dim=-1)
    y, scalars = x.clone(), (torch.tensor(60.0, requires_grad=True), torch.tensor(-35.0, requires_grad=True))
    found = torch.autograd.grad(siglip_loss(x.requires_grad_(), y, *scalars, impl="cpu"), scalars)
    wide = [t.detach().double().requires_grad_() for t in scalars]
    exact = torch.autograd.grad(sigmoid(x.detach().double(), y.double(), *wide).mean(), wide)
    for ours, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-4, atol=0.0)
