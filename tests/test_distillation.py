"""Similarity distillation by the fused pass: gradients, transforms and memory, against its composition and the float64 formula."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from similarity_cases import assert_as_good_as

from kdfast._core import bank_protocol, impls
from kdfast.functional import similarity_distillation

FUSED = impls.table()["similarity_distillation"].get("cpu") is None
pytestmark = pytest.mark.skipif(not FUSED, reason="the kernels are not built")

N, M, DS, DT = 9, 70, 12, 20


class BiasedBank:
    """A bank with a bias, as kdfast banks give it."""

    def __init__(self, rows, bias):
        self.rows, self.bias = rows, bias

    def as_rows(self):
        return bank_protocol.BankRows(self.rows, None, None, self.bias)


def data(dtype=torch.float32, teacher_dtype=None):
    unit = lambda *shape: F.normalize(torch.randn(*shape), dim=-1)
    teacher_dtype = teacher_dtype or dtype
    return dict(
        student=unit(N, DS).to(dtype).requires_grad_(),
        teacher=unit(N, DT).to(teacher_dtype),
        student_bank=unit(M, DS).to(dtype).requires_grad_(),
        teacher_bank=unit(M, DT).to(teacher_dtype),
        student_positive=unit(N, DS).to(dtype).requires_grad_(),
        teacher_positive=unit(N, DT).to(teacher_dtype),
        student_temperature=(0.1 + torch.rand(N)).requires_grad_(),
        teacher_temperature=0.05 + torch.rand(N),
    )


def cast(d: dict, dtype) -> dict:
    floats = {k: v.detach().to(dtype).requires_grad_(v.requires_grad) for k, v in d.items() if v.is_floating_point()}
    return d | floats


def formula(d: dict, divergence, own_index, bank_valid):
    def logits(side):
        query, bank, positive, tau = (d[name] for name in (side, f"{side}_bank", f"{side}_positive", f"{side}_temperature"))
        column = torch.arange(len(bank))
        out = (column == own_index[:, None]) | (column >= bank_valid)
        start = (query * positive).sum(-1, keepdim=True) / tau[:, None]
        return torch.cat([start, (query @ bank.T / tau[:, None]).masked_fill(out, -torch.inf)], 1)

    z, t = logits("student"), logits("teacher")
    p = t.softmax(-1)
    cross = -(p * z.log_softmax(-1).masked_fill(z == -torch.inf, 0)).sum(-1)
    return cross + (p * t.log_softmax(-1).masked_fill(t == -torch.inf, 0)).sum(-1) if divergence == "kl" else cross


def gradients(losses, d, upstream):
    return torch.autograd.grad((losses * upstream.to(losses.dtype)).sum(), [v for v in d.values() if v.requires_grad])


@pytest.mark.parametrize("divergence", ["ce", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:])
def test_losses_and_every_gradient(dtype, divergence):
    d, upstream = data(dtype), torch.randn(N)
    rules = dict(divergence=divergence, own_index=torch.randint(-1, M, (N,)), bank_valid=M - 3)
    ours = similarity_distillation(**d, **rules, reduction="none", impl="cpu")
    naive, truth = cast(d, dtype), cast(d, torch.float64)
    other, wanted = (formula(x, **rules) for x in (naive, truth))
    assert_as_good_as(ours.detach(), other.detach(), wanted.detach())
    grads = (gradients(losses, x, upstream) for losses, x in ((ours, d), (other, naive), (wanted, truth)))
    for mine, its, exact in zip(*grads, strict=True):
        assert_as_good_as(mine, its, exact)


def apart(noise, temperature):
    """Students `noise` away from their teachers, each near a key of the bank that is both sides', and the losses' formula on them."""
    unit = lambda rows: F.normalize(torch.randn(rows, 32), dim=1)
    bank = unit(1500)
    teacher = F.normalize(bank[:40] + 0.2 * unit(40), dim=1)
    student = F.normalize(teacher + noise * unit(40), dim=1) if noise else teacher

    def formula(divergence, dtype):
        z, t = ((x.to(dtype) @ bank.to(dtype).T / temperature).log_softmax(1) for x in (student, teacher))
        return (t.exp() * (t - z)).sum(1) if divergence == "kl" else -(t.exp() * z).sum(1)

    return (student, teacher, bank), formula


@pytest.mark.parametrize("how", ["eager", "vmap", "compiled", "jvp"])
@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("divergence", ["ce", "kl"])
@pytest.mark.parametrize(("noise", "temperature"), [(0, 0.07), (1e-4, 0.3), (1e-3, 0.02), (0.1, 0.07), (1, 0.02)])
def test_losses_have_the_digits_of_a_sum_over_the_columns(how, impl, divergence, noise, temperature):
    """Taken from the logits' means, they would round as logits do: 1e-5 at 50."""
    (student, teacher, bank), formula = apart(noise, temperature)
    given = dict(student_temperature=temperature, teacher_temperature=temperature, divergence=divergence, reduction="none")
    loss = lambda student, impl=impl: similarity_distillation(student, teacher, bank, impl=impl, **given)
    if how == "vmap":
        losses = torch.vmap(loss)(student[None])[0]
    elif how == "compiled":
        torch.compiler.reset()  # else the temperature is one that changes, which compiled code takes as a tensor
        losses = torch.compile(loss, fullgraph=True, backend="aot_eager")(student)
    elif how == "jvp":
        with fwAD.dual_level():
            losses, tangent = fwAD.unpack_dual(loss(fwAD.make_dual(student, torch.randn_like(student)), impl=None))
        assert tangent is not None
    else:
        losses = loss(student)
    assert_as_good_as(losses, formula(divergence, torch.float32), formula(divergence, torch.float64))
    if how == "eager" and noise == 0 and divergence == "kl":
        assert (losses == 0).all()


@pytest.mark.parametrize("impl", [None, "cpu", "torch"])
@pytest.mark.parametrize("keys", [70, 600], ids=["few pairs", "more"])
@pytest.mark.parametrize("nothing", [False, True], ids=["all rows count", "some admit nothing"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_and_reductions_of_the_rows_that_count(reduction, weighted, nothing, keys, impl):
    unit = lambda *shape: F.normalize(torch.randn(*shape), dim=-1)
    student, bank, teacher, teacher_bank = unit(N, DS), unit(keys, DS), unit(N, DT), unit(keys, DT)
    own, weight = torch.randint(-1, keys, (N,)), torch.rand(N) if weighted else None
    bias = torch.randn(keys)
    if nothing:
        own, bias = torch.arange(N) % 3, torch.full((keys,), -torch.inf)  # a third of the rows have their own, the one there is
        bias[0] = 0
    upstream = torch.linspace(-1, 2, N) if reduction == "none" else torch.tensor(1.5)

    def ours(student, bank):
        given = dict(student_temperature=0.2, teacher_temperature=0.1, own_index=own, weight=weight, reduction=reduction, impl=impl)
        return similarity_distillation(student, teacher, BiasedBank(bank, bias), teacher_bank, **given)

    def definition(student, bank):
        out = (torch.arange(keys) == own[:, None]) | (bias == -torch.inf)
        sides = (student, bank, 0.2), (teacher.to(student.dtype), teacher_bank.to(student.dtype), 0.1)
        z, t = ((q @ k.T / tau + bias).masked_fill(out, -1e9).log_softmax(1) for q, k, tau in sides)
        counted = (~out).any(1)
        losses = torch.where(counted, -(t.exp() * z).sum(1), 0) * (1 if weight is None else weight)
        total = counted.sum() if weight is None else (weight * counted).sum()
        return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / total}[reduction]

    def derivatives(loss, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (student, bank)]
        value = loss(*leaves)
        first = torch.autograd.grad(value, leaves, upstream.to(value.dtype), create_graph=True)
        once = torch.autograd.grad(loss(*leaves), leaves, upstream.to(value.dtype))
        second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        return value.detach(), *(x.detach() for x in first), *once, *second

    found = (derivatives(loss, dtype) for loss, dtype in ((ours, torch.float32), (definition, torch.float32), (definition, torch.float64)))
    for mine, its, wanted in zip(*found, strict=True):
        if nothing:  # the others have one candidate, and lose nothing
            assert mine.abs().max() < 1e-5
        else:
            assert_as_good_as(mine, its, wanted)


@pytest.mark.parametrize("wanted", ["student", "student_bank", "student_positive", "student_temperature"])
def test_one_gradient_at_a_time(wanted):
    d = {k: v.detach().requires_grad_(k == wanted) for k, v in data().items()}
    ours, other = (gradients(similarity_distillation(**d, impl=impl), d, torch.ones(())) for impl in ("cpu", "torch"))
    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", ["ce", "kl"])
def test_one_bank_that_is_not_contiguous(divergence):
    d = {k: v.detach() for k, v in data().items()}
    bank = torch.randn(DS, M).mT.requires_grad_()
    given = dict(student_bank=bank, student_temperature=0.3, teacher_temperature=0.1, divergence=divergence, own=True)
    losses = [similarity_distillation(d["student"], d["student_positive"], impl=impl, **given) for impl in ("cpu", "torch")]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(x, bank) for x in losses), rtol=1e-4, atol=1e-6)


def test_sides_of_different_dtypes():
    d = data(torch.float32, torch.bfloat16)
    wide = cast(d, torch.float32)
    ours, expected = (similarity_distillation(**x, reduction="none") for x in (d, wide))
    assert torch.equal(ours, expected)
    torch.testing.assert_close(similarity_distillation(**d, impl="torch"), expected.mean())


@pytest.mark.parametrize("divergence", ["ce", "kl"])
@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_a_bias_is_part_of_both_scores(impl, divergence):
    d = {k: v.detach() for k, v in data().items()}
    bias = torch.randn(M).masked_fill(torch.rand(M) < 0.2, -torch.inf)
    z, t = d["student"] @ d["student_bank"].T / 0.2 + bias, d["teacher"] @ d["teacher_bank"].T / 0.1 + bias
    wanted = -(t.softmax(-1) * z.log_softmax(-1).masked_fill(bias == -torch.inf, 0)).sum(-1)
    if divergence == "kl":
        wanted = wanted + (t.softmax(-1) * t.log_softmax(-1).masked_fill(bias == -torch.inf, 0)).sum(-1)
    given = dict(student_temperature=0.2, teacher_temperature=0.1, divergence=divergence, reduction="none", impl=impl)
    losses = similarity_distillation(d["student"], d["teacher"], BiasedBank(d["student_bank"], bias), d["teacher_bank"], **given)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divergence", ["ce", "kl"])
def test_gradient_of_the_teachers_temperature(divergence):
    d = {k: v.detach().double() for k, v in data().items()}
    given = {k: d[k] for k in ("student", "teacher", "student_bank", "teacher_bank")} | dict(student_temperature=0.4, divergence=divergence)
    loss = lambda tau: similarity_distillation(**given, teacher_temperature=tau)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, tau) and torch.autograd.gradgradcheck(loss, tau)
    single = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    ours = torch.autograd.grad(similarity_distillation(**single, teacher_temperature=(t := tau.detach().float().requires_grad_())), t)[0]
    torch.testing.assert_close(ours.double(), torch.autograd.grad(loss(tau), tau)[0], rtol=1e-4, atol=1e-6)


def test_second_derivatives_are_those_of_the_formula():
    d = data()
    truth = cast(d, torch.float64)
    rules = dict(divergence="kl", own_index=torch.randint(-1, M, (N,)), bank_valid=M - 3)

    def second(losses, x):
        leaves = [v for v in x.values() if v.requires_grad]
        first = torch.autograd.grad(losses.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    ours = second(similarity_distillation(**d, **rules, reduction="none", impl="cpu"), d)
    for got, wanted in zip(ours, second(formula(truth, **rules), truth), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_a_third_derivative_is_refused():
    d = data()
    first = torch.autograd.grad(similarity_distillation(**d), d["student"], create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), d["student"], create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(second.sum(), d["student"])


def test_a_bank_without_gradient_may_change_after_the_forward():
    d = data() | {"student_bank": F.normalize(torch.randn(M, DS), dim=-1)}
    expected = torch.autograd.grad(similarity_distillation(**d), d["student"])[0]
    loss = similarity_distillation(**d)
    d["student_bank"].zero_()
    assert torch.equal(torch.autograd.grad(loss, d["student"], retain_graph=True)[0], expected)
    again = torch.autograd.grad(loss, d["student"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="updated in place"):
        torch.autograd.grad(again.sum(), d["student"])


def test_rows_that_admit_nothing_are_not_counted():
    d = {k: v for k, v in data().items() if "positive" not in k}
    loss = similarity_distillation(**d, bank_valid=0, divergence="kl")
    grads = torch.autograd.grad(loss, [d["student"], d["student_bank"], d["student_temperature"]])
    assert loss == 0 and all((g == 0).all() for g in grads)


def test_retained_graphs_and_strides_of_zero():
    d = data()
    losses = similarity_distillation(**d, reduction="none")
    first, second = (torch.autograd.grad(losses.sum(), d["student_bank"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    wide = torch.randn(N, 2 * DS)[:, ::2].requires_grad_()
    got = torch.autograd.grad(similarity_distillation(**(d | {"student": wide})), wide)[0]
    same = wide.detach().clone().requires_grad_()
    assert torch.equal(got, torch.autograd.grad(similarity_distillation(**(d | {"student": same})), same)[0])


def test_transforms():
    d = {k: v.detach() for k, v in data().items()}
    rest = {k: v for k, v in d.items() if k != "student"}
    loss = lambda student: similarity_distillation(student, **rest)
    leaf = d["student"].clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(d["student"]), expected, rtol=1e-4, atol=1e-6)
    batch = torch.stack([d["student"], -d["student"]])
    torch.testing.assert_close(torch.vmap(loss)(batch), torch.stack([loss(x) for x in batch]))
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(batch)[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", ["ce", "kl"])
def test_compiled(divergence):
    d = data()
    f = lambda **x: similarity_distillation(**x, divergence=divergence, own_index=True)
    leaves = [v for v in d.values() if v.requires_grad]
    eager, compiled = f(**d), torch.compile(f, fullgraph=True, backend="aot_eager")(**d)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves))


@pytest.mark.parametrize("impl", [None, "torch"])
@pytest.mark.parametrize("recorded", [False, True], ids=["queue", "bank with gradient"])
def test_one_bank_compiled(impl, recorded):
    """No tensor is given to a function of autograd twice, which Dynamo refuses."""
    student, teacher, bank = (F.normalize(torch.randn(count, DS), dim=1) for count in (N, N, M))
    leaves = [x.requires_grad_() for x in (student, bank)[: 1 + recorded]]

    def f(student, bank):
        temperatures = {"student_temperature": 0.2, "teacher_temperature": 0.1}
        return similarity_distillation(student, teacher, bank, divergence="kl", own=True, impl=impl, **temperatures)

    eager, compiled = f(student, bank), torch.compile(f, fullgraph=True, backend="aot_eager")(student, bank)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves))


def test_autocast_rounds_as_the_composition_does():
    d = data()
    with torch.autocast("cpu", torch.bfloat16):
        fused, composed = (similarity_distillation(**d, impl=impl) for impl in ("cpu", "torch"))
    torch.testing.assert_close(fused, composed, rtol=2e-3, atol=2e-3)


def test_float64_is_not_for_the_kernel():
    for d in (data(torch.float64), data(torch.float32, torch.float64)):
        with pytest.raises(ValueError, match="similarity_distillation"):
            similarity_distillation(**d, impl="cpu")


@pytest.mark.parametrize("noise", [0.0, 1e-2])
@pytest.mark.parametrize("prefix", [None, 41])
def test_the_composition_over_keys_alike(noise, prefix):
    """The gradient is of what keys differ in: rounding of what they have in common, 1e-6, does not show."""
    key = F.normalize(torch.randn(1, DS), dim=-1)
    keys = F.normalize(key + noise * torch.randn(M, DS), dim=-1)
    student, teacher, teacher_keys = (F.normalize(torch.randn(n, d), dim=-1) for n, d in ((N, DS), (N, DT), (M, DT)))
    if prefix is not None:
        keys[prefix:] = torch.nan

    def gradient(dtype):
        leaf = student.to(dtype, copy=True).requires_grad_()
        banks = (t[:prefix] if dtype == torch.float64 else t for t in (keys, teacher_keys))
        bank, teacher_bank = (t.to(dtype) for t in banks)
        valid = {} if prefix is None or dtype == torch.float64 else {"bank_valid": prefix}
        options = dict(student_temperature=1 / 32, teacher_temperature=0.1, normalize=False, impl="torch", **valid)
        return torch.autograd.grad(similarity_distillation(leaf, teacher.to(dtype), bank, teacher_bank, **options), leaf)[0]

    exact = gradient(torch.float64)
    assert float((gradient(torch.float32).double() - exact).abs().max()) < 1e-7
