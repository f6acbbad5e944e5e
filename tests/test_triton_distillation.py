"""The Triton kernel of similarity distillation's losses: against the float64 formula, and through the public function.

It runs as those of test_triton_similarity.py do.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from similarity_cases import assert_as_good_as

from kdfast._core import triton_runtime
from kdfast._ops.similarity import triton
from kdfast._ops.similarity.losses import distillation_values
from kdfast._ops.similarity.triton import distillation as triton_distillation
from kdfast.functional import similarity_distillation

if triton_runtime.missing() is not None:
    pytest.skip(f"{triton_runtime.missing()}, and TRITON_INTERPRET is not 1", allow_module_level=True)
DEVICE = "cpu" if triton_runtime.INTERPRETED else "cuda"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
DIVERGENCES = pytest.mark.parametrize("kl", [False, True], ids=["ce", "kl"])
#: rows that stay while the banks stream by (the interpreter's tf32 products are exact), or products by steps of the widths
WAYS = pytest.mark.parametrize("products", ["tf32", "ieee"], ids=["whole rows", "steps"])
NAMES = ("student", "keys", "teacher", "teacher_keys", "scale", "teacher_scale", "start", "teacher_start", "bias", "key_index", "valid")


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape), dim=-1).to(dtype)


def problem(rows, columns, width, teacher_width, dtype=torch.float32, teacher_dtype=None, **terms):
    sides = (unit(rows, width, dtype=dtype), unit(columns, width, dtype=dtype))
    teachers = (unit(n, teacher_width, dtype=teacher_dtype or dtype) for n in (rows, columns))
    scales = (5 + 10 * torch.rand(rows), 5 + 10 * torch.rand(rows))
    return dict(zip(NAMES, (*sides, *teachers, *scales, *(None,) * 5), strict=True)) | terms


def every_term(rows, columns):
    return {
        "start": torch.randn(rows) * 5,
        "teacher_start": torch.randn(rows) * 5,
        "bias": torch.randn(columns).masked_fill(torch.rand(columns) < 0.2, -math.inf),
        "key_index": torch.randint(-1, columns, (rows, 2)),
        "valid": torch.tensor(columns - 3),
    }


def run(p, kl, products="tf32"):
    numbers = [triton.KERNELS.products["bf16" if p[name].dtype == torch.bfloat16 else products] for name in ("student", "teacher")]
    tensors = (None if p[name] is None else p[name].to(DEVICE) for name in NAMES)
    return torch.ops.kdfast_triton.similarity_distillation_losses(*tensors, kl, *numbers).cpu()


def formula(p, kl, dtype):
    """The naive formula in `dtype`, the matrices' own values."""
    column = torch.arange(len(p["keys"]))
    out = torch.zeros(len(p["student"]), len(column), dtype=torch.bool)
    if p["key_index"] is not None:
        out = (p["key_index"][..., None] == column).any(1)
    if p["valid"] is not None:
        out = out | (column >= p["valid"])

    def log_p(query, keys, scale, start):
        z = p[query].to(dtype) @ p[keys].to(dtype).T * p[scale].to(dtype)[:, None]
        z = (z if p["bias"] is None else z + p["bias"].to(dtype)).masked_fill(out, -math.inf)
        return (z if start is None else torch.cat([start.to(dtype)[:, None], z], 1)).log_softmax(-1)

    s, t = log_p("student", "keys", "scale", p["start"]), log_p("teacher", "teacher_keys", "teacher_scale", p["teacher_start"])
    terms = t.exp() * (t - s if kl else -s)
    return torch.where(t == -math.inf, 0.0, terms).sum(-1)


def check(p, kl, products="tf32"):
    assert_as_good_as(run(p, kl, products), formula(p, kl, torch.float32), formula(p, kl, torch.float64))


@DIVERGENCES
@WAYS
# a lone pair; less than a tile; a ragged tile each way; whole tiles; a bank in parts, the last one ragged
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 31, 17, 40), (33, 65, 3, 20), (64, 64, 16, 32), (5, 275, 33, 9)], ids=str)
def test_ragged_sizes(shape, products, kl):
    check(problem(*shape), kl, products)


@DIVERGENCES
@WAYS
@pytest.mark.parametrize("columns", [50, 290], ids=["one part", "parts"])
@pytest.mark.parametrize("chosen", ["start", "bias", "key_index", "valid", "all"])
def test_every_term(chosen, columns, products, kl):
    terms = every_term(33, columns)
    if chosen != "all":
        terms = {name: term for name, term in terms.items() if chosen in name}
    check(problem(33, columns, 9, 20, **terms), kl, products)


@DIVERGENCES
@DTYPES
def test_dtypes(dtype, kl):
    check(problem(33, 70, 24, 40, dtype), kl)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@WAYS
def test_sides_of_different_dtypes(dtypes, products):
    check(problem(9, 70, 24, 40, *dtypes), True, products)


@pytest.mark.parametrize("width", [64, 600])
def test_wide_rows_take_steps(width):
    check(problem(9, 40, 8, width), True)


@WAYS
@DIVERGENCES
@pytest.mark.parametrize(("noise", "temperature"), [(0, 0.07), (1e-4, 0.3), (1e-3, 0.02), (0.1, 0.07), (1, 0.02)])
def test_losses_have_the_digits_of_a_sum_over_the_columns(noise, temperature, kl, products):
    """KL of 1e-10 and less; and of equal sides 0. Taken from the logits' means, they would round as logits do."""
    bank, rows = unit(700, 32), 40
    teacher = F.normalize(bank[:rows] + 0.2 * unit(rows, 32), dim=1)
    student = F.normalize(teacher + noise * unit(rows, 32), dim=1) if noise else teacher
    scale = torch.full((rows,), 1 / temperature)
    p = dict.fromkeys(NAMES) | {"student": student, "keys": bank, "teacher": teacher, "scale": scale, "teacher_scale": scale}
    losses, p["teacher_keys"] = run(p, kl, products), bank
    assert_as_good_as(losses, formula(p, kl, torch.float32), formula(p, kl, torch.float64))
    if noise == 0 and kl:
        assert (losses == 0).all()


@DIVERGENCES
def test_rising_maxima(kl):
    """Every tile and part of the bank has a larger logit than those before, of either side, so that all sums are rescaled."""
    p = problem(9, 290, 12, 20)
    for query, keys, step in (("student", "keys", 0.02), ("teacher", "teacher_keys", 0.01)):
        p[keys] = p[keys] + step * torch.arange(290)[:, None] * p[query].mean(0)
    check(p, kl)


@DIVERGENCES
def test_extreme_scales(kl):
    p = problem(12, 70, 9, 9)
    p["scale"], p["teacher_scale"] = torch.linspace(-1e4, 1e4, 12), torch.linspace(1e4, -1e4, 12)
    check(p, kl)


@DIVERGENCES
def test_a_start_that_the_student_has_not_is_an_infinite_loss(kl):
    p = problem(6, 290, 9, 20, **{name: torch.zeros(6) for name in ("start", "teacher_start")})
    p["start"][0], p["teacher_start"][1] = -math.inf, -math.inf
    losses = run(p, kl)
    assert losses[0] == math.inf and losses[1:].isfinite().all()
    torch.testing.assert_close(losses[1:], formula(p, kl, torch.float64)[1:].float())


@pytest.mark.parametrize("nothing", [{"valid": torch.tensor(0)}, {"bias": torch.full((290,), -math.inf)}], ids=["valid", "bias"])
@DIVERGENCES
def test_rows_that_admit_nothing(nothing, kl):
    assert (run(problem(5, 290, 9, 20, **nothing), kl) == -math.inf).all()


@WAYS
def test_rows_beyond_valid_do_no_harm_and_nan_reaches_its_rows(products):
    p = problem(6, 70, 9, 20, valid=torch.tensor(37))
    want = run(p, True, products)
    p["keys"][37:], p["teacher_keys"][37:] = math.nan, math.nan
    assert torch.equal(run(p, True, products), want)
    p["student"][2, 3], p["teacher"][4, 5] = math.nan, math.nan
    assert run(p, True, products).isnan().tolist() == [False, False, True, False, True, False]


def test_the_same_bits_of_one_bank_and_of_its_copy():
    p = problem(9, 290, 20, 20)
    p["teacher_keys"] = p["keys"].clone()
    copied = run(p, True)
    assert torch.equal(run(p | {"teacher_keys": None}, True), copied)


def test_no_rows():
    assert run(problem(0, 5, 3, 4), True).shape == (0,)


@DIVERGENCES
def test_through_the_public_function(kl, monkeypatch):
    """With an index of its own, a positive, a prefix and a temperature of each row; the values are the kernel's."""
    rows, columns = 9, 50
    given = {
        "student": unit(rows, 12), "teacher": unit(rows, 20), "student_bank": unit(columns, 12), "teacher_bank": unit(columns, 20),
        "student_positive": unit(rows, 12), "teacher_positive": unit(rows, 20), "student_temperature": 0.1 + torch.rand(rows),
        "teacher_temperature": 0.1 + torch.rand(rows), "own_index": torch.randint(-1, columns, (rows,)),
    }  # fmt: skip
    given = {name: x.to(DEVICE) for name, x in given.items()} | {"bank_valid": 47, "divergence": "kl" if kl else "ce", "reduction": "none"}
    leaves = [given[name].requires_grad_() for name in ("student", "student_bank", "student_positive", "student_temperature")]
    launched = []
    tiles = triton_distillation.tiles
    monkeypatch.setattr(triton_distillation, "tiles", lambda *args: launched.append(args) or tiles(*args))

    def results(impl, call=lambda f: f):
        losses = call(lambda: similarity_distillation(**given, impl=impl, precision="tf32" if triton_runtime.INTERPRETED else None))()
        return losses.detach(), *torch.autograd.grad(losses.sum(), leaves)

    ours = results("triton")
    assert len(launched) == 1
    for x, y in zip(ours, results("torch"), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)
    compiled = results("triton", lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"))
    for x, y in zip(compiled, ours, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("shared", [True, False], ids=["one bank", "a bank each"])
def test_entries_under_vmap_are_launched(shared, monkeypatch):
    """Those of one bank together; what PyTorch's operations would make of them is not asked for."""
    student, teacher, bank, teacher_bank = (unit(3, n, width).to(DEVICE) for n, width in ((5, 6), (5, 8), (40, 6), (40, 8)))
    launched, tiles = [], triton_distillation.tiles

    def loss(student, teacher, bank):
        temperatures = {"student_temperature": 0.2, "teacher_temperature": 0.1}
        options = {"own_index": torch.arange(5, device=DEVICE), "divergence": "kl", "impl": "triton", **temperatures}
        return similarity_distillation(student, teacher, bank, teacher_bank[0], **options)

    banks = bank[0].expand(3, -1, -1) if shared else bank
    each = [loss(*entry) for entry in zip(student, teacher, banks, strict=True)]
    monkeypatch.setattr(triton_distillation, "tiles", lambda *args: launched.append(args) or tiles(*args))
    monkeypatch.setattr(distillation_values, "losses", None)
    given, dims = (student, teacher, bank[0] if shared else bank), (0, 0, None if shared else 0)
    torch.testing.assert_close(torch.vmap(loss, dims)(*given), torch.stack(each), rtol=2e-5, atol=2e-6)
    assert len(launched) == (1 if shared else 3)
    slopes, values = torch.vmap(torch.func.grad_and_value(loss), dims)(*given)
    torch.testing.assert_close(values, torch.stack(each), rtol=2e-5, atol=2e-6)
    leaf = student[1].clone().requires_grad_()
    loss(leaf, teacher[1], banks[1]).backward()
    torch.testing.assert_close(slopes[1], leaf.grad, rtol=1e-4, atol=1e-6)


def test_opcheck():
    p = problem(7, 70, 5, 6, **every_term(7, 70))
    tensors = (p[name].to(DEVICE) for name in NAMES)
    torch.library.opcheck(torch.ops.kdfast_triton.similarity_distillation_losses.default, (*tensors, True, 3, 3))
