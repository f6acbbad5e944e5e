"""The C++ kernels for log-sum-exps of rows and columns against the float64 formula, under every instruction set of this machine."""

import math

import pytest
import torch
from similarity_kernel_cases import DTYPES, assert_accurate
from torch import Tensor

from kdfast._core import extension
from kdfast._ops.similarity import symmetric  # noqa: F401  (fakes)

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))
OPS = torch.ops.kdfast


def case(batch, rows, columns, width, dtype=torch.float32, *, scale=20.0, labels=False) -> dict:
    x, y = (torch.nn.functional.normalize(torch.randn(batch, n, width), dim=-1).to(dtype) for n in (rows, columns))
    made = {"x": x, "y": y, "scale": torch.rand(batch, rows) * scale, "x_labels": None, "y_labels": None}
    if labels:
        made |= {f"{side}_labels": torch.randint(-2, 5, (batch, n)) << 31 for side, n in (("x", rows), ("y", columns))}
    return made


def products(a: dict) -> int:
    return 2 if a["x"].dtype == torch.bfloat16 else 0


def run(a: dict, g: tuple[Tensor, Tensor], want=(True, True)) -> tuple[Tensor, ...]:
    """(row_lse, column_lse, sums of x, sums of y)."""
    statistics = OPS.symmetric_lse(*a.values(), products(a))
    return *statistics[:2], *OPS.symmetric_gradients(*g, *statistics, *a.values(), *want, products(a))


def upstream(a: dict) -> tuple[Tensor, Tensor]:
    return torch.randn(a["x"].shape[:2]), torch.randn(a["y"].shape[:2])


def formula(a: dict, g: tuple[Tensor, Tensor], dtype=torch.float64) -> tuple[Tensor, ...]:
    """The definition, everything materialised."""
    x, y, scale, (row_g, column_g) = a["x"].to(dtype), a["y"].to(dtype), a["scale"].to(dtype), (side.to(dtype) for side in g)
    z = scale[..., None] * (x @ y.mT)
    if a["x_labels"] is not None:
        z = z.masked_fill(a["x_labels"][..., None] == a["y_labels"][:, None], -math.inf)
    rows, columns = z.logsumexp(-1), z.logsumexp(-2)
    p_rows = torch.where(rows[..., None] == -math.inf, 0, (z - rows[..., None]).exp())
    p_columns = torch.where(columns[:, None] == -math.inf, 0, (z - columns[:, None]).exp())
    weights = row_g[..., None] * p_rows + column_g[:, None] * p_columns
    return rows, columns, weights @ y, weights.mT @ (scale[..., None] * x)


def check(a: dict, g: tuple[Tensor, Tensor] | None = None) -> None:
    g = upstream(a) if g is None else g
    for got, want, naive in zip(run(a, g), formula(a, g), formula(a, g, a["x"].dtype), strict=True):
        assert_accurate(got, want, naive)


def equal(ours, expected) -> bool:
    return all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))


# 1: a lone row, column or element; 7, 17: beside a tile; 63, 65: beside a vector and a panel; 130: beside a chunk of steps; 300, 257, 513:
# beside a chunk of rows, a group of them and a block of columns; 1200 rows of width 1100: several groups of rows pass by.
SHAPES = [(1, 1, 1, 1), (2, 7, 65, 3), (1, 63, 17, 15), (3, 5, 257, 65), (1, 300, 130, 130), (2, 257, 513, 33), (1, 1200, 3, 1100)]


@DTYPES
@pytest.mark.parametrize("labels", [False, True], ids=["all pairs", "labels"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_ragged_sizes(isa, dtype, shape, labels):
    check(case(*shape, dtype, labels=labels))


@DTYPES
@pytest.mark.parametrize("scale", [150.0, 1e4])
def test_logits_too_far_apart_for_one_exponential(isa, dtype, scale):
    check(case(1, 70, 300, 16, dtype, scale=scale))


def test_some_rows_far_from_the_others(isa):
    """One exponential serves most rows of these tiles, two the others."""
    a = case(1, 140, 300, 16)
    a["scale"][0, ::7] = 400
    a["y"][0, 130:140] *= 30
    check(a)


def test_negative_and_zero_scales(isa):
    a = case(1, 70, 65, 9, labels=True)
    a["scale"] = torch.linspace(-10, 10, 70)[None].clone()
    a["scale"][0, 5] = 0
    check(a)


def test_precise_products(isa):
    """bf16x3 keeps 2^-15 of the scores."""
    a = case(1, 70, 90, 40)
    for got, want in zip(OPS.symmetric_lse(*a.values(), 1)[:2], formula(a, upstream(a))[:2], strict=True):
        assert (got - want).abs().max() < 20 * 2.0**-15


def test_a_pair_of_every_row_left_out(isa):
    """As CLIP has it: each row's own column; the labels in order, so that most blocks hold none of a row's."""
    a = case(1, 300, 300, 40)
    check({**a, "x_labels": torch.arange(300)[None] + (1 << 40), "y_labels": torch.arange(300)[None] + (1 << 40)})


@DTYPES
def test_nothing_left_in(isa, dtype):
    a = case(2, 9, 70, 12, dtype)
    a |= {"x_labels": torch.ones(2, 9, dtype=torch.long), "y_labels": torch.ones(2, 70, dtype=torch.long)}
    a["y_labels"][0, 3] = 0
    check(a)
    rows, columns, x_sums, _ = run(a, upstream(a))
    assert (rows[1] == -math.inf).all() and (columns[1] == -math.inf).all() and (x_sums[1] == 0).all()


@DTYPES
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_go_where_the_formula_takes_them(isa, dtype, value):
    a = case(2, 40, 70, 20, dtype)
    g = upstream(a)
    want = run(a, g)
    a["x"] = a["x"].clone()
    a["x"][0, 4, 3] = value
    for got, before, expected in zip(run(a, g), want, formula(a, g), strict=True):
        assert torch.equal(got[1], before[1])
        assert (got.isfinite() <= expected.isfinite()).all()
        if value != value:
            assert torch.equal(got.isnan(), expected.isnan())


def test_only_what_is_wanted(isa):
    a = case(2, 70, 130, 12)
    g = upstream(a)
    _, _, x_sums, y_sums = run(a, g)
    _, _, x_alone, none = run(a, g, (True, False))
    assert torch.equal(x_alone, x_sums) and none.shape == (0,)
    _, _, none, y_alone = run(a, g, (False, True))
    assert torch.equal(y_alone, y_sums) and none.shape == (0,)
    assert [x.shape for x in run(a, g, (False, False))[2:]] == [(0,), (0,)]


# both are cut; only the rows; entries are shared out; entries and each of them
@DTYPES
@pytest.mark.parametrize(
    "shape", [(1, 400, 500, 96), (1, 900, 50, 96), (4, 90, 210, 64), (3, 150, 210, 64)], ids=lambda s: "x".join(map(str, s))
)
def test_threads_agree_and_repeat(threads, dtype, shape):
    a = case(*shape, dtype)
    g = upstream(a)
    check(a, g)
    assert equal(run(a, g), run(a, g))


def test_empty_batches_and_sides():
    for shape in ((0, 4, 10, 3), (2, 0, 10, 3), (2, 4, 0, 3)):
        a = case(*shape)
        rows, columns, x_sums, y_sums = run(a, upstream(a))
        assert (rows == -math.inf).all() and (columns == -math.inf).all() and (x_sums == 0).all() and (y_sums == 0).all()
        assert x_sums.shape == a["x"].shape and y_sums.shape == a["y"].shape


def test_no_matrix_of_all_pairs():
    """Beside its outputs a call allocates the scratch of a thread alone."""
    a = case(1, 3000, 3000, 16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(a, upstream(a))
    assert 0 < max(abs(event.self_cpu_memory_usage) for event in profile.events()) < 3 << 20  # 3000 x 3000 floats are 34 MB


def test_opcheck():
    for a in (case(2, 7, 70, 5), case(2, 7, 70, 5, labels=True)):
        torch.library.opcheck(OPS.symmetric_lse.default, (*a.values(), 0))
        statistics = OPS.symmetric_lse(*a.values(), 0)
        for want in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(OPS.symmetric_gradients.default, (*upstream(a), *statistics, *a.values(), *want, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(x=a["x"][..., :4].contiguous()), "y has size"),
        (lambda a: a.update(x=a["x"][0]), "must have 3 dimensions"),
        (lambda a: a.update(x=a["x"].double(), y=a["y"].double()), "takes float32, bfloat16 or float16"),
        (lambda a: a.update(scale=torch.ones(2, 1).expand(2, 7)), "scale must be contiguous"),
        (lambda a: a.update(x_labels=torch.zeros(2, 7, dtype=torch.long)), "come together"),
        (lambda a: a.update(x_labels=torch.zeros(2, 7), y_labels=torch.zeros(2, 70)), "x_labels has dtype"),
    ],
)
def test_bad_arguments(change, message):
    a = case(2, 7, 70, 5)
    change(a)
    with pytest.raises(RuntimeError, match=message):
        OPS.symmetric_lse(*a.values(), 0)
