"""The Triton kernels of losses over all pairs of two sides: against the float64 formulas, and through the public functions.

They run as those of test_triton_similarity.py do.
"""

import functools
import math

import pytest
import torch
from similarity_cases import assert_as_good_as
from similarity_kernel_cases import assert_accurate

from kdfast import functional
from kdfast._core import triton_runtime
from kdfast._ops.similarity.losses import sup_con_values
from kdfast._ops.similarity.symmetric import symmetric_lse
from kdfast._ops.similarity.triton import slabs as triton_slabs

if triton_runtime.missing() is not None:
    pytest.skip(f"{triton_runtime.missing()}, and TRITON_INTERPRET is not 1", allow_module_level=True)
DEVICE = "cpu" if triton_runtime.INTERPRETED else "cuda"
OPS = torch.ops.kdfast_triton
# the interpreter multiplies in float32: what it shows of 16 bits is that loads, masks and conversions are right
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
# a lone pair; ragged tiles; one side beside a tile, the width beside a step; several entries
SHAPES = pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 65, 3), (3, 33, 31, 17), (1, 64, 96, 48)], ids=str)


@pytest.fixture
def small_slabs(monkeypatch):
    """Several slabs, cut along both sides."""
    monkeypatch.setattr(triton_slabs, "STATISTICS_PAIRS", 2 * 32 * 32)
    monkeypatch.setattr(triton_slabs, "HALF_PAIRS", 2 * 32 * 32)
    monkeypatch.setattr(triton_slabs, "WEIGHTS_PAIRS", 2 * 32 * 32)


def rows(batch, n, width, dtype):
    return torch.nn.functional.normalize(torch.randn(batch, n, width), dim=-1).to(dtype)


def run(op, *args):
    return tuple(x.cpu() for x in op(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in args)))


def number(dtype):
    return 2 if dtype == torch.bfloat16 else 0


def check(ours, formula, dtype):
    """`formula` by dtype."""
    extra = 2.0**-7 if dtype == torch.bfloat16 and triton_runtime.INTERPRETED else 1e-6  # the interpreter cuts what a GPU rounds
    for got, want, naive in zip(ours, formula(torch.float64), formula(dtype), strict=True):
        assert_accurate(got, want, naive, extra)


def symmetric(shape, dtype, labelled=True, scale=20.0):
    batch, n, m, width = shape
    x, y = rows(batch, n, width, dtype), rows(batch, m, width, dtype)
    labels = (torch.randint(4, (batch, n)) << 34, torch.randint(4, (batch, m)) << 34) if labelled else (None, None)
    return x, y, torch.rand(batch, n) * scale, *labels


def symmetric_formula(x, y, scale, x_labels, y_labels, row_g, column_g, dtype):
    x, y, scale, row_g, column_g = (t.to(dtype) for t in (x, y, scale, row_g, column_g))
    score = x @ y.mT
    z = scale[..., None] * score
    if x_labels is not None:
        z = z.masked_fill(x_labels[..., None] == y_labels[:, None], -math.inf)
    lse = z.logsumexp(-1), z.logsumexp(-2)
    p = torch.where(lse[0][..., None] == -math.inf, 0, (z - lse[0][..., None]).exp())
    p_columns = torch.where(lse[1][:, None] == -math.inf, 0, (z - lse[1][:, None]).exp())
    weights = (row_g[..., None] * p + column_g[:, None] * p_columns) * scale[..., None]
    dscale = ((row_g[..., None] * p + column_g[:, None] * p_columns) * score).sum(-1)
    return *lse, weights @ y, weights.mT @ x, dscale


def check_symmetric(problem, dtype):
    x, y, *_ = problem
    g = torch.randn(x.shape[:2]), torch.randn(y.shape[:2])
    row_lse, column_lse, *low = run(OPS.symmetric_lse, *problem, number(dtype))
    grads = run(OPS.symmetric_gradients, *g, row_lse, column_lse, *low, *problem, True, True, number(dtype))
    check((row_lse, column_lse, *grads), lambda d: symmetric_formula(*problem, *g, d), dtype)


@DTYPES
@SHAPES
def test_symmetric_ragged_sizes(shape, dtype):
    check_symmetric(symmetric(shape, dtype), dtype)


def test_symmetric_slabs(small_slabs):
    check_symmetric(symmetric((2, 70, 100, 20), torch.float32), torch.float32)


@pytest.mark.parametrize("scale", [300.0, 1e4])
def test_symmetric_logits_far_apart(scale):
    check_symmetric(symmetric((1, 33, 65, 9), torch.float32, labelled=False, scale=scale), torch.float32)


def test_symmetric_nothing_left_in():
    x, y, scale, *_ = symmetric((2, 9, 40, 12), torch.float32)
    problem = x, y, scale, torch.ones(2, 9, dtype=torch.long), torch.ones(2, 40, dtype=torch.long)
    problem[4][0, 3] = 0
    check_symmetric(problem, torch.float32)


def test_symmetric_nan_reaches_its_rows():
    problem = symmetric((2, 9, 40, 12), torch.float32, labelled=False)
    problem[0][0, 4, 3] = math.nan
    row_lse, column_lse, *_ = run(OPS.symmetric_lse, *problem, 0)
    assert row_lse.isnan().sum() == 1 and row_lse[0, 4].isnan()
    assert column_lse[0].isnan().all() and column_lse[1].isfinite().all()


def sigmoid(shape, dtype):
    batch, n, m, width = shape
    x, y = rows(batch, n, width, dtype), rows(batch, m, width, dtype)
    return x, y, torch.rand(batch, n) * 20, 5 * torch.randn(batch, n), torch.randint(-1, m, (batch, n))


def sigmoid_formula(x, y, scale, shift, positive, g, dtype):
    x, y, scale, shift, g = (t.to(dtype) for t in (x, y, scale, shift, g))
    score = x @ y.mT
    sign = torch.where(positive[..., None] == torch.arange(y.shape[1]), -1.0, 1.0).to(dtype)
    t = sign * (scale[..., None] * score + shift[..., None])
    weights = g[..., None] * sign * torch.sigmoid(t)
    scaled = weights * scale[..., None]
    return -torch.nn.functional.logsigmoid(-t).sum(-1), scaled @ y, scaled.mT @ x, weights.sum(-1), (weights * score).sum(-1)


def check_sigmoid(problem, dtype):
    g = torch.randn(problem[2].shape)
    (losses,) = run(lambda *args: (OPS.sigmoid_pairs(*args),), *problem, number(dtype))
    grads = run(OPS.sigmoid_gradients, g, *problem, True, True, number(dtype))
    check((losses, *grads), lambda d: sigmoid_formula(*problem, g, d), dtype)


@DTYPES
@SHAPES
def test_sigmoid_ragged_sizes(shape, dtype):
    check_sigmoid(sigmoid(shape, dtype), dtype)


def test_sigmoid_slabs_and_extreme_logits(small_slabs):
    x, y, _, _, positive = sigmoid((2, 70, 100, 20), torch.float32)
    check_sigmoid((x, y, torch.linspace(-200, 200, 70).expand(2, 70).contiguous(), torch.full((2, 70), -30.0), positive), torch.float32)


def test_sigmoid_matched_pairs_keep_their_digits():
    """A row whose only pair is a positive far on its side loses e^-z, not the rounding of softplus(z) - z."""
    x, y, *_ = sigmoid((1, 20, 1, 8), torch.float32)
    shift = torch.linspace(5, 60, 20)[None]
    losses = run(lambda *args: (OPS.sigmoid_pairs(*args),), x, y, torch.zeros(1, 20), shift, torch.zeros(1, 20, dtype=torch.long), 0)[0]
    torch.testing.assert_close(losses, torch.exp(-shift), rtol=1e-2, atol=0)


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 300, 70), (1, 1000, 129), (1, 3, 2000), (2, 0, 5)])
@pytest.mark.parametrize("most", [1, 128 * 128, 300**2])
def test_every_pair_is_in_one_slab(shape, most):
    """Also of slabs smaller than a tile, which is then what they are."""
    met = torch.zeros(shape, dtype=torch.int64)
    for slab in triton_slabs.cut(*shape, most, triton_slabs.Tiles(128, 64, 32, 8, 3)):
        met[slab.entries, slab.rows, slab.columns] += 1
    assert (met == 1).all()


@pytest.mark.parametrize("size", [0, 1, 127, 128, 500, 1000])
@pytest.mark.parametrize("columns", [64, 128])
def test_every_two_rows_meet_once(size, columns):
    """In the slabs of one matrix's rows, of which those on the diagonal have both of their triangles."""
    met = torch.zeros(size, size, dtype=torch.int64)
    for slab in triton_slabs.cut_half(size, 300**2, triton_slabs.Tiles(128, columns, 32, 8, 3)):
        assert slab.on_diagonal or slab.rows.stop <= slab.columns.start
        met[slab.rows, slab.columns] += 1
    assert torch.equal(met.triu(), torch.ones_like(met).triu()) and (met.tril() <= met.mT.tril()).all()


@pytest.mark.parametrize("name", ["clip", "siglip", "sup_con", "nt_xent", "nt_xent of classes"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_losses_and_their_gradients(name, reduction, small_slabs):
    x, y = rows(1, 45, 20, torch.float32)[0], rows(1, 45, 20, torch.float32)[0]
    labels = torch.randint(-6, 0, (45,)) << 34
    labels[0] = 1  # alone in its class
    scale, shift = torch.tensor(9.0), torch.tensor(-2.0)

    def results(impl, device):
        leaves = [t.detach().to(device).requires_grad_() for t in (x, y, scale, shift)]
        a, b, s, c = leaves
        options = {"impl": impl, "reduction": reduction}
        if name == "clip":
            value = functional.clip_loss(a, b, s, **options)
        elif name == "siglip":
            value = functional.siglip_loss(a, b, s, c, **options)
        elif name != "sup_con":
            classes = labels.to(device) if name.endswith("classes") else None
            value = functional.nt_xent(a, b, temperature=1 / s, labels=classes, **options)
        else:
            value = functional.sup_con(a, labels.to(device), temperature=1 / s, **options)
        g = torch.linspace(-1, 1, len(value), device=device) if value.dim() else torch.ones((), device=device)
        first = torch.autograd.grad(value, leaves, g, allow_unused=True, retain_graph=True)
        return [t.cpu() for t in (value, *first, *torch.autograd.grad(value, leaves, g, allow_unused=True)) if t is not None]

    for got, want in zip(results("triton", DEVICE), results("torch", "cpu"), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def of_matches(name, x, y, scale):
    """The losses of rows and their matches, by their formulas."""
    cross_entropy = functools.partial(torch.nn.functional.cross_entropy, reduction="none")
    if name == "nt_xent":
        x = torch.cat((x, y))
        z = (scale * (x @ x.mT).to(scale.dtype)).fill_diagonal_(-math.inf)
        return cross_entropy(z, torch.arange(len(z), device=z.device).roll(len(y)))
    z, own = scale * (x @ y.mT).to(scale.dtype), torch.arange(len(x), device=x.device)
    return (cross_entropy(z, own) + cross_entropy(z.mT, own)) / 2


@pytest.mark.parametrize("name", ["clip", "nt_xent"])
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (33, 20), (65, 48)], ids=str)
def test_losses_of_matches_are_as_accurate_as_their_formulas(name, size, small_slabs):
    """Rows near their matches: losses small beside the logits that they are differences of."""
    x, noise = rows(1, *size, torch.float32)[0], rows(1, *size, torch.float32)[0]
    y, scale = torch.nn.functional.normalize(x + 0.2 * noise, dim=-1), torch.tensor(25.0)

    def results(loss, dtype):
        leaves = [t.to(DEVICE, dtype).requires_grad_() for t in (x, y, scale)]
        losses = loss(*leaves)
        upstream = torch.linspace(-1, 1, len(losses)).to(losses)
        return [t.cpu() for t in (losses, *torch.autograd.grad(losses, leaves, upstream))]

    def fused(x, y, scale):
        if name == "nt_xent":
            return functional.nt_xent(x, y, temperature=1 / scale, normalize=False, reduction="none", precision="ieee", impl="triton")
        return functional.clip_loss(x, y, scale, reduction="none", precision="ieee", impl="triton")

    formula = lambda *leaves: of_matches(name, *leaves)
    for got, want, naive in zip(
        results(fused, torch.float32), results(formula, torch.float64), results(formula, torch.float32), strict=True
    ):
        assert_accurate(got, want, naive, 1e-6)


@pytest.mark.parametrize("name", ["clip", "nt_xent"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_losses_of_matches_in_16_bits(name, dtype):
    x, y = rows(1, 40, 24, dtype)[0], rows(1, 40, 24, dtype)[0]

    def results(x, y, scale, impl):
        leaves = [t.to(DEVICE if impl == "triton" else "cpu").requires_grad_() for t in (x, y, scale)]
        if impl is None:
            loss = of_matches(name, *leaves).mean()
        elif name == "nt_xent":
            loss = functional.nt_xent(*leaves[:2], temperature=1 / leaves[2], normalize=False, impl=impl)
        else:
            loss = functional.clip_loss(*leaves, impl=impl)
        return loss.double().cpu().detach(), *(t.double().cpu() for t in torch.autograd.grad(loss, leaves))

    ours, naive = results(x, y, torch.tensor(9.0), "triton"), results(x, y, torch.tensor(9.0), None)
    exact = results(x.double(), y.double(), torch.tensor(9.0).double(), None)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-5, atol=1e-5)
    for got, rough, want in zip(ours[1:], naive[1:], exact[1:], strict=True):
        assert (got - want).norm() <= 2 * (rough - want).norm() + 2e-3 * want.norm()


def test_nan_of_a_view_reaches_every_loss():
    x, y = rows(1, 5, 8, torch.float32)[0], rows(1, 5, 8, torch.float32)[0]
    x[2, 1] = math.nan
    losses = functional.nt_xent(x.to(DEVICE), y.to(DEVICE), normalize=False, reduction="none", impl="triton").cpu()
    assert losses.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_sup_con_in_16_bits(dtype):
    x = rows(1, 40, 24, dtype)[0]
    labels = torch.arange(40) % 7

    def gradient(x, impl):
        x = x.to(DEVICE if impl == "triton" else "cpu").requires_grad_()
        loss = functional.sup_con(x, labels.to(x.device), normalize=False, impl=impl)
        return loss.float().cpu().detach(), torch.autograd.grad(loss, x)[0].double().cpu()

    (loss, ours), (exact_loss, exact), (_, naive) = gradient(x, "triton"), gradient(x.double(), "torch"), gradient(x, "torch")
    torch.testing.assert_close(loss, exact_loss, rtol=1e-5, atol=1e-5)
    assert (ours - exact).norm() <= 2 * (naive - exact).norm() + 1e-3 * exact.norm()


def test_second_derivatives():
    x, y = (rows(1, 12, 8, torch.float32)[0] for _ in range(2))

    def second(name, impl):
        leaves = [t.to(DEVICE).requires_grad_() for t in (x.clone(), y.clone())]
        if name == "clip":
            value = functional.clip_loss(*leaves, 3.0, impl=impl)
        elif name == "siglip":
            value = functional.siglip_loss(*leaves, 3.0, -1.0, impl=impl)
        elif name == "nt_xent":
            value = functional.nt_xent(*leaves, temperature=0.3, impl=impl)
        else:
            value = functional.sup_con(torch.cat(leaves), torch.arange(24, device=DEVICE) % 5, temperature=0.3, impl=impl)
        first = torch.autograd.grad(value, leaves, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), leaves)

    for name in ("clip", "siglip", "sup_con", "nt_xent"):
        for got, want in zip(second(name, "triton"), second(name, "torch"), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_vmap_and_compile():
    x, y = (rows(3, 7, 8, torch.float32).to(DEVICE) for _ in range(2))
    of_each = torch.func.vmap(lambda x, y: symmetric_lse(x, y, 3.0, impl="triton"))(x, y)
    torch.testing.assert_close(of_each, symmetric_lse(x, y, 3.0, impl="torch"))

    def losses(x, y, impl):
        views = functional.nt_xent(x, y, temperature=0.3, impl=impl)
        return functional.clip_loss(x, y, 3.0, impl=impl) + functional.siglip_loss(x, y, 3.0, -1.0, impl=impl) + views

    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    leaf, other = x[0].clone().requires_grad_(), x[0].clone().requires_grad_()
    compiled(leaf, y[0], "triton").backward()
    losses(other, y[0], "torch").backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_values_of_sup_con_are_the_kernels_under_vmap_and_compile(monkeypatch):
    x, labels = rows(3, 9, 8, torch.float32).to(DEVICE), torch.tensor([0, 1, 1, 2, 2, 2, 3, 0, 1], device=DEVICE)

    def loss(x):
        return functional.sup_con(x, labels, temperature=0.3, impl="triton")

    leaf, other = (x[0].clone().requires_grad_() for _ in range(2))
    loss(leaf).backward()
    each = torch.stack([loss(entry) for entry in x])
    monkeypatch.setattr(sup_con_values, "losses", None)
    torch.testing.assert_close(torch.vmap(loss)(x), each)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x)[0], leaf.grad, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(torch.ops.kdfast_torch, "sup_con_losses", None)
    value = torch.compile(loss, backend="aot_eager", fullgraph=True)(other)
    value.backward()
    torch.testing.assert_close(value, each[0])
    torch.testing.assert_close(other.grad, leaf.grad, rtol=1e-4, atol=1e-6)


def test_opcheck():
    def moved(args):
        return tuple(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in args)

    problem = moved(symmetric((2, 7, 40, 5), torch.float32))
    torch.library.opcheck(OPS.symmetric_lse.default, (*problem, 0))
    statistics = OPS.symmetric_lse(*problem, 0)
    g = tuple(torch.ones_like(t) for t in statistics[:2])
    torch.library.opcheck(OPS.symmetric_gradients.default, (*g, *statistics, *problem, True, False, 0))
    problem = moved(sigmoid((2, 7, 40, 5), torch.float32))
    torch.library.opcheck(OPS.sigmoid_pairs.default, (*problem, 0))
    torch.library.opcheck(OPS.sigmoid_gradients.default, (torch.ones(2, 7, device=DEVICE), *problem, False, True, 0))
    x, labels = rows(1, 7, 5, torch.float32)[0].to(DEVICE), torch.arange(7, device=DEVICE) % 2
    scale = torch.ones((), device=DEVICE)
    torch.library.opcheck(OPS.sup_con.default, (x, scale, labels, True, 0))
    statistics = OPS.sup_con(x, scale, labels, True, 0)[1]
    torch.library.opcheck(OPS.sup_con_grad.default, (scale, statistics, x, scale, labels, True, True, 0))
    x = rows(2, 6, 5, torch.float32).to(DEVICE)
    for other in (None, x[1]):
        torch.library.opcheck(OPS.matching_loss.default, (x[0], other, scale, None, None, True, True, True, 0))
        statistics = OPS.matching_loss(x[0], other, scale, None, None, True, True, True, 0)[1]
        inputs = (scale, statistics, x[0], other, scale, None, None)
        torch.library.opcheck(OPS.matching_loss_grad.default, (*inputs, True, other is not None, True, False, 0))


@pytest.mark.parametrize(("spread", "scale"), [(0.02, 50.0), (0.2, 50.0), (0.02, 230.0), (1.0, 2.0)])
def test_sup_con_of_tight_classes(spread, scale, small_slabs):
    """The loss of nearly equal rows is the log of their number: a sum of their logits must not round as logits of 50 and more do."""
    labels = torch.arange(100) // 4
    x = rows(1, 25, 64, torch.float32)[0][labels] + spread * rows(1, 100, 64, torch.float32)[0]
    x = torch.nn.functional.normalize(x, dim=-1)
    losses, _ = run(OPS.sup_con, x, torch.tensor(scale), labels, False, 3)

    def formula(x):
        own = torch.eye(100, dtype=torch.bool)
        log_p = (scale * (x @ x.T)).masked_fill(own, -math.inf).log_softmax(-1)
        return -log_p.masked_fill((labels[:, None] != labels) | own, 0).sum(-1) / 3

    assert_as_good_as(losses, formula(x), formula(x.double()))


def test_empty_batches():
    problem = symmetric((0, 4, 5, 3), torch.float32)
    assert [tuple(t.shape) for t in run(OPS.symmetric_lse, *problem, 0)[:2]] == [(0, 4), (0, 5)]
    (losses,) = run(lambda *args: (OPS.sigmoid_pairs(*args),), *sigmoid((0, 4, 5, 3), torch.float32), 0)
    assert losses.shape == (0, 4)


def test_what_it_cannot_serve_says_why():
    x = torch.ones(3, 4, device=DEVICE).double()
    with pytest.raises(ValueError, match="float64"):
        functional.clip_loss(x, x, 1.0, impl="triton")
