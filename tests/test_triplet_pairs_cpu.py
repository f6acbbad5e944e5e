"""The C++ kernels of losses over pairs against the portable formulas in float64, under every instruction set of this machine."""

import math

import pytest
import torch
from similarity_kernel_cases import assert_accurate

from kdfast._core import extension
from kdfast._ops.triplet import dense  # noqa: F401  (fakes)
from kdfast.functional import angular_loss, contrastive_loss, margin_loss, multi_similarity_loss

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))
OPS = torch.ops.kdfast
LOSSES = (multi_similarity_loss, margin_loss, contrastive_loss, angular_loss)
METRICS = ("euclidean", "sqeuclidean", "cosine")


def case(n, m, width, classes, valid=0) -> dict:
    """m None: in batch."""
    a = {"x": torch.randn(n, width), "labels": torch.randint(0, classes, (n,))}
    if m is not None:
        a |= {"ref": torch.randn(m, width), "ref_labels": torch.randint(0, classes, (m,)), "ref_valid": m - valid}
        a |= {"own_index": torch.where(torch.rand(n) < 0.5, torch.randint(0, m, (n,)), -1)}
    return a


def run(loss, a: dict, impl: str, dtype=torch.float32, **how) -> tuple[torch.Tensor, ...]:
    """The loss and its gradients in x, ref and beta where that is a tensor."""
    floats = {name: t for name, t in (a | how).items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in floats.items()}
    given = {**a, **how, **leaves}
    value = loss(given.pop("x"), given.pop("labels"), **given, impl=impl)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return value.detach(), *torch.autograd.grad(value, tuple(leaves.values()), upstream)


def check(loss, a: dict, extra: float = 0.0, **how) -> None:
    runs = run(loss, a, "cpu", **how), run(loss, a, "torch", torch.float64, **how), run(loss, a, "torch", **how)
    for got, want, naive in zip(*runs, strict=True):
        assert_accurate(got, want, naive, extra)


def grid(loss):
    """Options of a loss, each reduction among them."""
    if loss is multi_similarity_loss:
        options = [{"epsilon": 0.1}, {"epsilon": None, "base": 0.2, "alpha": 5.0}, {"epsilon": 0.0, "beta": 8.0}]
        return [o | {"reduction": r} for o, r in zip(options, ("mean", "sum", "none"), strict=True)]
    if loss is angular_loss:
        return [{"reduction": "mean"}, {"reduction": "none", "alpha": 20.0}, {"reduction": "sum", "max_positives": 2}]
    options = [{"metric": m, "reduction": r} for m, r in zip(METRICS, ("mean_nonzero", "none", "mean"), strict=True)]
    if loss is margin_loss:
        return [o | {"beta": b} for o, b in zip(options, (1.2, torch.tensor(1.1), torch.linspace(0.2, 1.2, 9)), strict=True)]
    return [o | {"pos_margin": 0.1, "neg_margin": 1.3} for o in options]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
def test_every_loss(isa, loss, bank):
    a = case(90, 150 if bank else None, 9, 9, valid=20)
    for how in grid(loss):
        check(loss, a, **how)


# a lone row; beside a vector of lanes and a group of slots; beside a panel and a chunk of rows; several blocks of columns
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 15, 2), (17, 65, 3), (65, 63, 65), (257, 300, 130)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_ragged_sizes(isa, loss, shape):
    n, m, width = shape
    for a in (case(n, m, width, 6), case(n, None, width, 6)):
        check(loss, a, extra=1e-5 if width < 4 else 0.0, reduction="sum")  # few directions: 1 / d of close rows magnifies their rounding


def test_similarities_far_apart(isa):
    """Logits of thousands: only the largest counts; and a sum that is small beside the 1."""
    a = case(40, 70, 9, 5)
    check(multi_similarity_loss, a | {"x": 30 * a["x"]}, normalize=False, epsilon=None)
    check(multi_similarity_loss, a, base=0.95, beta=200.0, reduction="none")
    tiny = run(multi_similarity_loss, a, "cpu", base=-2.0, alpha=50.0, beta=1e-3)[0]
    assert tiny.isfinite()
    row = {"x": torch.eye(2), "labels": torch.tensor([0, 1]), "ref": torch.eye(2), "ref_labels": torch.tensor([0, 1])}
    got = run(multi_similarity_loss, row, "cpu", epsilon=None, reduction="none")[0]  # log1p(e^-1) / 2 + log1p(e^-25) / 50
    torch.testing.assert_close(got.double(), torch.full((2,), math.log1p(math.exp(-1)) / 2 + math.log1p(math.exp(-25)) / 50).double())


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_nan_goes_where_the_formula_takes_it(isa, loss):
    a = case(40, 70, 9, 5)
    for name, at in (("x", 4), ("ref", 11)):
        poisoned = a | {name: a[name].clone()}
        poisoned[name][at, 2] = math.nan
        got, want = (run(loss, poisoned, impl, reduction="none")[0] for impl in ("cpu", "torch"))
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0]], ids=["no_negative", "no_positive", "one"])
def test_one_kind_of_pair_alone(loss, labels):
    check(loss, {"x": torch.randn(len(labels), 3), "labels": torch.tensor(labels)}, reduction="none")


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_tiles_without_a_gradient_are_skipped(loss):
    n = 800
    x = torch.eye(8).repeat(1, 100).view(n, 8)[torch.arange(n).sort().indices] + 0.01 * torch.randn(n, 8)
    check(loss, {"x": x, "labels": torch.arange(n) // 5}, reduction="sum")


@pytest.mark.parametrize("bank", [False, True], ids=["in_batch", "bank"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_second_derivative_is_that_of_the_portable_formula(loss, bank):
    a = case(12, 20 if bank else None, 5, 3)

    def twice(impl):
        x = a["x"].clone().requires_grad_()
        leaves = [x]
        more = {k: a[k] for k in ("ref", "ref_labels", "own_index") if bank}
        if loss is margin_loss:
            leaves.append(torch.tensor(1.1, requires_grad=True))
            more["beta"] = leaves[1]
        first = torch.autograd.grad(loss(x, a["labels"], **more, impl=impl), leaves, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True, materialize_grads=True)

    for got, want in zip(twice("cpu"), twice("torch"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_threads_agree_and_repeat(threads, loss):
    a = case(400, 500, 30, 40)
    check(loss, a)
    assert all(torch.equal(x, y) for x, y in zip(run(loss, a, "cpu"), run(loss, a, "cpu"), strict=True))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_compiles_whole(loss):
    x, labels = torch.randn(30, 4, requires_grad=True), torch.arange(30) % 7
    torch._dynamo.reset()
    (want,) = torch.autograd.grad(loss(x, labels, impl="cpu"), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, labels, impl="cpu"), x)
    torch.testing.assert_close(got, want)


def test_rows_too_many_to_gather_are_refused():
    x, labels = torch.randn(2**13, 16), torch.arange(2**13) // 2**10
    with pytest.raises(ValueError, match="it would gather the rows of all positives"):
        angular_loss(x, labels, impl="cpu")


def test_opcheck():
    first, last = torch.tensor([0, 10]).repeat_interleave(6), torch.tensor([10, 20]).repeat_interleave(6)
    a = torch.randn(12, 5), torch.randn(20, 5), first, last, torch.full((12,), -1), torch.tensor(20)
    levels, wants = torch.rand(12, 2), ((True, True), (True, False), (False, True))
    torch.library.opcheck(OPS.pair_hinges.default, (*a, levels, 0))
    *_, tiles = OPS.pair_hinges(*a, levels, 0)
    torch.library.opcheck(OPS.multi_similarity.default, (*a, 2.0, 50.0, 0.5, 0.1))
    _, _, *kept = OPS.multi_similarity(*a, 2.0, 50.0, 0.5, 0.1)
    for want in wants:
        torch.library.opcheck(OPS.pair_hinges_grad.default, (torch.rand(12, 2), tiles, *a, levels, 0, *want))
        torch.library.opcheck(OPS.multi_similarity_grad.default, (torch.rand(12, 1), *kept, *a, 2.0, 50.0, 0.5, 0.1, *want))


def test_bad_arguments():
    first, last = torch.tensor([0, 10]).repeat_interleave(6), torch.tensor([10, 20]).repeat_interleave(6)
    a = torch.randn(12, 5), torch.randn(20, 5), first, last, torch.full((12,), -1), torch.tensor(20)
    with pytest.raises(RuntimeError, match="levels has size"):
        OPS.pair_hinges(*a, torch.rand(12, 3), 0)
    with pytest.raises(RuntimeError, match="alpha and beta must be > 0"):
        OPS.multi_similarity(*a, 0.0, 50.0, 0.5, 0.1)
    with pytest.raises(RuntimeError, match="tiles has size"):
        OPS.pair_hinges_grad(torch.rand(12, 2), torch.zeros(2, 1, dtype=torch.uint8), *a, torch.rand(12, 2), 0, True, True)
