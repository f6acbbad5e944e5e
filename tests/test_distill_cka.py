"""CKA: each term, both kinds of tasks and the bank against formulas written out; training with separate heads."""

import pytest
import torch
import torch.nn.functional as F
from distill_cases import D, rows, same_value_and_gradient

from kdfast import QueueBank
from kdfast.distill import CKA
from kdfast.functional import sinkhorn_divergence

TAU = 0.3


def given(n=7):
    student = {"logits": rows(n, 5, grad=True), "feat": rows(n, 4, grad=True)}
    return student, [{"logits": rows(n, 2), "feat": rows(n, 6)}, {"logits": rows(n, 3), "feat": rows(n, 3, 2, 2)}]


def embedded(loss, student, teachers):
    adapters = [loss.student_adapter, *loss.teacher_adapters]
    features = [x["feat"].mean((2, 3)) if x["feat"].dim() == 4 else x["feat"] for x in (student, *teachers)]
    return [F.normalize(x @ a.weight.T + a.bias, dim=1) for x, a in zip(features, adapters, strict=True)]


def sup_con(query, keys, y, key_y, own):
    """Mean over rows that have a positive; `own`: row i's own key is no candidate."""
    losses = []
    for i in range(len(query)):
        keep = torch.arange(len(keys)) != i if own else torch.ones(len(keys), dtype=torch.bool)
        log_p = (keys[keep] @ query[i] / TAU).log_softmax(0)
        same = key_y[keep] == y[i]
        if same.any():
            losses.append(-log_p[same].mean())
    return torch.stack(losses).mean()


def mmd(x, y):
    def kernel(a, b):
        d = (a[:, None] - b[None]).square().sum(2)
        return sum(torch.exp(-d / (2 * s**2)) for s in (0.001, 0.01, 0.05, 0.1, 0.2, 1, 2)).mean()

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def kl(s, t):
    return (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()


def leaves(loss, *tensors):
    return [*tensors, loss.student_adapter.weight, *(a.weight for a in loss.teacher_adapters)]


@pytest.mark.parametrize("align", ["mmd", "sinkhorn"])
def test_disjoint_tasks_share_one_head(align):
    s, t = given()
    loss = CKA([2, 3], common_dim=5, temperature=TAU, align=align, weights={"align": 2.0}).double().build(s, t)
    z, z1, z2 = embedded(loss, s, t)
    logits = torch.cat([t[0]["logits"], t[1]["logits"]], 1)
    y = logits.argmax(1)
    owner = torch.stack([z1[i] if label < 2 else z2[i] for i, label in enumerate(y)])
    apart = mmd if align == "mmd" else sinkhorn_divergence
    intra = sup_con(z, z, y, y, True) + (sup_con(z1, z1, y, y, True) + sup_con(z2, z2, y, y, True)) / 2
    expected = 0.5 * intra + 0.5 * sup_con(z, owner, y, y, False) + (apart(z, z1) + apart(z, z2)) + kl(s["logits"], logits)
    same_value_and_gradient(loss(s, t), expected, *leaves(loss, s["logits"], s["feat"]), rtol=1e-7, atol=1e-9)
    assert list(loss.last) == ["intra", "inter", "align", "task"]


def test_separate_tasks_have_a_head_and_labels_each():
    s, t = given()
    s["logits"] = [rows(7, 2, grad=True), rows(7, 3, grad=True)]
    loss = CKA([2, 3], "separate", common_dim=5, temperature=TAU).double().build(s, t)
    z, *z_t = embedded(loss, s, t)
    expected = 0.0
    for head, teacher, own in zip(s["logits"], t, z_t, strict=True):
        y = teacher["logits"].argmax(1)
        pulled = 0.5 * (sup_con(z, z, y, y, True) + sup_con(own, own, y, y, True)) + 0.5 * sup_con(z, own, y, y, False)
        expected = expected + (pulled + 10 * mmd(z, own) + kl(head, teacher["logits"])) / 2
    same_value_and_gradient(loss(s, t), expected, *leaves(loss, *s["logits"], s["feat"]), rtol=1e-7, atol=1e-9)


def test_a_bank_adds_candidates_and_takes_the_owners():
    s, t = given()
    bank = QueueBank(20, 5, labels=True, dtype=D)
    bank.push(rows(9, 5), torch.arange(9) % 5)
    weights = {"intra": 0, "align": 0, "task": 0, "inter": 1}
    loss = CKA([2, 3], common_dim=5, temperature=TAU, weights=weights, bank=bank).double().build(s, t)
    z, z1, z2 = embedded(loss, s, t)
    y = torch.cat([x["logits"] for x in t], 1).argmax(1)
    owner = torch.stack([z1[i] if label < 2 else z2[i] for i, label in enumerate(y)])
    losses = []
    for i in range(7):
        keys = torch.cat([owner[i : i + 1], bank.keys])
        log_p = (keys @ z[i] / TAU).log_softmax(0)
        losses.append(-log_p[torch.cat([torch.tensor([True]), torch.arange(9) % 5 == y[i]])].mean())
    expected = torch.stack(losses).mean()
    same_value_and_gradient(loss(s, t), expected, *leaves(loss, s["feat"])[:2], rtol=1e-7, atol=1e-9)
    assert len(bank) == 16 and torch.equal(bank.labels[9:16], y)
    torch.testing.assert_close(bank.keys[9:], owner.detach())


def test_separate_heads_learn_from_two_teachers():
    x = torch.randn(64, 6)
    teachers = [{"logits": 4 * x @ torch.randn(6, c), "feat": torch.tanh(x @ torch.randn(6, w))} for c, w in ((2, 9), (3, 7))]
    body, heads = torch.nn.Linear(6, 8), [torch.nn.Linear(8, c) for c in (2, 3)]
    loss = CKA([2, 3], "separate", common_dim=8)

    def student():
        h = body(x).tanh()
        return {"logits": [head(h) for head in heads], "feat": h}

    loss.build(student(), teachers)
    optimizer = torch.optim.Adam([*body.parameters(), *heads[0].parameters(), *heads[1].parameters(), *loss.parameters()], lr=0.02)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(student(), teachers)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]
    for head, teacher in zip(student()["logits"], teachers, strict=True):
        assert (head.argmax(1) == teacher["logits"].argmax(1)).float().mean() > 0.85


def test_bad_input_is_named():
    s, t = given()
    for call, message in (
        (lambda: CKA([2], "joint"), "tasks must be one of"),
        (lambda: CKA([2], align="ot"), "align must be one of"),
        (lambda: CKA([0]), "num_classes must be >= 1"),
        (lambda: CKA([2], weights={"mmd": 1.0}), "weights must be one of"),
        (lambda: CKA([2, 3], teacher_dims=[4]), r"one width a teacher \(2\), got 1"),
        (lambda: CKA([2], bank=QueueBank(4, 128)), "labels=True"),
        (lambda: CKA([2], bank=QueueBank(4, 8, labels=True)), "bank must have width 128"),
        (lambda: CKA([2])(s, t), r"a list of 1 \(num_classes\), got 2"),
        (lambda: CKA([3, 2]).double()(s, t), r"widths \[3, 2\]"),
        (lambda: CKA([2, 3], "separate").double()(s, t), "a list of 2 heads"),
        (lambda: CKA([2, 3])(s["feat"], t), "student must be a dict of logits, feat"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
