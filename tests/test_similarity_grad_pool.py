"""The C++ kernels for the gradients of lse and the pooled output together, against float64, under every instruction set of the machine."""

import math

import pytest
import torch
from similarity_kernel_cases import (
    CHOSEN,
    DTYPES,
    NOTHING,
    NOTHING_SHAPE,
    OVER,
    OVER_KEYS,
    ROWS,
    VALUES,
    WIDE,
    assert_accurate,
    assert_all_accurate,
    candidates,
    case,
    chosen_options,
    gradient_sums,
    of_pooled,
    shared_values,
    softmax,
)
from torch import Tensor

from kdfast._core import extension
from kdfast._ops.similarity import cpu

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))


def upstream(a: dict, width: int | None, dtype: torch.dtype) -> dict:
    """slope, h and values (None: the keys) for a problem."""
    return {"slope": torch.randn(a["query"].shape[:2]), **of_pooled(a, width, dtype)}


def run(a: dict, u: dict, level: tuple | None = None, *, products: str | None = None) -> dict[str, Tensor]:
    """Every sum of both kernels, after a forward unless its log-sums are given."""
    level = level or cpu.forward(**a, pooled=False, products=products)[::2]
    rest = {k: v for k, v in a.items() if k not in ("start_logit", "start_value")}
    options = {"h": u["h"], "values": u["values"], "products": products}
    rows = cpu.grad_rows(u["slope"], *level, **rest, **options)
    columns = cpu.grad_keys(u["slope"], *level, **rest, want_keys=True, want_bias=True, want_values=u["values"] is not None, **options)
    return dict(zip(("rows", "mass", "total", "dkeys", "dbias", "dvalues"), (*rows, *columns), strict=True))


def formula(a: dict, u: dict, dtype=torch.float64) -> dict[str, Tensor]:
    """The definition, everything materialised."""
    _, p = softmax(candidates(a, dtype))
    p = p if a["start_logit"] is None else p[..., 1:]
    found = gradient_sums(a, u, p, lambda w: u["slope"].to(dtype)[..., None] + w, dtype)
    return {"mass": p.sum(-1), "total": found["dz"].sum(-1), **found}


def check(a: dict, u: dict, dtype: torch.dtype) -> None:
    assert_all_accurate(run(a, u), formula(a, u), formula(a, u, dtype))


# 1: a lone row, column or element; 6, 7, 15, 16, 17: beside a tile; 63, 65: beside a vector and a panel; 129, 257: beside a block;
# 193: beside a chunk of rows; 130: beside a chunk of steps; 1200 rows of width 1100: several groups of rows.
SHAPES = [(1, 1, 1, 1), (6, 65, 1, 17), (2, 7, 15, 3), (3, 5, 17, 65), (1, 129, 193, 130), (2, 257, 63, 64), (1, 193, 257, 33)]
LARGE = [(1, 3, 1200, 1100), (1, 1200, 3, 1100), (1, 64, 6, 520)]


@OVER
@DTYPES
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE, *WIDE], ids=lambda s: "x".join(map(str, s)))
def test_ragged_sizes(isa, dtype, shape, width):
    a = case(*shape, dtype)
    check(a, upstream(a, width, dtype), dtype)


@OVER
@DTYPES
@ROWS
@CHOSEN
def test_exclusions(isa, dtype, chosen, rows, width):
    shape = (3, rows, 150, 33)
    a = case(*shape, dtype, **chosen_options(chosen, shape, dtype))
    check(a, upstream(a, width, dtype), dtype)


@pytest.mark.parametrize("width", [1, 17, 70, 600])
def test_values_wider_and_narrower_than_the_keys(isa, width):
    for a in (case(2, 7, 300, 33), case(2, 40, 30, 33, shared=True)):
        check(a, upstream(a, width, torch.float32), torch.float32)


def test_without_h_the_slope_is_all(isa):
    a = case(2, 30, 140, 20)
    u = upstream(a, None, torch.float32)
    level = cpu.forward(**a, pooled=False)[::2]
    rest = {k: v for k, v in a.items() if k not in ("start_logit", "start_value")}
    ours, truth = cpu.grad_rows(u["slope"], *level, **rest), formula(a, {**u, "h": torch.zeros_like(u["h"])})
    for got, name in zip(ours, ("rows", "mass", "total"), strict=True):
        assert_accurate(got, truth[name], truth[name].float())


@OVER
def test_low_digits_of_a_large_lse(isa, width):
    """p = exp(z - lse) with lse near 3000, whose unit in the last place is 2e-4."""
    a = case(1, 64, 100, 16, bias=torch.full((1, 100), 3000.0) + torch.randn(1, 100))
    u = upstream(a, width, torch.float32)
    check(a, u, torch.float32)
    lse, lse_low = cpu.forward(**a, pooled=False)[::2]
    assert (run(a, u, (lse, lse_low))["mass"] - 1).abs().max() < 1e-6
    assert (run(a, u, (lse, None))["mass"] - 1).abs().max() > 1e-5


@OVER
def test_a_shared_bank_is_the_expanded_bank(isa, width):
    a = case(3, 30, 130, 20, shared=True)
    u, apart = shared_values(upstream(a, width, torch.float32))
    level = cpu.forward(**a, pooled=False)[::2]
    ours, expected = run(a, u, level), run({**a, "keys": a["keys"].contiguous()}, apart, level)
    for name, got in ours.items():
        torch.testing.assert_close(got, expected[name], rtol=1e-5, atol=1e-5)


@OVER
@NOTHING
def test_nothing_admitted(isa, nothing, width):
    a = case(*NOTHING_SHAPE, **nothing)
    assert all((x == 0).all() for x in run(a, upstream(a, width, torch.float32)).values())


@OVER
@DTYPES
def test_nan_goes_where_the_formula_takes_it(isa, dtype, width):
    a = case(2, 13, 140, 20, dtype)
    u = upstream(a, width, dtype)
    level = cpu.forward(**a, pooled=False)[::2]
    want = run(a, u, level)
    for name in ("slope", "h"):
        broken = {**u, name: u[name].clone()}
        broken[name][0, 4] = math.nan
        ours = run(a, broken, level)
        assert ours["rows"][0, 4].isnan().all() and ours["total"][0, 4].isnan() and ours["dkeys"][0].isnan().all()
        kept = torch.arange(13) != 4
        torch.testing.assert_close(ours["rows"][0, kept], want["rows"][0, kept], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours["rows"][1], want["rows"][1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours["dkeys"][1], want["dkeys"][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_beyond_valid_may_hold_anything(isa, value):
    a = case(1, 9, 140, 20, valid=torch.tensor([100]))
    u = upstream(a, VALUES, torch.float32)
    want = run(a, u)
    a["keys"] = a["keys"].clone()
    a["keys"][:, 100:] = u["values"][:, 100:] = value
    ours = run(a, u)
    assert all(torch.equal(ours[name], want[name]) for name in want)
    assert all((ours[name][:, 100:] == 0).all() for name in ("dkeys", "dbias", "dvalues"))


@pytest.mark.parametrize(("products", "unit"), [("ieee", 2.0**-22), ("bf16x3", 2.0**-14), ("bf16", 2.0**-6)])
def test_products_keep_what_their_name_says(isa, products, unit):
    a = case(1, 40, 300, 130, scale=5.0)
    u = upstream(a, VALUES, torch.float32)
    ours, truth = run(a, u, products=products), formula(a, u)
    for name in ours:
        assert (ours[name] - truth[name]).abs().max() <= 20 * unit * truth[name].abs().max(), name


# the bank is divided; the rows are; both, with an odd batch
@OVER
@DTYPES
@pytest.mark.parametrize("shape", [(1, 4, 9000, 64), (1, 800, 700, 64), (5, 33, 1100, 48)], ids=lambda s: "x".join(map(str, s)))
def test_threads_agree_and_repeat(dtype, shape, width):
    a = case(*shape, dtype)
    u = upstream(a, width, dtype)
    level = cpu.forward(**a, pooled=False)[::2]
    before = torch.get_num_threads()
    try:
        one, two, again = (torch.set_num_threads(threads) or run(a, u, level) for threads in (1, 2, 2))
    finally:
        torch.set_num_threads(before)
    for name in one:
        assert torch.equal(two[name], again[name])
        if name in ("dkeys", "dbias", "dvalues"):
            assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_empty_batches_queries_and_banks():
    for shape in ((0, 4, 10, 3), (2, 0, 10, 3), (2, 4, 0, 3)):
        a = case(*shape)
        ours = run(a, upstream(a, VALUES, torch.float32))
        assert ours["rows"].shape == (shape[0], shape[1], 3) and ours["dvalues"].shape == (shape[0], shape[2], VALUES)
        assert all((x == 0).all() for x in ours.values())


@OVER
def test_no_matrix_of_all_pairs(width):
    """Beside its outputs a call allocates the scratch of a thread alone."""
    a = case(1, 3000, 3000, 16)
    u = upstream(a, width, torch.float32)
    level = cpu.forward(**a, pooled=False)[::2]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(a, u, level)
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < largest < 3 << 20  # 3000 x 3000 floats are 34 MB


def test_opcheck():
    shape = (2, 7, 70, 5)
    made = chosen_options("all", shape)
    for a in (case(*shape, shared=True), case(*shape, **made)):
        level = cpu.forward(**a, pooled=False)[::2]
        rest = [v for k, v in a.items() if k not in ("start_logit", "start_value")]
        for width in (OVER_KEYS, 3):
            u = upstream(a, width, torch.float32)
            args = (u["slope"], u["h"], *level, *rest[:4], u["values"], *rest[4:])
            torch.library.opcheck(torch.ops.kdfast.similarity_grad_rows.default, (*args, 0))
            torch.library.opcheck(torch.ops.kdfast.similarity_grad_keys.default, (*args, True, True, width is not None, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u: u.update(slope=torch.ones(2, 6)), "slope has size"),
        (lambda u: u.update(h=torch.ones(2, 7, 4)), "h has size"),
        (lambda u: u.update(h=torch.ones(2, 7, 5).double()), "takes float32, bfloat16 or float16"),
        (lambda u: u.update(h=torch.ones(2, 1, 5).expand(2, 7, 5)), "h must be contiguous"),
        (lambda u: u.update(values=torch.ones(2, 69, 5)), "values has size"),
        (lambda u: u.update(values=torch.ones(70, 5)), "values must have 3 dimensions"),
    ],
)
def test_bad_arguments(change, message):
    a = case(2, 7, 70, 5)
    u = upstream(a, None, torch.float32)
    change(u)
    with pytest.raises(RuntimeError, match=message):
        run(a, u)


def test_the_gradient_of_values_needs_h_and_values():
    a = {k: v for k, v in case(2, 7, 70, 5).items() if k not in ("start_logit", "start_value")}
    with pytest.raises(RuntimeError, match="needs h and values"):
        cpu.grad_keys(torch.ones(2, 7), torch.ones(2, 7), None, **a, want_keys=False, want_bias=False, want_values=True)
