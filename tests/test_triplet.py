"""Triplet losses against the float64 reference: values and gradients, in batch, against a bank, mined on another tensor."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast._ops.triplet import blocks, extrema, mining, reference
from kdfast.functional import angular_loss, mine_triplets, triplet_loss

REDUCTIONS = ("mean_nonzero", "mean", "sum", "none")
DETERMINISTIC = [m for m in mining.MININGS if m not in ("distance_weighted", "focal")]


def mined(name, d, positive, negative, margin):
    more = {"semi_hard": (margin,)}.get(name, ())
    return getattr(reference, name)(d.detach(), positive, negative, *more)


def agree(got, want, inputs, tolerance=1e-10):
    grad = torch.randn_like(want)
    expected = torch.autograd.grad(want, inputs, grad, retain_graph=True, allow_unused=True)
    given = torch.autograd.grad(got, inputs, grad, allow_unused=True)
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    for g, e in zip(given, expected, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if e is None else e, rtol=0, atol=tolerance)


def rows(n, d, dtype=torch.float64):
    return torch.randn(n, d, dtype=dtype, requires_grad=True)


@pytest.fixture(params=[2**19, 60], ids=["one_block", "many_blocks"])
def budget(request, monkeypatch):
    """The small budget cuts anchors, references and positives: every seam is crossed."""
    monkeypatch.setattr(blocks, "CPU_BUDGET", request.param)
    if request.param < 100:
        monkeypatch.setattr(extrema, "TILE_ROWS", 3)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize(("metric", "normalize"), [("euclidean", True), ("euclidean", False), ("sqeuclidean", False), ("cosine", False)])
def test_in_batch(name, metric, normalize):
    n, margin = 13, 0.3
    x, labels = rows(n, 5), torch.randint(0, 4, (n,))
    d = reference.distances(x, x, metric, normalize)
    triplets = mined(name, d, *reference.sides(labels, labels, torch.arange(n)), margin)
    for soft, swap, direction, reduction in itertools.product((False, True), (False, True), ("cluster", "confuse"), REDUCTIONS):
        how = dict(margin=margin, soft=soft, swap=swap, direction=direction, reduction=reduction)
        want = reference.triplet_loss([(d, d)], triplets, **how)
        agree(triplet_loss(x, labels, mining=name, metric=metric, normalize=normalize, **how), want, (x,))


@pytest.mark.parametrize("impl", [None, "torch"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_softplus_counts_as_nonzero_where_a_float_does_not_hold_it(name, impl):
    """Squared distances of hundreds: most hinges lie where a softplus of floats is 0."""
    x, labels = 9 * torch.randn(30, 8), torch.randint(0, 4, (30,))
    d = reference.distances(x, x, "sqeuclidean", False)
    triplets = mined(name, d, *reference.sides(labels, labels, torch.arange(30)), 300.0)
    for swap, direction in itertools.product((False, True), ("cluster", "confuse")):
        how = dict(margin=300.0 if name == "semi_hard" else 0.0, soft=True, swap=swap, direction=direction)
        want = reference.triplet_loss([(d, d)], triplets, **how, reduction="mean_nonzero")
        got = triplet_loss(x, labels, mining=name, metric="sqeuclidean", normalize=False, impl=impl, **how)
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("valid", [None, 9])
def test_against_a_bank(name, valid, budget):
    n, m, margin = 7, 14, 0.4
    x, y = rows(n, 4), rows(m, 4)
    labels, ref_labels = torch.randint(0, 3, (n,)), torch.randint(0, 3, (m,))
    own = torch.tensor([0, -1, 3, 13, 2, -1, 8])
    if valid is not None:
        with torch.no_grad():
            y[valid:] = torch.nan  # never read
    clean = y if valid is None else torch.where(torch.arange(m)[:, None] < valid, y, 0.0)
    d, d_ref = reference.distances(x, clean), reference.distances(clean, clean)
    triplets = mined(name, d, *reference.sides(labels, ref_labels, own, valid), margin)
    for soft, swap in itertools.product((False, True), (False, True)):
        want = reference.triplet_loss([(d, d_ref)], triplets, margin=margin, soft=soft, swap=swap)
        got = triplet_loss(
            x, labels, ref=y, ref_labels=ref_labels, ref_valid=valid, own_index=own, mining=name, margin=margin, soft=soft, swap=swap
        )
        agree(got, want, (x, y))


@pytest.mark.parametrize("name", [m for m in DETERMINISTIC if m != "batch_all"])
@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_layers_share_the_triplets_mined_on_another_tensor(name, bank):
    n, m, margin = 8, (11 if bank else 8), 0.5
    layers, on = [rows(n, 3), rows(n, 6)], torch.randn(n, 4, dtype=torch.float64)
    refs, on_ref = ([rows(m, 3), rows(m, 6)], torch.randn(m, 4, dtype=torch.float64)) if bank else (layers, on)
    labels = torch.randint(0, 3, (n,))
    ref_labels = torch.randint(0, 3, (m,)) if bank else labels
    sides = reference.sides(labels, ref_labels, None if bank else torch.arange(n))
    triplets = mined(name, reference.distances(on, on_ref), *sides, margin)
    given = dict(ref=refs, ref_labels=ref_labels, sample_on=(on, on_ref)) if bank else dict(sample_on=on)
    for swap, reduction in itertools.product((False, True), REDUCTIONS):
        pairs = [(reference.distances(x, y), reference.distances(y, y)) for x, y in zip(layers, refs, strict=True)]
        want = reference.triplet_loss(pairs, triplets, margin=margin, swap=swap, reduction=reduction)
        got = triplet_loss(layers, labels, mining=name, margin=margin, swap=swap, reduction=reduction, **given)
        agree(got, want, (*layers, *refs) if bank else tuple(layers))


@pytest.mark.parametrize("name", mining.MININGS)
def test_gradients_of_first_and_second_order(name, budget):
    x, y = rows(4, 3), rows(6, 3)
    labels, ref_labels = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 1, 0, 2, 0])

    def loss(x, y):
        return triplet_loss(x, labels, ref=y, ref_labels=ref_labels, mining=name, margin=0.9, soft=True, generator=torch.tensor(3))

    assert torch.autograd.gradcheck(loss, (x, y), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (x, y), fast_mode=True)


@pytest.mark.parametrize("name", mining.MININGS)
def test_compiles_whole_and_under_functional_transforms(name):
    x, labels, seed = rows(9, 4), torch.arange(9) % 3, torch.tensor(11)

    def loss(x):
        return triplet_loss(x, labels, mining=name, generator=seed)

    torch._dynamo.reset()
    (want,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), want)


@pytest.mark.parametrize("name", mining.MININGS)
@pytest.mark.parametrize(
    "labels",
    [[0, 0, 0, 0], [0, 1, 2, 3], [], [0]],
    ids=["no_negative", "no_positive", "empty", "one"],
)
def test_no_triplet_is_zero_with_a_graph(name, labels):
    x, labels = rows(len(labels), 3), torch.tensor(labels, dtype=torch.int64)
    for reduction in REDUCTIONS:
        loss = triplet_loss(x, labels, mining=name, reduction=reduction)
        assert loss.shape == ((len(labels),) if reduction == "none" else ())
        assert loss.abs().sum() == 0
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("name", mining.MININGS)
def test_nan_reaches_the_loss_of_its_anchors_only(name):
    x, y = torch.randn(5, 3), torch.randn(8, 3)
    x[2] = torch.nan
    labels, ref_labels = torch.tensor([0, 1, 0, 7, 1]), torch.arange(8) % 2
    loss = triplet_loss(x, labels, ref=y, ref_labels=ref_labels, mining=name, reduction="none", margin=0.9, generator=torch.tensor(0))
    assert loss.isnan().tolist() == [False, False, True, False, False]
    assert loss[3] == 0  # no positive
    y[0] = torch.nan
    loss = triplet_loss(torch.ones(5, 3), labels, ref=y, ref_labels=ref_labels, mining=name, reduction="none")
    assert loss.isnan().tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_ties_go_to_the_lower_index(name):
    """On an integer lattice distances tie exactly, also with the thresholds."""
    x = torch.randint(0, 3, (14, 2)).double().requires_grad_()
    labels = torch.arange(14) % 3
    d = reference.distances(x, x, "sqeuclidean", False)
    triplets = mined(name, d, *reference.sides(labels, labels, torch.arange(14)), 1.0)
    want = reference.triplet_loss([(d, d)], triplets, margin=1.0)
    agree(triplet_loss(x, labels, mining=name, margin=1.0, metric="sqeuclidean", normalize=False), want, (x,))


def test_gradient_is_zero_at_distance_zero():
    x = torch.ones(4, 3, requires_grad=True)
    for name in mining.MININGS:
        (grad,) = torch.autograd.grad(triplet_loss(x, torch.tensor([0, 0, 1, 1]), mining=name, normalize=False), x)
        assert torch.equal(grad, torch.zeros_like(grad)), name


@pytest.mark.parametrize("name", ["batch_all", "semi_hard", "semi_hard_facenet", "multi_similarity"])
def test_coinciding_rows(name):
    """Positives and negatives at distance 0, which |x|^2 + |y|^2 - 2 x.y does not give by itself."""
    rows, labels = torch.randn(10, 7, dtype=torch.float64, requires_grad=True), torch.randint(0, 4, (20,))
    x = rows.repeat(2, 1)  # whose gradient is the sum of both copies': which of two is the nearest may hang on a product's last bit
    labels[13:] = labels[3:10]
    d = reference.distances(x, x)
    triplets = mined(name, d, *reference.sides(labels, labels, torch.arange(20)), 0.5)
    agree(triplet_loss(x, labels, mining=name, margin=0.5), reference.triplet_loss([(d, d)], triplets, margin=0.5), (rows,))


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(name, dtype):
    """Off by no more than twice what the plain formula in float32 is, on rows far from the origin."""
    x, labels = (torch.randn(40, 16) + 3).to(dtype).requires_grad_(), torch.randint(0, 6, (40,))
    exact = x.detach().double().requires_grad_()
    kw = dict(mining=name, normalize=False, margin=1.0)
    loss, want = triplet_loss(x, labels, **kw), triplet_loss(exact, labels, **kw)
    assert loss.dtype == torch.float32
    (grad,), (expected,) = torch.autograd.grad(loss, x), torch.autograd.grad(want, exact)
    assert grad.dtype == dtype
    assert (loss - want).abs() < 2e-6 * want.abs() + 1e-7
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), expected, rtol=4 * eps, atol=max(eps, 2e-6) * float(expected.abs().max()))


@pytest.mark.parametrize("size", [1, 3, 63, 65, 257], ids=str)
def test_ragged_sizes_and_awkward_layouts(size):
    """257 spans three sampling blocks; 1 and 3 leave classes empty."""
    base = torch.randn(5, size).double()
    x, labels = base.t().detach().requires_grad_(), torch.arange(size) % 7
    for name in mining.MININGS:
        strided = triplet_loss(x, labels, mining=name, reduction="none", generator=torch.tensor(1))
        packed = triplet_loss(x.contiguous(), labels.to(torch.uint8), mining=name, reduction="none", generator=torch.tensor(1))
        torch.testing.assert_close(strided, packed)
        loss = strided.sum()  # its upstream gradient has stride 0
        first, second = torch.autograd.grad(loss, x, retain_graph=True), torch.autograd.grad(loss, x)
        assert torch.equal(first[0], second[0])
        assert first[0].isfinite().all()


@pytest.mark.parametrize("form", [{}, {"soft": True}, {"swap": True}], ids=["plain", "soft", "swap"])
@pytest.mark.parametrize("name", mining.MININGS)
def test_under_vmap(name, form):
    x, labels = torch.randn(3, 8, 4, dtype=torch.float64), torch.arange(8) % 3

    def loss(x):
        return triplet_loss(x, labels, mining=name, generator=torch.tensor(1), **form)

    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), torch.stack([torch.func.grad(loss)(one) for one in x]))


def test_autocast_changes_nothing():
    x, labels = torch.randn(30, 16, requires_grad=True), torch.arange(30) % 5
    for name in ("batch_hard", "batch_all", "semi_hard_facenet"):
        want = torch.autograd.grad(triplet_loss(x, labels, mining=name), x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = triplet_loss(x, labels, mining=name)
            (got,) = torch.autograd.grad(loss, x)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(got, want[0], rtol=0, atol=0)


def test_an_expanded_reference_and_a_frozen_one():
    x, labels = rows(4, 3), torch.tensor([0, 1, 0, 1])
    ref = torch.randn(1, 3, dtype=torch.float64).expand(6, 3)
    triplet_loss(x, labels, ref=ref, ref_labels=torch.arange(6) % 2, mining="batch_all").backward()
    assert x.grad.isfinite().all()


def test_equal_rows_of_two_layouts_are_at_distance_zero():
    """A norm's last bit depends on the layout; its rounding would be a distance with a gradient of length 1."""
    x = torch.randn(6, 64, dtype=torch.float64)
    x, y = x.T.contiguous().T.requires_grad_(), x.clone()
    loss = triplet_loss(x, torch.arange(6), ref=y, ref_labels=torch.arange(6), mining="easy_positive", direction="confuse", margin=5.0)
    d_an = reference.distances(x, y).masked_fill(torch.eye(6).bool(), torch.inf).amin(1)
    expected = torch.autograd.grad((d_an + 5).mean(), x)[0]  # of the negatives alone
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_max_positives_bounds_what_compiled_code_reserves():
    x, labels = rows(12, 3), torch.arange(12) % 4
    for name in ("batch_all", "semi_hard_facenet"):
        for bound in (2, 2**40):
            torch.testing.assert_close(triplet_loss(x, labels, mining=name, max_positives=bound), triplet_loss(x, labels, mining=name))
    first = triplet_loss(x, labels, mining="semi_hard_facenet", max_positives=1, reduction="mean")
    mined_ = mine_triplets(x, labels, mining="semi_hard_facenet", max_positives=1)
    assert mined_.valid.all() and torch.equal(mined_.positive[:, 0], torch.where(torch.arange(12) < 4, torch.arange(12) + 4, labels))
    d = reference.distances(x, x)
    a, p, n = mined_.to_tuple()
    torch.testing.assert_close(first, (d[a, p] - d[a, n] + 0.2).relu().mean())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_nothing_of_the_size_of_the_distance_matrix_is_allocated(monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BUDGET", 4096)
    n, d = 256, 8
    x, labels = torch.randn(n, d, requires_grad=True), torch.arange(n) % 32
    for name in mining.MININGS:
        with Largest() as seen:
            triplet_loss(x, labels, mining=name, generator=torch.tensor(0)).backward()
        assert seen.size < n * n / 4, (name, seen.size)


def test_blocks_grow_with_the_references(monkeypatch):
    """Each block forms the norms of all references, [M, D]: a few anchors a block would spend the time on those."""
    monkeypatch.setattr(blocks, "CPU_BUDGET", 1024)
    x, y = torch.randn(32, 64), torch.randn(1024, 64)
    labels, ref_labels = torch.arange(32) % 4, torch.arange(1024) % 500
    with torch.profiler.profile() as seen:
        triplet_loss(x, labels, ref=y, ref_labels=ref_labels, mining="batch_all")
    assert sum(event.count for event in seen.key_averages() if event.key == "aten::mm") <= 5


def test_rows_wider_than_the_batch_are_not_gathered_for_every_pair(monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BUDGET", 4096)
    n, d = 32, 512
    x, labels = torch.randn(n, d, requires_grad=True), torch.arange(n) % 4
    for loss in (lambda: triplet_loss(x, labels, mining="batch_all", swap=True), lambda: angular_loss(x, labels, impl="torch")):
        with Largest() as seen:
            loss().backward()
        assert seen.size <= n * d, seen.size  # of the pairs: 7 n d
