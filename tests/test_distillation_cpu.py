"""The C++ kernels of similarity distillation against the float64 formula, under every instruction set of this machine."""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from distillation_kernel_cases import NAMES, PRODUCTS, case, formula, forward, grad_keys, logits, options
from similarity_cases import assert_as_good_as
from similarity_kernel_cases import DTYPES, assert_accurate
from torch import Tensor

from kdfast._core import extension
from kdfast.functional import similarity_distillation

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))


def run(a: dict, g: Tensor, products: int = 0) -> tuple[Tensor, ...]:
    loss, difference, log_sums = forward(a, products)
    return loss, forward(a, products, kl=True)[0], difference, log_sums[0], log_sums[2], log_sums[4], grad_keys(a, g, log_sums, products)


def check(a: dict) -> None:
    """What the kernels give, held to the float64 formula.

    bf16 products round their weights to bf16. In dkeys an error of a logit, of up to half a unit in its last place from the rounding of its
    factor, is a share of each weight; a naive formula's errors differ from pair to pair and partly cancel.
    """
    g, bfloat16 = torch.randn(len(a["scale"])), a["student"].dtype == torch.bfloat16
    largest = max(z[z.isfinite()].abs().max().item() for z in (logits(a, side, torch.float64) for side in ("student", "teacher")))
    shares = [2.0**-6 if bfloat16 else 0.0] * 6 + [2.0**-6 if bfloat16 else largest * 2.0**-24]
    ours = run(a, g, PRODUCTS[a["student"].dtype])
    for got, want, naive, share in zip(ours, formula(a, g), formula(a, g, torch.float32), shares, strict=True):
        assert_accurate(got, want, naive, share)


def test_the_own_key_at_a_temperature_of_1e_4(isa):
    """The teacher is then one-hot at its own key, whose logit, 10^4, must be the same wherever it is compared."""
    a = case(9, 130, 24, 24, teacher_scale=torch.full((9,), 1e4), start_logit=torch.rand(9) * 5)
    a["teacher_start_logit"] = 1e4 * (a["teacher"] * a["teacher"]).sum(-1)
    check(a)
    loss, _, log_sums = forward(a)
    torch.testing.assert_close(loss, log_sums[0] - a["start_logit"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(forward(a, kl=True)[0], loss, rtol=1e-6, atol=1e-6)


# 1: a lone row, column or element; 6, 7, 15, 17: beside a tile of rows; 63, 65: beside a vector and a panel; 129, 257, 513: beside a block
# of columns; 97, 193: beside a chunk of rows; 130: beside a chunk of steps; 520: many panels; 3 and 13 keys of many rows: where they lie.
SHAPES = [
    (1, 1, 1, 1),
    (7, 65, 3, 17),
    (6, 63, 15, 65),
    (17, 257, 65, 3),
    (97, 129, 130, 16),
    (193, 40, 16, 130),
    (13, 513, 64, 128),
    (3, 66, 8, 520),
    (70, 3, 17, 33),
    (65, 13, 32, 16),
]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_ragged_sizes(isa, dtype, shape):
    check(case(*shape, dtype))


# Rows so wide that their blocks are packed in pieces: of either side, of both, and not whole vectors.
@DTYPES
@pytest.mark.parametrize("shape", [(20, 300, 4096, 24), (20, 300, 33, 4096), (40, 520, 2047, 4099)], ids=lambda s: "x".join(map(str, s)))
def test_wide_rows(isa, dtype, shape):
    check(case(*shape, dtype))


@DTYPES
@pytest.mark.parametrize("rows", [20, 70], ids=["floats on vectors", "on tiles"])
@pytest.mark.parametrize("chosen", ["bias", "start", "index", "valid", "all"])
def test_exclusions(isa, dtype, rows, chosen):
    given = {k: v for name, part in options(rows, 300).items() if chosen in (name, "all") for k, v in part.items()}
    check(case(rows, 300, 33, 24, dtype, **given))


def test_sides_of_different_dtypes(isa):
    """Each matrix is widened as it is packed: the result is that of the widened matrices, to the bit."""
    a, g = case(9, 300, 33, 20, torch.bfloat16, torch.float16), torch.randn(9)
    wide = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in a.items()}
    assert all(torch.equal(x, y) for x, y in zip(run(a, g), run(wide, g), strict=True))


@DTYPES
def test_one_bank_is_two_equal_banks(isa, dtype):
    a, g = case(40, 300, 33, 33, dtype), torch.randn(40)
    one, two = a | {"teacher_keys": a["keys"]}, a | {"teacher_keys": a["keys"].clone()}
    assert all(torch.equal(x, y) for x, y in zip(run(one, g, PRODUCTS[dtype]), run(two, g, PRODUCTS[dtype]), strict=True))
    check(one)


@pytest.mark.parametrize(("products", "unit"), [(0, 2.0**-23), (1, 2.0**-15), (2, 2.0**-7)], ids=["ieee", "bf16x3", "bf16"])
def test_products_keep_what_their_name_says(isa, products, unit):
    a, g = case(40, 700, 130, 64, scale=torch.full((40,), 20.0), teacher_scale=torch.full((40,), 20.0)), torch.ones(40)
    loss, kl, difference, *_ = run(a, g, products)
    want_loss, want_kl, want_difference, *_ = formula(a, g)
    assert (loss - want_loss).abs().max() <= 40 * unit
    assert (kl - want_kl).abs().max() <= 40 * unit
    assert (difference - want_difference).abs().max() <= 40 * unit


@pytest.mark.parametrize("shape", [(5, 6000, 64, 96), (390, 400, 64, 32)], ids=["columns", "rows"])
def test_threads_divide_rows_or_columns(isa, threads, shape):
    """Of 5 rows the columns are divided and the parts merged. Equal calls give equal bits."""
    rows, columns = shape[:2]
    a, g = case(*shape, **{k: v for part in options(rows, columns).values() for k, v in part.items()}), torch.randn(rows)
    check(a)
    assert all(torch.equal(x, y) for x, y in zip(run(a, g), run(a, g), strict=True))


def test_parts_without_a_column_or_a_weight(threads):
    """Of a divided bank one part admits nothing, by bias or by valid; or everything but the start is left out; or that too."""
    shape = (70, 4000, 64, 320)
    for given in ({"bias": torch.cat([torch.zeros(1500), torch.full((2500,), -math.inf)])}, {"valid": torch.tensor([2])}):
        check(case(*shape, **given))
    nothing = {"bias": torch.full((4000,), -math.inf)}
    for kl in (False, True):
        start = {"start_logit": torch.ones(70), "teacher_start_logit": torch.ones(70)}
        loss, difference, log_sums = forward(case(*shape, **nothing, **start), kl=kl)
        assert (loss == 0).all() and (difference == 0).all() and (log_sums[:4:2] == 1).all()
        loss, difference, log_sums = forward(case(*shape, **nothing), kl=kl)
        assert (loss == 0).all() and (difference == 0).all() and (log_sums[:4:2] == -math.inf).all()


@pytest.mark.parametrize("columns", [1, 300, 4000])
def test_a_start_that_the_student_has_not(isa, threads, columns):
    """inf where the teacher gives it a weight; where its weight has vanished, as any pair without one."""
    vanishes = torch.arange(70) % 2 == 0
    without = case(70, columns, 16, 16)
    start = {"start_logit": torch.full((70,), -math.inf), "teacher_start_logit": torch.where(vanishes, -500.0, 30.0)}
    for kl in (False, True):
        loss, expected = (forward(a, kl=kl)[0] for a in (without | start, without))
        assert (loss[~vanishes] == math.inf).all()
        torch.testing.assert_close(loss[vanishes], expected[vanishes], rtol=1e-6, atol=1e-7)


def test_valid_hides_anything(isa):
    """Rows beyond it may be uninitialised memory: they must not be read, and have no gradient."""
    a, g = case(5, 300, 16, 24, valid=torch.tensor([70])), torch.randn(5)
    cut = a | {"keys": a["keys"][:70].clone(), "teacher_keys": a["teacher_keys"][:70].clone(), "valid": None}
    want = run(cut, g)
    a["keys"][70:] = a["teacher_keys"][70:] = math.nan
    *ours, dkeys = run(a, g)
    assert all(torch.equal(x, y) for x, y in zip(ours, want, strict=False))
    assert torch.equal(dkeys[:70], want[-1]) and (dkeys[70:] == 0).all()


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_nearly_hard_softmaxes(isa, scale):
    """Scores of rows that are one-hot are exact, so that only the softmaxes' own roundings are left."""
    n, m, d = 7, 300, 8
    onehot = lambda rows: F.one_hot(torch.randint(d, (rows,)), d).float()
    big = torch.full((n,), scale)
    check(case(n, m, d, d, student=onehot(n), keys=onehot(m), teacher=onehot(n), teacher_keys=onehot(m), scale=big, teacher_scale=big))


@cache
def alike(temperature: float, noise: float) -> list[tuple]:
    """Problems of a student `noise` away from its teacher, and the formula's losses in float64 and float32: the same for every kernel."""
    torch.manual_seed(0)
    unit = lambda rows: F.normalize(torch.randn(rows, 32), dim=1)
    bank, scale = unit(4000), torch.full((40,), 1 / temperature)
    found = []
    for teacher in (unit(40), F.normalize(bank[:40] + 0.2 * unit(40), dim=1)):
        student = F.normalize(teacher + noise * unit(40), dim=1) if noise else teacher
        a = case(40, 4000, 32, 32, student=student, teacher=teacher, keys=bank, teacher_keys=bank, scale=scale, teacher_scale=scale)
        found.append((a, *(formula(a, torch.ones(40), dtype)[:2] for dtype in (torch.float64, torch.float32))))
    return found


@pytest.mark.parametrize("threads", [1, 2], ids=["whole", "parts"], indirect=True)
@pytest.mark.parametrize("noise", [0, 1e-5, 1e-4, 1e-2, 1])
@pytest.mark.parametrize("temperature", [0.3, 0.07, 0.02])
def test_losses_are_as_exact_as_sums_over_the_columns(isa, threads, temperature, noise):
    """From equal softmaxes to a KL of several nats: a difference of lse and mean logits would be off by the logits' own rounding."""
    for a, wanted, naive in alike(temperature, noise):
        cross, kl, difference, *_, dkeys = run(a, torch.ones(40))
        assert_as_good_as(cross, naive[0], wanted[0])
        assert_as_good_as(kl, naive[1], wanted[1])
        if noise == 0:
            assert all((x == 0).all() for x in (kl, difference, dkeys))


def test_a_shift_of_all_logits_costs_only_their_rounding(isa):
    a = case(6, 300, 32, 32, bias=torch.full((300,), 1e5))  # logits are rounded to 2^-7
    for kl, want in zip((False, True), formula(a | {"bias": None}, torch.ones(6)), strict=False):
        assert (forward(a, kl=kl)[0] - want).abs().max() < 0.05


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_bad_row_spoils_itself_alone(isa, name, bad):
    a = case(20, 300, 33, 40)
    want = forward(a)
    a[name][3, 5] = bad
    for got, expected in zip(forward(a), want, strict=True):
        rows = got.mT if got.dim() == 2 and got.shape[0] == 5 else got
        expected = expected.mT if rows is not got else expected
        keep = torch.arange(20) != 3
        torch.testing.assert_close(rows[keep], expected[keep], rtol=1e-5, atol=1e-5)
    assert forward(a)[0][3].isnan() and forward(a, kl=True)[0][3].isnan()


def test_own_key_among_rounded_weights(isa):
    """The own key's weight is not rounded to bf16, the others are: what they add up to is what the mean of the logits is divided by."""
    bank, noise, more = (F.normalize(torch.randn(count, 32), dim=1) for count in (400, 100, 100))
    teacher = F.normalize(bank[:100] + 0.1 * noise, dim=1)
    student = F.normalize(teacher + 0.3 * more, dim=1)

    def formula(student, teacher, bank):
        z = (torch.cat([(x * teacher).sum(1, keepdim=True), x @ bank.T], 1) / 0.05 for x in (student, teacher))
        log_p, log_q = (x.log_softmax(1) for x in z)
        return -(log_q.exp() * log_p).sum(1)

    rows = [x.bfloat16().float() for x in (student, teacher, bank)]
    with torch.autocast("cpu", torch.bfloat16):
        naive = formula(*rows)
        ours = similarity_distillation(*rows, student_temperature=0.05, teacher_temperature=0.05, own=True, reduction="none", impl="cpu")
    truth = formula(*(x.double() for x in rows))
    assert (ours - truth).norm() <= 2 * (naive - truth).norm()


def test_equal_sides_cancel(isa):
    a, g = case(20, 300, 33, 33), torch.randn(20)
    a |= {"teacher": a["student"], "teacher_keys": a["keys"].clone(), "teacher_scale": a["scale"]}
    _, kl, difference, *_, dkeys = run(a, g)
    assert all((x == 0).all() for x in (kl, difference, dkeys))


def test_no_rows():
    a = case(0, 30, 8, 8)
    assert [tuple(x.shape) for x in forward(a)] == [(0,), (0, 8), (5, 0)]
    assert (grad_keys(a, torch.ones(0), torch.ones(5, 0)) == 0).all()


@pytest.mark.parametrize("name", ["student", "keys", "teacher", "teacher_keys", "scale"])
def test_what_is_not_as_documented_is_refused(name):
    a = case(5, 30, 8, 12)
    for wrong in (a[name][:-1], a[name].double(), a[name].mT if a[name].dim() == 2 else a[name][None]):
        with pytest.raises(RuntimeError):
            forward(a | {name: wrong})


def test_opcheck():
    a = case(5, 30, 8, 12, **{k: v for part in options(5, 30).values() for k, v in part.items()})
    torch.library.opcheck(torch.ops.kdfast.similarity_distillation.default, (*(a[name] for name in NAMES), 0))
    given = tuple(a[name] for name in NAMES if not name.endswith("start_logit"))
    torch.library.opcheck(torch.ops.kdfast.similarity_distillation_grad_keys.default, (torch.randn(5), forward(a)[2], *given, 0))
    rows = torch.randn(5, 8), torch.randn(5, 8), torch.rand(5)
    for kl, mean in ((True, False), (False, True)):
        torch.library.opcheck(torch.ops.kdfast.similarity_distillation.default, (*(a[name] for name in NAMES), 0, kl, mean))
        g = torch.rand(()) if mean else torch.rand(5)
        torch.library.opcheck(torch.ops.kdfast.info_nce_grad_rows.default, (g, None, *rows, kl, mean, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_the_gradient(dtype):
    g, student, scale, difference = torch.randn(5), torch.randn(5, 9).to(dtype), torch.rand(5), torch.randn(5, 9)
    dstudent, dscale, _ = torch.ops.kdfast.info_nce_grad_rows(g, None, difference, student, scale, True, True, False)
    torch.testing.assert_close(dstudent, (g * scale)[:, None] * difference)
    torch.testing.assert_close(dscale, g * (student.float() * difference).sum(1))
    for of_mean, of_rows in zip(
        torch.ops.kdfast.info_nce_grad_rows(g[0], None, difference, student, scale, True, True, False),
        torch.ops.kdfast.info_nce_grad_rows(g[0].expand(5).contiguous() / 5, None, difference, student, scale, True, True, False),
        strict=True,
    ):
        torch.testing.assert_close(of_mean, of_rows)


@pytest.mark.parametrize("impl", [None, "cpu"])
@pytest.mark.parametrize("name", ["weight", "own_index"])
def test_weights_and_own_rows_may_lie_in_memory_as_they_like(name, impl):
    student, keys = torch.randn(9, 6, requires_grad=True), torch.randn(17, 6)
    strided = {"weight": torch.rand(9, 2), "own_index": torch.randint(17, (9, 2))}[name][:, 0]
    given = dict(student_temperature=0.2, teacher_temperature=0.1, impl=impl)
    losses = [similarity_distillation(student, student.detach() * 0.7, keys, **{name: x}, **given) for x in (strided, strided.contiguous())]
    assert torch.equal(*losses)
    assert torch.equal(*[torch.autograd.grad(loss, student)[0] for loss in losses])


def test_second_derivative_of_a_sum_of_single_losses():
    """Its upstream gradient is expanded."""
    student, keys = torch.randn(9, 6, requires_grad=True), torch.randn(17, 6, requires_grad=True)
    given = dict(student_temperature=0.2, teacher_temperature=0.1)
    found = []
    for reduction in ("none", "sum"):
        loss = similarity_distillation(student, student.detach() * 0.7, keys, reduction=reduction, **given).sum()
        first = torch.autograd.grad(loss, (student, keys), create_graph=True)
        found.append((*first, *torch.autograd.grad(sum(x.square().sum() for x in first), (student, keys))))
    torch.testing.assert_close(*found)
