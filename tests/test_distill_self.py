"""Methods with views, moving averages or classes of their own, each against its formula written out: value and gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from distill_cases import D, rows, same_value_and_gradient

from kdfast import QueueBank
from kdfast.distill import IAA, MSVQ, REFILLED, SSKD, WCL, CoNe, FacultyOT, SwAV
from kdfast.distill.wcl import components


def queue(capacity=12, dim=4, fill=9, **options):
    bank = QueueBank(capacity, dim, dtype=D, **options)
    bank.push(rows(fill, dim), *([torch.arange(fill) % 3] if options.get("labels") else []))
    return bank


def newest(bank, count):
    return bank.storage[(int(bank.pointer) - count + torch.arange(count)) % bank.capacity]


def unit(x):
    return F.normalize(x, dim=-1)


def soft_cross_entropy(s, t, keys, tau_s, tau_t):
    return -((unit(t) @ keys.T / tau_t).softmax(1) * (unit(s) @ keys.T / tau_s).log_softmax(1)).sum(1).mean()


def test_msvq_follows_three_teacher_views_in_two_queues():
    one, two = queue(), queue()
    loss = MSVQ(one, two, student_temperature=0.2, teacher_temperature=0.1)
    s, b, c, d = rows(5, 4, grad=True), rows(5, 4), rows(5, 4), rows(5, 4)
    parts = [soft_cross_entropy(s, t, bank.keys.clone(), 0.2, 0.1) for t, bank in ((b, one), (c, one), (d, two))]
    same_value_and_gradient(loss({"a": s}, [{"b": b, "c": c, "d": c}, {"b": c, "d": d}]), sum(parts) / 3, s)
    torch.testing.assert_close(newest(one, 5), unit(b))
    torch.testing.assert_close(newest(two, 5), unit(d))


def kl(s, t, T):
    p = (t / T).softmax(1)
    return T**2 * (p * (p.log() - (s / T).log_softmax(1))).sum(1).mean()


@pytest.mark.parametrize("kept", [0.0, 0.75, 1.0])
def test_sskd_keeps_the_best_ranked_of_the_wrong_rows(kept):
    n, y = 5, torch.tensor([0, 1, 2, 0, 1])
    s = {i: {"logits": rows(n, 3, grad=True), "feat": rows(n, 4, grad=True)} for i in range(4)}
    t = {i: {"logits": rows(n, 3), "feat": rows(n, 6)} for i in range(4)}
    for i in range(1, 4):
        t[i]["feat"] += t[0]["feat"]  # so that some rows are right
    loss = SSKD(kept=kept, projector="linear").double().build(s, t)
    affine = loss.projector.maps[0]
    f_s = [unit(s[i]["feat"] @ affine.weight.T + affine.bias) for i in range(4)]
    f_t = [unit(t[i]["feat"]) for i in range(4)]
    z_s, z_t = (torch.cat(f[1:]) @ f[0].T / 0.5 for f in (f_s, f_t))
    ranks = [int((row > row[i % n]).sum()) for i, row in enumerate(z_t)]
    wrong = sorted((rank, i) for i, rank in enumerate(ranks) if rank)
    keep = [i for i, rank in enumerate(ranks) if not rank] + [i for _, i in wrong[: math.floor(kept * len(wrong))]]
    assert 0 < len(wrong) < 15
    expected = 0.1 * F.cross_entropy(s[0]["logits"], y) + 0.9 * kl(s[0]["logits"], t[0]["logits"], 4)
    expected = expected + 2.7 * kl(*(torch.cat([x[i]["logits"] for i in (1, 2, 3)]) for x in (s, t)), 4)
    p = z_t.softmax(1)
    expected = expected + 10 * 0.25 * (p * (p.log() - z_s.log_softmax(1))).sum(1)[keep].mean()
    value = loss(s, t, labels=y)
    same_value_and_gradient(value, expected, *(s[i][part] for i in range(4) for part in ("logits", "feat")), affine.weight)
    named = {name: s[i] for i, name in enumerate(("plain", "rotated1", "rotated2", "rotated3"))}
    torch.testing.assert_close(loss(named, t, labels=y), value)
    stacked = [{part: torch.cat([x[i][part] for i in range(4)]) for part in ("logits", "feat")} for x in (s, t)]
    torch.testing.assert_close(loss(*stacked, labels=y), value)


def test_cone_neighbours_and_votes():
    bank, votes = queue(labels=True), QueueBank(12, 3, normalize=False, dtype=D)
    votes.push(rows(9, 3).softmax(1))
    loss = CoNe(bank, votes, neighbors=4, temperature=0.3, key_temperature=0.2)
    y = torch.tensor([0, 1, 2, 0, 3])
    s, t = {"logits": rows(5, 3, grad=True), "feat": rows(5, 4, grad=True)}, {"logits": rows(5, 3), "feat": rows(5, 4)}
    keys, labels = bank.keys.clone(), bank.labels[:9].clone()
    losses = []
    for q, label in zip(unit(s["feat"]), y, strict=True):
        near = (keys @ q).topk(4).indices
        p = (keys[near] @ q / 0.3).softmax(0)[labels[near] == label].sum()
        if p > 1e-8:
            losses.append(-p.log())
    assert 0 < len(losses) < 5  # the queue has no class 3
    p = (unit(t["feat"]) @ keys.T / 0.2).softmax(1) @ votes.keys
    consistency = (p * (p.log() - s["logits"].log_softmax(1))).sum(1).mean()
    expected = 0.7 * torch.stack(losses).mean() + 0.4 * consistency
    same_value_and_gradient(loss(s, t, labels=y), expected, s["logits"], s["feat"])
    torch.testing.assert_close(newest(bank, 5), unit(t["feat"]))
    torch.testing.assert_close(newest(votes, 5), t["logits"].softmax(1))
    assert torch.equal(bank.labels[[9, 10, 11, 0, 1]], y)


def test_cone_with_empty_queues_is_zero():
    loss = CoNe(QueueBank(8, 4, labels=True), QueueBank(8, 3, normalize=False))
    s = {"logits": torch.randn(5, 3, requires_grad=True), "feat": torch.randn(5, 4, requires_grad=True)}
    value = loss(s, {"logits": torch.randn(5, 3), "feat": torch.randn(5, 4)}, labels=torch.zeros(5, dtype=torch.long))
    value.backward()
    assert value == 0 and s["feat"].grad.isfinite().all() and len(loss.bank) == len(loss.probabilities) == 5


def components_by_union(x):
    z = unit(x) @ unit(x).T
    z.fill_diagonal_(-2)
    group = list(range(len(x)))
    for i, j in enumerate(z.argmax(1).tolist()):
        old, new = group[i], group[j]
        group = [new if g == old else g for g in group]
    return group


@pytest.mark.parametrize("n", [1, 2, 3, 63, 257])
def test_components_of_the_nearest_neighbour_graph(n):
    x = rows(n, 3)
    got, want = components(x).tolist(), components_by_union(x) if n > 1 else [0]
    assert len(set(got)) == len(set(want)) == len(set(zip(got, want, strict=True)))


def sup_con(x, labels, tau):
    losses = []
    for i in range(len(x)):
        keep = torch.arange(len(x)) != i
        same = labels[keep] == labels[i]
        if same.any():
            losses.append(-(x[keep] @ x[i] / tau).log_softmax(0)[same].mean())
    return torch.stack(losses).mean()


def test_wcl_takes_each_views_classes_from_the_other():
    a, b = ({"instance": rows(9, 4, grad=True), "graph": rows(9, 3, grad=True)} for _ in range(2))
    instances = torch.cat([unit(a["instance"]), unit(b["instance"])])
    instance = sup_con(instances, torch.arange(9).repeat(2), 0.2)  # the one other row of a sample is its positive
    classes = [torch.tensor(components_by_union(view["graph"].detach())) for view in (a, b)]
    graph = (sup_con(unit(a["graph"]), classes[1], 0.2) + sup_con(unit(b["graph"]), classes[0], 0.2)) / 2
    value = WCL(0.2, graph_weight=0.5)({"a": a, "b": b})
    same_value_and_gradient(value, instance + 0.5 * graph, *a.values(), *b.values())
    WCL()({0: rows(4, 3), 1: rows(4, 3)})


def codes(scores, epsilon, iters):
    """Sinkhorn's rows and columns in turn, prototypes first: [N, K]."""
    q = (scores / epsilon).exp().T
    for _ in range(iters):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("teacher", [False, True], ids=["self", "teacher"])
@pytest.mark.parametrize("fill", [None, 12, 20], ids=["", "partly filled", "queues"])
def test_swav_predicts_codes_of_other_views(fill, teacher):
    banks = None if fill is None else [queue(16, 4, fill), queue(16, 4, fill)]
    loss = SwAV(5, 4, temperature=0.3, epsilon=0.4, iters=3, banks=banks).double()
    views = {name: rows(6, 4, grad=True) for name in ("a", "b", "small")}
    other = {name: rows(6, 4) for name in views}
    c = unit(loss.prototypes)
    expected = 0.0
    for i, name in enumerate(("a", "b")):
        z = unit((other if teacher else views)[name].detach())
        joined = [z]
        if fill is not None:
            spare = [z[j % 6] for j in range(min(fill, 16), 16)]
            joined += [banks[i].keys.clone(), *(row[None] for row in spare)]
        q = codes(torch.cat(joined) @ c.detach().T, 0.4, 3)[:6]
        for v in views:
            if v != name:
                expected = expected - (q * (unit(views[v]) @ c.T / 0.3).log_softmax(1)).sum(1).mean() / 4
    value = loss(views, other if teacher else None)
    same_value_and_gradient(value, expected, *views.values(), loss.prototypes, rtol=1e-6, atol=1e-8)
    if fill is not None:
        torch.testing.assert_close(newest(banks[1], 6), unit((other if teacher else views)["b"].detach()))


def transport(a, b, cost, epsilon, iters):
    """Dual value of the entropic problem after log-domain iterations."""
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(iters):
        f = -epsilon * torch.logsumexp((g - cost) / epsilon + b.log(), 1)
        g = -epsilon * torch.logsumexp((f[:, None] - cost) / epsilon + a.log()[:, None], 0)
    plan = a[:, None] * b * ((f[:, None] + g - cost) / epsilon).exp()
    return (f * a).sum() + (g * b).sum() - epsilon * (plan.sum() - 1)


def test_faculty_ot_moves_mass_between_different_classes():
    s, t, cost = rows(4, 3, grad=True), rows(4, 5), torch.rand(5, 3, dtype=D)
    loss = FacultyOT(cost, T=2, epsilon=0.3, iters=200).double()
    expected = torch.stack([transport((t[i] / 2).softmax(0), (s[i] / 2).softmax(0), cost, 0.3, 200) for i in range(4)]).mean()
    same_value_and_gradient(loss(s, t), expected, s, rtol=1e-6, atol=1e-8)
    two = FacultyOT([cost, 2 * torch.rand(4, 3, dtype=D)], T=2, epsilon=0.3, iters=200).double()
    other = rows(4, 4)
    alone = FacultyOT(two.cost1, T=2, epsilon=0.3, iters=200).double()
    torch.testing.assert_close(two(s, [t, other]), (expected + alone(s, other)) / 2)


def test_refilled_compares_triplets(monkeypatch):
    s, t = rows(12, 4, grad=True), rows(12, 5)
    y = torch.arange(12) % 4
    drawn = []

    def spy(*args, **options):
        from kdfast.functional import mine_triplets

        drawn.append(mine_triplets(*args, **options))
        return drawn[-1]

    monkeypatch.setattr("kdfast.distill.refilled.mine_triplets", spy)
    value = REFILLED(margin=0.5, temperature=0.7)(s, t, labels=y)
    a, p, n = drawn[0].to_tuple()
    e, f = unit(s), unit(t)
    d_ap, d_an = (e[a] - e[p]).norm(dim=1), (e[a] - e[n]).norm(dim=1)
    assert len(a) and ((d_an > d_ap) & (d_an - d_ap <= 0.5)).all() and (y[a] == y[p]).all() and (y[a] != y[n]).all()
    q = ((d_an - d_ap) / 0.7).sigmoid()
    r = (((f[a] - f[n]).norm(dim=1) - (f[a] - f[p]).norm(dim=1)) / 0.7).sigmoid()
    expected = 1000 * (r * (r / q).log() + (1 - r) * ((1 - r) / (1 - q)).log()).mean()
    same_value_and_gradient(value, expected, s)
    alone = REFILLED()(s, t, labels=torch.arange(12))  # no triplet
    assert alone == 0 and torch.autograd.grad(alone, s)[0].abs().sum() == 0


@pytest.mark.parametrize("given", [False, True], ids=["batch", "given"])
def test_refilled_distils_a_classifier_of_class_centres(given):
    s, t, y = rows(5, 4, grad=True), rows(5, 3), torch.tensor([0, 2, 2, 3, 0])
    centres = rows(4, 3)
    used = centres if given else torch.stack([t[y == c].mean(0) if (y == c).any() else t[0] for c in range(4)])
    there = [0, 2, 3]
    log_t = (t @ unit(used[there]).T / 2).log_softmax(1)
    expected = 100 * (log_t.exp() * (log_t - (s[:, there] / 2).log_softmax(1))).sum(1).mean()
    loss = REFILLED(2, centres=centres if given else None)
    same_value_and_gradient(loss(s, t, labels=y), expected, s)


def multi_similarity(e, y, alpha=2, beta=40, base=0.5, eps=0.1):
    z, total = unit(e) @ unit(e).T, 0.0
    for i in range(len(e)):
        same = (y == y[i]) & (torch.arange(len(e)) != i)
        positive, negative = z[i][same], z[i][y != y[i]]
        p = positive[positive - eps < negative.max()]
        n = negative[negative + eps > positive.min()]
        if len(p) and len(n):
            total = total + (1 + torch.exp(-alpha * (p - base)).sum()).log() / alpha + (1 + torch.exp(beta * (n - base)).sum()).log() / beta
    return total / len(e)


def test_iaa_keeps_class_statistics_and_draws_from_them():
    loss = IAA(4, 3, lam=0.5, samples=2).double()
    seen = {c: [] for c in range(4)}
    variance, mean, count = torch.zeros(4, 3, dtype=D), torch.zeros(4, 3, dtype=D), torch.zeros(4, dtype=D)
    for step in range(2):
        z, y = rows(8, 3, grad=True), torch.tensor([0, 1, 0, 1, 2, 2, 0, 1])
        for c in range(3):
            x = z.detach()[y == c]
            w = max(len(x) / (len(x) + count[c]), 0.2)
            variance[c] = (1 - w) * variance[c] + w * x.var(0, correction=0) + w * (1 - w) * (mean[c] - x.mean(0)) ** 2
            mean[c] = (1 - w) * mean[c] + w * x.mean(0)
            count[c] += len(x)
            seen[c].append(x)
        torch.manual_seed(step)
        noise = [torch.randn(8, 3, dtype=D) for _ in range(2)]
        spread = (0.5 * variance[y]).sqrt()
        expected = multi_similarity(torch.cat([z, *(z + spread * eps for eps in noise)]), y.repeat(3))
        torch.manual_seed(step)
        same_value_and_gradient(loss(z, labels=y), expected, z)
        torch.testing.assert_close(loss.variance, variance)
        torch.testing.assert_close(loss.mean, mean)
    for c in range(3):  # below the least rate's reach these are the statistics of all that was seen
        torch.testing.assert_close(variance[c], torch.cat(seen[c]).var(0, correction=0))
    assert not loss.variance[3].any()
    before = loss.count.clone()
    loss.eval()(z, labels=y)
    assert torch.equal(before, loss.count)


def test_bad_input_is_named():
    x, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    both, labelled, votes = {"logits": x, "feat": x}, QueueBank(8, 3, labels=True), QueueBank(8, 3, normalize=False)
    for call, message in (
        (lambda: MSVQ(QueueBank(4, 3), x), "second_bank must be a QueueBank, got Tensor"),
        (lambda: MSVQ(QueueBank(4, 3), QueueBank(4, 3))({"a": x}, {"b": x}), "teacher must be a list of two"),
        (lambda: SSKD(kept=1.5), r"kept must be in \[0, 1\]"),
        (lambda: SSKD()({i: both for i in range(4)}, {i: both for i in range(4)}), "labels must be given for SSKD"),
        (lambda: SSKD()({i: x for i in range(4)}, both, labels=y), "student must have logits and feat in every view"),
        (lambda: SSKD()({i: both for i in range(3)}, both, labels=y), "student must have the views plain"),
        (lambda: SSKD()({"logits": x[:3], "feat": x[:3]}, both, labels=y), "student must have 4 N rows"),
        (lambda: CoNe(votes, votes), "bank must be made with labels=True"),
        (lambda: CoNe(labelled, QueueBank(8, 3)), "normalize=False"),
        (lambda: CoNe(labelled, votes)(both, both), "labels must be given"),
        (lambda: CoNe(labelled, votes)(x, both, labels=y), "student must be a dict of logits, feat"),
        (lambda: WCL(0), "temperature must be"),
        (lambda: WCL()({"a": {"graph": x}, "b": x}), "instance and graph in every view"),
        (lambda: SwAV(4, 3, banks=[QueueBank(4, 3)]), "each of 2 code views, got 1"),
        (lambda: SwAV(4, 3)({"a": x}), "at least two views"),
        (lambda: SwAV(4, 5)({"a": x, "b": x}), r"width dim \(5\)"),
        (lambda: SwAV(4, 3)({"a": x, "b": x}, {"a": x, "c": x}), r"teacher must have the views \['a', 'b'\]"),
        (lambda: FacultyOT(x)(x, x), r"cost must be \[3, 3\] for these logits, got \(4, 3\)"),
        (lambda: FacultyOT([x, x])(x, [x[:, :2]] * 3), "cost must be"),
        (lambda: REFILLED(3), "stage must be one of"),
        (lambda: REFILLED()(x, x), "labels must be given for REFILLED"),
        (lambda: REFILLED(2, centres=x)(x, x, labels=y), r"centres must be \[3, 3\]"),
        (lambda: IAA(3, 3)(x), "labels must be given for IAA"),
        (lambda: IAA(3, 2)(x, labels=y), r"width dim \(2\)"),
        (lambda: IAA(3, 3)(x, labels=y + 3), "labels must lie in"),
    ):
        with pytest.raises((ValueError, TypeError, IndexError), match=message):
            call()
