"""The Triton kernels of losses over all pairs and all triplets against the float64 formulas: on a GPU, or where there is none under
Triton's interpreter, in a process that has TRITON_INTERPRET=1 from its start (make test)."""

import pytest
import torch
from similarity_kernel_cases import assert_accurate

from kdfast._core import triton_runtime
from kdfast._ops.triplet import mining
from kdfast._ops.triplet.triton import dense as triton_dense
from kdfast.functional import angular_loss, contrastive_loss, margin_loss, multi_similarity_loss, triplet_loss

if triton_runtime.missing() is not None:
    pytest.skip(f"{triton_runtime.missing()}, and TRITON_INTERPRET is not 1", allow_module_level=True)
DEVICE = "cpu" if triton_runtime.INTERPRETED else "cuda"
PAIR_LOSSES = (contrastive_loss, margin_loss, multi_similarity_loss, angular_loss)
BANK = pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])


def case(n, m, width, classes, *, grid=False, valid=0) -> dict:
    """m None: in batch. On a grid distances are exact, so that every implementation counts the same triplets."""

    def rows(count):
        return torch.randint(-2, 3, (count, width)).float() if grid else torch.randn(count, width)

    a = {"embeddings": rows(n), "labels": torch.randint(0, classes, (n,))}
    if m is not None:
        own = torch.where(torch.rand(n) < 0.5, torch.randint(0, m, (n,)), -1)
        a |= {"ref": rows(m), "ref_labels": torch.randint(0, classes, (m,)), "own_index": own, "ref_valid": m - valid}
    return a


def run(loss, a: dict, impl: str, dtype=torch.float32, device=DEVICE) -> list[torch.Tensor]:
    """The loss and its gradients in every floating tensor."""
    given = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in a.items()}
    floats = {name: t for name, t in given.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in floats.items()}
    value = loss(**{**given, **leaves}, impl=impl)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=device).view(value.shape)
    return [t.detach().cpu() for t in (value, *torch.autograd.grad(value, tuple(leaves.values()), upstream))]


def check(loss, a: dict, extra: float = 0.0) -> None:
    runs = run(loss, a, "triton"), run(loss, a, "torch", torch.float64, "cpu"), run(loss, a, "torch", device="cpu")
    for got, want, naive in zip(*runs, strict=True):
        assert_accurate(got, want, naive, extra)


OPTIONS = {
    contrastive_loss: [
        {"metric": "euclidean", "reduction": "mean_nonzero"},
        {"metric": "sqeuclidean", "pos_margin": 0.1, "normalize": False},
    ],
    margin_loss: [{"metric": "cosine", "reduction": "none"}, {"beta": torch.linspace(0.2, 1.2, 5), "reduction": "mean"}],
    angular_loss: [{"reduction": "none"}, {"alpha": 20.0, "max_positives": 2}],
    multi_similarity_loss: [{"reduction": "none"}, {"epsilon": None, "base": 0.2, "alpha": 5.0, "beta": 8.0, "reduction": "sum"}],
}


@BANK
@pytest.mark.parametrize("loss", PAIR_LOSSES, ids=lambda f: f.__name__)
def test_losses_of_pairs(loss, bank):
    for options in OPTIONS[loss]:
        check(loss, case(19, 37 if bank else None, 18, 5, valid=5) | options, extra=2e-6)


@BANK
@pytest.mark.parametrize("name", mining.SETS)
@pytest.mark.parametrize("direction", ["cluster", "confuse"])
def test_losses_of_triplets(name, direction, bank):
    """With ties: a third of the negatives have a copy in another class, at the end of a semi-hard interval."""
    a = case(19, 37 if bank else None, 5, 6, grid=True, valid=5)
    how = {"mining": name, "direction": direction, "margin": 1.25, "epsilon": 0.75, "normalize": False}
    check(triplet_loss, a | how | {"reduction": "none", "metric": "euclidean" if bank else "sqeuclidean"}, extra=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 33, 2), (33, 3, 1)], ids=str)
def test_ragged_sizes(shape):
    n, m, width = shape
    for a in (case(n, m, width, 3, grid=True), case(n, None, width, 3, grid=True)):
        check(triplet_loss, a | {"mining": "batch_all", "margin": 1.25, "normalize": False, "reduction": "mean"}, extra=1e-6)


def test_rows_in_half_precision():
    """Rows widened: what the losses of the same rows in float32 are, and gradients rounded."""
    a = case(9, 17, 9, 3)
    a |= {name: a[name].bfloat16() for name in ("embeddings", "ref")}
    for loss, how in ((contrastive_loss, {}), (triplet_loss, {"mining": "batch_all"})):
        got, want = run(loss, a | how, "triton", torch.bfloat16), run(loss, a | how, "triton")
        torch.testing.assert_close(got[0], want[0])
        for g, w in zip(got[1:], want[1:], strict=True):
            assert g.dtype == torch.bfloat16
            torch.testing.assert_close(g, w.bfloat16())


@pytest.mark.parametrize("name", mining.SETS)
def test_more_positives_than_a_table_holds(name, monkeypatch):
    monkeypatch.setattr(triton_dense, "TABLE", 16 * 5)
    how = {"mining": name, "margin": 1.25, "epsilon": 0.75, "normalize": False, "max_positives": 8}
    check(triplet_loss, case(16, 20, 6, 2, grid=True) | how | {"reduction": "mean"}, extra=1e-6)


def test_columns_split_over_programs_meet(monkeypatch):
    a = case(3, 70, 6, 4, grid=True) | {"mining": "semi_hard", "margin": 1.25, "normalize": False, "reduction": "none"}
    monkeypatch.setattr(triton_runtime, "splits", lambda *_: 3)
    check(triplet_loss, a, extra=1e-6)


def test_rows_wider_than_a_chunk():
    check(contrastive_loss, case(20, None, 150, 4), extra=2e-6)


def test_tiles_without_a_gradient_are_skipped():
    x = 100 * torch.eye(2, 4).repeat_interleave(32, 0) + torch.randint(-2, 3, (64, 4))
    labels = torch.arange(64) // 4
    a = {"embeddings": x, "labels": labels, "mining": "batch_all", "margin": 1.25, "normalize": False, "reduction": "sum"}
    check(triplet_loss, a, extra=1e-6)
    first = (labels * 4).to(DEVICE)
    given = x.to(DEVICE), None, first, first + 4, torch.arange(64, device=DEVICE), torch.tensor(64, device=DEVICE)
    if triton_runtime.INTERPRETED:  # tiles of a GPU are larger than this
        assert 0 < triton_dense.triplet_hinges(*given, 0, 3, 0, 1.0, 1.25, 0.0)[-1].float().mean() < 0.9


@pytest.mark.parametrize("loss", (*PAIR_LOSSES, triplet_loss), ids=lambda f: f.__name__)
def test_nan_goes_where_the_formula_takes_it(loss):
    a = case(12, 20, 4, 3) | {"reduction": "none"} | ({"mining": "batch_all"} if loss is triplet_loss else {})
    for name, row in (("ref", 7), ("embeddings", 5)):
        poisoned = a | {name: a[name].index_fill(0, torch.tensor([row]), torch.nan)}
        got, want = (run(loss, poisoned, impl)[0].isnan() for impl in ("triton", "torch"))
        assert got.equal(want) and got.any()


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0]], ids=["no_negative", "no_positive", "one"])
def test_one_kind_of_pair_alone(labels):
    a = {"embeddings": torch.randn(len(labels), 3), "labels": torch.tensor(labels)}
    for loss, how in ((contrastive_loss, {}), (multi_similarity_loss, {"epsilon": None}), (triplet_loss, {"mining": "semi_hard"})):
        check(loss, a | how)


def test_second_derivative():
    a = case(12, None, 4, 3)
    found = []
    for impl in ("triton", "torch"):
        x = a["embeddings"].to(DEVICE).requires_grad_()
        loss = triplet_loss(x, a["labels"].to(DEVICE), mining="batch_all", margin=0.5, impl=impl)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_opcheck_and_compile():
    labels = (torch.arange(12, device=DEVICE) // 3).long()
    x, own = torch.randn(12, 4, device=DEVICE), torch.arange(12, device=DEVICE)
    classes = x, None, labels * 3, labels * 3 + 3, own, torch.tensor(12, device=DEVICE)
    ops = torch.ops.kdfast_triton
    for name, rule in (
        ("pair_hinges", (x[:, :2], 0)),
        ("multi_similarity", (2.0, 50.0, 0.5, 0.1)),
        ("triplet_hinges", (0, 2, 1, 1.0, 0.2, 0.1)),
    ):
        torch.library.opcheck(getattr(ops, name).default, (*classes, *rule))
        sums, _, *kept = getattr(ops, name)(*classes, *rule)
        torch.library.opcheck(getattr(ops, name + "_grad").default, (torch.ones_like(sums), *kept, *classes, *rule, True, False))

    def loss(x):
        return triplet_loss(x, labels, mining="batch_all", max_positives=2, impl="triton") + contrastive_loss(x, labels, impl="triton")

    torch.testing.assert_close(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), loss(x))


def test_what_it_cannot_serve_says_why():
    x, labels = torch.randn(4, 3, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="plain hinges"):
        triplet_loss(x, labels, mining="batch_all", soft=True, impl="triton")
    with pytest.raises(ValueError, match="float64"):
        contrastive_loss(x.double(), labels, impl="triton")
