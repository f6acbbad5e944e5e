"""The Triton scan for extremes against the float64 definition: on a GPU, or where there is none under Triton's interpreter,
in a process that has TRITON_INTERPRET=1 from its start (make test)."""

import pytest
import torch

from kdfast._core import triton_runtime
from kdfast._ops.triplet import extrema, reference
from kdfast.functional import mine_triplets, triplet_loss
from kdfast.ops import row_extrema

if triton_runtime.missing() is not None:
    pytest.skip(f"{triton_runtime.missing()}, and TRITON_INTERPRET is not 1", allow_module_level=True)
DEVICE = "cpu" if triton_runtime.INTERPRETED else "cuda"


def problem(n=40, m=150, d=20, classes=7, dtype=torch.float32):
    x, y = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    return x, y, torch.randint(0, classes, (n,)), torch.randint(0, classes, (m,))


def moved(*tensors):
    return tuple(t.to(DEVICE) for t in tensors)


def check_extremes(x, y, labels, ref_labels, own=None, metric="euclidean", normalize=False, valid=None):
    """Columns found are as far or near as any, to within the rounding of scores, and missing where nothing is admitted."""
    given = own if own is None or own is True else own.to(DEVICE)
    found = row_extrema(
        *moved(x, y, labels, ref_labels), own_index=given, valid=valid, metric=metric, normalize=normalize, impl="triton"
    )  # fmt: skip
    d = reference.distances(x, y, metric, normalize)
    sides = reference.sides(labels, ref_labels, torch.arange(len(x)) if own is True else own, valid)
    for kind, (positive, farthest) in extrema.KINDS.items():
        value, index = (t.cpu() for t in getattr(found, kind))
        mask = sides[0] if positive else sides[1]
        exists = mask.any(1)
        assert (index >= 0).equal(exists)
        at = d.gather(1, index.clamp_min(0)[:, None])[:, 0]
        assert mask.gather(1, index.clamp_min(0)[:, None])[:, 0][exists].all()
        best = torch.where(mask, d, -torch.inf).amax(1) if farthest else torch.where(mask, d, torch.inf).amin(1)
        torch.testing.assert_close(at[exists], best[exists], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value[exists].double(), at[exists], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 65, 5, 2), (33, 160, 40, 7), (65, 33, 33, 1)], ids=str)
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
def test_extremes_of_ragged_sizes(sizes, metric):
    for normalize in (False, True):
        check_extremes(*problem(*sizes), metric=metric, normalize=normalize)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_extremes_of_half_precision(dtype):
    x, y, *labels = problem(dtype=dtype)
    check_extremes(x, y, *labels)
    check_extremes(x[:, ::2], y[:, ::2], *labels, normalize=True)  # not contiguous


def test_the_own_column_and_columns_that_do_not_exist_are_nobodys():
    x, y, labels, ref_labels = problem()
    y[:40] = x + 1e-3 * torch.randn_like(x)  # by far the nearest, of any class
    own = torch.where(torch.rand(40) < 0.8, torch.arange(40), -1)
    check_extremes(x, y, labels, ref_labels, own=True)
    check_extremes(x, y, labels, ref_labels, own=own)
    check_extremes(x, y, labels, ref_labels, own=own, valid=100)


@pytest.mark.parametrize("name", extrema.PER_ANCHOR)
def test_ties_go_to_the_lower_index(name):
    """On a grid scores are exact: many distances are equal, and a negative as far as the positive is not farther."""
    x, y = (torch.randint(-2, 3, (n, 3)).float() + 7 for n in (30, 200))
    labels, ref_labels = (torch.randint(0, 30, (n,)) for n in (30, 200))
    d = reference.distances(x, y, normalize=False)
    want = getattr(reference, name)(d, *reference.sides(labels, ref_labels, None)).nonzero()
    got = mine_triplets(*moved(x, labels), **sources(y, ref_labels), mining=name, normalize=False, impl="triton")
    assert torch.stack(got.to_tuple(), 1).cpu().equal(want)


def sources(ref, ref_labels):
    return {"ref": ref.to(DEVICE), "ref_labels": ref_labels.to(DEVICE)}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", extrema.PER_ANCHOR)
def test_what_is_not_finite_reaches_its_anchors(bad, name):
    """A reference that is not finite is a positive or a negative of every anchor; only a NaN makes all distances to it NaN."""
    x, y, labels, ref_labels = problem()
    y[77, 3] = bad
    losses = [
        triplet_loss(*moved(x, labels), **sources(y, ref_labels), mining=name, reduction="none", impl=impl).cpu()
        for impl in ("triton", "torch")
    ]
    assert losses[0].isnan().equal(losses[1].isnan())
    x, y, labels, ref_labels = problem()
    x[5, 3] = bad
    loss = triplet_loss(*moved(x, labels), **sources(y, ref_labels), mining=name, reduction="none", impl="triton").cpu()
    assert loss[5].isnan() and loss.isnan().sum() == 1


@pytest.mark.parametrize("name", extrema.PER_ANCHOR)
def test_losses_and_gradients_are_the_portable_ones(name):
    x, _, labels, _ = problem(n=70)
    found = []
    for impl in ("triton", "torch"):
        leaf = x.to(DEVICE).requires_grad_()
        loss = triplet_loss(leaf, labels.to(DEVICE), mining=name, margin=0.5, impl=impl)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        found.append((loss, gradient, *torch.autograd.grad(gradient.square().sum(), leaf)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_columns_split_over_programs_are_one(monkeypatch):
    x, y, labels, ref_labels = problem(m=300, d=4)
    y[200:] = y[:100]  # ties across the parts
    ref_labels[200:] = ref_labels[:100]
    found = []
    for parts in (1, 3):
        monkeypatch.setattr(triton_runtime, "splits", lambda *_, parts=parts: parts)
        found.append(row_extrema(*moved(x, y, labels, ref_labels), impl="triton"))
    for one, three in zip(*found, strict=True):
        assert one.index.equal(three.index) and one.value.equal(three.value)


def test_opcheck_and_compile():
    x, y, labels, ref_labels = moved(*problem(n=9, m=40))
    own, exists = torch.full_like(labels, -1), torch.ones_like(ref_labels, dtype=torch.bool)
    op = torch.ops.kdfast_triton.triplet_extrema.default
    torch.library.opcheck(op, (x, y, labels, own, None, ref_labels, exists, True, [True, False, True, False]))

    def loss(x):
        return triplet_loss(x, labels, ref=y, ref_labels=ref_labels, impl="triton")

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), loss(x))


def test_what_it_cannot_serve_says_why():
    x, _, labels, _ = problem()
    with pytest.raises(ValueError, match="plain hinges"):
        triplet_loss(*moved(x, labels), mining="batch_all", soft=True, impl="triton")
    with pytest.raises(ValueError, match="float64"):
        triplet_loss(*moved(x.double(), labels), impl="triton")


@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard_facenet", "distance_weighted"])
def test_labels_of_any_strides(mining):
    """A kernel reads them one beside the other."""
    x, y, mixed = torch.randn(9, 6, device=DEVICE), torch.randn(40, 6, device=DEVICE), torch.randint(4, (80,), device=DEVICE)
    found = []
    for packed in (False, True):
        mine, theirs = (t.clone() if packed else t for t in (mixed[:18:2], mixed[::2]))
        assert theirs.is_contiguous() == packed
        options = {"generator": torch.tensor(3, device=DEVICE)} if mining == "distance_weighted" else {}
        loss = triplet_loss(x, mine, ref=y, ref_labels=theirs, mining=mining, max_positives=4, impl="triton", **options)
        found.append((loss, *(t for extreme in row_extrema(x, y, mine, theirs, impl="triton") for t in extreme)))
    for u, v in zip(*found, strict=True):
        assert torch.equal(u, v)
