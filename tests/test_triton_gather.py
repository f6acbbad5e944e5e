"""The Triton gather kernels against float64 formulas: on a GPU, or where there is none under Triton's interpreter,
in a process that has TRITON_INTERPRET=1 from its start (make test)."""

import math

import pytest
import torch

from kdfast._core import triton_runtime
from kdfast._ops.gather import statistics, triton
from kdfast.functional import sampled_info_nce, sampled_nce
from kdfast.ops import gather_similarity

if triton_runtime.missing() is not None:
    pytest.skip(f"{triton_runtime.missing()}, and TRITON_INTERPRET is not 1", allow_module_level=True)
DEVICE = "cpu" if triton_runtime.INTERPRETED else "cuda"
ULP = 2.0**-23


def moved(x):
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def on_cpu(function, *args):
    out = function(*map(moved, args))
    return tuple(x.cpu() for x in out) if isinstance(out, tuple) else out.cpu()


def problem(n, k, m, d, dtype=torch.float32):
    """query [N, D], weights [N, K], bank [M, D], index [N, K] with a row drawn twice."""
    index = torch.randint(m, (n, k))
    index[:, -1:] = index[:, :1]
    return torch.randn(n, d), torch.randn(n, k), torch.randn(m, d).to(dtype), index


def check(query, weights, bank, index):
    """Error at most 4 units in the last place of the sum of the terms' magnitudes, whatever their order."""
    rows = bank.double()[index]
    for got, product in (
        (on_cpu(triton.scores, query, bank, index), query.double()[:, None] * rows),
        (on_cpu(triton.pool, weights, bank, index), (weights.double()[..., None] * rows).transpose(1, 2)),
    ):
        wanted, magnitude = product.sum(-1), product.abs().sum(-1)
        assert got.dtype == torch.float32
        assert ((got.double() - wanted).abs() <= 4 * ULP * magnitude + 1e-30).all()


def check_statistic(query, bank, index, offset, shift):
    z = torch.einsum("nd,nkd->nk", query.double(), bank.double()[index])
    wanted, weights = statistics.of_scores(z, None if offset is None else offset.double(), None if shift is None else shift.double())
    wanted_pooled = torch.einsum("nk,nkd->nd", weights, bank.double()[index])
    value, pooled = on_cpu(triton.statistic, query, bank, index, offset, shift, True)
    torch.testing.assert_close(value.double(), wanted, rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(pooled.double(), wanted_pooled, rtol=2e-5, atol=2e-5 * float(wanted_pooled.abs().max()))
    alone, none = on_cpu(triton.statistic, query, bank, index, offset, shift, False)
    assert torch.equal(alone, value) and none.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 3), (2, 600, 40, 17), (3, 40, 50, 300)], ids=str)
def test_ragged_sizes(shape, dtype):
    check(*problem(*shape, dtype))


def test_bank_rows_apart():
    query, weights, bank, index = problem(3, 40, 50, 21)
    wide = torch.full((50, 28), math.nan)
    wide[:, 3:24] = bank
    check(query, weights, wide[:, 3:24], index)
    check(query, weights, bank[:1].expand(50, -1), index)


def test_what_is_not_finite_and_what_is_not_in_the_bank():
    query, weights, bank, index = problem(3, 20, 30, 37)
    query, weights, bank = query.abs(), weights.abs(), bank.abs()
    index[index < 3] = 3
    index[0, 3], index[1, 4], index[2, 5] = 0, 1, 30
    bank[0, 5], bank[1, 5], bank[2] = math.inf, math.nan, math.nan  # row 2 is not drawn
    z, o = on_cpu(triton.scores, query, bank, index), on_cpu(triton.pool, weights, bank, index)
    assert z[0, 3] == math.inf and z[1, 4].isnan() and z[2, 5].isnan() and z.isfinite().sum() == z.numel() - 3
    assert o[0, 5] == math.inf and o[1, 5].isnan() and o[2].isnan().all() and o.isfinite().sum() == o.numel() - 2 - 37


@pytest.mark.parametrize("kind", ["log-sum-exp", "noise contrast", "noise contrast, a shift for each row"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 63, 90, 63), (3, 700, 50, 5), (2, 9, 20, 600)], ids=str)
def test_statistics(kind, shape):
    query, offset, bank, index = problem(*shape)
    query /= math.sqrt(shape[3])
    offset[torch.rand(offset.shape) < 0.1] = -math.inf
    offset[0] = -math.inf  # a row with nothing left
    shift = {"log-sum-exp": None, "noise contrast": torch.tensor(0.7)}.get(kind, torch.randn(shape[0]))
    check_statistic(query, bank, index, None, shift)
    if shift is not None:
        offset[:, 0] = 0  # without its positive a row's loss is infinite
    check_statistic(query, bank, index, offset, shift)


def test_statistics_of_extreme_and_of_small_terms():
    """Nothing overflows, and log(1 + e) keeps its digits where e is far below 1."""
    _, _, bank, index = problem(4, 50, 40, 1)
    query = torch.tensor([[1e4], [-1e4], [100.0], [1e-3]])
    for shift in (None, torch.tensor(5.0)):
        check_statistic(query, bank, index, None, shift)
    query, _, bank, index = problem(3, 50, 40, 8)
    index[:, 0] = 7
    bank[7] = 1e3  # the positive counts for nothing
    query = query.abs() * 0.01
    value = on_cpu(triton.statistic, query, bank, index, None, torch.tensor(9.0), False)[0]
    z = torch.einsum("nd,nkd->nk", query.double(), bank.double()[index])
    torch.testing.assert_close(value.double(), statistics.of_scores(z, None, torch.tensor(9.0).double())[0], rtol=2e-6, atol=0)


def test_statistics_of_nan_and_of_rows_left_out():
    query, offset, bank, index = problem(3, 90, 30, 20)
    index[index == 4] = 3
    index[1, 10], offset[1, 10] = 4, -math.inf
    for bad in (math.nan, math.inf):
        bank[4] = bad
        value, pooled = on_cpu(triton.statistic, query, bank, index, offset, None, True)
        assert value.isfinite().all() and pooled.isfinite().all()
        value, pooled = on_cpu(triton.statistic, query, bank, index, None, None, True)
        assert value.isfinite()[[0, 2]].all() and pooled[[0, 2]].isfinite().all()
        if bad != bad:
            assert value[1].isnan() and pooled[1].isnan().all()


def test_samples_split_over_programs(monkeypatch):
    query, weights, bank, index = problem(2, 900, 40, 20)
    monkeypatch.setattr(triton_runtime, "fill", lambda *_: 3)
    check(query, weights, bank, index)
    for shift in (None, torch.tensor(0.3)):
        check_statistic(query, bank, index, None, shift)


@pytest.mark.parametrize("bank_grad", [False, True])
def test_losses_and_gradients_of_two_orders_are_the_portable_ones(bank_grad):
    query, _, bank, index = problem(4, 30, 25, 10)
    found = []
    for impl in ("triton", "torch"):
        q, b = moved(query).requires_grad_(), moved(bank).requires_grad_(bank_grad)
        leaves = (q, b) if bank_grad else (q,)
        loss = sampled_info_nce(q, q.detach() * 2, b, moved(index), temperature=0.5, impl=impl)
        loss = loss + sampled_nce(q, b, moved(index), temperature=0.5, num_data=25, normalizer=50.0, impl=impl)[0]
        loss = loss + gather_similarity(q, b, moved(index), scale=0.7, impl=impl).square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        found.append((loss, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6 * float(want.abs().max()))


def test_opcheck_compile_and_transforms():
    query, weights, bank, index = map(moved, problem(3, 12, 20, 6))
    ops = torch.ops.kdfast_triton
    torch.library.opcheck(ops.gather_similarity.default, (query, bank, index))
    torch.library.opcheck(ops.gather_weighted_sum.default, (weights, bank, index))
    torch.library.opcheck(ops.gather_statistic.default, (query, bank, index, weights, None, True))

    def loss(q):
        return gather_similarity(q, bank, index, impl="triton").square().sum()

    torch.testing.assert_close(torch.compile(loss, backend="aot_eager", fullgraph=True)(query), loss(query))
    torch.testing.assert_close(torch.func.grad(loss)(query), torch.autograd.functional.jacobian(loss, query))
    batched = torch.func.vmap(loss)(torch.stack([query, 2 * query]))
    torch.testing.assert_close(batched, torch.stack([loss(query), loss(2 * query)]))
