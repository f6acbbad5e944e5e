"""Each method against a formula written out independently, value and gradient, and the rules they share."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distill_cases import D, rows, same_value_and_gradient
from torch import nn

from kdfast import IndexedBank, Projector, QueueBank
from kdfast.distill import BINGO, KD, MSE, BagDataset, Cosine, cutmix, make_bags


def lowered(loss, call, parameters, steps=15, lr=0.05):
    """The loss falls when its own gradient is followed."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = call()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values[-1] < values[0]


# -- KD, MSE, Cosine -------------------------------------------------------------------------------------------


def test_kd_is_the_softened_divergence():
    s, t = rows(7, 5, grad=True), rows(7, 5, grad=True)
    p = (t.detach() / 3).softmax(-1)
    expected = 9 * (p * (p.log() - (s / 3).softmax(-1).log())).sum(-1).mean()
    loss = KD(T=3)
    same_value_and_gradient(loss(s, t), expected, s)
    assert t.grad is None and torch.equal(loss.last["kd"], loss(s, t).detach())
    tokens = rows(2, 3, 5)
    torch.testing.assert_close(loss(tokens, tokens + 1), loss(tokens.flatten(0, 1), tokens.flatten(0, 1) + 1))
    assert lowered(loss, lambda: loss(s, t), [s])


def test_kd_of_extreme_logits_is_finite():
    s = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = KD()(s, -s.detach())
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all()


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_kd_of_no_samples_is_zero(T):
    s = rows(0, 5, grad=True)
    loss = KD(T)(s, rows(0, 5))
    loss.backward()
    assert loss == 0 and s.grad.shape == (0, 5)


def test_mse_of_maps_pools_the_larger_and_projects():
    projector = Projector(5, 3).double()
    s, t = rows(2, 5, 4, 4, grad=True), rows(2, 3, 2, 2)
    affine = projector.maps[0]
    pooled = s.reshape(2, 5, 2, 2, 2, 2).mean((3, 5))
    expected = (F.conv2d(pooled, affine.weight[:, :, None, None], affine.bias) - t).square().mean()
    same_value_and_gradient(MSE(projector)(s, t), expected, s, affine.weight)


def test_mse_with_an_inverted_projector_trains_the_map_of_the_teacher():
    loss = MSE(projector=Projector(invert=True))
    s, t = torch.randn(16, 4), torch.randn(16, 6)
    loss.build(s, t)
    assert lowered(loss, lambda: loss(s, t), loss.parameters())


def test_cosine_normalises_and_averages_maps():
    s, t = rows(6, 5, 3, 3, grad=True), rows(6, 5, 2, 2)
    a, b = s.mean((2, 3)), t.mean((2, 3))
    expected = (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
    loss = Cosine()
    same_value_and_gradient(loss(s, t), expected, s)
    assert lowered(loss, lambda: loss(s, t), [s])


@pytest.mark.parametrize("make", [MSE, Cosine])
def test_pairs_are_layers_teachers_and_views(make):
    s, t = [torch.randn(4, 3), torch.randn(4, 5)], [torch.randn(4, 6), torch.randn(4, 7)]
    loss = make(projector=[Projector(), Projector(kind="mlp", hidden=8)])
    loss.build(s, t)
    each = [make(projector=p)(a, b) for p, a, b in zip(loss.projectors, s, t, strict=True)]
    torch.testing.assert_close(loss(s, t), sum(each) / 2)

    one, two = torch.randn(4, 3), torch.randn(4, 3)
    plain = make()
    torch.testing.assert_close(plain(one, [two, one]), plain(one, two) / 2)
    torch.testing.assert_close(plain({"a": one, "b": two}, {"b": one, "a": two}), plain(one, two))
    torch.testing.assert_close(plain({"a": one, "b": two}, two), plain(one, two) / 2)
    torch.testing.assert_close(plain((one, None), two), plain(one, two))


def test_layers_and_views_meet_each_of_several_teachers():
    a, b, c, d = (torch.randn(4, 3) for _ in range(4))
    plain = MSE()
    two_layers = (plain(a, b) + plain(b, c) + plain(a, d) + plain(b, a)) / 4
    torch.testing.assert_close(plain([a, b], [[b, c], [d, a]]), two_layers)
    views = {"x": a, "y": b}
    two_views = (plain(a, b) + plain(b, c) + plain(a, d) + plain(b, a)) / 4
    torch.testing.assert_close(plain(views, [{"x": b, "y": c}, {"x": d, "y": a}]), two_views)


def test_mixed_dtypes_meet_in_float32():
    s, t = torch.randn(4, 3).bfloat16(), torch.randn(4, 3).half()
    for loss in (MSE(), Cosine(), KD(), MSE("linear")):
        assert loss(s, t).dtype == torch.float32


def test_bad_pairs_are_named():
    x = torch.randn(4, 3)
    for call, message in (
        (lambda: MSE()(x, torch.randn(4, 5)), r"one shape, got \(4, 3\) and \(4, 5\): give projector="),
        (lambda: KD()(x, torch.randn(4, 5)), "one shape"),
        (lambda: KD(T=0), "T must be a finite number > 0"),
        (lambda: MSE()([x], [x, x]), "lists of one length, got 1 and 2"),
        (lambda: MSE()([x, x], x), "student must be a Tensor, got list"),
        (lambda: MSE()({"a": x}, {"b": x}), "teacher must have 'a' as student does"),
        (lambda: MSE([Projector(), Projector()])([x] * 3, [x] * 3), "one Projector a layer, got 2 for layer 2"),
        (lambda: MSE(projector="conv"), "projector must be one of"),
        (lambda: MSE(projector=nn.Linear(3, 3)), "projector must be a Projector"),
        (lambda: MSE(Projector(), student_dim=3), "must not be given with a Projector"),
        (lambda: MSE()(x.long(), x), "student must be float16"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()


# -- BINGO -----------------------------------------------------------------------------------------------------


def nce(query, keys, bank, tau, weights=None):
    """InfoNCE written out: query [N, D], keys [N, J, D], bank [N, M, D] (each row its own negatives)."""
    q, k, b = (F.normalize(x, dim=-1) for x in (query, keys, bank))
    negatives = (q[:, None] * b).sum(-1) / tau
    losses = []
    for j in range(k.shape[1]):
        z = (q * k[:, j]).sum(-1, keepdim=True) / tau
        losses.append(-torch.cat([z, negatives], 1).log_softmax(1)[:, 0])
    weights = torch.ones(len(q), k.shape[1], dtype=D) if weights is None else weights
    return (torch.stack(losses, 1) * weights).sum(1).mean()


def filled_queue(capacity=12, dim=4, fill=9):
    queue = QueueBank(capacity, dim, dtype=D)
    queue.push(rows(fill, dim))
    return queue


def test_bingo_paper_is_intra_plus_inter_against_the_queue():
    queue = filled_queue()
    loss = BINGO("paper", temperature=0.3, bank=queue)
    a, p, k = rows(5, 4, grad=True), rows(5, 4, grad=True), rows(5, 4)
    bank = queue.keys.clone().expand(5, -1, -1)
    expected = nce(a, k[:, None], bank, 0.3) + nce(p, k[:, None], bank, 0.3)
    value = loss({"a": a, "p": p}, {"a": k})
    same_value_and_gradient(value, expected, a, p)
    torch.testing.assert_close(loss.last["intra"], nce(a, k[:, None], bank, 0.3).detach())
    pushed = torch.cat([bank[0], F.normalize(k, dim=-1)])
    torch.testing.assert_close(queue.keys, torch.cat([pushed[12:], pushed[2:12]]))


def test_bingo_released_weighs_two_keys_and_pushes_the_anchors():
    queue = filled_queue()
    loss = BINGO("released", temperature=0.3, bank=queue, warmup_epochs=10)
    a, p, m = (rows(5, 4, grad=True) for _ in range(3))
    keys = rows(5, 2, 4)
    for epoch, first in ((9, [1.0, 0.0]), (10, [0.5, 0.5])):
        bank = queue.keys.clone().expand(5, -1, -1)
        weights = [torch.tensor(w, dtype=D).expand(5, 2) for w in (first, first[::-1], [0.7, 0.3])]
        expected = sum(nce(q, keys, bank, 0.3, w) for q, w in zip((a, p, m), weights, strict=True)) / 3
        before = int(queue.pointer)
        value = loss({"a": a, "p": p, "mix": m}, {"a": keys[:, 0], "p": keys[:, 1]}, lam=0.7, epoch=epoch)
        same_value_and_gradient(value, expected, a, p, m)
        assert (int(queue.pointer) - before) % 12 == 5
        newest = queue.storage[(before + torch.arange(5)) % 12]
        torch.testing.assert_close(newest, F.normalize(keys[:, 0], dim=-1))


def test_bingo_over_a_fixed_bank_of_all_samples_needs_no_teacher():
    bank, index, member = rows(9, 4), torch.tensor([3, 0, 8]), torch.tensor([5, 1, 2])
    loss = BINGO(temperature=0.3, bank=bank)
    a, p = rows(3, 4, grad=True), rows(3, 4, grad=True)
    everything = torch.arange(9)
    others = torch.stack([bank[everything != i] for i in index])
    fewer = torch.stack([bank[(everything != i) & (everything != j)] for i, j in zip(index, member, strict=True)])
    expected = nce(a, bank[index][:, None], others, 0.3) + nce(p, bank[index][:, None], fewer, 0.3)
    same_value_and_gradient(loss({0: a, 1: p}, None, index=index, positive_index=member), expected, a, p)
    assert "bank" not in loss.state_dict()


def test_bingo_in_batch_and_with_an_indexed_bank():
    a, p, k, index = rows(5, 4, grad=True), rows(5, 4, grad=True), rows(5, 4), torch.tensor([4, 2, 7, 0, 5])
    others = torch.stack([k[torch.arange(5) != i] for i in range(5)])
    expected = nce(a, k[:, None], others, 0.2) + nce(p, k[:, None], others, 0.2)
    same_value_and_gradient(BINGO()({"a": a, "p": p}, k), expected, a, p)

    bank = IndexedBank(8, 4, dtype=D, momentum=0.0).load_(rows(8, 4))
    others = torch.stack([bank.storage[torch.arange(8) != i] for i in index])
    expected = nce(a, k[:, None], others, 0.2) + nce(p, k[:, None], others, 0.2)
    same_value_and_gradient(BINGO(bank=bank)({"a": a, "p": p}, k, index=index), expected, a, p)
    torch.testing.assert_close(bank.storage[index], F.normalize(k, dim=-1))


def test_bingo_leaves_out_the_own_class_of_a_labelled_queue():
    queue = QueueBank(8, 4, labels=True, dtype=D)
    queue.push(rows(6, 4), torch.tensor([0, 1, 0, 1, 0, 1]))
    a, p, k = rows(2, 4, grad=True), rows(2, 4, grad=True), rows(2, 4)
    others = torch.stack([queue.keys[1::2], queue.keys[::2]])
    loss = BINGO(bank=queue, temperature=0.5)
    value = loss({"a": a, "p": p}, k, labels=torch.tensor([0, 1]))
    same_value_and_gradient(value, nce(a, k[:, None], others, 0.5) + nce(p, k[:, None], others, 0.5), a, p)
    assert len(queue) == 8
    with pytest.raises(ValueError, match="labels must be given with a bank that keeps labels"):
        loss({"a": a, "p": p}, k)


def test_bingo_trains_a_projector_and_a_temperature():
    loss = BINGO(bank=QueueBank(16, 6), projector="mlp", temperature=nn.Parameter(torch.tensor(0.5)))
    views, keys = {"a": torch.randn(8, 4), "p": torch.randn(8, 4)}, torch.randn(8, 6)
    loss.build(views, keys)
    loss.bank.push(torch.randn(16, 6))
    loss.push = False
    assert any(p is loss.temperature for p in loss.parameters())
    assert lowered(loss, lambda: loss(views, keys), loss.parameters())
    fixed = BINGO(bank=torch.randn(9, 6), student_dim=4, teacher_dim=6)
    fixed(views, None, index=torch.arange(8)).backward()


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_bingo_inverted_maps_the_keys(variant):
    queue = filled_queue()
    loss = BINGO(variant, temperature=0.3, bank=queue, projector=Projector(4, 6, invert=True)).double()
    weight, bias = loss.projector.maps[0].weight, loss.projector.maps[0].bias
    a, p, m, keys = *(rows(5, 4, grad=True) for _ in range(3)), rows(5, 2, 6)
    mapped, bank = keys @ weight.T + bias, queue.keys.clone().expand(5, -1, -1)
    if variant == "paper":
        expected = nce(a, mapped[:, :1], bank, 0.3) + nce(p, mapped[:, :1], bank, 0.3)
        value = loss({"a": a, "p": p}, {"a": keys[:, 0]})
    else:
        weights = [torch.tensor(w, dtype=D).expand(5, 2) for w in ([1.0, 0.0], [0.0, 1.0], [0.7, 0.3])]
        expected = sum(nce(q, mapped, bank, 0.3, w) for q, w in zip((a, p, m), weights, strict=True)) / 3
        value = loss({"a": a, "p": p, "mix": m}, {"a": keys[:, 0], "p": keys[:, 1]}, lam=0.7, epoch=0)
    same_value_and_gradient(value, expected, a, p, weight, bias)
    newest = queue.storage[(9 + torch.arange(5)) % 12]
    torch.testing.assert_close(newest, F.normalize(mapped[:, 0], dim=-1).detach())


def test_bingo_errors_are_named():
    a, queue = torch.randn(4, 3), QueueBank(8, 3)
    both = {"a": a, "p": a}
    for call, message in (
        (lambda: BINGO("official"), "variant must be one of"),
        (lambda: BINGO("released"), "bank must be given"),
        (lambda: BINGO(temperature=-1), "temperature must be"),
        (lambda: BINGO(bank=[a]), "bank must be a Tensor"),
        (
            lambda: BINGO(bank=a, projector=Projector(3, 3, invert=True))(both, None, index=torch.arange(4)),
            "projector must not be inverted where a bank Tensor",
        ),
        (lambda: BINGO()(a, a), "student must be a dict of the views a, p, got Tensor"),
        (lambda: BINGO()({"a": a}, a), "student must have the views a, p"),
        (lambda: BINGO()(both, None), "teacher must be a dict of the views a, got NoneType"),
        (lambda: BINGO("released", bank=queue)({**both, "mix": a}, both), "lam and epoch must be given"),
        (lambda: BINGO(bank=IndexedBank(8, 3))(both, a), "index must be given with an IndexedBank"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()


# -- the rules of banks ----------------------------------------------------------------------------------------


def test_a_push_happens_once_in_training_with_gradients():
    queue = QueueBank(64, 4)
    loss, views, key = BINGO(bank=queue), {"a": torch.randn(3, 4, requires_grad=True), "p": torch.randn(3, 4)}, torch.randn(3, 4)
    loss(views, key)
    assert len(queue) == 3
    with torch.no_grad():
        loss(views, key)
    loss.eval()(views, key)
    loss.train().push = False
    loss(views, key)
    assert len(queue) == 3
    loss.push = True
    for _ in range(2):  # micro-batches of one step both push
        loss(views, key).backward()
    assert len(queue) == 9


def test_the_push_after_scoring_leaves_the_gradient_right():
    queue = filled_queue()
    a, p, k = rows(5, 4, grad=True), rows(5, 4), rows(5, 4)
    loss = BINGO(bank=queue)
    loss.push = False
    still = torch.autograd.grad(loss({"a": a, "p": p}, k), a)[0]
    loss.push = True
    value = loss({"a": a, "p": p}, k)
    queue.push(rows(12, 4))
    torch.testing.assert_close(torch.autograd.grad(value, a)[0], still)


# -- bags ------------------------------------------------------------------------------------------------------


def test_label_bags_hold_distinct_others_of_the_label():
    labels = torch.randint(0, 6, (40,))
    labels[0] = 6  # alone
    bags = make_bags(torch.randn(40, 3), "label", k=5, labels=labels)
    for i, bag in enumerate(bags.tolist()):
        members = [j for j in bag if j >= 0]
        assert i not in members and len(set(members)) == len(members)
        assert all(labels[j] == labels[i] for j in members)
        assert len(members) == min(5, int((labels == labels[i]).sum()) - 1)
        assert all(j == -1 for j in bag[len(members) :])


def test_label_bags_take_every_member_equally_often():
    counts = torch.zeros(4, 4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        bags = make_bags(torch.zeros(4, 1), "label", k=1, labels=torch.zeros(4, dtype=torch.int32), generator=generator)
        counts[torch.arange(4), bags[:, 0]] += 1
    assert (counts.diagonal() == 0).all() and (counts + 200 * torch.eye(4) - 200).abs().max() < 60


def test_knn_bags_are_the_nearest_others():
    x = torch.randn(30, 6)
    x[7] = x[3]  # a duplicate is a neighbour, never the sample itself
    similarity = F.normalize(x, dim=1) @ F.normalize(x, dim=1).t()
    similarity.fill_diagonal_(-2)
    bags = make_bags(x, k=4)
    torch.testing.assert_close(similarity.gather(1, bags), similarity.topk(4).values)
    assert bags[7, 0] == 3 and bags[3, 0] == 7


def test_knn_bags_of_few_samples_are_padded():
    assert torch.equal(make_bags(torch.eye(2), k=3), torch.tensor([[1, -1, -1], [0, -1, -1]]))


def test_knn_bags_of_a_memory_map(tmp_path):
    x, seen = torch.randn(40, 6), []
    np.save(tmp_path / "features.npy", x.numpy())
    bags = make_bags(np.load(tmp_path / "features.npy", mmap_mode="r"), k=4, progress=lambda done, blocks: seen.append((done, blocks)))
    assert torch.equal(bags, make_bags(x, k=4)) and seen and seen[-1][0] == seen[-1][1]
    with pytest.raises(TypeError, match="features must be a Tensor"):
        make_bags(x.numpy(), "kmeans")


def test_kmeans_bags_stay_in_their_cluster():
    centres = 10 * torch.eye(4)
    truth = torch.arange(4).repeat(10)
    x = centres[truth] + 0.1 * torch.randn(40, 4)
    bags = make_bags(x, "kmeans", k=3, num_clusters=8, generator=torch.Generator().manual_seed(0))
    valid = bags >= 0
    assert valid.any(1).float().mean() > 0.9
    assert (truth[bags.clamp(min=0)] == truth[:, None])[valid].float().mean() > 0.9


def test_bag_dataset_yields_two_views_of_two_samples():
    data = [(torch.full((2,), float(i)), "label") for i in range(4)]
    bags = torch.tensor([[1, 2], [-1, 3], [-1, -1], [0, -1]])
    noisy = BagDataset(data, bags, transform=lambda x: x + 0.1 * torch.rand(2), generator=torch.Generator().manual_seed(0))
    drawn = set()
    for _ in range(20):
        a1, a2, p1, p2, index = noisy[0]
        assert index == 0 and not torch.equal(a1, a2) and a1.long().eq(0).all()
        assert torch.equal(p1.long(), p2.long())
        drawn.add(int(p1[0]))
    assert drawn == {1, 2}
    plain = BagDataset(data, bags)
    assert plain[1][2][0] == 3 and plain[2][2][0] == 2 and len(plain) == 4
    batch = next(iter(torch.utils.data.DataLoader(plain, batch_size=4)))
    assert [tuple(v.shape) for v in batch] == [(4, 2)] * 4 + [(4,)]
    with pytest.raises(ValueError, match=r"bags must be \[4, K\]"):
        BagDataset(data, bags[:3])


def test_cutmix_reports_the_share_that_is_left():
    a, p = torch.zeros(2, 3, 16, 20), torch.ones(2, 3, 16, 20)
    shares = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        x, lam = cutmix(a, p, generator=generator)
        torch.testing.assert_close(1 - x.mean().item(), lam)
        assert torch.equal(x[0, 0], x[1, 2])
        shares.append(lam)
    assert 0.4 < sum(shares) / 30 < 0.9 and not a.any()
    again = cutmix(a, p, generator=torch.Generator().manual_seed(0))[1]
    assert again == shares[0]
    with pytest.raises(ValueError, match="x_p must have shape"):
        cutmix(a, p[:1])


def test_bad_bags_are_named():
    x = torch.randn(4, 2)
    for call, message in (
        (lambda: make_bags(x, "faiss"), "method must be one of"),
        (lambda: make_bags(x, "label"), 'labels must be given for method="label"'),
        (lambda: make_bags(x, "knn", labels=torch.arange(4)), "labels must not be given"),
        (lambda: make_bags(x, k=0), "k must be >= 1"),
        (lambda: make_bags(x[0]), "features must have 2 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
