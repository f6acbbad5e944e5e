"""The C++ kernel for lse's gradient in the bank against the float64 formula, under every instruction set of this machine."""

import math

import pytest
import torch
from similarity_kernel_cases import (
    CHOSEN,
    DTYPES,
    NOTHING,
    NOTHING_SHAPE,
    ROWS,
    WIDE,
    assert_accurate,
    candidates,
    case,
    chosen_options,
    softmax,
)
from torch import Tensor

from kdfast._core import extension
from kdfast._ops.similarity import cpu

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))


def log_sums(a: dict) -> tuple[Tensor, Tensor]:
    """lse and lse_low of the kernel's own forward."""
    lse, _, lse_low = cpu.forward(**a, pooled=False)
    return lse, lse_low


def run(a: dict, g: Tensor, level: tuple | None = None, *, keys: bool = True, bias: bool = True) -> tuple[Tensor, Tensor]:
    """(dkeys, dbias) for the upstream `g`, after a forward unless its log-sums are given."""
    rest = {k: v for k, v in a.items() if k not in ("start_logit", "start_value")}
    return cpu.grad_keys(g, *(level or log_sums(a)), **rest, want_keys=keys, want_bias=bias)[:2]


def formula(a: dict, g: Tensor, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """The definition, everything materialised: sum_i g_i s_i p_ij q_i and sum_i g_i p_ij."""
    _, p = softmax(candidates(a, dtype))
    weights = g.to(dtype)[..., None] * (p if a["start_logit"] is None else p[..., 1:])
    return (weights * a["scale"].to(dtype)[..., None]).transpose(1, 2) @ a["query"].to(dtype), weights.sum(1)


def check(a: dict, dtype: torch.dtype, extra: float = 0.0) -> None:
    """The kernel's outputs, held to the float64 formula with a share `extra` beyond the bar."""
    g = torch.randn(a["scale"].shape)
    for got, want, naive in zip(run(a, g), formula(a, g), formula(a, g, dtype), strict=True):
        assert_accurate(got, want, naive, extra)


def equal(ours, expected) -> bool:
    return all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))


# 1: a lone row, column or element; 6, 7, 15, 16, 17: beside a tile of keys; 63, 65: beside a vector and a panel; 129, 257: beside a
# block of queries; 193: beside a chunk of keys; 130: beside a chunk of steps; 1200 keys of width 1100: several groups of keys.
SHAPES = [
    (1, 1, 1, 1),
    (1, 65, 1, 17),
    (2, 7, 15, 3),
    (3, 5, 17, 65),
    (1, 129, 193, 130),
    (2, 257, 63, 64),
    (1, 64, 6, 520),
    (1, 3, 1200, 1100),
]


@DTYPES
@pytest.mark.parametrize("shape", [*SHAPES, *WIDE, (1, 17, 580, 800)], ids=lambda s: "x".join(map(str, s)))
def test_ragged_sizes(isa, dtype, shape):
    check(case(*shape, dtype), dtype)


@DTYPES
@ROWS
@CHOSEN
def test_exclusions(isa, dtype, chosen, rows):
    shape = (3, rows, 230, 33)
    check(case(*shape, dtype, **chosen_options(chosen, shape, dtype)), dtype)


@DTYPES
@ROWS
def test_a_limit_drops_the_pairs_that_the_forward_dropped(isa, dtype, rows):
    """Limits that are scores themselves but for rounding: else the weights of a row would not add up to 1."""
    a = case(1, 50, 50, 300, dtype, scale=20)
    a["limit"] = (20 * (a["query"].float() * a["keys"].float()).sum(-1)).contiguous()
    for row in range(0, 50, 3):
        only = {**a, **{k: torch.cat([a[k][:, row : row + 1]] * rows, 1) for k in ("query", "scale", "limit")}}
        admits = cpu.forward(**only, pooled=False)[0].isfinite()
        assert run(only, torch.ones(1, rows))[1].sum().item() == pytest.approx(float(admits.sum()), abs=1e-5 * rows)


def test_labels_are_compared_in_all_64_bits(isa):
    query_labels = torch.tensor([[5, 5 + (1 << 32), -1]])
    key_labels = torch.tensor([[5, 5 + (1 << 32), 6, -1, (1 << 32) - 1]])
    check(case(1, 3, 5, 8, query_labels=query_labels, key_labels=key_labels), torch.float32)


@pytest.mark.parametrize("valid", [0, 1, 64, 299, 300, 10_000, -3])
def test_keys_beyond_valid_are_not_read_and_have_no_gradient(isa, valid):
    a = case(1, 5, 300, 16, valid=torch.tensor([valid]))
    a["keys"], g = a["keys"].clone(), torch.randn(1, 5)
    kept = min(max(valid, 0), 300)
    want = run({**a, "keys": a["keys"][:, :kept].contiguous(), "valid": None}, g)
    a["keys"][:, kept:] = math.nan
    ours = run(a, g)
    assert equal([x[:, :kept] for x in ours], want)
    assert all((x[:, kept:] == 0).all() for x in ours)


@DTYPES
def test_shared_keys_are_the_expanded_keys(isa, dtype):
    a, g = case(3, 9, 130, 20, dtype, shared=True), torch.randn(3, 9)
    assert a["keys"].stride(0) == 0
    check(a, dtype)
    level = log_sums(a)
    assert equal(run(a, g, level), run({**a, "keys": a["keys"].contiguous()}, g, level))


def test_negative_and_zero_scales(isa):
    a = case(1, 12, 70, 9)
    a["scale"] = torch.linspace(-10, 10, 12)[None].clone()
    a["scale"][0, 5] = 0
    check(a, torch.float32)


@DTYPES
def test_scale_150_and_logits_far_from_zero(isa, dtype):
    a = case(1, 90, 67, 16, dtype, scale=150)
    for sign in (1, 0, -1):
        b = {**a, "keys": a["keys"].abs(), "query": sign * a["query"].abs()} if sign else a
        check(b, dtype, 150 * 2.0**-24)  # logits are score times log2e s, rounded: a factor that the formula does not have


def test_a_large_lse(isa):
    a = case(1, 64, 100, 16, bias=torch.full((1, 100), 3000.0) + torch.randn(1, 100))
    check(a, torch.float32)


@NOTHING
def test_nothing_admitted(isa, nothing):
    for x in run(case(*NOTHING_SHAPE, **nothing), torch.randn(2, 7)):
        assert (x == 0).all()


@DTYPES
def test_nan_goes_where_the_formula_takes_it(isa, dtype):
    a, g = case(2, 13, 140, 20, dtype), torch.randn(2, 13)
    want = run(a, g)
    broken = {**a, "query": a["query"].clone()}
    broken["query"][0, 4, 3] = math.nan  # the row weighs on every key of its batch entry
    for got, expected in zip(run(broken, g), want, strict=True):
        assert got[0].isnan().all()
        assert torch.equal(got[1], expected[1])
    upstream = g.clone()
    upstream[1, 2] = math.nan
    for got, expected in zip(run(a, upstream), want, strict=True):
        assert got[1].isnan().all()
        assert torch.equal(got[0], expected[0])


@DTYPES
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_excluded_key_may_hold_anything(isa, dtype, value):
    a = case(1, 13, 140, 20, dtype, query_labels=torch.zeros(1, 13, dtype=torch.long), key_labels=torch.arange(140)[None] - 70)
    g = torch.randn(1, 13)
    want = run(a, g)
    a["keys"] = a["keys"].clone()
    a["keys"][0, 70] = value
    ours = run(a, g)
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)
    assert all((x[0, 70] == 0).all() for x in ours)


def test_only_what_is_wanted(isa):
    a, g = case(2, 70, 30, 12), torch.randn(2, 70)
    dkeys, dbias = run(a, g)
    alone, none = run(a, g, bias=False)
    assert torch.equal(alone, dkeys) and none.shape == (0,)
    none, alone = run(a, g, keys=False)
    assert torch.equal(alone, dbias) and none.shape == (0,)
    assert [x.shape for x in run(a, g, keys=False, bias=False)] == [(0,), (0,)]


# the keys are divided, and those that are valid; a batch that threads share; too few keys to divide
@DTYPES
@pytest.mark.parametrize("valid", [None, (450, 1, 0, 100, 10_000)], ids=["all", "valid"])
@pytest.mark.parametrize("shape", [(1, 500, 700, 64), (5, 300, 210, 48), (1, 2000, 90, 64)], ids=lambda s: "x".join(map(str, s)))
def test_any_number_of_threads_gives_the_same_bits(dtype, shape, valid):
    batch, _, columns, _ = shape
    a, g = case(*shape, dtype, bias=torch.zeros(batch, columns)), torch.randn(shape[:2])
    if valid is not None:
        a["valid"] = torch.tensor(valid[:batch])
    level = log_sums(a)
    before = torch.get_num_threads()
    try:
        one, two, three, again = (torch.set_num_threads(threads) or run(a, g, level) for threads in (1, 2, 3, 3))
    finally:
        torch.set_num_threads(before)
    assert equal(one, two) and equal(two, three) and equal(three, again)
    for b, kept in enumerate(() if valid is None else valid[:batch]):
        assert all((out[b, min(kept, columns) :] == 0).all() for out in three)


def test_empty_batches_queries_and_banks():
    for shape in ((0, 4, 10, 3), (2, 0, 10, 3), (2, 4, 0, 3)):
        dkeys, dbias = run(case(*shape), torch.ones(shape[:2]))
        assert dkeys.shape == (shape[0], *shape[2:]) and dbias.shape == (shape[0], shape[2])
        assert (dkeys == 0).all() and (dbias == 0).all()


def test_no_matrix_of_all_pairs():
    """Beside its output a call allocates the scratch of a thread alone."""
    a, g = case(1, 3000, 3000, 16), torch.ones(1, 3000)
    level = log_sums(a)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(a, g, level)
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < largest < 2 << 20  # 3000 x 3000 floats are 34 MB


def test_opcheck():
    shape = (2, 7, 70, 5)
    made = chosen_options("all", shape)
    for a in (case(*shape), case(*shape, shared=True), case(*shape, **made)):
        level = log_sums(a)
        rest = [v for k, v in a.items() if k not in ("start_logit", "start_value")]
        for want in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                torch.ops.kdfast.similarity_grad_keys.default,
                (torch.randn(2, 7), None, *level, *rest[:4], None, *rest[4:], *want, False, 0),
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(slope=torch.ones(2, 6)), "slope has size"),
        (lambda a: a.update(slope=torch.ones(2, 7).double()), "slope has dtype"),
        (lambda a: a.update(slope=torch.ones(2, 1).expand(2, 7)), "slope must be contiguous"),
        (lambda a: a.update(lse=torch.ones(2, 7, 1)), "lse must have 2 dimensions"),
        (lambda a: a.update(lse_low=torch.ones(2, 8)), "lse_low has size"),
        (lambda a: a.update(keys=a["keys"][..., :4]), "keys has size"),
        (lambda a: a.update(query_labels=torch.zeros(2, 7, dtype=torch.long)), "come together"),
        (lambda a: a.update(query=a["query"].double(), keys=a["keys"].double()), "takes float32, bfloat16 or float16"),
    ],
)
def test_bad_arguments(change, message):
    a = {k: v for k, v in case(2, 7, 70, 5).items() if k not in ("start_logit", "start_value")}
    a |= {"slope": torch.ones(2, 7), "lse": torch.ones(2, 7), "lse_low": torch.zeros(2, 7)}
    change(a)
    with pytest.raises(RuntimeError, match=message):
        cpu.grad_keys(**a, want_keys=True, want_bias=True)
