"""Methods that own banks or queues, each against its formula written out: value, gradient, and what is pushed."""

import pytest
import torch
import torch.nn.functional as F
from distill_cases import D, rows, same_value_and_gradient

from kdfast import IndexedBank, QueueBank
from kdfast.distill import CRD, SEED, CoDIR, CompRess


def queue(capacity=12, dim=4, fill=9):
    bank = QueueBank(capacity, dim, dtype=D)
    bank.push(rows(fill, dim))
    return bank


def newest(bank, count):
    return bank.storage[(int(bank.pointer) - count + torch.arange(count)) % bank.capacity]


def unit(x):
    return F.normalize(x, dim=-1)


class Fixed:
    """A sampler whose draw is known."""

    def __init__(self, negatives):
        self.negatives = negatives

    def draw(self, rows, positive):
        return torch.cat([rows[:, None], self.negatives], 1)


def crd_side(query, bank, index, tau, size, z):
    x = (torch.einsum("nd,nkd->nk", query, bank[index]) / tau).exp()
    z = size * x.detach().mean() if z is None else z
    x, noise = x / z, (index.shape[1] - 1) / size
    losses = -(x[:, 0] / (x[:, 0] + noise + 1e-7)).log() - (noise / (x[:, 1:] + noise + 1e-7)).log().sum(1)
    return losses.mean(), z


@pytest.mark.parametrize("layers", [False, True], ids=["CRD", "CoDIR"])
def test_crd_is_two_noise_contrasts_with_the_first_normalisers(layers):
    size, tau, index = 15, 0.3, torch.tensor([3, 0, 11, 7])
    negatives = torch.randint(0, size, (4, 6))
    make = CoDIR if layers else CRD
    loss = make(size, dim=5, temperature=tau, sampler=Fixed(negatives), momentum=0.25)
    if layers:
        s, t = [rows(4, 3, 2, grad=True), rows(4, 6, grad=True)], [rows(4, 2, 7)]
        flat_s, flat_t = lambda: torch.cat([s[0].mean(1), s[1]], 1), lambda: t[0].mean(1)
    else:
        s, t = rows(4, 8, grad=True), rows(4, 7)
        flat_s, flat_t = lambda: s, lambda: t
    loss = loss.build(s, t).double()
    leaves = [*(s if layers else [s]), loss.student_embedding.weight, loss.teacher_embedding.weight]
    drawn = torch.cat([index[:, None], negatives], 1)
    z_s = z_t = None
    for _ in range(2):
        v_s = unit(flat_s() @ loss.student_embedding.weight.T + loss.student_embedding.bias)
        v_t = unit(flat_t() @ loss.teacher_embedding.weight.T + loss.teacher_embedding.bias)
        m_s, m_t = loss.student_bank.storage.clone(), loss.teacher_bank.storage.clone()
        one, z_s = crd_side(v_s, m_t, drawn, tau, size, z_s)
        two, z_t = crd_side(v_t, m_s, drawn, tau, size, z_t)
        value = loss(s, t, index=index)
        same_value_and_gradient(value, (one + two) / (2 if layers else 1), *leaves, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(sum(loss.last.values()), value.detach())
        torch.testing.assert_close(loss.student_bank.storage[index], unit(0.25 * m_s[index] + 0.75 * v_s.detach()))
        torch.testing.assert_close(loss.teacher_bank.storage[index], unit(0.25 * m_t[index] + 0.75 * v_t.detach()))
    torch.testing.assert_close(loss.student_contrast.normalizer, z_s)


def test_crd_draws_other_classes_and_keeps_state():
    labels = torch.arange(12) % 3
    loss = CRD(12, dim=4, num_negatives=5, labels=labels, generator=torch.Generator().manual_seed(0))
    drawn = loss.sampler.draw(torch.arange(12), positive=True)
    assert torch.equal(drawn[:, 0], torch.arange(12)) and (labels[drawn[:, 1:]] != labels[:, None]).all()
    unlabelled = CRD(12, dim=4, num_negatives=50).sampler.draw(torch.arange(12))
    assert (unlabelled != torch.arange(12)[:, None]).all()
    s, t, index = torch.randn(4, 3), torch.randn(4, 2), torch.arange(4)
    loss(s, t, index=index)
    fresh = CRD(12, dim=4, num_negatives=5, labels=labels)
    fresh.load_state_dict(loss.state_dict())
    assert fresh.student_contrast.known and torch.equal(loss(s, t, index=index), fresh(s, t, index=index))


def test_codir_leaves_padding_out():
    tokens, other = rows(4, 3, 5), rows(4, 6)
    mask = torch.tensor([[1, 1, 0]] * 4)
    loss = CoDIR(9, dim=4, num_negatives=3, push=False).build(tokens, other).double().eval()
    torch.manual_seed(1)
    masked = loss(tokens, other, index=torch.arange(4), mask=mask)
    torch.manual_seed(1)
    torch.testing.assert_close(masked, loss(tokens[:, :2], other, index=torch.arange(4)))


def test_seed_is_a_soft_cross_entropy_over_own_key_and_queue():
    bank = queue()
    loss = SEED(bank, student_temperature=0.3, teacher_temperature=0.2).double()
    s, t = rows(5, 6, grad=True), rows(5, 4)
    loss.build(s, t)
    first, _, last = loss.projector.maps
    q = unit((s @ first.weight.T + first.bias).relu() @ last.weight.T + last.bias)
    k, keys = unit(t), bank.keys.clone()
    z_s, z_t = (torch.cat([(x * k).sum(1, keepdim=True), x @ keys.T], 1) for x in (q, k))
    expected = -((z_t / 0.2).softmax(1) * (z_s / 0.3).log_softmax(1)).sum(1).mean()
    same_value_and_gradient(loss(s, t), expected, s, first.weight)
    torch.testing.assert_close(newest(bank, 5), k)


def test_seed_at_its_own_temperature_under_autocast_finds_the_nearest_key():
    bank = QueueBank(40, 8)
    bank.push(torch.randn(40, 8))
    loss = SEED(bank, projector=None, push=False)
    s, t = torch.randn(6, 8), torch.randn(6, 8)
    own = -(torch.cat([(unit(s) * unit(t)).sum(1, keepdim=True), unit(s) @ bank.keys.T], 1) / 0.2).log_softmax(1)[:, 0].mean()
    torch.testing.assert_close(loss(s, t), own)  # softmax / 1e-4 is one-hot at the own key
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(s, t), own)


def compress(s, t, q_s, q_t):
    log_t, log_s = (unit(t) @ q_t.T / 0.1).log_softmax(1), (unit(s) @ q_s.T / 0.2).log_softmax(1)
    return (log_t.exp() * (log_t - log_s)).sum(1).mean()


@pytest.mark.parametrize("momentum", [False, True], ids=["online", "momentum"])
def test_compress_scores_each_side_in_its_own_queue(momentum):
    q_t, q_s = queue(dim=4), queue(dim=3)
    loss = CompRess(q_t, q_s, student_temperature=0.2, teacher_temperature=0.1)
    s, t, copy = rows(5, 3, grad=True), rows(5, 4), rows(5, 3)
    expected = compress(s, t, q_s.keys.clone(), q_t.keys.clone())
    same_value_and_gradient(loss(s, [t, copy] if momentum else t), expected, s)
    torch.testing.assert_close(newest(q_t, 5), unit(t))
    torch.testing.assert_close(newest(q_s, 5), unit(copy if momentum else s.detach()))


def test_compress_with_a_single_queue():
    bank = queue()
    loss = CompRess(bank, student_temperature=0.2, teacher_temperature=0.1)
    s, t = rows(5, 4, grad=True), rows(5, 4)
    expected = compress(s, t, bank.keys.clone(), bank.keys.clone())
    same_value_and_gradient(loss(s, t), expected, s)
    torch.testing.assert_close(newest(bank, 5), unit(t))


@pytest.mark.parametrize("banks", [1, 2], ids=["one queue", "a queue each"])
def test_compress_learns_the_teachers_temperature(banks):
    """The queues are pushed to before the backward."""
    queues = [queue() for _ in range(banks)]
    keys = [bank.keys.clone() for bank in queues]
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    s, t = rows(5, 4, grad=True), rows(5, 4)
    log_t, log_s = (unit(t) @ keys[0].T / temperature).log_softmax(1), (unit(s) @ keys[-1].T / 0.2).log_softmax(1)
    expected = (log_t.exp() * (log_t - log_s)).sum(1).mean()
    loss = CompRess(*queues, student_temperature=0.2, teacher_temperature=temperature)
    same_value_and_gradient(loss(s, t), expected, s, temperature)


def test_bad_input_is_named():
    x, labels = torch.randn(4, 3), torch.arange(4)
    for call, message in (
        (lambda: CRD(5, labels=labels), r"labels must have shape \(5,\)"),
        (lambda: CRD(0), "num_data must be >= 1"),
        (lambda: CRD(4, dim=2, num_negatives=2)(x, x), "index must be given"),
        (lambda: CRD(4, dim=2, num_negatives=2)(x, [x, x], index=labels), "teacher must be a Tensor, got list"),
        (lambda: CoDIR(4, dim=2, num_negatives=2)(x[None, None], x, index=labels), r"student must hold layers \[N, L, D\]"),
        (lambda: SEED(IndexedBank(4, 3)), "bank must be a QueueBank, got IndexedBank"),
        (lambda: SEED(QueueBank(4, 3), teacher_temperature=0), "teacher_temperature must be"),
        (lambda: CompRess(x), "teacher_bank must be a QueueBank, got Tensor"),
        (lambda: CompRess(QueueBank(4, 3), QueueBank(5, 3)), "teacher_bank's capacity 4, got 5"),
        (lambda: CompRess(QueueBank(4, 3))(torch.randn(4, 2), x), "must have the width of student"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
