"""impl="cpu" of the minings with one negative a positive pair, against the float64 definition and impl="torch"."""

import pytest
import torch

from kdfast._core import extension, random
from kdfast._ops.triplet import cpu, inputs, mining, reference
from kdfast.functional import mine_triplets, triplet_loss

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))
SAMPLED = ("distance_weighted", "focal")
SEED = torch.tensor(7)


def grid(n, m, classes, d=4):
    """Integer rows: scores and distances are exact, and many are equal."""
    x, y = (torch.randint(-5, 6, (k, d)).float() for k in (n, m))
    return x, y, torch.randint(0, classes, (n,)), torch.randint(0, classes, (m,))


def sphere(n, m, classes, d=6):
    """Unit rows near enough to each other for every range of distances to be met."""
    x, y = (torch.nn.functional.normalize(torch.randn(k, d) + 0.8, dim=1) for k in (n, m))
    return x, y, torch.randint(0, classes, (n,)), torch.randint(0, classes, (m,))


@pytest.mark.parametrize("classes", [2, 5, 60], ids=["many_positives", "about_as_many_as_take_a_table", "few_positives"])
def test_facenet_takes_the_references_triplets(classes, isa):
    x, y, labels, ref_labels = grid(25, 250, classes)
    y[60:65] = y[:5]
    own = torch.where(torch.rand(25) < 0.7, torch.randint(0, 250, (25,)), -1)
    for metric in ("euclidean", "sqeuclidean"):
        for valid in (None, 130):
            sides = reference.sides(labels, ref_labels, own, valid)
            want = reference.semi_hard_facenet(reference.distances(x, y, metric, False), *sides).nonzero()
            given = dict(ref=y, ref_labels=ref_labels, ref_valid=valid, own_index=own, metric=metric, normalize=False)
            got = mine_triplets(x, labels, mining="semi_hard_facenet", impl="cpu", **given)
            assert torch.stack(got.to_tuple(), 1).sort(0)[0].equal(want.sort(0)[0])
            assert set(map(tuple, torch.stack(got.to_tuple(), 1).tolist())) == set(map(tuple, want.tolist()))


def test_facenet_where_all_positives_are_equally_far(isa):
    x, y = torch.zeros(2, 3), torch.ones(200, 3)
    y[100:] = torch.arange(100)[:, None] / 10.0
    labels, ref_labels = torch.tensor([0, 1]), torch.cat([torch.zeros(60), torch.full((40,), 5), torch.full((100,), 1)]).long()
    both = [
        mine_triplets(x, labels, ref=y, ref_labels=ref_labels, mining="semi_hard_facenet", normalize=False, impl=i)
        for i in ("cpu", "torch")
    ]
    assert both[0].negative.equal(both[1].negative) and both[0].valid.equal(both[1].valid)


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("fallback", ["uniform", "drop"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_draws_invert_the_reference_weights(name, fallback, metric, isa):
    """300 columns, of which 280 exist: three sampling blocks, the last one ragged. Anchor 0 has no negative in range."""
    x, y, labels, ref_labels = sphere(30, 300, 5)
    y[ref_labels != labels[0]] -= 0.3 * x[0]
    if name == "focal" or metric == "cosine":
        y[ref_labels != labels[0]] = torch.nn.functional.normalize(y[ref_labels != labels[0]] - 3 * x[0], dim=1)
    own = torch.where(torch.rand(30) < 0.7, torch.randint(0, 300, (30,)), -1)
    d = reference.distances(x, y)
    positive, negative = reference.sides(labels, ref_labels, own, 280)
    w = reference.negative_weights(d, negative, name, 6, fallback)
    u = random.uniform(SEED, torch.arange(30)[:, None], torch.arange(300), torch.float64)
    given = dict(ref=y, ref_labels=ref_labels, ref_valid=280, own_index=own, mining=name, fallback=fallback, metric=metric)
    a, p, n = mine_triplets(x, labels, generator=SEED, impl="cpu", **given).to_tuple()
    want = (positive & (w > 0).any(1, keepdim=True)).nonzero()
    assert torch.stack([a, p], 1).sort(0)[0].equal(want.sort(0)[0])
    cumulative, target = w.cumsum(1), u[a, p]
    assert (w[a, n] > 0).all()
    assert (cumulative[a, n] >= target - 1e-5).all()
    assert ((cumulative - w)[a, n] <= target + 1e-5).all()


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize(("width", "share"), [(16, 0.002), (700, 0.01)], ids=["narrow", "wide"])
def test_draws_are_those_of_the_portable_path(name, width, share, isa):
    """Wide: fewer columns are packed at a time than a sampling block has; weights magnify the rounding of distances 700 times."""
    x, y, labels, ref_labels = sphere(60, 1000, 12, d=width)
    both = [mine_triplets(x, labels, ref=y, ref_labels=ref_labels, mining=name, generator=SEED, impl=impl) for impl in ("cpu", "torch")]
    assert both[0].valid.equal(both[1].valid) and both[0].positive.equal(both[1].positive)
    assert (both[0].negative != both[1].negative).sum() <= share * both[0].valid.sum()  # numbers that fall on a boundary
    loss = triplet_loss(x, labels, ref=y, ref_labels=ref_labels, mining=name, generator=SEED, reduction="none", impl="cpu")
    d, (a, p, n) = reference.distances(x, y), both[0].to_tuple()
    want = torch.zeros(60, dtype=torch.float64).index_add_(0, a, (d[a, p] - d[a, n] + 0.2).relu())
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLED)
def test_negatives_follow_the_stated_weights(name, isa):
    """Chi-square over the columns of one anchor, which draws for each of 20,000 positives."""
    draws, others = 20_000, 140
    x, y = torch.randn(1, 4), torch.randn(draws + others, 4)
    ref_labels = (torch.arange(draws + others) >= draws).long()
    found = mine_triplets(x, torch.tensor([0]), ref=y, ref_labels=ref_labels, mining=name, fallback="drop", generator=SEED, impl="cpu")
    drawn = torch.bincount(found.negative[found.valid] - draws, minlength=others).double()
    expected = draws * reference.negative_weights(reference.distances(x, y), ref_labels[None] == 1, name, 4, "drop")[0, draws:]
    assert found.valid.sum() == draws
    assert drawn[expected == 0].sum() == 0
    common = expected >= 5
    freedom = int(common.sum()) - 1
    assert freedom > 3
    statistic = ((drawn - expected).square() / expected)[common].sum()
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_no_anchor_is_dropped_in_512_dimensions(isa):
    centre = torch.randn(512)
    x = torch.cat([centre + s * torch.randn(16, 512) for s in (0.25, 0.6, 1.2)])  # distances from 0.3 to 1.2
    labels = torch.arange(48) % 16
    got = mine_triplets(x, labels, mining="distance_weighted", fallback="drop", generator=SEED, impl="cpu")
    assert got.valid.any(1).all()


@pytest.mark.parametrize("name", mining.PER_PAIR)
def test_the_loss_and_its_gradient_are_the_portable_ones(name, isa):
    x, y, labels, ref_labels = sphere(40, 90, 6)
    x.requires_grad_(), y.requires_grad_()
    for swap, given in ((False, {}), (True, dict(ref=y, ref_labels=ref_labels))):
        leaves = (x, y) if given else (x,)
        how = dict(mining=name, swap=swap, generator=SEED, max_positives=4 if given else None, **given)
        got, want = (triplet_loss(x, labels, impl=impl, **how) for impl in ("cpu", "torch"))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", mining.PER_PAIR)
def test_what_is_not_finite_poisons_its_anchors(name, isa):
    x, y, labels, ref_labels = sphere(20, 300, 4)
    labels[:2] = 50  # no positive
    x[3, 2] = torch.nan
    y[ref_labels == 1] = torch.nan
    rows = [
        triplet_loss(x, labels, ref=y, ref_labels=ref_labels, mining=name, generator=SEED, reduction="none", impl=impl)
        for impl in ("cpu", "torch")
    ]
    assert rows[0].isnan().equal(rows[1].isnan()) and not rows[0][:2].isnan().any()


@pytest.mark.parametrize("name", mining.PER_PAIR)
@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [0]], ids=["no_negative", "no_positive", "one"])
def test_nothing_to_mine_is_zero_with_a_graph(name, labels, isa):
    x = torch.randn(len(labels), 4, requires_grad=True)
    loss = triplet_loss(x, torch.tensor(labels), mining=name, generator=SEED, impl="cpu")
    assert loss.item() == 0 and torch.autograd.grad(loss, x)[0].abs().sum() == 0


@pytest.mark.parametrize("name", mining.PER_PAIR)
def test_the_same_triplets_for_any_number_of_threads_and_group(name, isa):
    """60 positives an anchor: fewer anchors are taken at a time than there are."""
    x, y, labels, ref_labels = sphere(330, 650, 11, d=40)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(mine_triplets(x, labels, ref=y, ref_labels=ref_labels, mining=name, generator=SEED, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    assert found[0].negative.equal(found[1].negative)
    other = mine_triplets(x[200:], labels[200:], ref=y, ref_labels=ref_labels, mining=name, generator=SEED, impl="cpu")
    if name == "semi_hard_facenet":  # draws depend on the anchor's number
        width = min(other.negative.shape[1], found[0].negative.shape[1])
        assert other.negative[:, :width].equal(found[0].negative[200:, :width])


@pytest.mark.parametrize(("name", "bound"), [("semi_hard_facenet", 3), ("focal", 3), ("focal", None)])
def test_compiles_whole(name, bound):
    """Without a bound of the positives the portable path serves."""
    x, labels = sphere(20, 1, 5)[0].requires_grad_(), torch.arange(20) % 5

    def loss(x, seed):
        return triplet_loss(x, labels, mining=name, generator=seed, max_positives=bound, impl="cpu" if bound else None)

    torch._dynamo.reset()
    (want,) = torch.autograd.grad(triplet_loss(x, labels, mining=name, generator=SEED, impl="cpu"), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, SEED), x)
    torch.testing.assert_close(got, want)


def test_opcheck():
    x, y, labels, ref_labels = sphere(9, 70, 3)
    b = inputs.collect(x, labels, ref=y, ref_labels=ref_labels, ready=False)
    scan = cpu._scan(x, y, b.anchors, b.classes, "euclidean", True)
    torch.library.opcheck(torch.ops.kdfast.triplet_facenet.default, (*scan, 5, 0))
    torch.library.opcheck(torch.ops.kdfast.triplet_weighted.default, (*scan, 5, SEED, 0.25, -1.0, 1.96, True, 0))
