"""Similarity distillation of few pairs: the mean's loss and both gradients from scores that are kept, against the float64 formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from distillation_kernel_cases import NAMES, PRODUCTS, case, formula, forward, kept, logits, options
from similarity_cases import assert_as_good_as
from similarity_kernel_cases import DTYPES, assert_accurate

from kdfast._core import extension
from kdfast.functional import similarity_distillation

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))

DIVERGENCES = pytest.mark.parametrize("kl", [False, True], ids=["ce", "kl"])

# 9 rows and 17 keys: the fewest. 63, 65, 129, 257: beside a panel and a block; 96, 97, 193: beside a chunk of rows; 130 and 140: tiles of
# parts, where there are any; widths of 1, 3, 17, 65: not whole vectors. 128 x 512 and 256 x 256: the most pairs.
SHAPES = [(9, 17, 1, 3), (10, 63, 17, 65), (17, 257, 65, 17), (96, 65, 16, 40), (97, 129, 130, 16), (193, 40, 16, 130), (130, 140, 48, 33)]
LARGEST = [(128, 512, 128, 64), (256, 256, 64, 128), (512, 128, 24, 24)]


def check(a: dict) -> None:
    """As test_distillation_cpu.check; a product that rounds its weights to bf16 rounds differences of probabilities here."""
    g, bfloat16 = torch.ones(len(a["scale"])), a["student"].dtype == torch.bfloat16
    largest = max(z[z.isfinite()].abs().max().item() for z in (logits(a, side, torch.float64) for side in ("student", "teacher")))
    products = PRODUCTS[a["student"].dtype]
    cross, difference, log_sums, dkeys = kept(a, products)
    divergence = kept(a, products, kl=True)[0]
    ours = cross, divergence, difference, log_sums[0], log_sums[2], log_sums[4], dkeys
    shares = [2.0**-6 if bfloat16 else 0.0] * 6 + [2.0**-6 if bfloat16 else largest * 2.0**-24]
    (*wanted,), (*naive,) = formula(a, g), formula(a, g, torch.float32)
    for found in (wanted, naive):
        found[:2] = [x.mean() for x in found[:2]]
    for got, want, its, share in zip(ours, wanted, naive, shares, strict=True):
        assert_accurate(got, want, its, share)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_ragged_sizes(isa, dtype, shape):
    check(case(*shape, dtype))


@pytest.mark.parametrize("shape", LARGEST, ids=lambda s: "x".join(map(str, s)))
def test_the_most_pairs(isa, shape):
    check(case(*shape))


@DTYPES
@pytest.mark.parametrize("chosen", ["bias", "start", "index", "valid", "all"])
def test_exclusions(isa, dtype, chosen):
    given = {k: v for name, part in options(40, 150).items() if chosen in (name, "all") for k, v in part.items()}
    check(case(40, 150, 33, 24, dtype, **given))


def test_scales_of_either_sign_and_zero(isa):
    scale = torch.randn(40) * 20
    scale[5] = 0
    check(case(40, 150, 33, 24, scale=scale, teacher_scale=scale.roll(1)))


@DIVERGENCES
@DTYPES
def test_one_bank_is_two_equal_banks(isa, dtype, kl):
    a = case(40, 150, 33, 33, dtype)
    one, two = a | {"teacher_keys": a["keys"]}, a | {"teacher_keys": a["keys"].clone()}
    assert all(torch.equal(x, y) for x, y in zip(kept(one, PRODUCTS[dtype], kl), kept(two, PRODUCTS[dtype], kl), strict=True))
    check(one)


@DIVERGENCES
@DTYPES
def test_few_pairs_are_as_their_rows(isa, dtype, kl):
    """Logits in the hundreds and losses of all sizes."""
    a = case(40, 150, 33, 24, dtype, scale=torch.logspace(-3, 2.5, 40), teacher_scale=torch.logspace(2.5, -3, 40))
    mean, difference, log_sums, _ = kept(a, PRODUCTS[dtype], kl)
    losses, its_difference, its_log_sums = forward(a, PRODUCTS[dtype], kl)
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(mean, losses.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(difference, its_difference, **close)
    torch.testing.assert_close(log_sums, its_log_sums, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("noise", [0, 1e-5, 1e-4, 1e-2, 1])
@pytest.mark.parametrize("temperature", [0.3, 0.02])
def test_losses_are_as_exact_as_sums_over_the_columns(isa, temperature, noise):
    """From equal softmaxes to a KL of several nats: a difference of lse and mean logits would be off by the logits' own rounding."""
    unit = lambda rows: F.normalize(torch.randn(rows, 32), dim=1)
    bank, scale = unit(500), torch.full((40,), 1 / temperature)
    teacher = F.normalize(bank[:40] + 0.2 * unit(40), dim=1)
    student = F.normalize(teacher + noise * unit(40), dim=1) if noise else teacher
    a = case(40, 500, 32, 32, student=student, teacher=teacher, keys=bank, teacher_keys=bank, scale=scale, teacher_scale=scale)
    wanted, naive = formula(a, torch.ones(40)), formula(a, torch.ones(40), torch.float32)
    divergence, difference, _, dkeys = kept(a, kl=True)
    assert_as_good_as(kept(a)[0], naive[0].mean(), wanted[0].mean())
    assert_as_good_as(divergence, naive[1].mean(), wanted[1].mean())
    if noise == 0:
        assert divergence == 0 and (difference == 0).all() and (dkeys == 0).all()


def test_valid_hides_anything(isa):
    """Rows beyond it may be uninitialised memory: they must not be read, and have no gradient."""
    a = case(20, 300, 16, 24, valid=torch.tensor([70]))
    want = kept(a | {"keys": a["keys"][:70].clone(), "teacher_keys": a["teacher_keys"][:70].clone(), "valid": None})
    a["keys"][70:] = a["teacher_keys"][70:] = math.nan
    mean, difference, log_sums, dkeys = kept(a)
    assert torch.equal(mean, want[0]) and torch.equal(difference, want[1]) and torch.equal(log_sums[:5], want[2])
    assert torch.equal(dkeys[:70], want[-1]) and (dkeys[70:] == 0).all()


@DIVERGENCES
@pytest.mark.parametrize("nothing", [{"bias": torch.full((30,), -math.inf)}, {"valid": torch.tensor([0])}], ids=["bias", "valid"])
def test_nothing_but_the_start_or_nothing_at_all(isa, nothing, kl):
    a = case(20, 30, 8, 12, **nothing)
    start = {"start_logit": torch.ones(20), "teacher_start_logit": torch.ones(20)}
    for given, loss, lse in ((start, 0, 1), ({}, 0, -math.inf)):  # a row that admits nothing does not count
        mean, difference, log_sums, dkeys = kept(a | given, kl=kl)
        assert mean == loss and (log_sums[:4:2] == lse).all()
        assert (difference == 0).all() and (dkeys == 0).all()


@DIVERGENCES
def test_a_start_that_the_student_has_not(isa, kl):
    """inf where the teacher gives it a weight; where its weight has vanished, as any pair without one."""
    without = case(20, 40, 16, 16)
    for logit, expected in ((30.0, torch.tensor(math.inf)), (-500.0, kept(without, kl=kl)[0])):
        start = {"start_logit": torch.full((20,), -math.inf), "teacher_start_logit": torch.full((20,), logit)}
        torch.testing.assert_close(kept(without | start, kl=kl)[0], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["student", "teacher"])
@pytest.mark.parametrize("shape", [(20, 100, 33, 40), (130, 140, 33, 40)], ids=["floats on vectors", "on tiles"])
def test_a_bad_row_spoils_no_other_row(isa, shape, name, bad):
    a = case(*shape)
    want = kept(a)
    a[name][3, 5] = bad
    mean, difference, log_sums, dkeys = kept(a)
    others = torch.arange(shape[0]) != 3
    assert mean.isnan() and dkeys.isnan().any()
    torch.testing.assert_close(difference[others], want[1][others], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_sums[:, others], want[2][:, others], rtol=1e-5, atol=1e-5)


# The fewest and the most rows and keys, on either side of each limit; the teacher's width counts too.
@pytest.mark.parametrize(
    ("shape", "few"),
    [
        ((8, 17, 4, 4), False),
        ((9, 16, 4, 4), False),
        ((9, 17, 4, 4), True),
        ((128, 512, 4, 4), True),
        ((9, 513, 4, 4), False),
        ((129, 512, 4, 4), False),
        ((64, 64, 2048, 4), True),
        ((64, 64, 4, 2049), False),
    ],
    ids=str,
)
def test_which_pairs_are_few(shape, few):
    assert _C.few_distilled_pairs(*shape) == few
    a = case(*shape)
    given = tuple(a[name] for name in NAMES)
    dkeys = torch.ops.kdfast.similarity_distillation(*given, 0, True, True, True)[3]
    assert dkeys.shape == (a["keys"].shape if few else (0,))
    assert torch.ops.kdfast.similarity_distillation(*given, 0, True, True, False)[3].numel() == 0
    table = torch.ops.kdfast.similarity_distillation(*given, 0, True, False, True)[3]
    assert table.shape == (shape[:2] if few else (0,))  # of losses that are not reduced
    assert torch.ops.kdfast.similarity_distillation(*given, PRODUCTS[torch.bfloat16], True, False, True)[3].numel() == 0
    for mean in (True, False):
        torch.library.opcheck(torch.ops.kdfast.similarity_distillation.default, (*given, 0, True, mean, True))


@pytest.mark.parametrize("chosen", ["nothing", "start", "index", "bias"])
@pytest.mark.parametrize("shape", [(10, 63, 17, 65), (130, 140, 48, 33), (64, 256, 64, 64)], ids=lambda s: "x".join(map(str, s)))
def test_a_table_of_weights_has_the_keys_gradient(isa, shape, chosen):
    a = case(*shape, **options(*shape[:2]).get(chosen, {}))
    g = torch.randn(shape[0])
    given = tuple(a[name] for name in NAMES)
    for kl in (False, True):
        *_, log_sums, table = torch.ops.kdfast.similarity_distillation(*given, 0, kl, False, True)
        dkeys = torch.ops.kdfast.similarity_distillation_grad_keys(g, log_sums, *given[:7], *given[9:], 0, 1.0, 1.0, table)
        assert_accurate(dkeys, (*formula(a, g),)[-1], (*formula(a, g, torch.float32),)[-1])


@pytest.mark.parametrize("own", [False, True], ids=["bank", "own key"])
@pytest.mark.parametrize("divergence", ["ce", "kl"])
@pytest.mark.parametrize("learnt", [False, True], ids=["number", "learnt temperature"])
@DTYPES
def test_gradients_of_the_mean(dtype, learnt, divergence, own):
    """As those of the rows under an upstream of their share, and as good as the formula's."""
    unit = lambda rows: F.normalize(torch.randn(rows, 24), dim=1).to(dtype)
    student, bank, teacher, teacher_bank = unit(20), unit(40), unit(20), unit(40)
    leaves = [student, bank] + ([torch.tensor(0.2)] if learnt and not own else [])
    g = torch.tensor(0.7)

    def gradients(loss, leaves):
        leaves = [x.detach().requires_grad_() for x in leaves]
        return torch.autograd.grad(g.to(out.dtype) * out if (out := loss(*leaves)) is not None else None, leaves)

    def ours(student, bank, tau=0.2, reduction="mean"):
        given = dict(student_temperature=tau, teacher_temperature=0.1, divergence=divergence, own=own, reduction=reduction)
        return similarity_distillation(student, teacher, bank, teacher_bank, **given)

    def definition(student, bank, tau=0.2):
        sides = ((student, bank, tau), (teacher.to(student.dtype), teacher_bank.to(student.dtype), 0.1))
        z, t = (
            (torch.cat([(q * sides[1][0]).sum(1, keepdim=True)] * own + [q @ k.T], 1).to(student.dtype) / tau).log_softmax(1)
            for q, k, tau in sides
        )
        return (t.exp() * ((t - z) if divergence == "kl" else -z)).sum(1).mean()

    mean = gradients(ours, leaves)
    rows = gradients(lambda *x: ours(*x, reduction="none").mean(), leaves)
    naive, truth = gradients(definition, leaves), gradients(definition, [x.double() for x in leaves])
    for got, of_rows, its, wanted in zip(mean, rows, naive, truth, strict=True):
        assert_as_good_as(got, its, wanted)
        close = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, of_rows, rtol=close, atol=close * float(of_rows.abs().max()))
