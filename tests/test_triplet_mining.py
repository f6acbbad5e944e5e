"""mine_triplets, the sampled minings and row_extrema; wrong arguments of the family."""

import pytest
import torch

from kdfast._core import random
from kdfast._ops.triplet import blocks, mining, reference, sampling
from kdfast.functional import Triplets, mine_triplets, triplet_loss
from kdfast.ops import row_extrema

SAMPLED = ("distance_weighted", "focal")


def problem(n=14, m=20, classes=4, d=5):
    x, y = torch.randn(n, d, dtype=torch.float64), torch.randn(m, d, dtype=torch.float64)
    return x, y, torch.randint(0, classes, (n,)), torch.randint(0, classes, (m,))


def as_set(triplets):
    return set(zip(*(t.tolist() for t in triplets.to_tuple()), strict=True))


@pytest.mark.parametrize("name", [m for m in mining.MININGS if m not in (*SAMPLED, *mining.SETS)])
def test_the_triplets_are_the_references(name):
    x, y, labels, ref_labels = problem()
    own = torch.arange(14)
    want = getattr(reference, name)(reference.distances(x, y), *reference.sides(labels, ref_labels, own))
    got = mine_triplets(x, labels, ref=y, ref_labels=ref_labels, own_index=own, mining=name)
    assert as_set(got) == {tuple(t) for t in want.nonzero().tolist()}
    assert ((got.positive == -1) == ~got.valid).all() and ((got.negative == -1) == ~got.valid).all()


@pytest.mark.parametrize("name", mining.SETS)
def test_draws_from_a_set_cover_it_and_nothing_else(name):
    x, y, labels, ref_labels = problem(n=6, m=12, classes=3)
    more = (0.4,) if name == "semi_hard" else ()
    want = getattr(reference, name)(reference.distances(x, y), *reference.sides(labels, ref_labels, None), *more)
    got = mine_triplets(x, labels, ref=y, ref_labels=ref_labels, mining=name, margin=0.4, per_pair=200, generator=torch.tensor(0))
    assert got.valid.shape[2] == 200
    assert as_set(got) == {tuple(t) for t in want.nonzero().tolist()}


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("fallback", ["uniform", "drop"])
def test_draws_invert_the_reference_weights(name, fallback):
    """300 columns: three sampling blocks, the last one ragged. Anchor 0 has no negative in range."""
    x, y, labels, ref_labels = problem(n=9, m=300, d=6)
    y[ref_labels != labels[0]] -= 8 * x[0] / x[0].norm()
    d = reference.distances(x, y)
    positive, negative = reference.sides(labels, ref_labels, None)
    w = reference.negative_weights(d, negative, name, 6, fallback)
    u = random.uniform(torch.tensor(7), torch.arange(9)[:, None], torch.arange(300), torch.float64)
    triplets = reference.sampled(w, positive, u)
    got = mine_triplets(x, labels, ref=y, ref_labels=ref_labels, mining=name, fallback=fallback, generator=torch.tensor(7))
    assert as_set(got) == {tuple(t) for t in triplets.nonzero().tolist()}
    assert got.valid[0].any() == (fallback == "uniform")
    want = reference.triplet_loss([(d, None)], triplets, margin=0.2)
    loss = triplet_loss(x, labels, ref=y, ref_labels=ref_labels, mining=name, fallback=fallback, generator=torch.tensor(7))
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SAMPLED)
def test_negatives_follow_the_stated_weights(name):
    """Chi-square over the columns of one anchor, 40,000 draws."""
    x, y, _, _ = problem(n=1, m=140, d=4)
    d = reference.distances(x, y)
    w = reference.negative_weights(d, torch.arange(140)[None] > 9, name, 4, "drop")[0]
    u = random.uniform(torch.tensor(1), torch.zeros(1, 1, dtype=torch.int64), torch.arange(40_000)[None], torch.float64)
    drawn = torch.bincount(sampling.draw(w[None], u)[0], minlength=140)
    assert drawn[w == 0].sum() == 0
    expected = 40_000 * w
    common = expected >= 5
    observed = torch.cat([drawn[common].double(), drawn[~common].sum()[None].double()])
    expected = torch.cat([expected[common], expected[~common].sum()[None].clamp_min(1e-9)])
    statistic = ((observed - expected).square() / expected)[expected > 5].sum()
    freedom = int((expected > 5).sum()) - 1
    assert freedom > 3
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_no_anchor_is_dropped_in_512_dimensions():
    """There log weights span hundreds: a maximum over the batch would underflow rows to 0."""
    centre = torch.randn(512)
    x = torch.cat([centre + s * torch.randn(16, 512) for s in (0.25, 0.6, 1.2)])  # distances from 0.3 to 1.2
    labels = torch.arange(48) % 16
    got = mine_triplets(x, labels, mining="distance_weighted", fallback="drop", generator=torch.tensor(0))
    d = reference.distances(x, x)
    _, negative = reference.sides(labels, labels, torch.arange(48))
    assert got.valid.any(1).equal((negative & (d < 1.4)).any(1))
    assert got.valid.any(1).all()


@pytest.mark.parametrize("name", SAMPLED)
def test_draws_depend_on_the_seed_alone(name, monkeypatch):
    x, _, labels, _ = problem(n=40)
    first = mine_triplets(x, labels, mining=name, generator=torch.tensor(5))
    eager = triplet_loss(x, labels, mining=name, generator=torch.tensor(5), reduction="none")
    monkeypatch.setattr(blocks, "CPU_BUDGET", 90)
    assert mine_triplets(x, labels, mining=name, generator=torch.tensor(5)).negative.equal(first.negative)
    assert not mine_triplets(x, labels, mining=name, generator=torch.tensor(6)).negative.equal(first.negative)
    torch.testing.assert_close(triplet_loss(x, labels, mining=name, generator=torch.tensor(5), reduction="none"), eager)
    a, p, n = first.to_tuple()
    d = reference.distances(x, x)
    want = torch.zeros(40, dtype=torch.float64).index_add_(0, a, (d[a, p] - d[a, n] + 0.2).relu())
    torch.testing.assert_close(eager, want)

    def losses():
        generator = torch.Generator().manual_seed(3)
        return [triplet_loss(x, labels, mining=name, generator=generator).item() for _ in range(2)]

    assert losses() == losses() and len(set(losses())) == 2


@pytest.mark.parametrize("name", SAMPLED)
def test_draws_do_not_depend_on_threads(name):
    x, labels = torch.randn(300, 16), torch.arange(300) % 40
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = mine_triplets(x, labels, mining=name, generator=torch.tensor(5))
        torch.set_num_threads(2)
        two = mine_triplets(x, labels, mining=name, generator=torch.tensor(5))
    finally:
        torch.set_num_threads(before)
    assert one.negative.equal(two.negative)


def test_a_row_drawn_at_its_very_end_takes_a_column_with_weight():
    w = torch.zeros(1, 300)
    w[0, [3, 130]] = torch.tensor([1e-7, 1.0])
    u = torch.tensor([[1e-12, 1 - 2**-24]])
    assert sampling.draw(w, u).tolist() == [[3, 130]]


def test_mining_compiles_with_max_positives():
    x, labels, seed = torch.randn(9, 4), torch.arange(9) % 3, torch.tensor(1)

    def mine(x, seed):
        return mine_triplets(x, labels, mining="focal", max_positives=3, generator=seed)

    torch._dynamo.reset()
    got, want = torch.compile(mine, fullgraph=True, backend="aot_eager")(x, torch.tensor(2)), mine(x, torch.tensor(2))
    assert isinstance(got, Triplets)
    assert all(getattr(got, f).equal(getattr(want, f)) for f in ("anchor", "positive", "negative", "valid"))
    unbounded = torch.compile(lambda x: mine_triplets(x, labels, mining="focal", generator=seed), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="max_positives"):
        unbounded(x)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
def test_row_extrema(metric):
    x, y, labels, ref_labels = problem()
    labels[2] = 9  # no positive
    x.requires_grad_(), y.requires_grad_()
    found = row_extrema(x, y, labels, ref_labels, own_index=True, metric=metric)
    d = reference.distances(x, y, metric, False)
    sides = reference.sides(labels, ref_labels, torch.arange(14))
    for name, side, farthest in (
        ("hardest_positive", 0, True),
        ("easiest_positive", 0, False),
        ("hardest_negative", 1, False),
        ("easiest_negative", 1, True),
    ):
        value, index = getattr(found, name)
        chosen = reference.pick(d, sides[side], farthest=farthest)
        exists = chosen.any(1)
        assert index.equal(torch.where(exists, chosen.int().argmax(1), -1))
        torch.testing.assert_close(value[exists], d[chosen], rtol=0, atol=1e-12)
        assert (value[~exists] == (-torch.inf if farthest else torch.inf)).all()
    assert torch.autograd.grad(found.hardest_positive.value[exists].sum(), x)[0].isfinite().all()
    y_nan = y.detach().clone()
    y_nan[4] = torch.nan
    one = row_extrema(x, y_nan, labels * 0, ref_labels * 0)
    assert (one.hardest_positive.index == 4).all() and one.hardest_positive.value.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bank", [True, False])
def test_row_extrema_round_gradients_once(dtype, bank):
    """Three references share the gradients of 200 anchors, which added up in the rows' dtype lost all but its first digits."""
    x, y = (2 * torch.randn(200, 5)).to(dtype).requires_grad_(), torch.randn(3, 5).to(dtype).requires_grad_()
    y = y if bank else x
    labels = torch.arange(200) % 3
    one, wide = row_extrema(x, y, labels, labels[: len(y)]), [x.detach().double().requires_grad_()]
    wide.append(y.detach().double().requires_grad_() if bank else wide[0])
    other = row_extrema(*wide, labels, labels[: len(y)])
    for mine, true in zip(one, other, strict=True):
        assert mine.index.equal(true.index)
        got, want = (torch.autograd.grad(e.value[e.index >= 0].sum(), t) for e, t in ((mine, [x, y][: 1 + bank]), (true, wide[: 1 + bank])))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.double(), w, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_anchors_have_no_triplets(dtype):
    """An impl="cpu" would have no references to take the middle of, the portable path no tile."""
    for name in mining.MININGS:
        per_pair = 2 if name in mining.SETS else None
        got = mine_triplets(torch.empty(0, 3, dtype=dtype), torch.empty(0, dtype=torch.int64), mining=name, per_pair=per_pair)
        assert got.valid.shape == got.negative.shape and got.valid.shape[0] == 0
    found = row_extrema(torch.empty(0, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype), torch.empty(0, dtype=torch.int64), torch.arange(2))
    assert all(e.value.shape == e.index.shape == (0,) for e in found)


def test_an_infinite_distance_is_a_distance():
    x, y = torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [torch.inf, 0.0]])
    found = row_extrema(x, y, torch.tensor([0]), torch.tensor([0, 1]))
    assert found.hardest_negative.index.item() == 1 and found.hardest_negative.value.item() == torch.inf


WRONG = {
    "embeddings must be a Tensor": dict(embeddings=[[1.0]]),
    "embeddings must have 2 dimensions": dict(embeddings=torch.randn(4)),
    "embeddings must be float16": dict(embeddings=torch.ones(4, 3, dtype=torch.int64)),
    "labels must have shape": dict(labels=torch.arange(3)),
    "labels must have an integer dtype": dict(labels=torch.ones(4)),
    "ref_labels must be given": dict(ref=torch.randn(5, 3)),
    "ref_labels needs ref": dict(ref_labels=torch.arange(4)),
    "ref_valid needs ref": dict(ref_valid=2),
    "ref must have the width": dict(ref=torch.randn(5, 2), ref_labels=torch.arange(5)),
    "ref must have the dtype": dict(ref=torch.randn(5, 3).double(), ref_labels=torch.arange(5)),
    "ref must have at least 1 row": dict(ref=torch.randn(0, 3), ref_labels=torch.arange(0)),
    "own_index must lie in": dict(ref=torch.randn(5, 3), ref_labels=torch.arange(5), own_index=torch.tensor([0, 1, 2, 5])),
    "own_index must be None or True": dict(own_index=torch.arange(4)),
    "own_index=True needs a row for each": dict(ref=torch.randn(3, 3), ref_labels=torch.arange(3), own_index=True),
    "ref_valid must be an int": dict(ref=torch.randn(5, 3), ref_labels=torch.arange(5), ref_valid=2.5),
    "ref_valid must lie in": dict(ref=torch.randn(5, 3), ref_labels=torch.arange(5), ref_valid=6),
    "ref_valid must have shape": dict(ref=torch.randn(5, 3), ref_labels=torch.arange(5), ref_valid=torch.tensor([1, 2])),
    "mining must be one of": dict(mining="hardest"),
    "metric must be one of": dict(metric="l1"),
    "reduction must be one of": dict(reduction="max"),
    "direction must be one of": dict(direction="up"),
    "fallback must be one of": dict(fallback="none"),
    "margin must be >= 0|margin must be a finite": dict(margin=-1.0),
    "margin must be a float": dict(margin="0.2"),
    "margin must be > 0": dict(mining="semi_hard", margin=0.0),
    "max_positives must be": dict(max_positives=0),
    "sample_on must be None": dict(mining="batch_all", sample_on=torch.randn(4, 2)),
    "sample_on must be a pair": dict(ref=torch.randn(5, 3), ref_labels=torch.arange(5), sample_on=torch.randn(4, 2)),
    "sample_on must have shape": dict(sample_on=torch.randn(3, 2)),
    "sample_on must be given": dict(embeddings=[torch.randn(4, 3), torch.randn(4, 2)]),
    "generator must be": dict(mining="focal", generator=3),
    "impl must be None or one of": dict(impl="fast"),
    "impl='triton' cannot serve": dict(impl="triton"),
}


@pytest.mark.parametrize("message", WRONG, ids=lambda m: m.replace(" ", "_"))
def test_wrong_arguments_are_named(message):
    given = dict(embeddings=torch.randn(4, 3), labels=torch.arange(4) % 2) | WRONG[message]
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        triplet_loss(given.pop("embeddings"), given.pop("labels"), **given)


def test_per_pair_belongs_to_the_set_minings():
    x, labels = torch.randn(4, 3), torch.arange(4) % 2
    for name in mining.SETS:
        with pytest.raises(ValueError, match="per_pair must be given"):
            mine_triplets(x, labels, mining=name)
    with pytest.raises(ValueError, match="per_pair must be None"):
        mine_triplets(x, labels, mining="focal", per_pair=2)
    with pytest.raises(ValueError, match="per_pair must be >= 1"):
        mine_triplets(x, labels, mining="batch_all", per_pair=0)


def test_a_bank_brings_its_labels_and_its_fill():
    from kdfast.bank import QueueBank

    bank = QueueBank(8, 3, labels=True)
    rows, row_labels = torch.randn(5, 3), torch.arange(5) % 2
    bank.push(rows, labels=row_labels)
    x, labels = torch.randn(4, 3), torch.arange(4) % 2
    want = triplet_loss(x, labels, ref=rows, ref_labels=row_labels)
    torch.testing.assert_close(triplet_loss(x, labels, ref=bank), want)
    with pytest.raises(ValueError, match="ref_labels must not be given"):
        triplet_loss(x, labels, ref=bank, ref_labels=row_labels)


def test_rows_not_yet_written_are_no_references():
    from kdfast.bank import IndexedBank

    x, labels = torch.randn(6, 4), torch.arange(6) % 3
    bank, written = IndexedBank(9, 4, init="empty", labels=True), torch.tensor([2, 3, 5, 8])  # row 0 would be the nearest negative
    bank.update(written, torch.randn(4, 4), written % 3)
    mined = mine_triplets(x, labels, ref=bank)
    want = mine_triplets(x, labels, ref=bank.storage[written], ref_labels=written % 3)
    assert want.valid.any() and mined.valid.equal(want.valid)
    for got, index in ((mined.positive, want.positive), (mined.negative, want.negative)):
        assert got.equal(torch.where(want.valid, written[index], -1))


def test_any_label_may_be_used_beside_rows_that_do_not_exist():
    last = torch.iinfo(torch.int64).max
    x, labels = torch.randn(2, 3), torch.tensor([last, 0])
    mined = mine_triplets(x, labels, ref=torch.randn(5, 3), ref_labels=torch.tensor([0, last, last, last, 0]), ref_valid=2)
    assert mined.positive.tolist() == [1, 0] and mined.negative.tolist() == [0, 1]


def test_row_extrema_names_its_own_arguments():
    x, y, labels, ref_labels = problem(n=3, m=4)
    for match, call in (
        ("labels_x", lambda: row_extrema(x, y, labels[:2], ref_labels)),
        ("labels_y", lambda: row_extrema(x, y, labels, ref_labels[:2])),
        ("^y must have the width of x", lambda: row_extrema(x, y[:, :2], labels, ref_labels)),
        ("^valid must lie in", lambda: row_extrema(x, y, labels, ref_labels, valid=5)),
        ("^y must be a Tensor", lambda: row_extrema(x, None, labels, ref_labels)),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact_ties_stay_ties(dtype):
    """On a grid many distances are equal: the lower index wins, and a negative as far as the positive is not farther."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x, y = (torch.randint(-2, 3, (n, 3), generator=generator).to(dtype) + 7 for n in (9, 40))
        labels, ref_labels = (torch.randint(0, 3, (n,), generator=generator) for n in (9, 40))
        d, sides = reference.distances(x, y, normalize=False), reference.sides(labels, ref_labels, None)
        found = row_extrema(x, y, labels, ref_labels)
        assert found.hardest_negative.index.equal(reference.pick(d, sides[1], farthest=False).int().argmax(1))
        for name in ("hard_semihard", "semi_hard_facenet"):
            mined = mine_triplets(x, labels, ref=y, ref_labels=ref_labels, mining=name, normalize=False)
            assert as_set(mined) == {tuple(t) for t in getattr(reference, name)(d, *sides).nonzero().tolist()}
