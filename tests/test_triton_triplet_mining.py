"""The Triton kernels of minings of a negative a pair against the definitions: on a GPU, or where there is none under Triton's interpreter,
in a process that has TRITON_INTERPRET=1 from its start (make test)."""

import pytest
import torch

from kdfast._core import triton_runtime
from kdfast._ops.triplet import mining, reference
from kdfast._ops.triplet.triton import mining as triton_mining
from kdfast.functional import mine_triplets, triplet_loss

if triton_runtime.missing() is not None:
    pytest.skip(f"{triton_runtime.missing()}, and TRITON_INTERPRET is not 1", allow_module_level=True)
DEVICE = "cpu" if triton_runtime.INTERPRETED else "cuda"
DRAWN = ("distance_weighted", "focal")


def case(n, m, width, classes, *, grid=False) -> dict:
    """m None: in batch."""

    def rows(count):
        return torch.randint(-2, 3, (count, width)).float() if grid else torch.randn(count, width)

    a = {"embeddings": rows(n), "labels": torch.randint(0, classes, (n,))}
    if m is not None:
        a |= {"ref": rows(m), "ref_labels": torch.randint(0, classes, (m,)), "own_index": torch.randint(-1, m, (n,)), "ref_valid": m - 3}
    return {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in a.items()}


def seed():
    return torch.tensor(5, device=DEVICE)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_facenet_takes_the_definition_s_triplets(metric, bank):
    """On a grid: many distances are equal, negatives as far as the positive are not farther, and the lower index is taken."""
    a = case(19, 75 if bank else None, 3, 4, grid=metric != "cosine")
    got = mine_triplets(**a, mining="semi_hard_facenet", metric=metric, normalize=False, impl="triton")
    x, labels = a["embeddings"].cpu(), a["labels"].cpu()
    y, ref_labels = (a["ref"].cpu(), a["ref_labels"].cpu()) if bank else (x, labels)
    d = reference.distances(x, y, metric, normalize=False)
    own = a["own_index"].cpu() if bank else torch.arange(19)
    want = reference.semi_hard_facenet(d, *reference.sides(labels, ref_labels, own, a.get("ref_valid"))).nonzero()
    assert torch.stack(got.to_tuple(), 1).cpu().equal(want)


@pytest.mark.parametrize("name", mining.PER_PAIR)
@pytest.mark.parametrize(("fallback", "bank"), [("uniform", False), ("drop", True)], ids=["in_batch", "bank"])
def test_draws_losses_and_gradients_are_the_portable_ones(name, fallback, bank, monkeypatch):
    monkeypatch.setattr(triton_mining, "SUMS", 30)  # slabs of few anchors
    a = case(11, 60 if bank else None, 6, 3)
    how = {"mining": name, "fallback": fallback, "max_positives": 3}
    mined = [mine_triplets(**a, **how, generator=seed(), impl=impl) for impl in ("triton", "torch")]
    for got, want in zip(*((m.positive, m.negative, m.valid) for m in mined), strict=True):
        assert got.equal(want)
    found = []
    for impl in ("triton", "torch"):
        leaf = a["embeddings"].clone().requires_grad_()
        loss = triplet_loss(**{**a, "embeddings": leaf}, **how, margin=0.5, generator=seed(), impl=impl)
        found.append((loss, torch.autograd.grad(loss, leaf)[0]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [3, 100])
def test_draws_follow_the_weights(width):
    """One anchor with many equal positives: how often each negative is drawn. Wide rows have weights hundreds of orders apart."""
    positives, m = 100, 70
    ref = torch.nn.functional.normalize(torch.randn(m, width), dim=-1)
    x = torch.nn.functional.normalize(ref[-1:] + 0.3 * torch.randn(1, width) / width**0.5 * 3, dim=-1)
    ref = torch.cat([x.expand(positives, width), ref])
    labels, ref_labels = torch.zeros(1, dtype=torch.int64), (torch.arange(positives + m) >= positives).long()
    given = {"ref": ref.to(DEVICE), "ref_labels": ref_labels.to(DEVICE)}
    mined = mine_triplets(x.to(DEVICE), labels.to(DEVICE), **given, mining="distance_weighted", generator=seed(), impl="triton")
    negative = mined.negative[0].cpu()
    d = reference.distances(x, ref)
    p = reference.negative_weights(d, *reference.sides(labels, ref_labels, None)[1:], "distance_weighted", width, "uniform")[0]
    often = torch.bincount(negative, minlength=len(ref)) / positives
    assert ((often - p).abs() < 5 * (p * (1 - p) / positives).sqrt() + 1e-9).all()


@pytest.mark.parametrize("name", mining.PER_PAIR)
def test_nan_reaches_the_losses_of_anchors_with_both_kinds(name):
    a = case(12, None, 4, 3)
    a["embeddings"][3] = torch.nan
    how = {"mining": name, "max_positives": 4, "reduction": "none"}
    got, want = (triplet_loss(**a, **how, generator=seed(), impl=impl).isnan() for impl in ("triton", "torch"))
    assert got.equal(want) and got.any()


def test_columns_split_over_programs_are_one(monkeypatch):
    a = case(3, 75, 3, 9, grid=True)
    found = []
    for parts in (1, 3):
        monkeypatch.setattr(triton_runtime, "splits", lambda *_, parts=parts: parts)
        options = ({"mining": name, "normalize": name in DRAWN} for name in mining.PER_PAIR)
        found.append([mine_triplets(**a, **each, generator=seed(), impl="triton") for each in options])
    for one, three in zip(*found, strict=True):
        assert one.negative.equal(three.negative)


def test_compiles_whole():
    a = case(12, None, 4, 3)

    def loss(x):
        names = "distance_weighted", "semi_hard_facenet"
        options = {"max_positives": 4, "generator": seed(), "impl": "triton"}
        return sum(triplet_loss(x, a["labels"], mining=name, **options) for name in names)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(a["embeddings"]), loss(a["embeddings"]))


def test_without_a_bound_it_says_why():
    a = case(4, None, 3, 2)
    with pytest.raises(ValueError, match="max_positives"):
        triplet_loss(**a, mining="focal", impl="triton")
