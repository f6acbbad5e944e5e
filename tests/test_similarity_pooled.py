"""The C++ kernel for all gradients of lse and pooled in one pass, against float64, under every instruction set of the machine."""

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

NAMES = "rows", "mean", "dkeys", "dbias", "dvalues"


def upstream(a: dict, width: int | None, dtype: torch.dtype) -> dict:
    """g, h and values (None: the keys) for a problem, and its start's value over them."""
    batch, rows, own = a["query"].shape
    if a["start_value"] is not None:
        a["start_value"] = torch.randn(batch, rows, width or own).to(dtype)
    return {"g": torch.randn(batch, rows), **of_pooled(a, width, dtype)}


def run(a: dict, u: dict, *, want=(True, True, True, None), products: str | None = None, left: tuple | None = None) -> dict[str, Tensor]:
    """The sums that are wanted (by default all), after a forward pass unless its outputs are given."""
    lse, pooled, lse_low = left or cpu.forward(**a, pooled=True, values=u["values"], products=products)
    rest = {k: v for k, v in a.items() if k not in ("start_logit", "start_value")}
    options = {}
    if a["start_logit"] is not None:
        options["start_weight"] = torch.where(lse == -math.inf, 0, torch.exp(a["start_logit"] - lse - lse_low))
        if a["start_value"] is not None:
            options["start_slope"] = (u["h"] * a["start_value"].float()).sum(-1)
    wanted = dict(zip(("want_rows", "want_keys", "want_bias", "want_values"), want, strict=True))
    if wanted["want_values"] is None:
        wanted["want_values"] = u["values"] is not None
    found = cpu.pooled_grad(u["g"], u["h"], pooled, lse, lse_low, **rest, **wanted, **options, values=u["values"], products=products)
    return dict(zip(NAMES, found, strict=True))


def formula(a: dict, u: dict, dtype=torch.float64) -> dict[str, Tensor]:
    """The definition, everything materialised."""
    _, all_p = softmax(candidates(a, dtype))
    p = all_p if a["start_logit"] is None else all_p[..., 1:]
    found = {}

    def slopes(w):
        mean = (p * w).sum(-1)
        if a["start_value"] is not None:
            mean = mean + all_p[..., 0] * (u["h"].to(dtype) * a["start_value"].to(dtype)).sum(-1)
        found["mean"] = mean
        return (0 if u["g"] is None else u["g"].to(dtype)[..., None]) + (w - mean[..., None])

    return found | gradient_sums(a, u, p, slopes, dtype)


def check(a: dict, u: dict, dtype: torch.dtype) -> None:
    assert_all_accurate(run(a, u), formula(a, u), formula(a, u, dtype))


# 1: a lone row, column or element; 6, 7, 15, 16, 17: beside a tile; 63, 65: beside a vector and a panel; 129, 257: beside a block;
# 97, 193: beside a chunk of rows; 130: beside a chunk of steps; 1200 rows of width 1100: several groups of rows.
SHAPES = [(1, 1, 1, 1), (6, 65, 1, 17), (2, 7, 15, 3), (3, 5, 17, 65), (1, 97, 193, 130), (2, 257, 63, 64), (1, 193, 257, 33)]
LARGE = [(1, 3, 1200, 1100), (1, 1200, 3, 1100), (1, 600, 40, 1100), (1, 64, 6, 520)]


@OVER
@DTYPES
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=lambda s: "x".join(map(str, s)))
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


@OVER
@DTYPES
def test_what_is_wanted_does_not_depend_on_what_else_is(isa, dtype, width):
    a = case(2, 70, 140, 20, dtype)
    u = upstream(a, width, dtype)
    left = cpu.forward(**a, pooled=True, values=u["values"])
    every = run(a, u, left=left)
    for i, name in enumerate(("rows", "dkeys", "dbias", "dvalues")):
        if name == "dvalues" and width is None:
            continue
        alone = run(a, u, want=[i == j for j in range(4)], left=left)
        assert torch.equal(alone[name], every[name])
        assert [x for x in NAMES if alone[x].shape != (0,)] == sorted({name, *(["mean"] if name != "dvalues" else [])}, key=NAMES.index)


def test_without_an_upstream_of_lse(isa):
    a = case(2, 30, 140, 20)
    u = upstream(a, VALUES, torch.float32)
    check(a, {**u, "g": None}, torch.float32)
    without, zero = (run(a, {**u, "g": g}) for g in (None, torch.zeros(2, 30)))
    assert all(torch.equal(x, y) for x, y in zip(without.values(), zero.values(), strict=True))


def dominated(rows: int, columns: int, width: int) -> tuple[dict, dict]:
    """Each query's own key holds almost all of its row; queries are long, so that what is left of h.v less its mean counts."""
    keys = torch.nn.functional.normalize(torch.randn(1, columns, width), dim=-1)
    query = 100 * keys[:, :rows]
    a = {**case(1, rows, columns, width, scale=0.5), "query": query, "keys": keys}
    return a, {"g": None, "h": torch.randn(1, rows, width), "values": torch.randn(1, columns, width) + 5}


def alike(rows: int, columns: int, width: int) -> tuple[dict, dict]:
    """Keys share a long vector, which cancels in every gradient but for what the weights do not sum to zero by; a few hold each row."""
    a = case(1, rows, columns, width, scale=6.0)
    a["keys"] = a["keys"] + 30 * torch.nn.functional.normalize(torch.randn(width), dim=-1)
    a["query"] = a["query"] - (a["query"] @ (mean := a["keys"].mean(1)[0]))[..., None] * mean / mean.square().sum()
    return a, {"g": None, "h": torch.randn(1, rows, width), "values": torch.randn(1, columns, width)}


@pytest.mark.parametrize("made", [dominated, alike])
@pytest.mark.parametrize("shape", [(20, 40, 16), (130, 300, 128), (100, 2000, 128)], ids=str)
def test_slopes_sum_to_zero_to_the_last_digits(isa, made, shape):
    a, u = made(*shape)
    check(a, u, torch.float32)


def test_a_small_upstream_of_lse_keeps_its_digits_beside_a_large_one_of_pooled(isa):
    a = case(1, 40, 200, 16)
    u = upstream(a, VALUES, torch.float32)
    u["values"] = torch.full_like(u["values"], 3.0)  # w is the same for all, so that g alone is left
    u["h"], u["g"] = 1000 * u["h"], 1e-3 * u["g"]
    check(a, u, torch.float32)


@OVER
def test_low_digits_of_a_large_lse(isa, width):
    """p = exp(z - lse) with lse near 3000, whose unit in the last place is 2e-4."""
    a = case(1, 64, 100, 16, bias=torch.full((1, 100), 3000.0) + torch.randn(1, 100))
    check(a, upstream(a, width, torch.float32), torch.float32)


@OVER
def test_a_shared_bank_is_the_expanded_bank(isa, width):
    a = case(3, 30, 130, 20, shared=True)
    u, apart = shared_values(upstream(a, width, torch.float32))
    left = cpu.forward(**a, pooled=True, values=u["values"])
    for want in ((True, True, True, None), (True, False, False, False)):
        ours, expected = run(a, u, want=want, left=left), run({**a, "keys": a["keys"].contiguous()}, apart, want=want, left=left)
        for name, got in ours.items():
            torch.testing.assert_close(got, expected[name], rtol=1e-5, atol=1e-5)


@OVER
@NOTHING
def test_nothing_admitted(isa, nothing, width):
    a = case(*NOTHING_SHAPE, **nothing)
    ours = run(a, upstream(a, width, torch.float32))
    assert all((x == 0).all() for x in ours.values())


@OVER
@DTYPES
def test_nan_goes_where_the_formula_takes_it(isa, dtype, width):
    a = case(2, 13, 140, 20, dtype)
    u = upstream(a, width, dtype)
    left = cpu.forward(**a, pooled=True, values=u["values"])
    want = run(a, u, left=left)
    for name in ("g", "h"):
        broken = {**u, name: u[name].clone()}
        broken[name][0, 4] = math.nan
        ours = run(a, broken, left=left)
        assert ours["rows"][0, 4].isnan().all() and ours["dkeys"][0].isnan().all() and ours["dbias"][0].isnan().all()
        kept = torch.arange(13) != 4
        torch.testing.assert_close(ours["rows"][0, kept], want["rows"][0, kept], rtol=1e-4, atol=1e-5)
        for name in ("rows", "dkeys", "dbias"):
            torch.testing.assert_close(ours[name][1], want[name][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_beyond_valid_may_hold_anything(isa, value):
    a = case(1, 70, 140, 20, valid=torch.tensor([100]))
    u = upstream(a, VALUES, torch.float32)
    want = run(a, u)
    a["keys"] = a["keys"].clone()
    a["keys"][:, 100:] = u["values"][:, 100:] = value
    ours = run(a, u)
    assert all(torch.equal(ours[name], want[name]) for name in want)
    assert all((ours[name][:, 100:] == 0).all() for name in ("dkeys", "dbias", "dvalues"))


@pytest.mark.parametrize(("products", "unit"), [("ieee", 2.0**-22), ("bf16x3", 2.0**-14), ("bf16", 2.0**-6)])
def test_products_keep_what_their_name_says(isa, products, unit):
    a = case(1, 140, 300, 130, scale=5.0)
    u = upstream(a, VALUES, torch.float32)
    ours, truth = run(a, u, products=products), formula(a, u)
    for name in ours:
        assert (ours[name] - truth[name]).abs().max() <= 20 * unit * truth[name].abs().max(), name


def test_an_infinite_value_is_an_infinity_of_the_formula_on_every_product(isa):
    a = case(1, 70, 140, 20)
    u = upstream(a, VALUES, torch.float32)
    u["values"][0, 3, 5] = math.inf
    u["h"] = u["h"].abs()
    assert torch.equal(run(a, u)["rows"].isfinite(), formula(a, u)["rows"].isfinite())
    assert run(a, u)["dvalues"].isfinite().all()


# the bank is divided, with copies of the rows' sums; both are; both, with an odd batch
@OVER
@DTYPES
@pytest.mark.parametrize("valid", [None, (650, 1, 0, 1000, 10_000)], ids=["all", "valid"])
@pytest.mark.parametrize(
    "shape", [(1, 4, 9000, 64), (1, 800, 700, 64), (5, 33, 1100, 48), (1, 130, 2100, 64)], ids=lambda s: "x".join(map(str, s))
)
def test_threads_agree_and_repeat(dtype, shape, width, valid):
    a = case(*shape, dtype, **({} if valid is None else {"valid": torch.tensor(valid[: shape[0]])}))
    u = upstream(a, width, dtype)
    left = cpu.forward(**a, pooled=True, values=u["values"])
    before = torch.get_num_threads()
    try:
        one, four, again = (torch.set_num_threads(threads) or run(a, u, left=left) for threads in (1, 4, 4))
    finally:
        torch.set_num_threads(before)
    for name in one:
        assert torch.equal(four[name], again[name])
        torch.testing.assert_close(one[name], four[name], rtol=1e-3, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)


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
    left = cpu.forward(**a, pooled=True, values=u["values"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(a, u, left=left)
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < largest < 3 << 20  # 3000 x 3000 floats are 34 MB


def test_opcheck():
    shape = (2, 7, 70, 5)
    made = chosen_options("all", shape)
    for a in (case(*shape, shared=True), case(*shape, **made)):
        for width in (OVER_KEYS, 3):
            u = upstream(a, width, torch.float32)
            lse, pooled, lse_low = cpu.forward(**a, pooled=True, values=u["values"])
            rest = [v for k, v in a.items() if k not in ("start_logit", "start_value")]
            args = (u["g"], u["h"], pooled, lse, lse_low, *rest[:4], u["values"], torch.rand_like(lse), torch.randn_like(lse), *rest[4:])
            torch.library.opcheck(torch.ops.kdfast.similarity_pooled_grad.default, (*args, True, True, True, width is not None, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u: u.update(g=torch.ones(2, 6)), "g has size"),
        (lambda u: u.update(h=torch.ones(2, 7, 4)), "h has size"),
        (lambda u: u.update(h=torch.ones(2, 7, 5).double()), "h has dtype"),
        (lambda u: u.update(h=torch.ones(2, 1, 5).expand(2, 7, 5)), "h must be contiguous"),
        (lambda u: u.update(values=torch.ones(70, 5)), "values must have 3 dimensions"),
    ],
)
def test_bad_arguments(change, message):
    a = case(2, 7, 70, 5)
    u = upstream(a, None, torch.float32)
    left = cpu.forward(**a, pooled=True)
    change(u)
    with pytest.raises(RuntimeError, match=message):
        run(a, u, left=left)


def test_the_gradient_of_values_needs_values():
    a = case(2, 7, 70, 5)
    with pytest.raises(RuntimeError, match="needs values"):
        run(a, upstream(a, None, torch.float32), want=(False, False, False, True))
