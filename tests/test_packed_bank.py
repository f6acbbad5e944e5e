"""QueueBank(layout="packed"): the same numbers as layout="rows" whatever happens to the bank, and the fused push against a list of rows."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import QueueBank
from kdfast._core import extension
from kdfast._ops.similarity import cpu
from kdfast.bank import kernels
from kdfast.functional import info_nce, similarity_distillation

_C, REASON = extension.load("_C")
pytestmark = pytest.mark.skipif(_C is None, reason=str(REASON))

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def any_bank_has_a_copy(monkeypatch):
    """Whatever its size and dtype, so that small ones can be tested."""
    monkeypatch.setattr(kernels, "worthwhile", lambda storage: True)


# 512 rows are whole blocks of every kernel, 1100 and 513 leave some over, 65 fill none.
CAPACITIES = pytest.mark.parametrize("capacity", [65, 512, 513, 1100])


def unit(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1).to(dtype)


def pair(capacity: int, dim: int, **options) -> tuple[QueueBank, QueueBank]:
    """A bank in either layout."""
    return QueueBank(capacity, dim, layout="rows", **options), QueueBank(capacity, dim, layout="packed", **options)


def step(bank, query: Tensor, positive: Tensor, **options) -> tuple[Tensor, Tensor]:
    query = query.clone().requires_grad_()
    loss = info_nce(query, positive, bank, temperature=0.2, **options)
    return loss.detach(), *torch.autograd.grad(loss, query)


def assert_alike(rows: QueueBank, packed: QueueBank, dtype: torch.dtype = BF16, **options) -> None:
    query, positive = unit(20, rows.storage.shape[1], dtype=dtype), unit(20, rows.storage.shape[1], dtype=dtype)
    for got, want in zip(step(packed, query, positive, **options), step(rows, query, positive, **options), strict=True):
        assert got.equal(want)
    for name, value in rows.state_dict().items():
        assert packed.state_dict()[name].equal(value), name


def multiplies_pairs() -> bool:
    """Whether this instruction set has panels to keep."""
    return _C.isa_in_force() in ("avx512_amx", "avx512_bf16")


@CAPACITIES
@pytest.mark.parametrize("dim", [1, 33, 64])
def test_pushes_keep_the_copy_in_step(isa, capacity, dim):
    """Batches within a block, across blocks, round the end, empty, as large as the bank and larger: the copy is updated, not remade."""
    rows, packed = pair(capacity, dim, dtype=BF16, labels=True)
    assert_alike(rows, packed)
    panels = packed.as_rows().panels
    assert (panels.numel() > 0) == (multiplies_pairs() and capacity >= 512)
    for n in (1, 7, capacity - 5, 0, 40, capacity, 2 * capacity + 3, 16):
        keys, labels, where = torch.randn(n, dim), torch.randint(3, (n,)), torch.rand(n) < 0.8
        for bank in (rows, packed):
            bank.push(keys, labels, where if n % 2 else None)
        if panels.numel():
            assert packed.as_rows().panels is panels
        assert_alike(rows, packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_and_precision(isa, dtype):
    """The copy serves products of bf16, whatever the rows are; other losses read the rows."""
    rows, packed = pair(1100, 40, dtype=dtype)
    keys = torch.randn(900, 40)
    rows.push(keys), packed.push(keys)
    assert_alike(rows, packed, dtype)
    if dtype == torch.float32:
        for precision in ("bf16", "bf16x3", "ieee"):
            assert_alike(rows, packed, dtype, precision=precision)
        with torch.autocast("cpu", BF16):
            assert_alike(rows, packed, dtype)


def test_the_copy_is_read(isa):
    """A change of the copy alone shows in the result: the tests above compare two ways, not one with itself."""
    keys, query, scale = unit(512, 32), unit(1, 8, 32), torch.ones(1, 8)
    panels = torch.ops.kdfast.bank_panels(keys)
    if not multiplies_pairs():
        assert panels.numel() == 0
        return
    nothing = (None,) * 8
    want = cpu.forward(query, keys[None], scale, *nothing, True)[1]
    assert cpu.forward(query, keys[None], scale, *nothing, True, panels=panels)[1].equal(want)
    panels[-512 * 16 :] = 0
    assert not cpu.forward(query, keys[None], scale, *nothing, True, panels=panels)[1].equal(want)


def test_foreign_copies_are_not_read(isa):
    """Of other rows, of another width, of a part, of another instruction set, of anything: the result is that of the rows."""
    keys, query, scale = unit(1024, 32), unit(1, 8, 32), torch.ones(1, 8)
    nothing = (None,) * 8
    want = cpu.forward(query, keys[None], scale, *nothing, True)
    others = [torch.ops.kdfast.bank_panels(other) for other in (unit(1024, 32), unit(512, 32), unit(1024, 31), keys[:512], keys.float())]
    for name in _C.isas_available():
        if name != isa:
            _C.force_isa(name)
            others.append(torch.ops.kdfast.bank_panels(keys))
    _C.force_isa(isa)
    others += [torch.zeros(5, dtype=torch.int32), torch.ops.kdfast.bank_panels(keys)[1:], torch.empty(0, dtype=torch.int32)]
    for packed in others:
        for got, expected in zip(cpu.forward(query, keys[None], scale, *nothing, True, panels=packed), want, strict=True):
            assert got.equal(expected)


def test_another_instruction_set_is_noticed():
    rows, packed = pair(1024, 32, dtype=BF16)
    keys = torch.randn(1024, 32)
    rows.push(keys), packed.push(keys)
    for name in (*_C.isas_available(), None):
        _C.force_isa(name)
        assert_alike(rows, packed)
        more = torch.randn(100, 32)
        rows.push(more), packed.push(more)
        assert_alike(rows, packed)


def by_state_dict(bank: QueueBank) -> QueueBank:
    other = QueueBank(1100, 24, dtype=BF16, layout="packed")
    other.push(torch.randn(300, 24))
    other.as_rows()
    other.load_state_dict(bank.state_dict())
    return other


def by_saving(bank: QueueBank) -> QueueBank:
    file = io.BytesIO()
    torch.save(bank, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def by_hand(bank: QueueBank) -> QueueBank:
    other = copy.deepcopy(bank)
    kept = other.storage[1000].clone()
    other.as_rows()
    other.storage[:] = 0
    other.as_rows()
    other.storage.copy_(bank.storage)
    assert other.storage[1000].equal(kept)
    return other


@pytest.mark.parametrize(
    "made",
    [
        copy.deepcopy,
        lambda bank: pickle.loads(pickle.dumps(bank)),
        by_saving,
        by_state_dict,
        by_hand,
        lambda bank: copy.deepcopy(bank).float().bfloat16(),
        lambda bank: copy.deepcopy(bank).to("meta").to_empty(device="cpu").load_state_dict(bank.state_dict()) and by_state_dict(bank),
    ],
    ids=["deepcopy", "pickle", "torch.save", "load_state_dict", "by hand", "to", "to_empty"],
)
def test_the_copy_is_remade(made):
    bank = QueueBank(1100, 24, dtype=BF16, layout="packed")
    bank.push(torch.randn(1500, 24))
    bank.as_rows()
    other = made(bank)
    rows = QueueBank(1100, 24, dtype=BF16)
    rows.load_state_dict(bank.state_dict())
    assert set(other.state_dict()) == {"storage", "pointer", "fill"}
    assert_alike(rows, other)
    more = torch.randn(40, 24)
    rows.push(more), other.push(more)
    assert_alike(rows, other)


def test_converted_rows():
    rows, packed = pair(1024, 32, dtype=BF16)
    keys = torch.randn(1024, 32)
    rows.push(keys), packed.push(keys)
    packed.as_rows()
    assert_alike(rows.float(), packed.float(), torch.float32, precision="bf16")
    assert packed.double().as_rows().panels is None
    assert_alike(rows.double(), packed, torch.float64)


def test_another_storage_of_the_same_version():
    rows, packed = pair(1024, 32, dtype=BF16)
    packed.as_rows()
    for keys in (unit(1024, 32), unit(1024, 32)):
        rows.storage, packed.storage = keys.clone(), keys.clone()
        assert_alike(rows, packed)


def test_shared_memory_has_no_copy():
    """Another process's writes would not be counted here."""
    rows, packed = pair(1024, 32, dtype=BF16)
    packed.share_memory()
    assert packed.as_rows().panels is None
    keys = torch.randn(30, 32)
    rows.push(keys), packed.push(keys)
    assert_alike(rows, packed)


def test_a_push_between_forward_and_backward():
    bank = QueueBank(1024, 32, dtype=BF16, layout="packed")
    bank.push(torch.randn(1024, 32))
    query, positive = unit(8, 32).requires_grad_(), unit(8, 32)
    (want,) = torch.autograd.grad(info_nce(query, positive, bank), query)
    loss = info_nce(query, positive, bank)
    bank.push(torch.randn(1024, 32))
    (got,) = torch.autograd.grad(loss, query)
    assert got.equal(want)
    loss = info_nce(query.float(), positive.float(), bank.float())
    (grad,) = torch.autograd.grad(loss, query, create_graph=True)
    bank.push(torch.randn(3, 32))
    with pytest.raises(RuntimeError, match="updated in place"):
        grad.float().square().sum().backward()


def test_numbers_that_no_product_holds(isa):
    """NaN and infinities in a block do in either layout what they do in the formula, and are gone with the rows that held them."""
    rows, packed = pair(1024, 32, dtype=BF16, normalize=False)
    keys = unit(1024, 32)
    broken = keys.clone()
    broken[700, 3] = torch.inf
    broken[70] = torch.nan
    for bank in (rows, packed):
        bank.push(broken)
    query, positive = unit(4, 32), unit(4, 32)
    for bank in (rows, packed):
        assert info_nce(query, positive, bank).isnan()
    for bank in (rows, packed):
        bank.push(keys)
    assert_alike(rows, packed)


def test_rows_beyond_the_fill_are_not_read(isa):
    rows, packed = pair(1024, 32, dtype=BF16)
    for bank in (rows, packed):
        bank.storage.fill_(torch.nan)
        bank.as_rows()
    for n in (3, 600):
        keys = torch.randn(n, 32)
        rows.push(keys), packed.push(keys)
        query, positive = unit(8, 32), unit(8, 32)
        for got, want in zip(step(packed, query, positive), step(rows, query, positive), strict=True):
            assert got.isfinite().all() and got.equal(want)


def test_threads_agree_and_repeat(threads):
    rows, packed = pair(5000, 64, dtype=BF16)
    keys = torch.randn(5000, 64)
    rows.push(keys), packed.push(keys)
    query, positive = unit(20, 64), unit(20, 64)
    want, got = step(rows, query, positive), step(packed, query, positive)
    for x, y, again in zip(want, got, step(packed, query, positive), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-2, atol=1e-4)
        assert again.equal(y)


def test_distillation_and_labels():
    rows, packed = pair(1024, 32, dtype=BF16, labels=True)
    keys, labels = torch.randn(1024, 32), torch.randint(5, (1024,))
    rows.push(keys, labels), packed.push(keys, labels)
    assert_alike(rows, packed, query_labels=torch.randint(5, (20,)))
    query, positive = unit(8, 32), unit(8, 32)
    options = dict(student_temperature=0.2, teacher_temperature=0.1)
    assert similarity_distillation(query, positive, packed, **options).equal(similarity_distillation(query, positive, rows, **options))


def test_compiled_losses_and_pushes():
    rows, packed = pair(1024, 32, dtype=BF16)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def train(query, positive, bank):
        loss = info_nce(query, positive, bank, temperature=0.2)
        bank.push(positive)
        return loss

    for _ in range(3):
        query, positive = unit(8, 32), unit(8, 32)
        torch.testing.assert_close(train(query, positive, packed), info_nce(query, positive, rows, temperature=0.2))
        rows.push(positive)
        assert_alike(rows, packed)


def test_opcheck():
    storage, keys = unit(600, 8), torch.randn(9, 8)
    zero = torch.zeros((), dtype=torch.int64)
    labels, key_labels, where = torch.zeros(600, dtype=torch.int64), torch.arange(9), torch.arange(9) % 2 == 0
    for given in ((None, None, None), (labels, key_labels, where)):
        torch.library.opcheck(torch.ops.kdfast.bank_push, (storage, zero.clone(), zero.clone(), given[0], None, keys, *given[1:], True))


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_push_rounds_the_length_and_the_quotient(dtype, strided):
    """Each to half a unit in the last place of float32, and the quotient of numbers below 1 to the bank's."""
    keys = torch.randn(7, 3).T if strided else torch.randn(3, 7)
    bank = QueueBank(5, 7, dtype=dtype)
    bank.push(keys.to(torch.float16))
    wide = F.normalize(keys.to(torch.float16).double(), dim=1)
    assert (bank.keys.double() - wide).abs().max() <= torch.finfo(dtype).eps * 0.76


@pytest.mark.parametrize("normalize", [False, True])
def test_rows_of_the_bank_itself(normalize):
    """Rows that the push overwrites before it comes to read them."""
    bank = QueueBank(8, 3, normalize=normalize, labels=True)
    bank.push(torch.randn(8, 3), torch.arange(8))
    bank.push(torch.randn(2, 3), torch.arange(2))
    before, labels = bank.storage.clone(), bank.labels.clone()
    bank.push(bank.storage[1:7], bank.labels[1:7])
    torch.testing.assert_close(bank.storage, torch.cat([before[:2], before[1:7]]))
    assert bank.labels.equal(torch.cat([labels[:2], labels[1:7]]))


def test_zero_rows_stay_zero():
    bank = QueueBank(4, 3)
    bank.push(torch.zeros(2, 3))
    assert bank.keys.equal(torch.zeros(2, 3))


@pytest.mark.parametrize("dtype, rows, kept", [(torch.float32, 16384, True), (torch.float32, 16383, False), (BF16, 16384, False)], ids=str)
def test_a_copy_is_kept_where_it_pays(monkeypatch, dtype, rows, kept):
    monkeypatch.undo()
    panels = QueueBank(rows, 4, dtype=dtype, layout="packed").as_rows().panels
    assert (panels is not None) == kept


def test_bad_layout():
    with pytest.raises(ValueError, match="layout"):
        QueueBank(4, 3, layout="columns")
