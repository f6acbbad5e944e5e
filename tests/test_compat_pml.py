"""kdfast.compat.pml: against the definitions written out pair by pair, and against pytorch-metric-learning where it is installed."""

import importlib.util
import itertools
import math

import pytest
import torch
from pml_cases import LOSSES, agree, as_tuple, batch, mean_of, pairs_of, plain_margin, plain_nt_xent, triplets_of, unit
from torch import nn

from kdfast.compat.pml import (
    BatchEasyHardMiner,
    BatchHardMiner,
    CrossBatchMemory,
    DistanceWeightedMiner,
    MarginLoss,
    MultiSimilarityLoss,
    MultiSimilarityMiner,
    NTXentLoss,
    SupConLoss,
    TripletMarginLoss,
    TripletMarginMiner,
    losses,
    miners,
)

peer = pytest.mark.skipif(importlib.util.find_spec("pytorch_metric_learning") is None, reason="pytorch-metric-learning is not installed")


@pytest.mark.parametrize("name", LOSSES)
def test_all_pairs_of_a_batch(name):
    loss, plain = LOSSES[name]
    x, labels = batch()
    labels[3] = 99  # alone in its class
    agree(loss(x, labels), plain(x, x, *pairs_of(labels)), x)


@pytest.mark.parametrize("name", LOSSES)
def test_all_pairs_against_references(name):
    loss, plain = LOSSES[name]
    x, labels = batch(7)
    y, ref_labels = batch(13)
    agree(loss(x, labels, ref_emb=y, ref_labels=ref_labels), plain(x, y, *pairs_of(labels, ref_labels)), x, y)


@pytest.mark.parametrize("name", LOSSES)
def test_listed_pairs_and_triplets(name):
    loss, plain = LOSSES[name]
    x, labels = batch()
    positive, negative = ([pair for i, pair in enumerate(pairs) if i % 3] for pairs in pairs_of(labels))
    want = plain(x, x, positive, negative)
    agree(loss(x, labels, as_tuple(positive, negative)), want, x)
    agree(loss(x, None, as_tuple(positive, negative)), want, x)
    triplets = triplets_of(positive, negative)[::5]
    listed = tuple(torch.tensor(column) for column in zip(*triplets, strict=True))
    if "triplet" in name or name == "margin":
        apart = [[(i, p) for i, (_, p, _) in enumerate(triplets)], [(i, n) for i, (_, _, n) in enumerate(triplets)]]
        agree(loss(x, labels, listed), plain_rows(plain, x, triplets, apart), x)
    else:  # a triplet is a positive and a negative pair; the means over an anchor's pairs count each pair once
        once = (lambda pairs: pairs) if name == "nt_xent" else (lambda pairs: sorted(set(pairs)))
        agree(loss(x, labels, listed), plain(x, x, once([t[:2] for t in triplets]), once([(a, n) for a, _, n in triplets])), x)


def plain_rows(plain, x, triplets, apart):
    """The loss with each listed triplet as an anchor of its own."""
    return plain(x[[a for a, _, _ in triplets]], x, *apart)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_to_compare_is_zero_with_a_graph(name):
    loss, _ = LOSSES[name]
    x, _ = batch(4)
    labels = torch.arange(4)
    if name != "multi_similarity":  # which pushes away from negatives alone
        assert loss(x, labels).item() == 0
    empty = torch.empty(0, dtype=torch.int64)
    value = loss(x, labels, (empty,) * 4)
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(value, x)[0].abs().max() == 0


def test_extreme_scores_keep_their_gradient():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1e-3]], requires_grad=True)
    value = NTXentLoss(temperature=0.01)(x, torch.tensor([0, 0, 1]))
    assert value.item() == pytest.approx((200 + 0) / 2, rel=0.01)
    assert torch.autograd.grad(value, x)[0].abs().sum() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_empty_batches_and_nan(name):
    loss, _ = LOSSES[name]
    x, labels = batch(6, classes=2)
    value = loss(x[:0], labels[:0])
    assert value.item() == 0 and torch.autograd.grad(value, x)[0].abs().max() == 0
    broken = x.detach().clone()
    broken[2, 1] = torch.nan
    triplet = tuple(torch.tensor(index) for index in ([0, 2], [1, 3], [2, 0]))
    assert loss(broken, torch.arange(6) // 2).isnan() and loss(broken, None, triplet).isnan()
    for miner in (BatchHardMiner(), BatchEasyHardMiner(), TripletMarginMiner(), MultiSimilarityMiner(), DistanceWeightedMiner()):
        mined = miner(x[:0], labels[:0])
        assert len(mined) == len(miner(x, labels)) and all(index.shape == (0,) and index.dtype == torch.int64 for index in mined)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_float32(dtype):
    x, labels = batch(dtype=torch.float32)
    for name, (loss, _) in LOSSES.items():
        low = x.detach().to(dtype).requires_grad_()
        value = loss(low, labels)
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, loss(low.detach().float(), labels))
        assert torch.autograd.grad(value, low)[0].dtype == dtype
        for miner in (None, MultiSimilarityMiner(), TripletMarginMiner()):
            mined = miner and miner(x, labels)
            with torch.autocast("cpu", dtype):
                again = miner and miner(x, labels)
                got = loss(x, labels, again)
            assert mined is None or in_set(again[:2]) == in_set(mined[:2])
            torch.testing.assert_close(got, loss(x, labels, mined))


def test_margin_loss_learns_its_boundary():
    x, labels = batch(dtype=torch.float32)
    loss = MarginLoss(nu=0.3, learn_beta=True)
    assert {name: tuple(p.shape) for name, p in loss.state_dict().items()} == {"beta": (1,)}
    got = loss(x, labels)
    agree(got, MarginLoss()(x, labels) + 0.3 * loss.beta[0], x, atol=1e-6)
    assert torch.autograd.grad(got, loss.beta)[0].isfinite()
    several = MarginLoss(learn_beta=True, num_classes=5)
    with torch.no_grad():
        several.beta += torch.rand(5) / 4
    positive, negative = pairs_of(labels)
    want = plain_margin(x, x, positive, negative, beta=[several.beta[c] for c in labels])
    for value in (several(x, labels), several(x, labels, as_tuple(positive, negative))):
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(*(torch.autograd.grad(v, several.beta, retain_graph=True)[0] for v in (value, want)))


# -- miners ----------------------------------------------------------------------------------------------------------------------


def in_set(tuples):
    return sorted(zip(*(t.tolist() for t in tuples), strict=True))


def distances(x, y):
    return torch.cdist(unit(x.detach()), unit(y.detach()))


@pytest.mark.parametrize("with_references", [False, True])
def test_batch_miners_take_what_their_rule_says(with_references):
    x, labels = batch()
    y, ref_labels = batch(31) if with_references else (x, labels)
    d, given = distances(x, y), (y, ref_labels) if with_references else (None, None)
    positive, negative = pairs_of(labels, ref_labels if with_references else None)
    for pos, neg in itertools.product(("easy", "hard"), ("semihard", "hard")):
        want = []
        for a in range(len(x)):
            mine, others = [p for b, p in positive if a == b], [n for b, n in negative if a == b]
            if not mine:
                continue
            p = (min if pos == "easy" else max)(mine, key=lambda j: d[a, j])
            others = [n for n in others if neg == "hard" or d[a, n] > d[a, p]]
            if others:
                want.append((a, p, a, min(others, key=lambda j: d[a, j])))
        assert in_set(BatchEasyHardMiner(pos, neg)(x, labels, *given)) == want
        if pos == neg == "hard":
            assert in_set(BatchHardMiner()(x, labels, *given)) == [(a, p, n) for a, p, _, n in want]
    rules = {"all": lambda g: g <= 0.2, "hard": lambda g: g <= 0, "semihard": lambda g: 0 < g <= 0.2, "easy": lambda g: g > 0.2}
    for kind, rule in rules.items():
        want = [t for t in triplets_of(positive, negative) if rule(d[t[0], t[2]] - d[t[0], t[1]])]
        assert in_set(TripletMarginMiner(0.2, kind)(x, labels, *given)) == want
    s = unit(x.detach()) @ unit(y.detach()).T
    a1, p, a2, n = MultiSimilarityMiner(0.1)(x, labels, *given)
    least = {a: min([s[a, p] for b, p in positive if a == b], default=math.inf) for a in range(len(x))}
    most = {a: max([s[a, n] for b, n in negative if a == b], default=-math.inf) for a in range(len(x))}
    assert in_set((a1, p)) == [(a, p) for a, p in positive if s[a, p] - 0.1 < most[a]]
    assert in_set((a2, n)) == [(a, n) for a, n in negative if s[a, n] + 0.1 > least[a]]


def test_distance_weighted_draws_one_eligible_negative_a_pair():
    x, labels = batch(40, 16)
    d = distances(x, x)
    a, p, n = DistanceWeightedMiner(generator=torch.Generator().manual_seed(1))(x, labels)
    again = DistanceWeightedMiner(generator=torch.Generator().manual_seed(1))(x, labels)
    assert all(torch.equal(*pair) for pair in zip((a, p, n), again, strict=True))
    assert (labels[a] == labels[p]).all() and (a != p).all() and (labels[a] != labels[n]).all() and (d[a, n] < 1.4).all()
    possible = {a for a, n in pairs_of(labels)[1] if d[a, n] < 1.4}
    assert in_set((a, p)) == [pair for pair in pairs_of(labels)[0] if pair[0] in possible]


def test_a_miners_tuple_goes_into_a_loss():
    x, labels = batch()
    for miner in (BatchHardMiner(), BatchEasyHardMiner(), TripletMarginMiner(), MultiSimilarityMiner(), DistanceWeightedMiner()):
        for loss, _ in LOSSES.values():
            value = loss(x, labels, miner(x, labels))
            assert value.isfinite() and torch.autograd.grad(value, x)[0].isfinite().all()


# -- the memory ------------------------------------------------------------------------------------------------------------------


class PlainMemory:
    """A list of (embedding, label); what is compared with a batch leaves out the batch's own entries."""

    def __init__(self, size):
        self.size, self.slots, self.next = size, [], 0

    def push(self, x, labels):
        own = []
        for row, label in zip(x.detach(), labels, strict=True):
            if len(self.slots) < self.size:
                self.slots.append(None)
            self.slots[self.next] = (row.clone(), int(label))
            own.append(self.next)
            self.next = (self.next + 1) % self.size
        return own

    def compared(self, labels, own):
        y, columns = torch.stack([row for row, _ in self.slots]), [label for _, label in self.slots]
        entries = [(a, b) for a in range(len(labels)) for b in range(len(columns)) if own is None or b != own[a]]
        return y, [e for e in entries if labels[e[0]] == columns[e[1]]], [e for e in entries if labels[e[0]] != columns[e[1]]]


@pytest.mark.parametrize("name", LOSSES)
def test_memory_scores_earlier_batches_without_own_rows(name):
    loss, plain = LOSSES[name]
    memory, reference = CrossBatchMemory(loss, 6, 17), PlainMemory(17)
    for _ in range(4):  # fills, wraps
        x, labels = batch(6, classes=3)
        own = reference.push(x, labels)
        agree(memory(x, labels), plain(x, *reference.compared(labels, own)), x)


def test_memory_mines_without_own_rows():
    memory, reference = CrossBatchMemory(TripletMarginLoss(0.5), 6, 30, BatchEasyHardMiner("easy", "hard")), PlainMemory(30)
    for _ in range(2):
        x, labels = batch(10, classes=3)
        own = reference.push(x, labels)
        got = memory(x, labels)
        y, positive, negative = reference.compared(labels, own)
        d, losses = torch.cdist(unit(x), unit(y)), []
        for a in range(len(x)):
            d_ap, d_an = ([d[a, j] for b, j in pairs if a == b] for pairs in (positive, negative))
            if d_ap and d_an:
                losses.append((min(d_ap) - min(d_an) + 0.5).clamp(min=0))
        agree(got, mean_of((v for v in losses if v > 0), x), x)


def test_memory_takes_a_mask_of_keys_and_batches_beyond_its_size():
    memory, reference = CrossBatchMemory(NTXentLoss(), 6, 8), PlainMemory(8)
    x, labels = batch(12, classes=3)
    mask = torch.arange(12) % 2 == 0
    reference.push(x[mask], labels[mask])
    got = memory(x, labels, enqueue_mask=mask)
    agree(got, plain_nt_xent(x[~mask], *reference.compared(labels[~mask], None)), x)
    own = [slot if r >= 4 else -1 for r, slot in enumerate(reference.push(x, labels))]  # the first four are overwritten at once
    agree(memory(x, labels), plain_nt_xent(x, *reference.compared(labels, own)), x)


def test_memory_resumes_from_its_state():
    memory = CrossBatchMemory(SupConLoss(), 6, 10)
    steps = [batch(4, classes=2, dtype=torch.float32) for _ in range(5)]
    for x, labels in steps[:3]:
        memory(x, labels)
    again = CrossBatchMemory(SupConLoss(), 6, 10)
    again.load_state_dict(memory.state_dict())
    for x, labels in steps[3:]:
        assert torch.equal(memory(x, labels), again(x, labels))
    assert torch.equal(memory.embedding_memory, again.embedding_memory) and memory.label_memory.shape == (10,)
    memory.reset_queue()
    assert len(memory.memory) == 0


# -- arguments -------------------------------------------------------------------------------------------------------------------


class LpDistance:
    p, power, normalize_embeddings = 2, 2, False


class SNRDistance:
    pass


class MeanReducer:
    pass


class DivisorReducer:
    pass


def test_distance_and_reducer_objects_are_told_by_their_class():
    x, labels = batch()
    got = TripletMarginLoss(0.5, distance=LpDistance(), reducer=MeanReducer())(x, labels)
    d = torch.cdist(x, x).square()
    want = torch.stack([(d[a, p] - d[a, n] + 0.5).clamp(min=0) for a, p, n in triplets_of(*pairs_of(labels))]).mean()
    agree(got, want, x)


def test_what_is_not_served_is_named():
    x, labels = batch()
    index = torch.arange(3)
    for wrong, kind, message in (
        (lambda: TripletMarginLoss(triplets_per_anchor=10), ValueError, "triplets_per_anchor must be"),
        (lambda: TripletMarginLoss(distance=SNRDistance()), ValueError, "distance must be None.*got SNRDistance"),
        (lambda: TripletMarginLoss(reducer=DivisorReducer()), ValueError, "reducer must be None.*got DivisorReducer"),
        (lambda: TripletMarginLoss(embedding_regularizer=nn.Identity()), ValueError, "embedding_regularizer is not supported"),
        (lambda: NTXentLoss(reducer=MeanReducer()), ValueError, "reducer is not supported by kdfast.compat.pml.NTXentLoss"),
        (lambda: NTXentLoss(distance=LpDistance()), ValueError, "distance must be None"),
        (lambda: NTXentLoss(temprature=1), TypeError, "NTXentLoss has no option 'temprature'"),
        (lambda: SupConLoss(temperature=0), ValueError, "temperature must be"),
        (lambda: MultiSimilarityLoss(alpha=0), ValueError, "alpha must be"),
        (lambda: MultiSimilarityLoss(base=None), TypeError, "base must be"),
        (lambda: TripletMarginLoss(smooth_loss=1), TypeError, "smooth_loss must be"),
        (lambda: TripletMarginMiner(margin="0.2"), TypeError, "margin must be"),
        (lambda: MultiSimilarityMiner(epsilon=float("nan")), ValueError, "epsilon must be"),
        (lambda: MarginLoss(beta=1e308), ValueError, "beta must be"),
        (lambda: MarginLoss(num_classes=-1), ValueError, "num_classes must be"),
        (lambda: CrossBatchMemory(SupConLoss(), 6.0), TypeError, "embedding_size must be"),
        (lambda: CrossBatchMemory(SupConLoss(), 6)(x, labels, enqueue_mask=labels), TypeError, "enqueue_mask must be"),
        (lambda: CrossBatchMemory(SupConLoss(), x.shape[1] + 1)(x, labels), ValueError, "embeddings must have width embedding_size"),
        (lambda: SupConLoss()(x, labels, ref_emb=x[:, 1:].detach(), ref_labels=labels), ValueError, "ref_emb must have the width"),
        (lambda: TripletMarginLoss()(x, labels, ref_emb=[1.0], ref_labels=labels), TypeError, "ref_emb must be"),
        (lambda: MarginLoss(nu=0.1, num_classes=3), ValueError, "nu must be 0 with num_classes"),
        (lambda: MarginLoss(triplets_per_anchor=3), ValueError, "triplets_per_anchor"),
        (lambda: BatchEasyHardMiner("semihard", "hard"), ValueError, "pos_strategy must be one of"),
        (lambda: BatchEasyHardMiner("easy", "easy"), ValueError, "neg_strategy must be one of"),
        (lambda: BatchEasyHardMiner(allowed_pos_range=(0, 1)), ValueError, "allowed_pos_range must be None"),
        (lambda: DistanceWeightedMiner(cutoff=0.4), ValueError, "cutoff must be 0.5"),
        (lambda: DistanceWeightedMiner(distance=LpDistance()), ValueError, "distance must be None"),
        (lambda: TripletMarginMiner(type_of_triplets="soft"), ValueError, "type_of_triplets must be one of"),
        (lambda: CrossBatchMemory(nn.MSELoss(), 6), ValueError, "loss must be a loss of kdfast.compat.pml"),
        (lambda: CrossBatchMemory(SupConLoss(), 6, miner=nn.Identity()), ValueError, "miner must be a miner of"),
        (lambda: CrossBatchMemory(SupConLoss(), 6)(x, labels, (index,) * 3), ValueError, "indices_tuple must be None"),
        (lambda: SupConLoss()(x), ValueError, "labels or indices_tuple must be given"),
        (lambda: SupConLoss()(x, labels[:5]), ValueError, "labels must have shape"),
        (lambda: SupConLoss()(x, labels.double()), TypeError, "labels must have an integer dtype"),
        (lambda: SupConLoss()(x, labels, (index, index)), ValueError, "indices_tuple must be"),
        (lambda: SupConLoss()(x, labels, (index, index, index[:2])), ValueError, "indices_tuple must hold index vectors that pair up"),
        (lambda: SupConLoss()(x, labels, ref_labels=labels), ValueError, "ref_labels needs ref_emb"),
        (lambda: NTXentLoss()(x, labels, ref_emb=x.detach()), ValueError, "ref_labels must be given"),
        (lambda: SupConLoss()(x, labels, ref_emb=x.detach()), ValueError, "ref_labels must be given"),
        (lambda: TripletMarginLoss()(x, labels, ref_emb=x.detach()), ValueError, "ref_labels must be given"),
        (lambda: MultiSimilarityMiner()(x, labels, x.detach()), ValueError, "ref_labels must be given"),
    ):
        with pytest.raises(kind, match=message):
            wrong()


# -- the library itself ----------------------------------------------------------------------------------------------------------


@peer
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("miner", [None, "BatchHardMiner", "BatchEasyHardMiner", "TripletMarginMiner", "MultiSimilarityMiner"])
def test_losses_and_miners_are_the_librarys(name, miner):
    from pytorch_metric_learning import losses, miners

    from kdfast.compat import pml

    (x, labels), (ours, _) = batch(), LOSSES[name]
    arguments = {key: getattr(ours, key) for key in ("margin", "swap", "smooth_loss", "temperature") if hasattr(ours, key)}
    if name == "margin":
        arguments["beta"] = 1.25  # exact in its float32
    theirs = getattr(losses, type(ours).__name__)(**arguments)
    mined = wanted = None
    if miner is not None:
        mined, wanted = (getattr(source, miner)()(x, labels) for source in (pml.miners, miners))
        half = len(mined) // 2 if len(mined) == 4 else len(mined)
        for part in (slice(None, half), slice(half, None)):
            if mined[part]:
                assert in_set(mined[part]) == in_set(wanted[part])
    agree(ours(x, labels, mined), theirs(x, labels, wanted), x)
    y, ref_labels = batch(29)
    if "swap" not in name:  # with references the library swaps in a distance of another row
        mined = None if miner is None else getattr(pml.miners, miner)()(x, labels, y, ref_labels)
        agree(ours(x, labels, mined, y, ref_labels), theirs(x, labels, mined, y, ref_labels), x, y)


@peer
def test_modules_have_the_librarys_names():
    import pytorch_metric_learning.losses as library_losses
    import pytorch_metric_learning.miners as library_miners

    from kdfast.compat import pml

    for ours, theirs in ((losses, library_losses), (miners, library_miners)):
        own = [value for value in vars(ours).values() if isinstance(value, type) and value in vars(pml).values()]
        assert len(own) >= 5 and all(hasattr(theirs, value.__name__) for value in own)
    assert losses.CrossBatchMemory is CrossBatchMemory  # which the library has among its losses


@peer
def test_memory_is_the_librarys_where_nothing_is_mined():
    from pytorch_metric_learning import losses as library

    for ours, theirs in ((NTXentLoss(), library.NTXentLoss()), (TripletMarginLoss(0.3), library.TripletMarginLoss(0.3))):
        memory, wanted = CrossBatchMemory(ours, 6, 24), library.CrossBatchMemory(theirs, 6, 24)
        for _ in range(5):
            x, labels = batch(8, classes=3)
            agree(memory(x, labels), wanted(x, labels), x)
        torch.testing.assert_close(memory.embedding_memory, wanted.embedding_memory)


@peer
def test_the_librarys_distance_and_reducer_objects_are_taken():
    from pytorch_metric_learning import distances as library
    from pytorch_metric_learning import losses, reducers

    x, labels = batch()
    for distance in (library.LpDistance(power=2), library.LpDistance(normalize_embeddings=False), library.CosineSimilarity()):
        for reducer in (reducers.MeanReducer(), reducers.AvgNonZeroReducer(), reducers.SumReducer()):
            arguments = {"margin": 0.1, "distance": distance, "reducer": reducer}
            agree(TripletMarginLoss(**arguments)(x, labels), losses.TripletMarginLoss(**arguments)(x, labels), x)
