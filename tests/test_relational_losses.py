"""Similarity distillation and the Wasserstein dependency against formulas over the full score matrix."""

import pytest
import torch
import torch.nn.functional as F
from test_info_nce import same

from kdfast.functional import similarity_distillation, wasserstein_dependency

N, M, DS, DT = 5, 17, 4, 6


@pytest.fixture
def data():
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    return dict(
        s=make(N, DS).requires_grad_(),
        t=make(N, DT),
        bank_s=make(M, DS).requires_grad_(),
        bank_t=make(M, DT),
        tau=torch.tensor(0.6, dtype=torch.float64, requires_grad=True),
    )


def divergence(z_student, z_teacher, kind):
    p, log_q = F.softmax(z_teacher, -1), F.log_softmax(z_student, -1)
    return F.kl_div(log_q, p, reduction="batchmean") if kind == "kl" else -(p * log_q).sum(-1).mean()


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_two_banks(data, kind):
    d = data
    valid, own = 14, torch.tensor([0, 3, -1, 13, 2])
    out = torch.arange(M)[None] == own[:, None]
    out |= torch.arange(M)[None] >= valid
    z_s = (d["s"] @ d["bank_s"].T / d["tau"]).masked_fill(out, -torch.inf)
    z_t = (d["t"] @ d["bank_t"].T / 0.3).masked_fill(out, -torch.inf)
    keep = ~out
    p, log_q = F.softmax(z_t, -1), F.log_softmax(z_s, -1)
    expected = -(p * log_q.masked_fill(out, 0)).sum(-1)
    if kind == "kl":
        expected = expected + (p * F.log_softmax(z_t, -1).masked_fill(~keep, 0)).sum(-1)
    options = dict(student_temperature=d["tau"], teacher_temperature=0.3, divergence=kind, bank_valid=valid, own_index=own)
    actual = similarity_distillation(d["s"], d["t"], d["bank_s"], d["bank_t"], **options)
    same(actual, expected.mean(), [d["s"], d["bank_s"], d["tau"]])


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_one_bank_with_the_teachers_own_key(data, kind):
    d = data
    t, bank = d["t"][:, :DS], d["bank_s"].detach()
    z_s = torch.cat([(d["s"] * t).sum(-1, keepdim=True), d["s"] @ bank.T], 1) / d["tau"]
    z_t = torch.cat([(t * t).sum(-1, keepdim=True), t @ bank.T], 1) / 0.3
    options = dict(student_temperature=d["tau"], teacher_temperature=0.3, divergence=kind, own=True)
    same(similarity_distillation(d["s"], t, bank, **options), divergence(z_s, z_t, kind), [d["s"], d["tau"]])


def test_own_keys_of_different_widths(data):
    d = data
    mine, theirs = torch.randn(N, DS, dtype=torch.float64), torch.randn(N, DT, dtype=torch.float64)
    z_s = torch.cat([(d["s"] * mine).sum(-1, keepdim=True), d["s"] @ d["bank_s"].T], 1) / 0.5
    z_t = torch.cat([(d["t"] * theirs).sum(-1, keepdim=True), d["t"] @ d["bank_t"].T], 1) / 0.3
    options = dict(student_temperature=0.5, teacher_temperature=0.3, student_positive=mine, teacher_positive=theirs)
    same(similarity_distillation(d["s"], d["t"], d["bank_s"], d["bank_t"], **options), divergence(z_s, z_t, "ce"), [d["s"], d["bank_s"]])


def test_a_nearly_hard_teacher_is_exact_even_under_autocast(data):
    """SEED's teacher temperature: scores reach 1e4, where bfloat16 products would pick the wrong neighbour."""
    s, t, bank = (F.normalize(torch.randn(n, 32), dim=-1) for n in (8, 8, 200))
    with torch.autocast("cpu", torch.bfloat16):
        loss = similarity_distillation(s, t, bank, student_temperature=0.2, teacher_temperature=1e-4)
    z_s, z_t = s.double() @ bank.double().T / 0.2, t.double() @ bank.double().T / 1e-4
    torch.testing.assert_close(loss.double(), divergence(z_s, z_t, "ce"), rtol=1e-3, atol=1e-3)


def test_the_teacher_gets_no_gradient(data):
    d = data
    t, bank_t = d["t"].clone().requires_grad_(), d["bank_t"].clone().requires_grad_()
    loss = similarity_distillation(d["s"], t, d["bank_s"], bank_t, student_temperature=0.5, teacher_temperature=0.3)
    assert torch.autograd.grad(loss, [t, bank_t], allow_unused=True) == (None, None)


def test_second_derivative(data):
    d = data
    options = dict(student_temperature=0.5, teacher_temperature=0.3)
    f = lambda s, bank: similarity_distillation(s, d["t"], bank, d["bank_t"], **options)
    assert torch.autograd.gradgradcheck(f, (d["s"], d["bank_s"]))


@pytest.mark.parametrize("labelled", [False, True])
def test_wasserstein_dependency(data, labelled):
    d = data
    q, k, bank = d["s"], torch.randn(N, DS, dtype=torch.float64, requires_grad=True), d["bank_s"]
    labels, bank_labels = torch.tensor([0, 1, 2, 3, 0]), torch.arange(M) % 3
    keep = torch.arange(M)[None] < 15
    keep = keep & (torch.arange(M)[None] != torch.arange(N)[:, None])
    if labelled:
        keep = keep & (labels[:, None] != bank_labels[None])
    z = q @ bank.T / d["tau"]
    expected = ((z * keep).sum(-1) / keep.sum(-1) - (q * k).sum(-1) / d["tau"]).mean()
    classes = dict(query_labels=labels, bank_labels=bank_labels) if labelled else {}
    actual = wasserstein_dependency(q, k, bank, temperature=d["tau"], bank_valid=15, own_index=True, **classes)
    same(actual, expected, [q, k, bank, d["tau"]])


@pytest.mark.parametrize("labelled", [False, True])
def test_wasserstein_dependency_of_a_long_bank(labelled):
    """Sums of many rows keep their digits; what lies beyond `bank_valid` is not read."""
    m, valid = 5000, 4321
    q, k, bank = torch.randn(3, DS), torch.randn(3, DS), 1 + torch.randn(m, DS)
    labels, bank_labels = torch.tensor([7, -3, 1 << 40]), torch.arange(m) % 3 - 3
    keep = torch.ones(3, valid) if not labelled else (labels[:, None] != bank_labels[None, :valid]).double()
    z = q.double() @ bank[:valid].double().T
    wanted = (z * keep).sum(-1) / keep.sum(-1) - (q.double() * k.double()).sum(-1)
    bank[valid:] = torch.nan
    classes = dict(query_labels=labels, bank_labels=bank_labels) if labelled else {}
    actual = wasserstein_dependency(q, k, bank, temperature=1.0, bank_valid=valid, reduction="none", **classes)
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        (dict(student_temperature=0.0), ValueError, "student_temperature"),
        (dict(teacher_temperature=-1.0), ValueError, "teacher_temperature"),
        (dict(divergence="js"), ValueError, "divergence"),
        (dict(teacher_bank=None), ValueError, "student_bank"),
        (dict(teacher_bank=torch.zeros(M - 1, DT)), ValueError, "teacher_bank"),
        (dict(teacher=torch.zeros(N + 1, DT)), ValueError, "teacher"),
        (dict(own=True), ValueError, "student_positive"),
        (dict(own_index=torch.full((N,), M)), IndexError, "own_index"),
    ],
)
def test_bad_input_names_the_argument(changes, error, name):
    arguments = dict(
        student=torch.zeros(N, DS),
        teacher=torch.zeros(N, DT),
        student_bank=torch.zeros(M, DS),
        teacher_bank=torch.zeros(M, DT),
        student_temperature=0.2,
        teacher_temperature=0.1,
    )
    with pytest.raises(error, match=name):
        similarity_distillation(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        (dict(query_labels=torch.zeros(2).long()), ValueError, "bank_labels"),
        (dict(bank_labels=torch.zeros(4).long()), ValueError, "query_labels"),
        (dict(bank_valid=5), ValueError, "bank_valid"),
        (dict(temperature=torch.ones(4)), ValueError, "temperature"),
        (dict(weight=torch.ones(1)), ValueError, "weight"),
    ],
)
def test_wasserstein_bad_input_names_the_argument(changes, error, name):
    with pytest.raises(error, match=name):
        wasserstein_dependency(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4, 3), **{"temperature": 1.0, **changes})
