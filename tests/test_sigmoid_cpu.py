"""The C++ kernels of the sigmoid pair loss against the float64 formula, under every instruction set of this machine."""

import math

import pytest
import torch
from similarity_kernel_cases import DTYPES, assert_accurate

from kdfast._core import extension
from kdfast._ops.similarity.losses import sigmoid  # noqa: F401  (fakes)

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))
OPS = torch.ops.kdfast


def case(batch, rows, columns, width, dtype=torch.float32, *, scale=20.0) -> dict:
    x, y = (torch.nn.functional.normalize(torch.randn(batch, n, width), dim=-1).to(dtype) for n in (rows, columns))
    scale, shift = torch.rand(batch, rows) * scale, 5 * torch.randn(batch, rows)
    return {"x": x, "y": y, "scale": scale, "shift": shift, "positive": torch.randint(-1, columns, (batch, rows))}


def run(a: dict, g: torch.Tensor, want=(True, True)) -> tuple[torch.Tensor, ...]:
    """(losses, sums of x, sums of y, sums of the weights)."""
    products = 2 if a["x"].dtype == torch.bfloat16 else 0
    return OPS.sigmoid_pairs(*a.values(), products), *OPS.sigmoid_gradients(g, *a.values(), *want, products)


def formula(a: dict, g: torch.Tensor, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """The definition, everything materialised."""
    x, y, scale, shift, g = (t.to(dtype) for t in (a["x"], a["y"], a["scale"], a["shift"], g))
    z = scale[..., None] * (x @ y.mT) + shift[..., None]
    sign = torch.where(a["positive"][..., None] == torch.arange(y.shape[1]), -1.0, 1.0).to(dtype)
    weights = g[..., None] * sign * torch.sigmoid(sign * z)
    return -torch.nn.functional.logsigmoid(-sign * z).sum(-1), weights @ y, weights.mT @ (scale[..., None] * x), weights.sum(-1)


def check(a: dict) -> None:
    g = torch.randn(a["scale"].shape)
    for got, want, naive in zip(run(a, g), formula(a, g), formula(a, g, a["x"].dtype), strict=True):
        assert_accurate(got, want, naive)


# a lone pair; beside a tile, a vector and a panel; beside a chunk of rows, a block of columns and a chunk of steps; several groups of rows
SHAPES = [(1, 1, 1, 1), (2, 7, 65, 3), (3, 5, 257, 65), (1, 300, 130, 130), (2, 257, 513, 33)]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_ragged_sizes(isa, dtype, shape):
    check(case(*shape, dtype))


def test_extreme_logits(isa):
    check(case(1, 70, 130, 16, scale=1e4))
    a = case(1, 70, 130, 16, scale=0.0)
    check({**a, "scale": torch.linspace(-10, 10, 70)[None], "shift": torch.linspace(-200, 200, 70)[None]})


def test_matched_pairs_keep_their_digits(isa):
    """A row whose only pair is a positive far on its side loses e^-z, not the rounding of softplus(z) - z."""
    a = case(1, 20, 1, 8, scale=0.0)
    a |= {"shift": torch.linspace(5, 60, 20)[None], "positive": torch.zeros(1, 20, dtype=torch.long)}
    torch.testing.assert_close(run(a, torch.ones(1, 20))[0], torch.exp(-a["shift"]), rtol=1e-2, atol=0)


@DTYPES
def test_nan_goes_where_the_formula_takes_it(isa, dtype):
    a = case(2, 40, 70, 20, dtype)
    g = torch.randn(2, 40)
    want = run(a, g)
    a["x"] = a["x"].clone()
    a["x"][0, 4, 3] = math.nan
    for got, before, expected in zip(run(a, g), want, formula(a, g), strict=True):
        assert torch.equal(got[1], before[1])
        assert torch.equal(got.isnan(), expected.isnan())


def test_only_what_is_wanted(isa):
    a, g = case(2, 70, 130, 12), torch.randn(2, 70)
    _, x_sums, y_sums, weights = run(a, g)
    _, x_alone, none, again = run(a, g, (True, False))
    assert torch.equal(x_alone, x_sums) and none.shape == (0,) and torch.equal(again, weights)
    _, none, y_alone, _ = run(a, g, (False, True))
    assert torch.equal(y_alone, y_sums) and none.shape == (0,)
    assert torch.equal(run(a, g, (False, False))[3], weights)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 400, 500, 96), (3, 150, 210, 64)], ids=lambda s: "x".join(map(str, s)))
def test_threads_agree_and_repeat(threads, dtype, shape):
    a, g = case(*shape, dtype), torch.randn(shape[:2])
    check(a)
    assert all(torch.equal(x, y) for x, y in zip(run(a, g), run(a, g), strict=True))


def test_empty_batches_and_sides():
    for shape in ((0, 4, 10, 3), (2, 0, 10, 3), (2, 4, 0, 3)):
        a = case(*shape[:2], max(shape[2], 1), shape[3])
        a["y"] = a["y"][:, : shape[2]].contiguous()
        for got in run(a, torch.ones(shape[:2])):
            assert (got == 0).all()


def test_opcheck():
    a = case(2, 7, 70, 5)
    torch.library.opcheck(OPS.sigmoid_pairs.default, (*a.values(), 0))
    for want in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(OPS.sigmoid_gradients.default, (torch.randn(2, 7), *a.values(), *want, 0))


def test_bad_arguments():
    a = case(2, 7, 70, 5)
    for change, message in (({"shift": torch.ones(2, 6)}, "shift has size"), ({"positive": torch.ones(2, 7)}, "positive has dtype")):
        with pytest.raises(RuntimeError, match=message):
            OPS.sigmoid_pairs(*(a | change).values(), 0)
