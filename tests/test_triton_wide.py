"""The streaming softmax of wide rows in Triton, slab by slab: the tests of test_triton_similarity.py on this path."""

import math

import pytest
import torch
from similarity_kernel_cases import NOTHING, NOTHING_SHAPE, case, chosen_options
from test_triton_similarity import DEVICE, check, forward, grad_keys, grad_rows

from kdfast import functional, ops
from kdfast._ops.similarity import triton
from kdfast._ops.similarity.triton import slabs as triton_slabs


@pytest.fixture(autouse=True)
def every_row_is_wide(monkeypatch):
    """And several slabs, cut along both sides."""
    monkeypatch.setattr(triton, "MAX_BYTES", 0)
    monkeypatch.setattr(triton, "MAX_BYTES_SMALL", 0)
    monkeypatch.setattr(triton_slabs, "STATISTICS_PAIRS", 2 * 32 * 32)
    monkeypatch.setattr(triton_slabs, "WEIGHTS_PAIRS", 2 * 32 * 32)


# a lone pair; several entries in a slab; several slabs of columns; of rows and columns, in whole tiles and steps
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 31, 17), (1, 33, 70, 3), (1, 64, 32, 16)])
def test_ragged_sizes(shape):
    check(case(*shape))


@pytest.mark.parametrize("chosen", ["start", "valid", "all"])
def test_exclusions(chosen):
    shape = (1, 33, 50, 9)
    check(case(*shape, **chosen_options(chosen, shape)))


def test_values_other_than_the_keys():
    shape = (1, 9, 70, 20)
    check(case(*shape, **chosen_options("start", shape)), value_width=40)


def test_a_shared_bank_is_the_expanded_bank():
    a = case(3, 20, 70, 20, shared=True)
    b = {**a, "keys": a["keys"].contiguous()}
    for x, y in zip(*(forward(**c, pooled=True) for c in (a, b)), strict=True):
        assert torch.equal(x, y)


@NOTHING
def test_nothing_admitted(nothing):
    a = case(*NOTHING_SHAPE, **nothing)
    lse, pooled, low = forward(**a, pooled=True)
    assert (lse == -math.inf).all() and (pooled == 0).all() and (low == 0).all()
    rest = {k: v for k, v in a.items() if k not in ("start_logit", "start_value")}
    sums = grad_rows(torch.randn(2, 7), lse, low, **rest), grad_keys(torch.randn(2, 7), lse, low, **rest, want_keys=True, want_bias=True)
    assert all((x == 0).all() for side in sums for x in side)


def test_rows_beyond_valid_do_no_harm():
    a = case(1, 9, 100, 8, valid=torch.tensor([37]))
    h, g = torch.randn(1, 9, 8), torch.ones(1, 9)
    rest = {k: v for k, v in a.items() if k not in ("start_logit", "start_value")}

    def everything():
        lse, pooled, low = forward(**a, pooled=True)
        keys = grad_keys(g, lse, low, **rest, want_keys=True, want_bias=True, h=h)
        return lse, pooled, *grad_rows(g, lse, low, **rest, h=h), *keys

    want = everything()
    a["keys"][:, 37:] = math.nan
    for got, expected in zip(everything(), want, strict=True):
        assert torch.equal(got, expected)


def test_nan_reaches_its_rows():
    a = case(1, 6, 70, 9)
    a["query"][0, 2, 3] = math.nan
    lse, pooled, _ = forward(**a, pooled=True)
    assert lse[0, 2].isnan() and pooled[0, 2].isnan().all()
    assert lse[0, [0, 1, 3, 4, 5]].isfinite().all() and pooled[0, [0, 1, 3, 4, 5]].isfinite().all()


def test_extreme_scales():
    a = case(1, 12, 70, 9)
    a["scale"] = torch.linspace(-1e4, 1e4, 12)[None].clone()
    check(a)


def test_fp16_inputs():
    check(case(1, 33, 50, 24, torch.float16))


def test_losses_and_their_gradients():
    torch.manual_seed(0)
    q, k, bank = (torch.nn.functional.normalize(torch.randn(n, 20), dim=-1).to(DEVICE).requires_grad_() for n in (13, 13, 90))

    def gradients(impl):
        loss = functional.info_nce(q, k, bank, temperature=0.1, impl=impl)
        lse, pooled = ops.similarity_softmax(q, bank, scale=2.0, impl=impl)
        return torch.autograd.grad(loss + lse.sum() + pooled.square().sum(), (q, k, bank))

    for x, y in zip(gradients("triton"), gradients("torch"), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)
