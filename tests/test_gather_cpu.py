"""The C++ gather kernels against float64 formulas, under every instruction set of this machine."""

import math

import pytest
import torch
from torch import Tensor

from kdfast._core import extension
from kdfast._ops.gather import cpu, statistics

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
ULP = 2.0**-23


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def problem(n: int, k: int, m: int, d: int, dtype=torch.float32) -> tuple[Tensor, ...]:
    """query [N, D], weights [N, K], bank [M, D], index [N, K] with a row drawn twice."""
    index = torch.randint(m, (n, k))
    index[:, -1:] = index[:, :1]
    return torch.randn(n, d), torch.randn(n, k), torch.randn(m, d).to(dtype), index


def check(query: Tensor, weights: Tensor, bank: Tensor, index: Tensor) -> None:
    """Error at most 4 units in the last place of the sum of the terms' magnitudes, whatever their order."""
    rows = bank.double()[index]
    for got, product in (
        (cpu.scores(query, bank, index), query.double()[:, None] * rows),
        (cpu.pool(weights, bank, index), (weights.double()[..., None] * rows).transpose(1, 2)),
    ):
        assert got.dtype == torch.float32
        wanted, magnitude = product.sum(-1), product.abs().sum(-1)
        assert ((got.double() - wanted).abs() <= 4 * ULP * magnitude + 1e-30).all()


# Widths beside a vector (15, 17), a panel of vectors (63, 65, 129) and two panels (257); samples beside a vector and a run.
SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 7, 3),
    (2, 17, 40, 15),
    (2, 33, 40, 17),
    (5, 63, 90, 63),
    (3, 129, 50, 65),
    (2, 257, 60, 128),
    (2, 20, 9, 129),
]


@DTYPES
@pytest.mark.parametrize("shape", [*SHAPES, (3, 16, 70, 257), (1, 3, 5, 520)], ids=lambda s: "x".join(map(str, s)))
def test_ragged_sizes(isa, dtype, shape):
    check(*problem(*shape, dtype))


# Where rows are drawn so often, and are so long, that blocks of the bank are multiplied: widths beside a vector, a panel and a chunk of
# steps; 200 rows exceed a tile; 520 bank rows are several blocks.
BLOCKED = [(13, 600, 90, 270), (7, 900, 64, 319), (5, 900, 65, 321), (6, 900, 30, 513), (3, 1500, 70, 300), (6, 2500, 520, 300)]


@DTYPES
@pytest.mark.parametrize("shape", [*BLOCKED, (200, 100, 20, 300)], ids=lambda s: "x".join(map(str, s)))
def test_rows_drawn_many_times(isa, dtype, shape):
    check(*problem(*shape, dtype))


@pytest.mark.parametrize("shape", [(36, 60_000, 40, 96), (1100, 120, 30, 272)], ids=["samples", "rows"])
def test_more_than_is_ordered_at_once(shape):
    query, weights, bank, index = problem(*shape)
    z, o = cpu.scores(query, bank, index), cpu.pool(weights, bank, index)
    torch.testing.assert_close(z, (query @ bank.T).gather(1, index), rtol=1e-4, atol=1e-4)
    dense = torch.zeros(shape[0], shape[2]).scatter_add_(1, index, weights)
    torch.testing.assert_close(o, dense @ bank, rtol=1e-4, atol=1e-2)
    value, pooled = cpu.statistic(query * 0.1, bank, index, None, torch.tensor(0.5), True)
    wanted, derivative = statistics.of_scores(z * 0.1, None, torch.tensor(0.5))
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(pooled, cpu.pool(derivative, bank, index), rtol=1e-3, atol=1e-2)


def test_one_row_drawn_every_time(isa):
    """Its weights are added up in runs: 20,000 equal ones, one after another, would be off by far more."""
    _, _, bank, index = problem(2, 20_000, 80, 320)
    index[:] = 3
    pooled = cpu.pool(torch.full((2, 20_000), 0.1), bank, index)
    torch.testing.assert_close(pooled.double(), (20_000 * torch.tensor(0.1).double() * bank[3].double()).expand(2, -1), rtol=5e-6, atol=0)


@DTYPES
def test_rows_not_drawn_may_hold_anything(isa, dtype):
    query, weights, bank, index = problem(5, 900, 70, 320, dtype)
    index[index < 3] = 3
    expected = cpu.scores(query, bank, index), cpu.pool(weights, bank, index)
    bank[0], bank[1], bank[2, 7] = math.nan, math.inf, -math.inf
    assert torch.equal(cpu.scores(query, bank, index), expected[0])
    assert torch.equal(cpu.pool(weights, bank, index), expected[1])


@pytest.mark.parametrize(("width", "samples"), [(5, 40), (21, 40), (128, 40), (130, 40), (60, 1000)])
def test_bank_rows_apart(isa, width, samples):
    query, weights, bank, index = problem(3, samples, 50, width)
    wide = torch.full((50, width + 7), math.nan)
    wide[:, 3 : 3 + width] = bank
    check(query, weights, wide[:, 3 : 3 + width], index)
    check(query, weights, bank[:1].expand(50, -1), index)


@DTYPES
@pytest.mark.parametrize(("width", "samples"), [(3, 20), (16, 20), (37, 20), (320, 900)])
def test_infinities_and_nan_stay_what_they_are(isa, dtype, width, samples):
    query, weights, bank, index = problem(2, samples, 30, width, dtype)
    query, weights, bank = query.abs(), weights.abs(), bank.abs()
    index[index < 2] = 2
    index[0, 3], index[1, 4] = 0, 1
    for d in (0, width // 2, width - 1):
        changed = bank.clone()
        changed[0, d], changed[1, d] = math.inf, math.nan
        z, o = cpu.scores(query, changed, index), cpu.pool(weights, changed, index)
        assert z[0, 3] == math.inf and z[1, 4].isnan() and z.isfinite().sum() == z.numel() - 2
        assert o[0, d] == math.inf and o[1, d].isnan() and o.isfinite().sum() == o.numel() - 2


@DTYPES
def test_threads_change_no_bit_of_single_rows(threads, dtype):
    query, weights, bank, index = problem(7, 3000, 15_000, 72, dtype)
    torch.set_num_threads(1)
    expected = cpu.scores(query, bank, index), cpu.pool(weights, bank, index)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(cpu.scores(query, bank, index), expected[0])
        assert torch.equal(cpu.pool(weights, bank, index), expected[1])


@DTYPES
def test_threads_repeat_sums_by_blocks(threads, dtype):
    """Scores are the same bits whatever the number of threads; sums for the same number, for each thread adds up its own blocks."""
    query, weights, bank, index = problem(60, 1500, 600, 320, dtype)
    torch.set_num_threads(1)
    scores, sums = cpu.scores(query, bank, index), cpu.pool(weights, bank, index)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(cpu.scores(query, bank, index), scores)
        once = cpu.pool(weights, bank, index)
        assert torch.equal(cpu.pool(weights, bank, index), once)
        torch.testing.assert_close(once, sums, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("where", ["query", "weights", "bank"])
@pytest.mark.parametrize("value", [math.inf, math.nan, 3.4e38])
def test_what_parts_of_floats_cannot_hold(isa, where, value):
    """By blocks: only the rows and elements that the value reaches are lost; 3.4e38 is finite, yet its leading bf16 part is not."""
    query, weights, bank, index = (x.abs() if x.is_floating_point() else x for x in problem(3, 900, 30, 320))
    index[index == 4], index[0, 5] = 3, 4
    dict(query=query[1:2, 7:8], weights=weights[1:2, 7:8], bank=bank[4:5, 7:8])[where].fill_(value)
    z, o = cpu.scores(query * 1e-3, bank, index).double(), cpu.pool(weights * 1e-3, bank, index).double()
    wanted_z = ((query * 1e-3).double()[:, None] * bank.double()[index]).sum(-1)
    wanted_o = torch.einsum("nk,nkd->nd", (weights * 1e-3).double(), bank.double()[index])
    torch.testing.assert_close(z, wanted_z, rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(o, wanted_o, rtol=1e-5, atol=0, equal_nan=True)


def statistic_reference(query: Tensor, bank: Tensor, index: Tensor, offset: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    z = torch.einsum("nd,nkd->nk", query.double(), bank.double()[index])
    value, weights = statistics.of_scores(z, None if offset is None else offset.double(), None if shift is None else shift.double())
    return value, torch.einsum("nk,nkd->nd", weights, bank.double()[index])


def check_statistic(query: Tensor, bank: Tensor, index: Tensor, offset: Tensor | None, shift: Tensor | None) -> None:
    value, pooled = cpu.statistic(query, bank, index, offset, shift, True)
    wanted_value, wanted_pooled = statistic_reference(query, bank, index, offset, shift)
    torch.testing.assert_close(value.double(), wanted_value, rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(pooled.double(), wanted_pooled, rtol=2e-5, atol=2e-5 * float(wanted_pooled.abs().max()))
    alone, none = cpu.statistic(query, bank, index, offset, shift, False)
    assert torch.equal(alone, value) and none.numel() == 0


# One sample; fewer than a vector's; beside one; more than a run of vectors, and by blocks.
STATISTICS = [(1, 1, 1, 1), (3, 5, 7, 3), (5, 63, 90, 63), (2, 33, 40, 17), (3, 2100, 50, 5), (13, 600, 90, 270)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["log-sum-exp", "noise contrast", "noise contrast, a shift for each row"])
@pytest.mark.parametrize("shape", STATISTICS, ids=lambda s: "x".join(map(str, s)))
def test_statistics(isa, dtype, kind, shape):
    query, offset, bank, index = problem(*shape, dtype)
    query /= math.sqrt(shape[3])
    offset[torch.rand(offset.shape) < 0.1] = -math.inf
    offset[0] = -math.inf  # a row with nothing left
    shift = {"log-sum-exp": None, "noise contrast": torch.tensor(0.7)}.get(kind, torch.randn(shape[0]))
    check_statistic(query, bank, index, None, shift)
    if shift is not None:
        offset[:, 0] = 0  # without its positive a row's loss is infinite
    check_statistic(query, bank, index, offset, shift)


def test_statistics_of_extreme_scores(isa):
    """Scores of thousands, both ways: nothing overflows, and what is below the smallest float is 0."""
    _, _, bank, index = problem(4, 50, 40, 1)
    query = torch.tensor([[1e4], [-1e4], [100.0], [1e-3]])
    for shift in (None, torch.tensor(5.0)):
        check_statistic(query, bank, index, None, shift)


@pytest.mark.parametrize("width", [20, 320])
def test_statistics_of_nan_and_of_rows_left_out(isa, width):
    query, offset, bank, index = problem(3, 900, 30, width)
    index[index == 4] = 3
    index[1, 10], offset[1, 10] = 4, -math.inf
    for bad in (math.nan, math.inf):
        bank[4] = bad
        assert cpu.statistic(query, bank, index, offset, None, False)[0].isfinite().all()
        value, pooled = cpu.statistic(query, bank, index, None, None, True)
        assert value.isfinite()[[0, 2]].all() and pooled[[0, 2]].isfinite().all()
        if bad != bad:
            assert value[1].isnan() and pooled[1].isnan().all()


def test_threads_repeat_statistics(threads):
    for shape in ((60, 1500, 600, 320), (60, 1500, 60_000, 72)):
        query, _, bank, index = problem(*shape)
        torch.set_num_threads(1)
        expected = cpu.statistic(query, bank, index, None, None, True)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            value, pooled = cpu.statistic(query, bank, index, None, None, True)
            assert torch.equal(value, expected[0])
            assert torch.equal(pooled, cpu.statistic(query, bank, index, None, None, True)[1])
            torch.testing.assert_close(pooled, expected[1], rtol=1e-4, atol=1e-5)


def scattered(weights: Tensor, query: Tensor, index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The sums over the samples of each bank row in float64, [size, D], and those of the terms' magnitudes."""
    terms = (weights.double()[..., None] * query.double()[:, None]).flatten(0, 1)
    out = torch.zeros(2, size, query.shape[1], dtype=torch.float64)
    out[0].index_add_(0, index.flatten(), terms)
    out[1].index_add_(0, index.flatten(), terms.abs())
    return out[0], out[1]


# 600 and 1100 bank rows are two and three blocks of 512; 300,000 are more than 512 of those, so that blocks grow.
SCATTERED = [*SHAPES, (3, 40, 600, 257), (70, 200, 1100, 20), (2, 50, 300_000, 5)]


@DTYPES
@pytest.mark.parametrize("shape", SCATTERED, ids=lambda s: "x".join(map(str, s)))
def test_scatter(isa, dtype, shape):
    query, weights, bank, index = problem(*shape)
    got = cpu.scatter(weights, query, index, len(bank), dtype)
    wanted, magnitude = scattered(weights, query, index, len(bank))
    assert got.dtype == dtype and got.shape == bank.shape
    assert torch.equal(got, cpu.scatter(weights, query, index, len(bank), torch.float32).to(dtype))  # rounded once, as PyTorch rounds
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    assert ((got.double() - wanted).abs() <= 4 * ULP * magnitude + rounding * wanted.abs() + 1e-6 * (dtype == torch.float16)).all()


def test_scatter_into_one_row(isa):
    """In runs, too: one after another the 60,000 would be off by 1e-3."""
    query, _, _, index = problem(3, 20_000, 80, 70)
    query, index[:] = query.abs(), 79
    got = cpu.scatter(torch.full((3, 20_000), 0.1), query, index, 80, torch.float32)
    wanted = 20_000 * torch.tensor(0.1).double() * query.double().sum(0)
    torch.testing.assert_close(got[79].double(), wanted, rtol=2e-5, atol=0)
    assert (got[:79] == 0).all()


@DTYPES
def test_scatter_of_infinities_and_nan(isa, dtype):
    query, weights, _, index = problem(4, 30, 20, 19)
    index[index == 19] = 0
    query, weights = query.abs() + 0.1, weights.abs() + 0.1
    index[index == 7] = 8
    index[0, 0], index[1, 1], index[2, 2] = 7, 7, 6
    weights[0, 0], weights[2, 2] = math.inf, math.nan
    got = cpu.scatter(weights, query, index, 20, dtype)
    assert (got[7] == math.inf).all() and got[6].isnan().all() and (got[19] == 0).all()
    assert got[torch.tensor([*range(6), *range(8, 20)])].isfinite().all()
    assert (cpu.scatter(weights * 1e30, query * 1e30, index, 20, dtype)[8] == math.inf).all()


def test_values_are_rounded_as_pytorch_rounds(isa):
    """Half's subnormals, ties, its largest number and what lies beyond; bf16's ties and overflow."""
    x = torch.cat([2.0 ** torch.arange(-27, 18), 65504 + 16 * torch.arange(-2.0, 3), torch.tensor([0.0, 3.4e38, math.inf, math.nan])])
    x = torch.cat([x, x * (1 + 2.0**-11), x * (1 + 2.0**-8), x * (1 + 3 * 2.0**-9), x * 1.4999])
    x = torch.cat([x, -x])[None]
    for dtype in (torch.float16, torch.bfloat16):
        got = cpu.scatter(torch.ones(1, 1), x, torch.zeros(1, 1, dtype=torch.long), 1, dtype)
        torch.testing.assert_close(got, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@DTYPES
def test_threads_change_no_bit_of_scatter(threads, dtype):
    query, weights, _, index = problem(60, 5000, 3000, 72)
    torch.set_num_threads(1)
    expected = cpu.scatter(weights, query, index, 3000, dtype)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(cpu.scatter(weights, query, index, 3000, dtype), expected)


def test_empty():
    bank = torch.randn(5, 3)
    for n, k in ((0, 4), (4, 0)):
        index = torch.zeros(n, k, dtype=torch.long)
        assert cpu.scores(torch.randn(n, 3), bank, index).shape == (n, k)
        pooled = cpu.pool(torch.randn(n, k), bank, index)
        assert pooled.shape == (n, 3) and (pooled == 0).all()
        assert torch.equal(cpu.scatter(torch.randn(n, k), torch.randn(n, 3), index, 5, torch.bfloat16), torch.zeros(5, 3).bfloat16())
    index = torch.zeros(2, 4, dtype=torch.long)
    assert (cpu.scores(torch.randn(2, 0), torch.randn(5, 0), index) == 0).all()
    assert cpu.pool(torch.randn(2, 4), torch.randn(5, 0), index).shape == (2, 0)
    assert cpu.scatter(torch.randn(2, 4), torch.randn(2, 0), index, 5, torch.float32).shape == (5, 0)


@pytest.mark.parametrize("wrong", [-1, 30, 1 << 40])
@pytest.mark.parametrize("samples", [40, 900])
def test_an_index_outside_the_bank_is_an_error(isa, wrong, samples):
    query, weights, bank, index = problem(3, samples, 30, 320)
    index[1, 7] = wrong
    for call in (
        lambda: cpu.scores(query, bank, index),
        lambda: cpu.pool(weights, bank, index),
        lambda: cpu.statistic(query, bank, index, None, None, True),
        lambda: cpu.scatter(weights, query, index, 30, torch.float32),
    ):
        with pytest.raises(RuntimeError, match=r"index must be in \[0, 30\)"):
            call()


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        query, weights, bank, index = problem(3, 10, 20, 12, dtype)
        torch.library.opcheck(torch.ops.kdfast.gather_similarity.default, (query, bank, index))
        torch.library.opcheck(torch.ops.kdfast.gather_weighted_sum.default, (weights, bank, index))
        torch.library.opcheck(torch.ops.kdfast.gather_statistic.default, (query, bank, index, weights, torch.randn(3), True))
        torch.library.opcheck(torch.ops.kdfast.gather_scatter.default, (weights, query, index, 20, dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(query=a["query"].double()), "query has dtype"),
        (lambda a: a.update(query=a["query"][:, :4]), "query has size"),
        (lambda a: a.update(query=a["query"].T.contiguous().T), "query must be contiguous"),
        (lambda a: a.update(bank=a["bank"].double()), "takes float32, bfloat16 or float16"),
        (lambda a: a.update(bank=a["bank"].T.contiguous().T), "rows of the bank must be contiguous"),
        (lambda a: a.update(bank=a["bank"][:0]), "bank must have at least 1 row"),
        (lambda a: a.update(bank=a["bank"][0]), "bank and index must have 2 dimensions"),
        (lambda a: a.update(index=a["index"].int()), "index has dtype"),
        (lambda a: a.update(index=a["index"].T.contiguous().T), "index must be contiguous"),
    ],
)
def test_bad_arguments(change, message):
    query, _, bank, index = problem(3, 10, 20, 12)
    a = {"query": query, "bank": bank, "index": index}
    change(a)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kdfast.gather_similarity(**a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(weight=a["weight"].double()), "weight has dtype"),
        (lambda a: a.update(weight=a["weight"][:, :4]), "weight has size"),
        (lambda a: a.update(query=a["query"][:2]), "query has size"),
        (lambda a: a.update(query=a["query"][0]), "query and index must have 2 dimensions"),
        (lambda a: a.update(index=a["index"].int()), "index has dtype"),
        (lambda a: a.update(size=0), "bank must have at least 1 row"),
        (lambda a: a.update(size=-1), "size must be >= 0"),
        (lambda a: a.update(dtype=torch.float64), "takes float32, bfloat16 or float16"),
    ],
)
def test_bad_arguments_of_scatter(change, message):
    query, weights, _, index = problem(3, 10, 20, 12)
    a = {"weight": weights, "query": query, "index": index, "size": 20, "dtype": torch.float32}
    change(a)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kdfast.gather_scatter(**a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(query=a["query"][:2]), "query has size"),
        (lambda a: a.update(offset=a["offset"][:, :4]), "offset has size"),
        (lambda a: a.update(offset=a["offset"].double()), "offset has dtype"),
        (lambda a: a.update(shift=torch.ones(2)), "shift has size"),
        (lambda a: a.update(shift=torch.tensor(1.0)), "shift must have 1 dimensions"),
        (lambda a: a.update(index=a["index"][:, :0], offset=None), "at least 1 column"),
    ],
)
def test_bad_arguments_of_statistics(change, message):
    query, offset, bank, index = problem(3, 10, 20, 12)
    a = {"query": query, "bank": bank, "index": index, "offset": offset, "shift": torch.ones(3), "pooled": True}
    change(a)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kdfast.gather_statistic(**a)


def test_what_it_refuses():
    assert cpu.refuses(device_type="cpu", dtype=torch.bfloat16, bank_dtype=torch.bfloat16) is None
    assert "cuda" in cpu.refuses(device_type="cuda")
    assert "float64" in cpu.refuses(dtype=torch.float64)
    assert "float64" in cpu.refuses(bank_dtype=torch.float64)
