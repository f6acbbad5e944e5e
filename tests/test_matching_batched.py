"""info_nce within each of several batches, [B, N, D]: one op each way, as good as its problems one by one."""

import pytest
import torch
import torch.nn.functional as F
from similarity_cases import assert_as_good_as
from torch import Tensor

from kdfast._core import impls
from kdfast._ops.similarity.losses import matching
from kdfast.functional import info_nce

pytestmark = pytest.mark.skipif(impls.table()["matching_loss"]["cpu"] is not None, reason="no compiled kernels")

SIZES = pytest.mark.parametrize("size", [(1, 3, 7), (3, 1, 1), (4, 65, 33), (5, 64, 128)], ids=lambda s: "x".join(map(str, s)))
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def problem(*size: int, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, noise = (F.normalize(torch.randn(size, dtype=torch.float64), dim=-1) for _ in range(2))
    return x.to(dtype), F.normalize(x + noise, dim=-1).to(dtype), torch.tensor(0.2)


def formula(x, y, temperature, labels=None, smoothing=0.0) -> Tensor:
    n = x.shape[-2]
    z = ((x @ y.mT) / temperature.to(x.dtype)).to(temperature.dtype)
    if labels is not None:
        z = z.masked_fill((labels[..., :, None] == labels[..., None, :]) & ~torch.eye(n, dtype=torch.bool), -torch.inf)
    own = torch.arange(n).repeat(z[..., 0, 0].numel())
    return F.cross_entropy(z.flatten(0, -2), own, reduction="none", label_smoothing=smoothing).view(x.shape[:-1])


def gradients(loss, inputs, g=None, dtype=None) -> list[Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [t.detach().to(dtype or t.dtype if t.dim() else wide).requires_grad_() for t in inputs]
    losses = loss(*leaves)
    return [losses, *torch.autograd.grad(losses, leaves, None if g is None else g.to(losses.dtype))]


@pytest.fixture
def ways(monkeypatch) -> list[tuple]:
    """The shapes that reach the fused loss."""
    seen, run = [], matching.MatchingLoss.run
    monkeypatch.setattr(matching.MatchingLoss, "run", lambda call, x, *rest: seen.append(tuple(x.shape)) or run(call, x, *rest))
    return seen


@SIZES
@REDUCTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_as_accurate_as_the_formula(isa, ways, size, reduction, dtype):
    inputs = problem(*size, dtype=dtype)
    reduce = {"mean": torch.mean, "sum": torch.sum, "none": lambda losses: losses}[reduction]
    g = torch.randn(size[:2]) if reduction == "none" else None
    ours = gradients(lambda x, y, t: info_nce(x, y, temperature=t, reduction=reduction), inputs, g)
    assert ways == ([] if dtype == torch.bfloat16 and reduction == "none" else [size])
    definition = lambda *leaves: reduce(formula(*leaves))
    for x, naive, truth in zip(ours, gradients(definition, inputs, g, dtype), gradients(definition, inputs, g, torch.float64), strict=True):
        assert_as_good_as(x, naive, truth)


@REDUCTIONS
@pytest.mark.parametrize("options", [{}, {"labels": True}, {"smoothing": 0.2}, {"normalize": True}, {"weight": True}], ids=str)
def test_each_problem_is_by_itself(ways, options, reduction):
    x, y, _ = problem(3, 20, 16)
    labels = torch.arange(60).view(3, 20) // 3 % 5 if "labels" in options else None
    weight = torch.rand(3, 20) if "weight" in options else None
    others = {"label_smoothing": options.get("smoothing", 0.0), "normalize": "normalize" in options}
    g = torch.randn(3, 20)

    def whole(x, y):
        return info_nce(2 * x, y, query_labels=labels, weight=weight, reduction=reduction, **others)

    def apart(x, y):
        rows = [info_nce(2 * x[i], y[i], query_labels=None if labels is None else labels[i], reduction="none", **others) for i in range(3)]
        losses = torch.stack(rows) if weight is None else torch.stack(rows) * weight
        return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / (60 if weight is None else weight.sum())}[reduction]

    upstream = g if reduction == "none" else None
    ours = gradients(whole, (x, y), upstream)
    assert (ways == [(3, 20, 16)]) == (weight is None)
    for a, b in zip(ours, gradients(apart, (x, y), upstream), strict=True):
        torch.testing.assert_close(a, b)


@REDUCTIONS
def test_further_dimensions_and_inputs_that_are_not_contiguous(ways, reduction):
    x, y, _ = problem(6, 10, 9)
    loss = lambda x, y: info_nce(x, y, temperature=0.3, reduction=reduction)
    spread = lambda v: torch.stack([v, torch.full_like(v, torch.nan)], -1)[..., 0].view(2, 3, 10, 9)
    expected = gradients(loss, (x, y), torch.ones(6, 10) if reduction == "none" else None)
    leaves = [spread(v).requires_grad_() for v in (x, y)]
    losses = loss(*leaves)
    assert losses.shape == ((2, 3, 10) if reduction == "none" else ()) and ways == [(6, 10, 9)] * 2
    for a, b in zip((losses, *torch.autograd.grad(losses.sum(), leaves)), expected, strict=True):
        assert torch.equal(a.reshape(b.shape), b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_and_a_graph_kept(reduction):
    inputs = problem(3, 6, 9)
    directions = [torch.randn_like(t) for t in inputs]

    def second(loss, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        value = loss(*leaves)
        once = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
        first = torch.autograd.grad(value.sum(), leaves, create_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(once, first, strict=True))
        along = sum((x * v.to(dtype)).sum() for x, v in zip(first, directions, strict=True))
        return (*first, *torch.autograd.grad(along, leaves))

    ours = second(lambda x, y, t: info_nce(x, y, temperature=t, reduction=reduction), torch.float32)
    definition = lambda *leaves: formula(*leaves).mean() if reduction == "mean" else formula(*leaves)
    for x, y in zip(ours, second(definition, torch.float64), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("of", ["x", "y", "labels"])
def test_what_was_changed_in_place_gives_no_wrong_gradients(of, reduction):
    x, y, _ = problem(2, 6, 5)
    given = {"x": x.requires_grad_() * 1, "y": y.requires_grad_() * 1, "labels": torch.arange(12).view(2, 6) % 4}
    loss = info_nce(given["x"], given["y"], query_labels=given["labels"], reduction=reduction).sum()
    given[of].detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_same_bits_whatever_the_number_of_threads():
    """Each problem is one thread's."""
    runs = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        inputs = problem(7, 130, 130)
        runs.append(
            [t for r in ("mean", "none") for t in gradients(lambda x, y, t, r=r: info_nce(x, y, temperature=t, reduction=r).mean(), inputs)]
        )
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_ops_are_described_to_the_compiler():
    x, y, _ = problem(2, 6, 9)
    for scale, labels, smoothing in ((torch.tensor(8.0), None, 0.0), (None, torch.arange(12).view(2, 6) % 3, 0.0), (None, None, 0.1)):
        for mean in (True, False):
            for keep in ((True, True), (True, False), (False, False)):
                given = (x, y, scale, None, labels, mean, *keep, 0, True, smoothing)
                torch.library.opcheck(torch.ops.kdfast.matching_loss, given)
            if not mean:
                _, statistics, *kept = torch.ops.kdfast.matching_loss(x, y, scale, None, labels, False, True, True, 0, True, smoothing)
                wanted = (True, True, scale is not None, False)
                given = (torch.rand(2, 6), statistics, x, y, scale, None, labels, *wanted, 0, True, smoothing, 1.0, *kept)
                torch.library.opcheck(torch.ops.kdfast.matching_loss_grad, given)


def test_bad_tensors_are_refused():
    x, op = torch.ones(2, 6, 9), torch.ops.kdfast.matching_loss
    for given, message in (
        ((x[0, 0], x[0]), "x must have 2 or 3 dimensions"),
        ((x, x[:1]), "y has size 1"),
        ((x, None), "as many rows of one view"),
        ((x[:0], x[:0]), "x must have an entry"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*given, None, None, None, True, False, False, 0)
    for options in ({"row_weights": torch.ones(6)}, {"sum": True}, {"include": False}):
        with pytest.raises(RuntimeError, match="batch dimension takes no row_weights"):
            op(x, x, None, None, None, True, False, False, 0, True, **options)
    _, statistics, *_ = op(x, x, None, None, None, True, False, False, 0, True)
    with pytest.raises(RuntimeError, match="needs kept_x and table"):
        torch.ops.kdfast.matching_loss_grad(torch.ones(()), statistics, x, x, None, None, None, True, True, False, False, 0, True)
