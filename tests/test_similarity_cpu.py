"""The C++ similarity kernel against the float64 formula, under every instruction set of this machine."""

import math

import pytest
import torch
from similarity_kernel_cases import (
    CHOSEN,
    DTYPES,
    NOTHING,
    NOTHING_SHAPE,
    ROWS,
    ULP,
    WIDE,
    assert_accurate,
    candidates,
    case,
    chosen_options,
    options,
    softmax,
)
from torch import Tensor

from kdfast._core import extension
from kdfast._ops.similarity import cpu

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))


def formula(a: dict, dtype=torch.float64, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition, everything materialised: log sum_j exp(z_ij) and sum_j p_ij v_j."""
    logits = candidates(a, dtype)
    values = (a["keys"] if values is None else values).to(dtype)[:, None].expand(-1, logits.shape[1], -1, -1)  # [B, N, M, D]
    if a["start_logit"] is not None:
        values = torch.cat([a["start_value"].to(dtype)[:, :, None], values], 2)
    lse, p = softmax(logits)
    return lse, (p[..., None, :] @ values)[..., 0, :]


def check(a: dict, dtype: torch.dtype, **given) -> tuple[Tensor, Tensor]:
    """The kernel's outputs, held to the float64 formula."""
    lse, pooled, _ = cpu.forward(**a, pooled=True, **given)
    want_lse, want_pooled = formula(a, values=given.get("values"))
    naive_lse, naive_pooled = formula(a, dtype, values=given.get("values"))
    for got, want, naive in ((lse, want_lse, naive_lse), (pooled, want_pooled, naive_pooled)):
        assert_accurate(got, want, naive)
    return lse, pooled


# 1: a lone row, column or element; 6 and 7: a whole row tile and one more; 15, 17, 63, 65: beside a vector and a panel;
# 255, 257: beside a block of columns; 97: beside a chunk of rows; 128 < 130: beside a chunk of steps; 520: many panels.
SHAPES = [(1, 1, 1, 1), (1, 6, 1, 17), (2, 7, 65, 3), (1, 3, 63, 15), (3, 5, 257, 65), (1, 97, 255, 130), (2, 13, 513, 64), (1, 2, 66, 520)]
SHAPES += [(1, 70, 3, 33), (2, 65, 13, 16)]  # few keys of many rows, multiplied where they lie


@DTYPES
@pytest.mark.parametrize("shape", [*SHAPES, *WIDE], ids=lambda s: "x".join(map(str, s)))
def test_ragged_sizes(isa, dtype, shape):
    check(case(*shape, dtype), dtype)


@DTYPES
@ROWS
@CHOSEN
def test_exclusions(isa, dtype, chosen, rows):
    shape = (3, rows, 300, 33)
    check(case(*shape, dtype, **chosen_options(chosen, shape, dtype)), dtype)


@DTYPES
@ROWS
@pytest.mark.parametrize("width", [1, 17, 70])
def test_values_other_than_the_keys(isa, dtype, rows, width):
    start = {"start_logit": torch.randn(2, rows), "start_value": torch.randn(2, rows, width).to(dtype)}
    for a in (case(2, rows, 300, 33, dtype, **start), case(2, rows, 300, 33, dtype, shared=True)):
        check(a, dtype, values=torch.randn(2, 300, width).to(dtype))
    check(case(2, rows, 300, 33, dtype, shared=True), dtype, values=torch.randn(1, 300, width).to(dtype).expand(2, -1, -1))


@DTYPES
@pytest.mark.parametrize("widths", [(33, 1024), (1030, 17)], ids=["wide values", "wide keys"])
def test_values_of_another_width_where_one_is_wide(isa, dtype, widths):
    check(case(1, 20, 192, widths[0], dtype), dtype, values=torch.randn(1, 192, widths[1]).to(dtype))


@pytest.mark.parametrize("keys_dtype", [torch.bfloat16, torch.float16])
def test_wide_matrices_of_different_dtypes(isa, keys_dtype):
    a = case(1, 20, 192, 1024, keys_dtype)
    a["query"] = torch.randn(1, 20, 1024)
    want = cpu.forward(**{**a, "keys": a["keys"].float()}, pooled=True)
    assert all(map(torch.equal, cpu.forward(**a, pooled=True), want))


@pytest.mark.parametrize("keys_dtype", [torch.bfloat16, torch.float16])
def test_matrices_of_different_dtypes(isa, keys_dtype):
    """Each matrix is widened as it is packed: the result is that of the widened matrices, to the bit."""
    a, values = case(2, 9, 300, 33, keys_dtype), torch.randn(2, 300, 20).to(keys_dtype)
    a["query"] = torch.randn(2, 9, 33)
    want = cpu.forward(**{**a, "keys": a["keys"].float()}, pooled=True, values=values.float())
    for got, expected in zip(cpu.forward(**a, pooled=True, values=values), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("products", "unit"), [("ieee", 2.0**-23), ("bf16x3", 2.0**-15), ("bf16", 2.0**-7)])
@ROWS
def test_products_keep_what_their_name_says(isa, rows, products, unit):
    """Scores |z| <= 20 of unit rows err by less than 20 units of the products' precision; the pooled rows by as much, relatively."""
    a = case(1, rows, 700, 130, scale=20.0)
    lse, pooled, _ = cpu.forward(**a, pooled=True, products=products)
    want_lse, want_pooled = formula(a)
    assert (lse - want_lse).abs().max() <= 20 * unit
    assert (pooled - want_pooled).abs().max() <= 40 * unit * want_pooled.abs().max()


def test_labels_are_compared_in_all_64_bits(isa):
    """Labels that agree in their low, or in their high, 32 bits are different labels."""
    query_labels = torch.tensor([[5, 5 + (1 << 32), -1]])
    key_labels = torch.tensor([[5, 5 + (1 << 32), 6, -1, (1 << 32) - 1]])
    check(case(1, 3, 5, 8, query_labels=query_labels, key_labels=key_labels), torch.float32)


def test_limit_is_compared_before_the_bias(isa):
    a = case(1, 1, 2, 1, unit=False, bias=torch.tensor([[100.0, -100.0]]), limit=torch.tensor([[1.5]]), scale=1)
    a["query"], a["keys"] = torch.ones(1, 1, 1), torch.tensor([[[1.0], [2.0]]])
    lse, pooled, _ = cpu.forward(**a, pooled=True)
    assert lse.item() == pytest.approx(101.0)
    assert pooled.item() == 1.0


@pytest.mark.parametrize("valid", [0, 1, 64, 299, 300, 10_000, -3])
def test_valid_is_a_clamped_prefix_that_hides_anything(isa, valid):
    """Rows beyond it may be uninitialised memory: they must not be read."""
    a = case(1, 5, 300, 16, valid=torch.tensor([valid]))
    a["keys"] = a["keys"].clone()
    kept = min(max(valid, 0), 300)
    want = cpu.forward(**{**a, "keys": a["keys"][:, :kept].contiguous(), "valid": None}, pooled=True)
    a["keys"][:, kept:] = math.nan
    for got, expected in zip(cpu.forward(**a, pooled=True), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@DTYPES
def test_shared_keys_are_the_expanded_keys(isa, dtype):
    a = case(3, 9, 130, 20, dtype, shared=True)
    assert a["keys"].stride(0) == 0
    lse, pooled = check(a, dtype)
    for got, want in zip(cpu.forward(**{**a, "keys": a["keys"].contiguous()}, pooled=True)[:2], (lse, pooled), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_shared_keys_with_own_bias_labels_and_valid(isa):
    shape = (3, 9, 130, 20)
    made = options(*shape, torch.float32)
    check(case(*shape, shared=True, **made["bias"]), torch.float32)
    check(case(*shape, shared=True, **made["labels"]), torch.float32)
    check(case(*shape, shared=True, **made["valid"]), torch.float32)
    bias, labels = torch.randn(1, 130).expand(3, -1), torch.randint(3, (1, 130)).expand(3, -1)
    shared = {"bias": bias, "query_labels": torch.randint(3, (3, 9)), "key_labels": labels, "valid": torch.tensor([77]).expand(3)}
    check(case(*shape, shared=True, **shared), torch.float32)


@ROWS
def test_negative_and_zero_scales(isa, rows):
    a = case(1, rows, 70, 9)
    a["scale"] = torch.linspace(-10, 10, rows)[None].clone()
    a["scale"][0, rows // 2] = 0
    check(a, torch.float32)


@NOTHING
def test_nothing_admitted(isa, nothing):
    lse, pooled, _ = cpu.forward(**case(*NOTHING_SHAPE, **nothing), pooled=True)
    assert (lse == -math.inf).all()
    assert (pooled == 0).all()
    start = {"start_logit": torch.randn(2, 7), "start_value": torch.randn(2, 7, 5)}
    lse, pooled, _ = cpu.forward(**case(*NOTHING_SHAPE, **nothing, **start), pooled=True)
    torch.testing.assert_close(lse, start["start_logit"], rtol=2e-7, atol=2e-7)
    torch.testing.assert_close(pooled, start["start_value"], rtol=2e-7, atol=0)


def test_dropped_start_counts_for_nothing(isa):
    a = case(1, 4, 40, 5)
    want = cpu.forward(**a, pooled=True)
    a |= {"start_logit": torch.full((1, 4), -math.inf), "start_value": torch.randn(1, 4, 5)}
    for got, expected in zip(cpu.forward(**a, pooled=True), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@DTYPES
@ROWS
def test_low_cosine_rows_at_scale_150(isa, dtype, rows):
    """Every cosine near -1: a fixed shift by the scale would underflow."""
    a = case(1, rows, 300, 32, dtype, scale=150)
    a["keys"] = torch.nn.functional.normalize(-a["query"].float().mean(1, keepdim=True) + 0.05 * torch.randn(1, 300, 32), dim=-1).to(dtype)
    a["query"] = (-a["keys"][:, :rows] + 0.01 * torch.randn(1, rows, 32)).to(dtype)
    check(a, dtype)


@ROWS
def test_logits_below_minus_88_with_a_ragged_bank(isa, rows):
    """The zero padding of the last panel, taken for a logit, would dominate the row."""
    a = case(1, rows, 67, 16, scale=400)
    a["keys"] = a["keys"].abs()
    a["query"] = -a["query"].abs()
    assert formula(a)[0].max() < -88
    check(a, torch.float32)


@ROWS
def test_extreme_logits(isa, rows):
    check(case(1, rows, 100, 16, scale=1e4), torch.float32)
    check(case(1, rows, 100, 16, scale=1e4, bias=torch.randn(1, 100) * 1e4), torch.float32)


@DTYPES
@ROWS
def test_flat_softmax_over_65536_rows(isa, dtype, rows):
    """All weights equal: the sum and the pooled row are means of 65,536 terms."""
    a = case(1, rows, 65536, 8, dtype, scale=1e-3)
    lse, pooled, _ = cpu.forward(**a, pooled=True)
    want_lse, want_pooled = formula(a)
    assert (lse.double() - want_lse).abs().max() < 4 * ULP * 11.1
    # Where the instruction set multiplies bf16, weights near 1 are rounded to multiples of 2^-8 or 2^-7 below and above it.
    assert (pooled.double() - want_pooled).abs().max() < (2e-4 if dtype == torch.bfloat16 else 1e-6)


def test_nan_stays_in_its_rows(isa):
    a = case(2, 13, 140, 20)
    want = cpu.forward(**a, pooled=True)
    a["query"][0, 4, 3] = math.nan
    a["scale"][1, 7] = math.nan
    lse, pooled, _ = cpu.forward(**a, pooled=True)
    broken = torch.zeros(2, 13, dtype=torch.bool)
    broken[0, 4] = broken[1, 7] = True
    assert lse[broken].isnan().all() and pooled[broken].isnan().all()
    torch.testing.assert_close(lse[~broken], want[0][~broken], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pooled[~broken], want[1][~broken], rtol=1e-5, atol=1e-6)


@DTYPES
@ROWS
@pytest.mark.parametrize("bits", [0x7FC0, 0x7FFF, -1], ids=["plain", "all ones", "negative"])
def test_nan_of_any_payload_in_keys_and_bias(isa, dtype, rows, bits):
    payload = bits if dtype != torch.float32 else {0x7FC0: 0x7FC00000, 0x7FFF: 0x7FFFFFFF, -1: -1}[bits]
    if dtype == torch.float16 and bits == 0x7FC0:
        payload = 0x7E00
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    a = case(1, rows, 90, 20, dtype)
    a["keys"] = a["keys"].clone()
    a["keys"].view(integers)[0, 70, 1] = payload
    lse, pooled, _ = cpu.forward(**a, pooled=True)
    assert lse.isnan().all() and pooled.isnan().all()
    lse, *_ = cpu.forward(**case(1, rows, 90, 20, dtype, bias=torch.zeros(1, 90).index_fill(1, torch.tensor([3]), math.nan)), pooled=True)
    assert lse.isnan().all()


def test_start_without_a_value_pools_zero(isa):
    """As the mass of a candidate whose value is not wanted in the pooled row."""
    a = case(1, 9, 70, 12, start_logit=torch.randn(1, 9) * 3)
    want = cpu.forward(**{**a, "start_value": torch.zeros(1, 9, 12)}, pooled=True)
    for got, expected in zip(cpu.forward(**a, pooled=True), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_lse_alone(isa):
    a = case(2, 11, 100, 12)
    lse, pooled, _ = cpu.forward(**a, pooled=False)
    assert pooled.shape == (0,)
    torch.testing.assert_close(lse, cpu.forward(**a, pooled=True)[0], rtol=0, atol=0)


# (1, 4, ...): the bank is divided; (1, 800, ...): the rows are; (5, ...): both, with an odd batch.
@DTYPES
@pytest.mark.parametrize("shape", [(1, 4, 20000, 128), (1, 800, 700, 64), (5, 33, 2100, 48)], ids=lambda s: "x".join(map(str, s)))
def test_threads_agree_and_repeat(threads, dtype, shape):
    a = case(*shape, dtype, **options(*shape, dtype)["start"])
    lse, pooled, _ = cpu.forward(**a, pooled=True)
    for _ in range(3):
        again = cpu.forward(**a, pooled=True)
        assert torch.equal(lse, again[0]) and torch.equal(pooled, again[1])
    torch.set_num_threads(1)
    one = cpu.forward(**a, pooled=True)
    torch.testing.assert_close(lse, one[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pooled, one[1], rtol=0, atol=1e-3 if dtype == torch.bfloat16 else 2e-6)


def test_divided_bank_with_nothing_admitted_in_one_part(threads, isa):
    """One thread's columns are all dropped: its part must count for nothing, not for NaN."""
    shape = (1, 4, 20000, 128)
    bias = torch.zeros(1, 20000)
    bias[:, :10000] = -math.inf
    check_shape = case(*shape, bias=bias)
    lse, pooled, _ = cpu.forward(**check_shape, pooled=True)
    want = formula(check_shape)
    torch.testing.assert_close(lse.double(), want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pooled.double(), want[1], rtol=0, atol=1e-6)
    lse, pooled, _ = cpu.forward(**case(*shape, valid=torch.tensor([3])), pooled=True)
    assert lse.isfinite().all() and pooled.isfinite().all()
    lse, pooled, _ = cpu.forward(**case(*shape, valid=torch.tensor([0])), pooled=True)
    assert (lse == -math.inf).all() and (pooled == 0).all()


def test_empty_batches_and_empty_banks():
    for shape in ((0, 4, 10, 3), (2, 0, 10, 3)):
        lse, pooled, _ = cpu.forward(**case(*shape), pooled=True)
        assert lse.shape == shape[:2] and pooled.shape == (*shape[:2], 3)
    lse, pooled, _ = cpu.forward(**case(2, 4, 0, 3), pooled=True)
    assert (lse == -math.inf).all() and (pooled == 0).all()


def test_opcheck():
    shape = (2, 7, 70, 5)
    made = chosen_options("all", shape)
    for a in (case(*shape), case(*shape, shared=True), case(*shape, **made)):
        for pooled in (True, False):
            for values in (None, torch.randn(2, 70, 3)):
                given = {**a, "start_value": None}.values() if values is not None else a.values()
                first, rest = list(given)[:5], list(given)[5:]
                torch.library.opcheck(torch.ops.kdfast.similarity_softmax.default, (*first, values, *rest, pooled, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(query=a["query"].transpose(0, 1).contiguous().transpose(0, 1)), "query must be contiguous"),
        (lambda a: a.update(keys=a["keys"][..., :4]), "keys has size"),
        (lambda a: a.update(scale=a["scale"].double()), "scale has dtype"),
        (lambda a: a.update(valid=torch.tensor([1])), "valid has size"),
        (lambda a: a.update(start_value=torch.zeros(2, 7, 5)), "start_value needs start_logit"),
        (lambda a: a.update(key_index=torch.zeros(2, 7, dtype=torch.long)), "key_index must have 3 dimensions"),
        (lambda a: a.update(query_labels=torch.zeros(2, 7, dtype=torch.long)), "come together"),
        (lambda a: a.update(query=a["query"].double(), keys=a["keys"].double()), "takes float32, bfloat16 or float16"),
        (lambda a: a.update(query=a["query"][0]), "must have 3 dimensions"),
    ],
)
def test_bad_arguments(change, message):
    a = case(2, 7, 70, 5)
    change(a)
    with pytest.raises(RuntimeError, match=message):
        cpu.forward(**a, pooled=True)


def test_what_it_refuses():
    assert cpu.refuses(device_type="cpu", dtype=torch.bfloat16) is None
    assert "cuda" in cpu.refuses(device_type="cuda", dtype=torch.float32)
    assert "float64" in cpu.refuses(device_type="cpu", dtype=torch.float64)


def test_tile_registers_are_shared_with_other_code(threads, isa):
    """PyTorch's bf16 products use the same registers, on the same threads; each must find its own setting."""
    a = case(1, 64, 300, 96, torch.bfloat16)
    x, y = torch.randn(64, 70).bfloat16(), torch.randn(70, 50).bfloat16()
    want = cpu.forward(**a, pooled=True)
    product = x @ y
    for _ in range(3):
        for got, expected in zip(cpu.forward(**a, pooled=True), want, strict=True):
            assert torch.equal(got, expected)
        assert torch.equal(x @ y, product)
