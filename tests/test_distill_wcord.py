"""WCoRD: each critic, both banks and the transport term against formulas written out; sampling, state, errors."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from kdfast import ClassSampler, Distiller, IndexedBank, QueueBank, Term
from kdfast.distill import KD, WCoRD

D = torch.float64
DIM, SIZE, TAU = 6, 20, 0.3


def inputs(n=5):
    s = torch.randn(n, 7, dtype=D, requires_grad=True)
    return s, torch.randn(n, 4, dtype=D), torch.randperm(SIZE)[:n]


def indexed() -> IndexedBank:
    return IndexedBank(SIZE, DIM, dtype=D).load_(torch.randn(SIZE, DIM, dtype=D))


def made(bank, **options) -> WCoRD:
    """In double precision, built; the singular vectors stay where they are, so that a second forward is the same."""
    loss = WCoRD(bank, dim=DIM, temperature=TAU, **{"local_weight": 0.0, **options}).double()
    s, t, _ = inputs()
    return loss.build(s.detach(), t)


def embedded(loss: WCoRD, s, t):
    """Unit embeddings from W / sigma, the power method's own left vector after the step that the forward takes."""
    out = []
    for x, affine in ((s, loss.student_embedding), (t, loss.teacher_embedding)):
        left = affine.direction
        right = F.normalize(affine.weight.detach().t() @ left, dim=0)
        sigma = left @ affine.weight @ right
        out.append(F.normalize(x @ (affine.weight / sigma).t() + affine.bias, dim=1))
    return out


def check(loss: WCoRD, value, expected, s):
    parameters = [s, loss.student_embedding.weight, loss.teacher_embedding.weight]
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    got, want = (torch.autograd.grad(v, parameters, allow_unused=True) for v in (value, expected))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def negatives_of(bank, index, labels=None):
    """[N, M] mask of an indexed bank's rows that are negatives."""
    mask = torch.arange(SIZE) != index[:, None]
    return mask if labels is None else mask & (bank.labels != labels[:, None])


@pytest.mark.parametrize("critic", ["infonce", "wasserstein"])
@pytest.mark.parametrize("labelled", [False, True], ids=["", "labelled"])
def test_global_term_against_an_indexed_bank(critic, labelled):
    classes = torch.arange(SIZE) % 3
    bank = IndexedBank(SIZE, DIM, dtype=D, labels=labelled)
    bank.load_(torch.randn(SIZE, DIM, dtype=D), classes if labelled else None)
    loss = made(bank, critic=critic, global_weight=0.8)
    s, t, index = inputs()
    labels = classes[index] if labelled else None
    before = bank.storage.clone()
    value = loss(s, t, index=index, labels=labels)
    e_s, e_t = embedded(loss, s, t)
    z, positive = e_s @ before.t() / TAU, (e_s * e_t).sum(1) / TAU
    mask = negatives_of(bank, index, labels)
    if critic == "infonce":
        rows = torch.cat([positive[:, None], z.masked_fill(~mask, -math.inf)], 1)
        expected = -rows.log_softmax(1)[:, 0].mean()
    else:
        expected = ((z * mask).sum(1) / mask.sum(1) - positive).mean()
    check(loss, value, 0.8 * expected, s)
    moved = F.normalize(0.5 * before[index] + 0.5 * e_t.detach(), dim=1)
    torch.testing.assert_close(bank.storage[index], moved)


@pytest.mark.parametrize("critic", ["infonce", "wasserstein"])
def test_global_term_against_a_queue(critic):
    bank = QueueBank(8, DIM, dtype=D)
    bank.push(torch.randn(6, DIM, dtype=D))
    loss = made(bank, critic=critic, global_weight=1.0)
    s, t, _ = inputs()
    before = bank.keys.clone()
    value = loss(s, t)
    e_s, e_t = embedded(loss, s, t)
    z, positive = e_s @ before.t() / TAU, (e_s * e_t).sum(1, keepdim=True) / TAU
    if critic == "infonce":
        expected = -torch.cat([positive, z], 1).log_softmax(1)[:, 0].mean()
    else:
        expected = z.mean() - positive.mean()
    check(loss, value, expected, s)
    torch.testing.assert_close(bank.storage[[6, 7, 0, 1, 2]], e_t.detach())


class Fixed:
    """A sampler whose draw is known."""

    def __init__(self, index):
        self.index = index

    def draw(self, rows):
        return self.index


def test_sampled_infonce():
    bank = indexed()
    s, t, index = inputs()
    drawn = (index[:, None] + torch.randint(1, SIZE, (5, 9))) % SIZE
    loss = made(bank, sampler=Fixed(drawn), global_weight=1.0)
    before = bank.storage.clone()
    value = loss(s, t, index=index)
    e_s, e_t = embedded(loss, s, t)
    z = torch.einsum("nd,nkd->nk", e_s, before[drawn]) / TAU
    positive = (e_s * e_t).sum(1, keepdim=True) / TAU
    check(loss, value, -torch.cat([positive, z], 1).log_softmax(1)[:, 0].mean(), s)


def test_crd_nce_with_the_first_batch_normaliser():
    bank = indexed()
    s, t, index = inputs()
    drawn = (index[:, None] + torch.randint(1, SIZE, (5, 9))) % SIZE
    loss = made(bank, critic="crd_nce", sampler=Fixed(drawn), global_weight=1.0)
    normalizer = None
    for _ in range(2):
        before = bank.storage.clone()
        value = loss(s, t, index=index)
        e_s, e_t = embedded(loss, s, t)
        exps = (torch.einsum("nd,nkd->nk", e_s, before[drawn]) / TAU).exp()
        own = ((e_s * before[index]).sum(1, keepdim=True) / TAU).exp()
        if normalizer is None:
            normalizer = (SIZE * torch.cat([own, exps], 1).mean()).detach()
        x, x_k = ((e_s * e_t).sum(1) / TAU).exp() / normalizer, exps / normalizer
        noise = 9 / SIZE
        expected = -(x / (x + noise + 1e-7)).log() - (noise / (x_k + noise + 1e-7)).log().sum(1)
        check(loss, value, expected.mean(), s)
    torch.testing.assert_close(loss.noise_contrast.normalizer, normalizer)
    fresh = WCoRD(indexed(), dim=DIM, critic="crd_nce", num_negatives=3).double()
    fresh.load_state_dict(loss.state_dict(), strict=False)
    assert torch.equal(fresh.noise_contrast.normalizer, loss.noise_contrast.normalizer) and fresh.noise_contrast.known


def test_local_term_is_transport_inside_the_batch():
    loss = made(QueueBank(8, DIM, dtype=D), epsilon=0.2, iters=300, global_weight=0.5, local_weight=0.7)
    s, t, _ = inputs()
    loss(s, t)
    e_s, e_t = embedded(loss, s, t)
    cost = (1 - e_s @ e_t.t()).detach()
    f, g = torch.zeros(5, dtype=D), torch.zeros(5, dtype=D)
    for _ in range(300):
        f = -0.2 * torch.logsumexp((g - cost) / 0.2 - math.log(5), 1)
        g = -0.2 * torch.logsumexp((f[:, None] - cost) / 0.2 - math.log(5), 0)
    plan = ((f[:, None] + g - cost) / 0.2).exp() / 25
    value = (f.mean() + g.mean()) - 0.2 * (plan.sum() - 1)
    torch.testing.assert_close(loss.last["local"], 0.7 * value, rtol=1e-5, atol=1e-6)

    loss.push, loss.global_weight = False, 1e-9
    got = torch.autograd.grad(loss(s, t), s)[0]
    e_s, e_t = embedded(loss, s, t)
    want = torch.autograd.grad(0.7 * (plan * (1 - e_s @ e_t.t())).sum(), s)[0]  # the envelope: the plan held fixed
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_an_empty_bank_and_a_single_sample_are_finite():
    for bank in (QueueBank(8, DIM, dtype=D), IndexedBank(SIZE, DIM, dtype=D, init="empty")):
        loss = made(bank)
        s, t, index = inputs(1)
        value = loss(s, t, index=index)
        value.backward()
        assert value.isfinite() and s.grad.isfinite().all()


@pytest.mark.parametrize("critic", ["infonce", "crd_nce", "wasserstein"])
def test_every_critic_lowers_its_loss(critic):
    bank = IndexedBank(64, DIM)
    sampled = {} if critic == "wasserstein" else {"num_negatives": 16}
    loss = WCoRD(bank, dim=DIM, critic=critic, **sampled)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)  # made before the widths are known
    s, index = torch.randn(64, 7), torch.arange(64)
    t = torch.tanh(s @ torch.randn(7, 4))
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        value = loss(s, t, index=index)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[1] and set(loss.last) == {"global", "local"}
    torch.testing.assert_close(sum(loss.last.values()), value.detach())


def test_the_sampler_state_goes_on_after_a_checkpoint():
    def make():
        sampler = ClassSampler(torch.arange(SIZE) % 4, 5, generator=torch.Generator().manual_seed(3))
        return WCoRD(IndexedBank(SIZE, DIM), dim=DIM, sampler=sampler, local_weight=0.0, student_dim=7, teacher_dim=4)

    loss = make()
    s, t, index = torch.randn(5, 7), torch.randn(5, 4), torch.arange(5)
    loss(s, t, index=index)
    fresh = make()
    fresh.load_state_dict(copy.deepcopy(loss.state_dict()))
    for _ in range(2):
        assert torch.equal(loss(s, t, index=index), fresh(s, t, index=index))


def test_a_distiller_with_two_contrastive_terms_round_trips():
    def make():
        student = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        teacher = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3))
        wcord = WCoRD(IndexedBank(SIZE, DIM), dim=DIM, num_negatives=4, local_weight=0.0, generator=torch.Generator())
        return Distiller(student, teacher, {"kd": Term(KD()), "wcord": Term(wcord, at="1")})

    d, x, y = make(), torch.randn(5, 6), torch.randint(0, 3, (5,))
    d.build(x)
    d(x, y, index=torch.arange(5), task=F.cross_entropy)
    twin = make()
    for teacher, other in zip(twin.teachers, d.teachers, strict=True):
        teacher.load_state_dict(other.state_dict())
    twin.load_state_dict(d.state_dict())
    for _ in range(2):
        assert torch.equal(d(x, y, index=torch.arange(5))[0], twin(x, y, index=torch.arange(5))[0])
    assert torch.equal(d.losses["wcord"].bank.storage, twin.losses["wcord"].bank.storage)
    ignored = d._ddp_params_and_buffers_to_ignore
    assert "losses.wcord.bank.storage" in ignored and "losses.wcord.sampler.alias" in ignored


def test_autocast_keeps_the_loss_in_float32():
    loss = WCoRD(QueueBank(8, DIM), dim=DIM)
    s, t = torch.randn(5, 7, requires_grad=True), torch.randn(5, 4)
    loss.bank.push(torch.randn(8, DIM))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(s, t)
    value.backward()
    assert value.dtype == torch.float32 and s.grad.isfinite().all()


def test_bad_input_is_named():
    bank, queue = IndexedBank(SIZE, DIM), QueueBank(8, DIM)
    s, t = torch.randn(3, 7), torch.randn(3, 4)
    for call, message in (
        (lambda: WCoRD(torch.randn(8, DIM)), "bank must be an IndexedBank or a QueueBank"),
        (lambda: WCoRD(bank), r"bank must have width dim \(128\)"),
        (lambda: WCoRD(bank, dim=DIM, critic="nce"), "critic must be one of"),
        (lambda: WCoRD(bank, dim=DIM, critic="crd_nce"), "num_negatives or sampler must be given"),
        (lambda: WCoRD(queue, dim=DIM, num_negatives=4), "need an IndexedBank"),
        (lambda: WCoRD(bank, dim=DIM, critic="wasserstein", num_negatives=4), "need an IndexedBank and critic"),
        (lambda: WCoRD(bank, dim=DIM, num_negatives=4, sampler=Fixed(None)), "must not both be given"),
        (lambda: WCoRD(IndexedBank(SIZE, DIM, init="empty"), dim=DIM, critic="crd_nce", num_negatives=4), 'init="uniform"'),
        (lambda: WCoRD(bank, dim=DIM, global_weight=0.0), "global_weight must be a finite number > 0"),
        (lambda: WCoRD(bank, dim=DIM)(s, t), "index must be given with an IndexedBank"),
        (lambda: WCoRD(queue, dim=DIM)(s[None], t), "student must be"),
        (lambda: WCoRD(IndexedBank(SIZE, DIM, labels=True), dim=DIM)(s, t, index=torch.arange(3)), "labels must be given"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
