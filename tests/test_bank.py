"""QueueBank and IndexedBank: what a list of pushed rows would hold, and the same on every rank."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import needs_gloo, on_two_ranks

import kdfast
from kdfast._core import bank_protocol
from kdfast.bank import IndexedBank, QueueBank, ddp_ignored
from kdfast.functional import sampled_nce


def replay(bank: QueueBank, rows: list, labels: list | None = None) -> None:
    """`bank` holds what pushing `rows` one at a time into slots 0, 1, ... would leave."""
    expected, expected_labels = {}, {}
    for i, row in enumerate(rows):
        expected[i % bank.capacity] = row
        if labels is not None:
            expected_labels[i % bank.capacity] = labels[i]
    assert len(bank) == len(expected)
    assert int(bank.pointer) == len(rows) % bank.capacity
    for slot, row in expected.items():
        torch.testing.assert_close(bank.keys[slot], row.to(bank.storage.dtype), rtol=0, atol=0)
        if labels is not None:
            assert int(bank.labels[slot]) == int(expected_labels[slot])


# Capacities against batches of 0, 1, a divisor, a non-divisor, exactly the capacity and more than twice it.
@pytest.mark.parametrize("capacity", [1, 8, 63], ids=lambda c: f"capacity{c}")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "where"])
def test_queue_is_first_in_first_out(capacity, masked):
    bank = QueueBank(capacity, 3, labels=True, normalize=False)
    rows, labels = [], []
    for step, n in enumerate([4, 0, 1, capacity, 5, 2 * capacity + 3, 7]):
        keys, y = torch.randn(n, 3), torch.randint(9, (n,), dtype=torch.int32)
        where = torch.rand(n) < 0.6 if masked else None
        if masked and step == 4:
            where = torch.zeros(n, dtype=torch.bool)  # nothing kept
        bank.push(keys, y, where=where)
        kept = torch.ones(n, dtype=torch.bool) if where is None else where
        rows += list(keys[kept])
        labels += list(y[kept])
        replay(bank, rows, labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_queue_normalises_in_float32(dtype):
    keys = torch.randn(5, 16).to(dtype) * 100
    bank = QueueBank(8, 16, dtype=dtype)
    bank.push(keys)
    wide = keys.double() if dtype == torch.float64 else keys.float()
    # the kernel's lengths are summed in double, PyTorch's in float: a unit in the last place
    rtol = 0 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(bank.keys, F.normalize(wide, dim=1).to(dtype), rtol=rtol, atol=0)


def test_where_keeps_bad_rows_out():
    keys = torch.randn(6, 4)
    keys[[1, 4]] = torch.nan
    bank = QueueBank(16, 4)
    bank.push(keys, where=keys.isfinite().all(dim=1))
    assert len(bank) == 4 and bank.storage.isfinite().all()


def test_state_round_trip_mid_wrap():
    bank = QueueBank(8, 3, labels=True)
    bank.push(torch.randn(11, 3), torch.arange(11))
    other = QueueBank(8, 3, labels=True)
    other.load_state_dict(bank.state_dict())
    more = torch.randn(4, 3)
    for b in (bank, other, copy.deepcopy(bank)):
        b.push(more, torch.arange(4))
    for name, value in bank.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)
    assert set(bank.state_dict()) == {"storage", "labels", "pointer", "fill"}


def test_queue_as_rows():
    bank = QueueBank(8, 3, labels=True)
    bank.push(torch.randn(5, 3), torch.arange(5))
    rows = bank_protocol.unpack(bank)
    assert (
        rows.rows is bank.storage and rows.valid.shape == () and int(rows.valid) == 5 and rows.labels is bank.labels and rows.bias is None
    )
    with pytest.raises(ValueError, match="bank_valid"):
        bank_protocol.unpack(bank, valid=3)


def test_push_takes_no_gradient_and_reads_nothing_back():
    bank = QueueBank(8, 3)
    keys = torch.randn(5, 3, requires_grad=True)
    push = torch.compile(bank.push, backend="aot_eager", fullgraph=True)  # a host read would break the graph
    push(keys, where=torch.tensor([True, False, True, True, False]))
    assert not bank.storage.requires_grad
    assert len(bank) == 3


def test_expanded_and_strided_keys():
    bank = QueueBank(16, 4, normalize=False)
    base = torch.randn(4, 5)
    bank.push(base.T)
    bank.push(base[:, :1].T.expand(3, 4))
    replay(bank, list(base.T) + [base[:, 0]] * 3)


# The last key of a repeated index counts alone, against its own row's old value.
@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_indexed_update_last_duplicate_wins(momentum):
    bank = IndexedBank(7, 4, momentum=momentum, labels=True)
    old = bank.storage.clone()
    index = torch.tensor([2, 5, 2, 0, 2, 5], dtype=torch.int32)
    keys, labels = torch.randn(6, 4), torch.arange(6)
    bank.update(index, keys, labels)
    for row, source in {2: 4, 5: 5, 0: 3}.items():
        torch.testing.assert_close(bank.storage[row], F.normalize(momentum * old[row] + (1 - momentum) * keys[source], dim=0))
        assert int(bank.labels[row]) == source
    untouched = [1, 3, 4, 6]
    torch.testing.assert_close(bank.storage[untouched], old[untouched], rtol=0, atol=0)
    assert (bank.labels[untouched] == -1).all()


def test_indexed_uniform_start():
    bank = IndexedBank(400, 12, generator=torch.Generator().manual_seed(3))
    assert bank.storage.abs().max() <= 0.5 and bank.storage.abs().max() > 0.49
    assert bank.as_rows().bias is None and len(bank) == 400


def test_indexed_empty_rows_carry_bias_and_take_their_first_key_whole():
    bank = IndexedBank(5, 3, init="empty")
    key = torch.randn(2, 3)
    bank.update(torch.tensor([3, 1]), key)
    torch.testing.assert_close(bank.storage[[3, 1]], F.normalize(key, dim=1))
    inf = math.inf
    assert bank.as_rows().bias.tolist() == [-inf, 0, -inf, 0, -inf]
    old = bank.storage[3].clone()
    bank.update(torch.tensor([3]), key[1:])
    torch.testing.assert_close(bank.storage[3], F.normalize(0.5 * old + 0.5 * key[1], dim=0))
    restored = IndexedBank(5, 3, init="empty")
    restored.load_state_dict(bank.state_dict())
    assert torch.equal(restored.as_rows().bias, bank.as_rows().bias)


def test_indexed_load():
    features = torch.randn(6, 3, dtype=torch.float16)
    bank = IndexedBank(6, 3, init="empty", labels=True).load_(features, torch.arange(6))
    torch.testing.assert_close(bank.storage, F.normalize(features.float(), dim=1))
    assert (bank.as_rows().bias == 0).all() and torch.equal(bank.labels, torch.arange(6))


def test_a_refused_load_changes_nothing():
    bank = IndexedBank(6, 3, labels=True)
    before = bank.storage.clone()
    with pytest.raises(ValueError, match="labels must have shape"):
        bank.load_(torch.randn(6, 3), torch.arange(5))
    assert bank.storage.equal(before)


def test_public_names():
    assert kdfast.QueueBank is QueueBank and kdfast.IndexedBank is IndexedBank


def test_ddp_ignored_names():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), QueueBank(4, 3), IndexedBank(4, 3, init="empty"))
    assert set(ddp_ignored(model)) == {"1.storage", "1.pointer", "1.fill", "2.storage", "2.filled"}


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "capacity", lambda: QueueBank(0, 3)),
        (TypeError, "dim", lambda: QueueBank(3, 2.5)),
        (TypeError, "dtype", lambda: QueueBank(3, 2, dtype=torch.int64)),
        (ValueError, "gather", lambda: QueueBank(3, 2, gather="all")),
        (ValueError, "dimensions", lambda: QueueBank(3, 2).push(torch.zeros(2))),
        (ValueError, "width 2", lambda: QueueBank(3, 2).push(torch.zeros(2, 3))),
        (TypeError, "keys", lambda: QueueBank(3, 2).push(torch.zeros(2, 2, dtype=torch.int64))),
        (ValueError, "labels", lambda: QueueBank(3, 2).push(torch.zeros(2, 2), torch.zeros(2).long())),
        (ValueError, "labels", lambda: QueueBank(3, 2, labels=True).push(torch.zeros(2, 2))),
        (TypeError, "labels", lambda: QueueBank(3, 2, labels=True).push(torch.zeros(2, 2), torch.zeros(2))),
        (ValueError, "labels", lambda: QueueBank(3, 2, labels=True).push(torch.zeros(2, 2), torch.zeros(3).long())),
        (TypeError, "where", lambda: QueueBank(3, 2).push(torch.zeros(2, 2), where=torch.ones(2))),
        (ValueError, "where", lambda: QueueBank(3, 2).push(torch.zeros(2, 2), where=torch.ones(3).bool())),
        (ValueError, "momentum", lambda: IndexedBank(3, 2, momentum=1.5)),
        (ValueError, "init", lambda: IndexedBank(3, 2, init="zeros")),
        (IndexError, "index", lambda: IndexedBank(3, 2).update(torch.tensor([3]), torch.zeros(1, 2))),
        (IndexError, "index", lambda: IndexedBank(3, 2).update(torch.tensor([-1]), torch.zeros(1, 2))),
        (TypeError, "index", lambda: IndexedBank(3, 2).update(torch.tensor([1.0]), torch.zeros(1, 2))),
        (ValueError, "features", lambda: IndexedBank(3, 2).load_(torch.zeros(4, 2))),
        (ValueError, "labels", lambda: IndexedBank(3, 2, labels=True).load_(torch.zeros(3, 2))),
    ],
)
def test_bad_input(error, match, call):
    with pytest.raises(error, match=match):
        call()


def rank_batch(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uneven batches: 3 rows on rank 0, 5 on rank 1; both ranks hold an index 2."""
    generator = torch.Generator().manual_seed(rank)
    n = (3, 5)[rank]
    index = torch.tensor([[2, 0, 1], [4, 2, 3, 6, 5]][rank])
    return torch.randn(n, 4, generator=generator), torch.arange(n) + 10 * rank, index, torch.arange(n) != 1


def banks_of_rank(rank: int) -> dict:
    queue, indexed = QueueBank(7, 4, labels=True), IndexedBank(9, 4, init="empty", labels=True)
    own = QueueBank(7, 4, gather=None)
    keys, labels, index, where = rank_batch(rank)
    for _ in range(2):
        queue.push(keys, labels, where)
        indexed.update(index, keys, labels)
    own.push(keys)
    model = torch.nn.Linear(4, 4)
    model.bank = own  # differs between ranks: it would be overwritten by rank 0's
    model._ddp_params_and_buffers_to_ignore = ddp_ignored(model)
    before = own.storage.clone()
    torch.nn.parallel.DistributedDataParallel(model)(keys)
    assert torch.equal(own.storage, before) and len(own) == len(keys)
    generator = torch.Generator().manual_seed(5)
    bank, negatives = torch.randn(9, 4, generator=generator), torch.randint(9, (len(keys), 3), generator=generator)
    normalizer = sampled_nce(keys, bank, negatives, temperature=0.5, num_data=9, group=dist.group.WORLD)[1]
    return {
        "normalizer": normalizer,
        "bank": bank,
        "negatives": negatives,
        "queue": queue.state_dict(),
        "indexed": indexed.state_dict(),
        "own": len(own),
    }


@needs_gloo
def test_ranks_with_uneven_batches_hold_equal_banks():
    saved = on_two_ranks(banks_of_rank)
    queue, indexed = QueueBank(7, 4, labels=True), IndexedBank(9, 4, init="empty", labels=True)
    batches = [torch.cat(parts) for parts in zip(rank_batch(0), rank_batch(1), strict=True)]
    for _ in range(2):
        queue.push(batches[0], batches[1], batches[3])
        indexed.update(batches[2], batches[0], batches[1])
    negatives = torch.cat([s["negatives"] for s in saved])
    whole = sampled_nce(batches[0], saved[0]["bank"], negatives, temperature=0.5, num_data=9)[1]
    for rank in range(2):
        torch.testing.assert_close(saved[rank]["normalizer"], whole)
        assert saved[rank]["own"] == (3, 5)[rank]
        for bank, name in ((queue, "queue"), (indexed, "indexed")):
            for key, value in bank.state_dict().items():
                torch.testing.assert_close(saved[rank][name][key], value, rtol=0, atol=0)
