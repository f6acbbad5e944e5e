"""impl="cpu" of the minings with one triplet an anchor, against the float64 definition and impl="torch", under every instruction set."""

import pytest
import torch

from kdfast._core import extension
from kdfast._ops.triplet import cpu, extrema, inputs, mining, reference
from kdfast.functional import mine_triplets, triplet_loss
from kdfast.ops import row_extrema

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))
METRICS = ("euclidean", "sqeuclidean", "cosine")


def problem(n=40, m=300, d=20, classes=7, dtype=torch.float32):
    x, y = torch.randn(n, d), torch.randn(m, d)
    return x.to(dtype), y.to(dtype), torch.randint(0, classes, (n,)), torch.randint(0, classes, (m,))


def check_extremes(x, y, labels, ref_labels, own=None, metric="euclidean", normalize=False, valid=None):
    """Columns found are as far or near as any, to within the rounding of scores, and missing where nothing is admitted."""
    found = row_extrema(x, y, labels, ref_labels, own_index=own, valid=valid, metric=metric, normalize=normalize, impl="cpu")
    d = reference.distances(x, y, metric, normalize)
    sides = reference.sides(labels, ref_labels, torch.arange(len(x)) if own is True else own, valid)
    for kind, (positive, farthest) in extrema.KINDS.items():
        value, index = getattr(found, kind)
        mask = sides[0] if positive else sides[1]
        exists = mask.any(1)
        assert (index >= 0).equal(exists)
        at = d.gather(1, index.clamp_min(0)[:, None])[:, 0]
        assert mask.gather(1, index.clamp_min(0)[:, None])[:, 0][exists].all()
        best = torch.where(mask, d, -torch.inf).amax(1) if farthest else torch.where(mask, d, torch.inf).amin(1)
        torch.testing.assert_close(at[exists], best[exists], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(value[exists].double(), at[exists], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1), (3, 65, 5, 2), (63, 257, 40, 7), (65, 600, 130, 20), (200, 63, 33, 1)],
    ids=["one", "a_panel_and_one", "a_block_and_one", "wide", "one_class"],
)
@pytest.mark.parametrize("metric", METRICS)
def test_extremes_of_ragged_sizes(sizes, metric, isa):
    n, m, d, classes = sizes
    for normalize in (False, True):
        check_extremes(*problem(n, m, d, classes), metric=metric, normalize=normalize)


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_extremes_of_every_dtype(dtype, isa):
    x, y, *labels = problem(dtype=dtype)
    check_extremes(x, y, *labels)
    check_extremes(x[:, ::2], y[:, ::2], *labels, normalize=True)  # not contiguous
    check_extremes(x[:1].expand_as(x), y, *labels)


def test_the_own_column_and_columns_that_do_not_exist_are_nobodys(isa):
    x, y, labels, ref_labels = problem()
    y[:40] = x + 1e-3 * torch.randn_like(x)  # by far the nearest, of any class
    own = torch.where(torch.rand(40) < 0.8, torch.arange(40), -1)
    check_extremes(x, y, labels, ref_labels, own=True)
    check_extremes(x, y, labels, ref_labels, own=own)
    y[200:] = torch.nan
    check_extremes(x, y.nan_to_num(0), labels, ref_labels, own=own, valid=200)
    found = [row_extrema(x, y, labels, ref_labels, own_index=own, valid=200, impl=impl) for impl in ("cpu", "torch")]
    for got, want in zip(*found, strict=True):
        assert got.index.equal(want.index)


@pytest.mark.parametrize("name", mining.PER_ANCHOR)
def test_ties_go_to_the_lower_index(name, isa):
    """On a grid scores are exact: many distances are equal, and a negative as far as the positive is not farther."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randint(-2, 3, (n, 3), generator=generator).float() + 7 for n in (30, 400))
        labels, ref_labels = (torch.randint(0, 60, (n,), generator=generator) for n in (30, 400))
        d = reference.distances(x, y, normalize=False)
        want = getattr(reference, name)(d, *reference.sides(labels, ref_labels, None)).nonzero()
        got = mine_triplets(x, labels, ref=y, ref_labels=ref_labels, mining=name, normalize=False, impl="cpu")
        assert torch.stack(got.to_tuple(), 1).equal(want)


def test_a_copy_of_the_positive_is_not_farther(isa):
    """A positive and its copy of another class have scores of the same bits, though they are formed in different passes."""
    x, y, *_ = problem(n=64, m=600, d=70)
    copies = torch.cat([y[:300], y[:300]])
    ref_labels = torch.cat([torch.arange(300) % 64, torch.full((300,), 99)])
    for name in ("easy_semihard", "hard_semihard"):
        mined = mine_triplets(x, torch.arange(64), ref=copies, ref_labels=ref_labels, mining=name, impl="cpu")
        assert mined.valid.any() and (mined.negative != mined.positive + 300)[mined.valid].all()


def test_rows_far_from_the_origin_are_told_apart(isa):
    x, y, *labels = problem()
    check_extremes(x + 3000.0, y + 3000.0, *labels)


@pytest.mark.parametrize("label", [torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max])
def test_labels_of_all_64_bits(label, isa):
    x, y, labels, ref_labels = problem(classes=2)
    check_extremes(x, y, torch.where(labels == 1, label, 1 << 32), torch.where(ref_labels == 1, label, 1 << 32), valid=280)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", mining.PER_ANCHOR)
def test_what_is_not_finite_is_mined_as_portably(bad, name, isa):
    x, y, labels, ref_labels = problem(d=8)
    x[3, 2] = bad
    y[[5, 270], 0] = bad
    labels[:2] = 50  # no positive
    both = [mine_triplets(x, labels, ref=y, ref_labels=ref_labels, mining=name, normalize=False, impl=impl) for impl in ("cpu", "torch")]
    assert all(getattr(both[0], field).equal(getattr(both[1], field)) for field in ("positive", "negative", "valid"))
    rows = [
        triplet_loss(x, labels, ref=y, ref_labels=ref_labels, mining=name, normalize=False, reduction="none", impl=impl)
        for impl in ("cpu", "torch")
    ]
    assert rows[0].isnan().equal(rows[1].isnan()) and rows[0].isnan().any()
    torch.testing.assert_close(*rows, equal_nan=True)


def test_rows_that_do_not_exist_may_hold_anything(isa):
    """Those of sample_on reach the kernels as they are, NaN and all."""
    x, y, labels, ref_labels = problem()
    y[200:] = torch.nan
    on = torch.randn(40, 6), torch.cat([torch.randn(200, 6), torch.full((100, 6), torch.inf)])
    for name in (*mining.PER_ANCHOR, *mining.PER_PAIR):
        given = dict(ref=y, ref_labels=ref_labels, ref_valid=200, mining=name, sample_on=on, generator=torch.tensor(1))
        got, want = (triplet_loss(x, labels, impl=impl, **given) for impl in ("cpu", "torch"))
        torch.testing.assert_close(got, want)


def test_the_same_bits_for_any_number_of_threads(isa):
    x, y, labels, ref_labels = problem(n=333, m=700, d=48)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(row_extrema(x, y, labels, ref_labels, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(a.index.equal(b.index) and a.value.equal(b.value) for a, b in zip(found[0], other, strict=True))


def test_rows_taken_in_several_groups(isa):
    """More anchors than are packed at a time, width 1000: 1024 or fewer."""
    x, y, labels, ref_labels = problem(n=1200, m=70, d=1000, classes=300)
    check_extremes(x, y, labels, ref_labels)


def scan_arguments(n=9, m=70):
    x, y, labels, ref_labels = problem(n, m)
    b = inputs.collect(x, labels, ref=y, ref_labels=ref_labels, ready=False)
    return cpu._scan(x, y, b.anchors, b.classes, "euclidean", True)


def test_opcheck():
    torch.library.opcheck(torch.ops.kdfast.triplet_extrema.default, (*scan_arguments(), 1, True, 0))


def test_what_the_op_refuses():
    arguments = list(scan_arguments())
    long = torch.int64
    for at, wrong in ((0, torch.randn(9, 3)), (5, torch.zeros(3, dtype=long)), (7, torch.full((9,), 70)), (12, torch.full((70,), 70))):
        given = [*arguments[:at], wrong, *arguments[at + 1 :]]
        with pytest.raises(RuntimeError):
            torch.ops.kdfast.triplet_extrema(*given, 0, False, 0)
    with pytest.raises(ValueError, match="cannot serve triplet_loss: it takes float32"):
        triplet_loss(torch.randn(4, 3).double(), torch.arange(4) % 2, impl="cpu")


def _crowds() -> dict[str, torch.Tensor]:
    """Rows whose nearest and farthest bf16 cannot tell apart, or hardly."""
    x = torch.randn(300, 20)
    return {
        "apart": x,
        "one_crowd": 1 + 1e-4 * x,
        "copies": x[torch.arange(300) % 90],
        "crowds_far_apart": 100 * torch.randn(3, 20)[torch.arange(300) % 3] + 1e-3 * x,
        "lengths_of_all_sizes": x * torch.logspace(-6, 6, 300)[:, None],
        "too_small_for_products": 1e-15 * x,
        "zero": 0 * x,
    }


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("crowd", _crowds())
def test_what_bf16_cannot_tell_apart_is_measured_again(crowd, metric, isa):
    x, labels = _crowds()[crowd], torch.randint(0, 40, (300,))
    batch = inputs.collect(x, labels, metric=metric, normalize=False, ready=False)
    found = cpu.extremes(x, x, batch.anchors, batch.classes, metric, False)[0]
    d, scale = reference.distances(x, x, metric, False), x.double().square().sum(1)
    if metric == "euclidean":
        d = d.square()
    rounding = 2e-6 * (torch.ones_like(d) if metric == "cosine" else scale[:, None] + scale)
    same, other = reference.sides(labels, labels, torch.arange(300), None)
    for kind, mask, sign in (("hardest_positive", same, 1), ("easiest_positive", same, -1), ("hardest_negative", other, -1)):
        index = found[kind]
        assert (index >= 0).equal(mask.any(1))
        key = torch.where(mask, sign * d, -torch.inf)
        best = key.argmax(1)
        here, at = torch.arange(300), index.clamp_min(0)
        short = (key[here, best] - key[here, at])[mask.any(1)]
        allowed = (rounding[here, best] + rounding[here, at])[mask.any(1)]
        assert (short <= allowed).all(), (crowd, kind, (short - allowed).max())
