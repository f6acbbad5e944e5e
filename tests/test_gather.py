"""gather_similarity and the losses over sampled rows, against float64 references that materialise everything."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast._core import impls
from kdfast._ops.gather import portable, reference
from kdfast.bank import IndexedBank, QueueBank
from kdfast.functional import sampled_info_nce, sampled_nce
from kdfast.ops import gather_similarity

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
AVAILABLE = [name for name, reason in impls.table()["gather_similarity"].items() if reason is None and name != "triton"]
IMPLS = pytest.mark.parametrize("impl", AVAILABLE)
FORMS = pytest.mark.parametrize(("dtype", "impl"), [(d, i) for i in AVAILABLE for d in DTYPES if (d, i) != (torch.float64, "cpu")], ids=str)
# N, D, M, K. K small beside M gathers, M <= 16 K multiplies blocks; 63 / 65 / 257 straddle tile edges; 3000 x 70 needs
# several tiles of slots; N = 0 and K = 1 are the ends.
SHAPES = [(1, 3, 1, 1), (3, 65, 257, 5), (63, 7, 2000, 3), (2, 70, 60000, 3000), (5, 16, 33, 257), (0, 4, 9, 3)]


def problem(n, d, m, k, dtype=torch.float64, grad=True):
    query = torch.randn(n, d).to(dtype).requires_grad_(grad)
    bank = torch.randn(m, d).to(dtype).requires_grad_(grad)
    return query, bank, torch.randint(m, (n, k))


def close(ours, naive, exact):
    """Our error is at most twice the naive same-dtype formula's, plus 4 ulp of the largest value (64 where the reference rounds too)."""
    ulp = torch.finfo(ours.dtype).eps * exact.abs().max()
    bound = 2 * (naive.double() - exact).abs().max() + (64 if ours.dtype == torch.float64 else 4) * ulp
    assert (ours.double() - exact).abs().max() <= bound


@FORMS
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_matches_reference(shape, dtype, impl):
    query, bank, index = problem(*shape, dtype)
    ours = gather_similarity(query, bank, index.int(), scale=0.7, impl=impl)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours.shape == index.shape
    if ours.numel() == 0:
        return
    upstream = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, (query, bank), upstream)
    wide_query, wide_bank = query.detach().double().requires_grad_(), bank.detach().double().requires_grad_()
    exact = reference.gather_similarity(wide_query, wide_bank, index, 0.7)
    exact_grads = torch.autograd.grad(exact, (wide_query, wide_bank), upstream.double())
    naive = torch.einsum("nd,nkd->nk", query, bank[index]) * 0.7
    naive_grads = torch.autograd.grad(naive, (query, bank), upstream.to(naive.dtype))
    close(ours, naive, exact.detach())
    for ours_grad, naive_grad, exact_grad, x in zip(grads, naive_grads, exact_grads, (query, bank), strict=True):
        assert ours_grad.dtype == x.dtype
        close(ours_grad, naive_grad, exact_grad)


def test_no_columns():
    query, bank, index = problem(3, 4, 5, 0)
    out = gather_similarity(query, bank, index)
    assert out.shape == (3, 0)
    assert [g.abs().max() for g in torch.autograd.grad(out.sum(), (query, bank))] == [0, 0]


@pytest.mark.parametrize("m", [4, 400], ids=["dense", "gathered"])
@pytest.mark.parametrize("scale", ["float", "0-d", "per-row"])
def test_gradients_of_every_order(m, scale):
    query, bank, index = problem(3, 2, m, 4)
    index[0] = index[0, 0]  # duplicates in a row
    if scale == "float":
        inputs, op = (query, bank), lambda q, b: gather_similarity(q, b, index, scale=1.3)
    else:
        s = (torch.rand(()) if scale == "0-d" else torch.rand(3)).double().requires_grad_()
        inputs, op = (query, bank, s), lambda q, b, s: gather_similarity(q, b, index, scale=s)
    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


@IMPLS
def test_gathered_rows_are_never_stored(impl):
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    for m in (2000, 50_000):
        query, bank, index = problem(40, 64, m, 2000, torch.float32)
        with Watch():
            gather_similarity(query, bank, index, impl=impl).sum().backward()
            sampled_info_nce(query, query.detach(), bank.detach(), index, temperature=1.0, impl=impl).backward()
        assert largest <= max(bank.numel(), portable._BLOCK) < index.numel() * 64


def test_strides_expansion_and_upstream_of_stride_0():
    base, bank, index = problem(6, 5, 300, 7)
    query = base.detach().T.contiguous().T.requires_grad_()
    wide = bank.detach().repeat(1, 2)[:, ::2].requires_grad_()
    out = gather_similarity(query, wide, index.T.contiguous().T)
    torch.testing.assert_close(out, reference.gather_similarity(query, wide, index))
    expected = torch.autograd.grad(reference.gather_similarity(query, wide, index).sum(), (query, wide))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (query, wide)), expected)
    one = base[:1].expand(6, 5)
    torch.testing.assert_close(gather_similarity(one, bank, index), reference.gather_similarity(one, bank, index))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_function_transforms(dtype):
    query, bank, index = problem(4, 3, 40, 6, dtype, grad=False)

    def loss(q, b, i):
        return gather_similarity(q, b, i).square().sum()

    expected = torch.autograd.functional.jacobian(lambda q, b: reference.gather_similarity(q, b, index).square().sum(), (query, bank))
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(query, bank, index), expected)
    queries, banks = torch.randn(3, 4, 3).to(dtype), torch.randn(3, 40, 3).to(dtype)
    for in_dims, args in (((0, None, None), (queries, bank, index)), ((0, 0, None), (queries, banks, index))):
        batched = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=in_dims)(*args)
        for b in range(3):
            single = torch.func.grad(loss, argnums=(0, 1))(*(x if d is None else x[b] for x, d in zip(args, in_dims, strict=True)))
            torch.testing.assert_close(tuple(g[b] for g in batched), single)


@IMPLS
def test_compiles_whole(impl):
    query, bank, index = problem(4, 3, 40, 6, torch.float32)

    def loss(q, b, i, t):
        sampled, _ = sampled_nce(q, b.detach(), i, temperature=t, num_data=40, normalizer=50.0, impl=impl)
        negatives = sampled_info_nce(q, q * 2, b.detach(), i, temperature=t, impl=impl)
        return gather_similarity(q, b, i, scale=t, impl=impl).square().sum() + sampled + negatives

    t = torch.tensor(0.5, requires_grad=True)
    expected = torch.autograd.grad(loss(query, bank, index, t), (query, bank, t))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(query, bank, index, t)
    torch.testing.assert_close(torch.autograd.grad(compiled, (query, bank, t)), expected)


def test_autocast_keeps_float32():
    query, bank, index = problem(4, 8, 30, 6, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gather_similarity(query.bfloat16(), bank, index)
        grads = torch.autograd.grad(out.sum(), (query, bank))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, reference.gather_similarity(query.bfloat16(), bank, index).float())
    assert [g.dtype for g in grads] == [torch.float32] * 2


def crd(query, positive, bank, index, **kwargs):
    return sampled_nce(query, bank, index, temperature=0.3, num_data=50, **kwargs)[0]


def info(query, positive, bank, index, **kwargs):
    return sampled_info_nce(query, positive, bank, index, temperature=0.3, **kwargs)


def reference_rows(loss, query, positive, bank, index):
    if loss is info:
        return reference.sampled_info_nce(query, positive, bank, index, 0.3)
    return reference.sampled_nce(query, bank, index, 0.3, 50)[0]


@pytest.mark.parametrize("loss", [crd, info])
@pytest.mark.parametrize("bank_grad", [False, True], ids=["fixed-bank", "bank-gradient"])
@FORMS
def test_losses_match_reference(loss, bank_grad, dtype, impl):
    query, bank, index = problem(9, 6, 40, 17, dtype)
    query = (query / 3).detach().requires_grad_()
    positive = torch.randn(9, 6).to(dtype)
    bank = bank.detach().requires_grad_(bank_grad)
    inputs = (query, bank) if bank_grad else (query,)
    rows = loss(query, positive, bank, index, reduction="none", impl=impl)
    grads = torch.autograd.grad(rows.sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(rows.sum(), inputs)
    wide = tuple(x.detach().double().requires_grad_() for x in inputs)
    exact = reference_rows(loss, wide[0], positive, wide[1] if bank_grad else bank, index)
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(
        rows.double(), exact, rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=1e-5 if dtype != torch.float64 else 0
    )
    for g, a, e in zip(grads, again, torch.autograd.grad(exact.sum(), wide), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(g, a, rtol=0, atol=0)


@pytest.mark.parametrize("loss", [crd, info])
@pytest.mark.parametrize("bank_grad", [False, True], ids=["fixed-bank", "bank-gradient"])
def test_losses_gradcheck(loss, bank_grad):
    query, bank, index = problem(3, 2, 9, 4)
    positive, t = torch.randn(3, 2).double().requires_grad_(), torch.tensor(0.4).double().requires_grad_()
    fixed = bank.detach()

    def value(q, p, t, b=fixed):
        if loss is info:
            return sampled_info_nce(q, p, b, index, temperature=t, reduction="none")
        return sampled_nce(q + 0 * p, b, index, temperature=t, num_data=9, normalizer=11.0, reduction="none")[0]

    inputs = (query, positive, t, bank) if bank_grad else (query, positive, t)
    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)
    queries = torch.stack([query, 2 * query]).detach()
    single = [torch.autograd.grad(value(q, positive, t).sum(), q)[0] for q in queries.clone().requires_grad_()]
    gradient = torch.func.grad(lambda q: value(q, positive, t).sum())
    torch.testing.assert_close(gradient(queries[0]), single[0])
    torch.testing.assert_close(torch.func.vmap(gradient)(queries), torch.stack(single))
    expected = torch.stack([value(q, positive, t) for q in (query, 2 * query)])
    torch.testing.assert_close(torch.func.vmap(lambda q: value(q, positive, t))(torch.stack([query, 2 * query])), expected)
    twice = torch.stack([query, query]).detach()
    batched = torch.func.vmap(lambda q: sampled_nce(q, fixed, index, temperature=0.4, num_data=9)[0])(twice)
    torch.testing.assert_close(batched, sampled_nce(query, fixed, index, temperature=0.4, num_data=9)[0].expand(2))


@pytest.mark.parametrize("loss", [crd, info])
def test_bank_may_change_between_forward_and_backward(loss):
    query, _, index = problem(4, 3, 8, 5, torch.float32)
    bank = IndexedBank(8, 3)
    expected = torch.autograd.grad(loss(query, query.detach(), bank, index), query)
    out = loss(query, query.detach(), bank, index)
    bank.update(torch.arange(4), torch.randn(4, 3))
    torch.testing.assert_close(torch.autograd.grad(out, query, retain_graph=True), expected)
    with pytest.raises(RuntimeError, match="changed in place"):
        torch.autograd.grad(out, query, create_graph=True)


def test_crd_normalizer():
    query, bank, index = problem(6, 4, 20, 8, torch.float32, grad=False)
    rows, z = reference.sampled_nce(query, bank, index, 0.5, 20)
    loss, normalizer = sampled_nce(query, bank, index, temperature=0.5, num_data=20)
    torch.testing.assert_close((loss.double(), normalizer.double()), (rows.mean(), z), rtol=1e-5, atol=0)
    assert normalizer.shape == () and not normalizer.requires_grad
    again, kept = sampled_nce(query * 2, bank, index, temperature=0.5, num_data=20, normalizer=normalizer)
    torch.testing.assert_close(again.double(), reference.sampled_nce(query * 2, bank, index, 0.5, 20, z)[0].mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(kept, normalizer)


def test_extreme_logits_stay_finite():
    # exp(z) overflows float32 by far in both directions; the losses are finite and equal float64's.
    query, bank, index = problem(5, 4, 30, 9, torch.float32)
    for loss in (
        lambda q, b, t: sampled_nce(q, b, index, temperature=t, num_data=30, reduction="none")[0],
        lambda q, b, t: sampled_info_nce(q, -q.detach(), b, index, temperature=t, reduction="none"),
    ):
        rows = loss(query, bank.detach(), 1e-2)
        (gradient,) = torch.autograd.grad(rows.sum(), query)
        wide = query.detach().double().requires_grad_()
        exact = loss(wide, bank.detach().double(), 1e-2)
        torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(gradient.double(), torch.autograd.grad(exact.sum(), wide)[0], rtol=1e-3, atol=1e-2)


@IMPLS
def test_second_derivatives_of_extreme_logits_stay_finite(impl):
    query, bank, index = problem(5, 24, 60, 40, torch.float32)
    results = []
    for q, b, name in ((query, bank, impl), (query.double(), bank.double(), "torch")):
        q, b = q.detach().requires_grad_(), b.detach().requires_grad_()
        loss = sampled_info_nce(q, q * torch.tensor([[4.0], [-4], [1], [-1], [0]]), b, index, temperature=0.5, impl=name)
        gradients = torch.autograd.grad(loss, (q, b), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), (q, b)))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


def test_exclusions():
    query, bank, index = problem(6, 4, 12, 9, grad=False)
    bank_labels, labels, own = torch.arange(12) % 3, torch.arange(6) % 3, torch.arange(6)
    bias = torch.randn(12).double()
    bias[3] = -torch.inf
    query.requires_grad_()
    kwargs = dict(query_labels=labels, bank_labels=bank_labels, bank_bias=bias, bank_valid=10, own_index=own)
    rows = info(query, query.detach(), bank, index, reduction="none", **kwargs)
    z = reference.gather_similarity(query, bank, index, 1 / 0.3) + bias[index]
    out = (bank_labels[index] == labels[:, None]) | (index >= 10) | (index == own[:, None])
    z = torch.cat([(query * query.detach()).sum(1, keepdim=True) / 0.3, z.masked_fill(out, -torch.inf)], 1)
    expected = -torch.log_softmax(z, 1)[:, 0]
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(torch.autograd.grad(rows.sum(), query), torch.autograd.grad(expected.sum(), query))


def test_rows_with_nothing_admitted():
    query, bank, index = problem(3, 4, 12, 5)
    index[0] = 7
    kwargs = dict(own_index=torch.tensor([7, -1, -1]), reduction="none")
    for b in (bank, bank.detach()):
        rows = info(query, query.detach(), b, index, **kwargs)
        assert rows[0] == 0 and torch.autograd.grad(rows.sum(), query)[0][0].abs().max() == 0
        dropped = info(query, query.detach(), b, index, include_positive=False, **kwargs)
        assert dropped[0] == 0 and (dropped[1:] != 0).all() and torch.autograd.grad(dropped.sum(), query)[0].isfinite().all()


def test_banks_bring_their_own_fill_and_bias():
    query = torch.randn(4, 3, requires_grad=True)
    queue = QueueBank(9, 3)
    queue.push(torch.randn(5, 3))
    index = torch.randint(9, (4, 6))
    torch.testing.assert_close(info(query, query.detach(), queue, index), info(query, query.detach(), queue.storage, index, bank_valid=5))
    empty = IndexedBank(9, 3, init="empty")
    empty.update(torch.tensor([0, 1, 2]), torch.randn(3, 3))
    index[:, 0] = torch.tensor([0, 1, 2, 8])  # the last sample's own row was never written
    rows = crd(query, None, empty, index, reduction="none")
    assert rows[3] == 0 and rows.isfinite().all() and (rows[:3] > 0).all()
    assert torch.autograd.grad(rows.sum(), query)[0].isfinite().all()


def test_nan_reaches_only_the_rows_it_touches():
    query, bank, index = problem(4, 3, 20, 6)
    with torch.no_grad():
        bank[5] = torch.nan
    index[index == 5] = 4
    index[2, 3] = 5
    for b in (bank, bank.detach()):
        rows = info(query, query.detach(), b, index, reduction="none")
        assert rows.isnan().tolist() == [False, False, True, False]
        gradient = torch.autograd.grad(rows.sum(), query)[0]
        assert gradient.isnan().any(1).tolist() == [False, False, True, False]


def test_weight_and_normalize():
    query, bank, index = problem(4, 3, 20, 6, grad=False)
    unit = torch.nn.functional.normalize
    weight = torch.tensor([1.0, 0, 2, 3]).double()
    rows = info(unit(query), unit(query), unit(bank), index, reduction="none")
    torch.testing.assert_close(info(query, query, bank, index, normalize=True, weight=weight), (rows * weight).sum() / 6)


good = problem(3, 4, 5, 2, torch.float32, grad=False)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "query", lambda q, b, i: gather_similarity(q.long(), b, i)),
        (ValueError, "query", lambda q, b, i: gather_similarity(q[0], b, i)),
        (ValueError, "bank", lambda q, b, i: gather_similarity(q, b[:0], i)),
        (ValueError, "width", lambda q, b, i: gather_similarity(q, b[:, 1:], i)),
        (TypeError, "dtype of query", lambda q, b, i: gather_similarity(q, b.double(), i)),
        (TypeError, "index", lambda q, b, i: gather_similarity(q, b, i.float())),
        (ValueError, "index", lambda q, b, i: gather_similarity(q, b, i[:2])),
        (IndexError, "index", lambda q, b, i: gather_similarity(q, b, i + 5)),
        (IndexError, "index", lambda q, b, i: gather_similarity(q, b, i - 5)),
        (IndexError, "index", lambda q, b, i: sampled_info_nce(q, q, b, i + 5)),
        (IndexError, "index", lambda q, b, i: sampled_nce(q, b, i - 5, num_data=5)),
        (TypeError, "scale", lambda q, b, i: gather_similarity(q, b, i, scale="1")),
        (ValueError, "scale", lambda q, b, i: gather_similarity(q, b, i, scale=torch.ones(4))),
        (ValueError, "impl", lambda q, b, i: gather_similarity(q.double(), b.double(), i, impl="cpu")),
        (ValueError, "impl", lambda q, b, i: gather_similarity(q, b, i, impl="fast")),
        (ValueError, "impl", lambda q, b, i: sampled_nce(q, b, i, num_data=5, impl="cuda")),
        (ValueError, "temperature", lambda q, b, i: sampled_info_nce(q, q, b, i, temperature=0.0)),
        (ValueError, "temperature", lambda q, b, i: sampled_info_nce(q, q, b, i, temperature=torch.ones(2))),
        (ValueError, "positive", lambda q, b, i: sampled_info_nce(q, q[1:], b, i)),
        (TypeError, "bank", lambda q, b, i: sampled_info_nce(q, q, None, i)),
        (ValueError, "bank_labels", lambda q, b, i: sampled_info_nce(q, q, b, i, query_labels=torch.zeros(3).long())),
        (ValueError, "reduction", lambda q, b, i: sampled_info_nce(q, q, b, i, reduction="max")),
        (ValueError, "weight", lambda q, b, i: sampled_info_nce(q, q, b, i, weight=torch.ones(2))),
        (IndexError, "own_index", lambda q, b, i: sampled_info_nce(q, q, b, i, own_index=torch.tensor([0, 1, 9]))),
        (ValueError, "query_labels", lambda q, b, i: sampled_info_nce(q, q, b, i, bank_labels=torch.zeros(5).long())),
        (TypeError, "bank_valid", lambda q, b, i: sampled_info_nce(q, q, b, i, bank_valid=2.5)),
        (ValueError, "bank_valid", lambda q, b, i: sampled_info_nce(q, q, b, i, bank_valid=6)),
        (ValueError, "bank_valid", lambda q, b, i: sampled_info_nce(q, q, b, i, bank_valid=torch.tensor([1, 2]))),
        (ValueError, "negative", lambda q, b, i: sampled_nce(q, b, i[:, :1], num_data=5)),
        (ValueError, "num_data", lambda q, b, i: sampled_nce(q, b, i, num_data=0)),
        (ValueError, "normalizer", lambda q, b, i: sampled_nce(q, b, i, num_data=5, normalizer=-1.0)),
        (TypeError, "normalizer", lambda q, b, i: sampled_nce(q, b, i, num_data=5, normalizer="first")),
    ],
)
def test_bad_input(error, match, call):
    with pytest.raises(error, match=match):
        call(*good)


@pytest.mark.parametrize("include_positive", [True, False])
@pytest.mark.parametrize("bank_grad", [False, True], ids=["bank", "bank with gradient"])
def test_rows_left_out_are_not_read(include_positive, bank_grad):
    query, positive = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    bank, index = torch.randn(9, 6), torch.tensor([[7, 0, 8], [1, 2, 3], [8, 8, 7], [4, 3, 0]])  # the third query has no row left
    own = torch.tensor([-1, -1, -1, 3])
    clean = sampled_info_nce(query, positive, bank, index, bank_valid=7, own_index=own, include_positive=include_positive)
    expected = torch.autograd.grad(clean, query)[0]
    bank[7:] = torch.nan
    bank.requires_grad_(bank_grad)
    loss = sampled_info_nce(query, positive, bank, index, bank_valid=7, own_index=own, include_positive=include_positive)
    torch.testing.assert_close(loss, clean)
    torch.testing.assert_close(torch.autograd.grad(loss, query, retain_graph=True)[0], expected)
    again = torch.autograd.grad(loss, query, create_graph=True)[0]
    torch.testing.assert_close(again, expected)
    assert torch.autograd.grad(again.sum(), query)[0][[0, 1, 3]].isfinite().all()


def test_nce_of_a_bank_that_holds_nothing_is_zero_with_a_gradient():
    from kdfast.bank import IndexedBank

    query = torch.randn(3, 4, requires_grad=True)
    loss, normalizer = sampled_nce(query, IndexedBank(5, 4, init="empty"), torch.arange(6).view(3, 2) % 5, num_data=5)
    loss.backward()
    assert loss.item() == 0 and normalizer.item() == 0 and (query.grad == 0).all()
