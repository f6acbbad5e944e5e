"""info_nce against the formula written out row by row: every form, its gradients, its refusals."""

import plain
import pytest
import torch
import torch.nn.functional as F

from kdfast.functional import info_nce

N, M, D = 7, 19, 5


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return dict(
        q=make(N, D).requires_grad_(),
        k=make(N, D).requires_grad_(),
        bank=make(M, D).requires_grad_(),
        labels=torch.randint(0, 4, (N,), generator=g),
        bank_labels=torch.randint(0, 4, (M,), generator=g),
        bias=make(M),
        weight=torch.rand(N, generator=g, dtype=torch.float64),
        tau=torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
    )


def same(actual, expected, inputs):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(actual, inputs, retain_graph=True, allow_unused=True)
    want = torch.autograd.grad(expected, inputs, retain_graph=True, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b, rtol=1e-9, atol=1e-10)


def inner(d, tau):
    return ((d["q"] * d["k"]).sum(-1) / tau)[:, None]


def test_bank_negatives_with_learnable_temperature(data):
    d = data
    z = plain.scores(d["q"], d["bank"], d["tau"])
    expected = plain.reduced(plain.info_nce_rows(inner(d, d["tau"]), z, torch.ones_like(z, dtype=torch.bool)))
    same(info_nce(d["q"], d["k"], d["bank"], temperature=d["tau"]), expected, [d["q"], d["k"], d["bank"], d["tau"]])


def test_everything_at_once(data):
    d = data
    tau = torch.linspace(0.2, 0.9, N, dtype=torch.float64).requires_grad_()
    bias = d["bias"].clone()
    bias[3] = -torch.inf
    own = torch.tensor([0, -1, 2, 5, 5, -1, 18])
    z = plain.scores(d["q"], d["bank"], tau, bias)
    mask = plain.admitted(z, valid=17, bias=bias, query_labels=d["labels"], bank_labels=d["bank_labels"], own=own)
    cosine_limit = (d["q"] * d["k"]).sum(-1) + 0.5
    mask &= (d["q"] @ d["bank"].T) <= cosine_limit[:, None]
    expected = plain.reduced(plain.info_nce_rows(inner(d, tau), z, mask), d["weight"])
    actual = info_nce(
        d["q"],
        d["k"],
        d["bank"],
        temperature=tau,
        bank_bias=bias,
        bank_valid=torch.tensor(17),
        query_labels=d["labels"].int(),
        bank_labels=d["bank_labels"].short(),
        own_index=own,
        false_negative_margin=0.5,
        weight=d["weight"],
    )
    same(actual, expected, [d["q"], d["k"], d["bank"], tau])


def test_targets_are_in_the_denominator_once_and_no_exclusion_removes_them(data):
    d = data
    targets = torch.tensor([4, 0, 18, 18, 7, 2, 9])
    own = torch.tensor([4, 3, -1, 6, 7, 1, 0])
    labels = d["bank_labels"][targets]  # every target shares its query's class
    z = plain.scores(d["q"], d["bank"], 0.3, d["bias"])
    mask = plain.admitted(z, query_labels=labels, bank_labels=d["bank_labels"], own=own)
    mask &= torch.arange(M)[None] != targets[:, None]
    expected = plain.reduced(plain.info_nce_rows(z.gather(1, targets[:, None]), z, mask))
    options = dict(temperature=0.3, targets=targets, own_index=own, query_labels=labels, bank_labels=d["bank_labels"], bank_bias=d["bias"])
    same(info_nce(d["q"], bank=d["bank"], **options), expected, [d["q"], d["bank"]])


def test_a_row_without_a_target_is_not_counted(data):
    d = data
    targets = torch.tensor([4, -1, 18, -1, 7, 2, 9])
    rows = info_nce(d["q"], bank=d["bank"], targets=targets, reduction="none")
    assert rows[1] == 0 and rows[3] == 0
    torch.testing.assert_close(info_nce(d["q"], bank=d["bank"], targets=targets), rows.sum() / 5)


@pytest.mark.parametrize("include_positive", [True, False])
def test_several_weighted_positives(data, include_positive):
    d = data
    positives = torch.randn(N, 3, D, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    z = plain.scores(d["q"], d["bank"], 0.3)
    z_positive = torch.einsum("nd,njd->nj", d["q"], positives) / 0.3
    rows = plain.info_nce_rows(z_positive, z, torch.ones_like(z, dtype=torch.bool), weights=weights, include_positive=include_positive)
    actual = info_nce(d["q"], positives, d["bank"], temperature=0.3, positive_weights=weights, include_positive=include_positive)
    same(actual, plain.reduced(rows), [d["q"], positives, d["bank"]])


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("labelled", [False, True])
def test_in_batch(data, copies, labelled):
    d = data
    positives = torch.randn(N, copies, D, dtype=torch.float64, requires_grad=True)
    rows = positives.reshape(-1, D)
    z = plain.scores(d["q"], rows, 0.3)
    owner = torch.arange(N).repeat_interleave(copies)
    mask = owner[None] != torch.arange(N)[:, None]
    if labelled:
        mask &= d["labels"][:, None] != d["labels"].repeat_interleave(copies)[None]
    z_positive = torch.einsum("nd,njd->nj", d["q"], positives) / 0.3
    expected = plain.reduced(plain.info_nce_rows(z_positive, z, mask))
    given = positives[:, 0] if copies == 1 else positives
    actual = info_nce(d["q"], given, temperature=0.3, query_labels=d["labels"] if labelled else None)
    same(actual, expected, [d["q"], positives])


def test_in_batch_leaves_out_one_more_sample(data):
    d = data
    own = torch.tensor([3, -1, 2, 0, 5, -1, 1])
    mask = (own[:, None] != torch.arange(N)) & ~torch.eye(N, dtype=torch.bool)
    rows = plain.info_nce_rows(inner(d, 0.3), plain.scores(d["q"], d["k"], 0.3), mask)
    same(info_nce(d["q"], d["k"], temperature=0.3, own_index=own), plain.reduced(rows), [d["q"], d["k"]])


def test_in_batch_equals_cross_entropy_over_the_score_matrix(data):
    d = data
    same(info_nce(d["q"], d["k"], temperature=0.3), F.cross_entropy(d["q"] @ d["k"].T / 0.3, torch.arange(N)), [d["q"], d["k"]])


@pytest.mark.parametrize("with_bias", [False, True])
def test_label_smoothing(data, with_bias):
    d = data
    own = torch.arange(N)
    bias = d["bias"] if with_bias else None
    z = plain.scores(d["q"], d["bank"], 0.3, bias)
    mask = plain.admitted(z, valid=15, query_labels=d["labels"], bank_labels=d["bank_labels"], own=own)
    expected = plain.reduced(plain.info_nce_rows(inner(d, 0.3), z, mask, smoothing=0.1))
    options = dict(query_labels=d["labels"], bank_labels=d["bank_labels"], own_index=True, bank_valid=15, bank_bias=bias)
    same(info_nce(d["q"], d["k"], d["bank"], temperature=0.3, label_smoothing=0.1, **options), expected, [d["q"], d["k"], d["bank"]])


def test_label_smoothing_equals_cross_entropy_with_targets(data):
    d = data
    targets = torch.arange(N) + 3
    expected = F.cross_entropy(d["q"] @ d["bank"].T / 0.3, targets, label_smoothing=0.2)
    same(info_nce(d["q"], bank=d["bank"], targets=targets, temperature=0.3, label_smoothing=0.2), expected, [d["q"], d["bank"]])


@pytest.mark.parametrize("include_positive", [True, False])
@pytest.mark.parametrize("explicit", [False, True])
def test_same_class_rows_as_positives(data, include_positive, explicit):
    d = data
    labels = d["labels"].clone()
    labels[2] = 99  # a class of its own: no positive unless one is explicit
    own = torch.arange(N)
    z = plain.scores(d["q"], d["bank"], 0.3)
    candidates = plain.admitted(z, valid=16, own=own)
    positives = candidates & (labels[:, None] == d["bank_labels"][None])
    denominator = candidates if include_positive else candidates & ~positives
    if explicit:
        z = torch.cat([z, inner(d, 0.3)], 1)
        positives = torch.cat([positives, torch.ones(N, 1, dtype=torch.bool)], 1)
        denominator = torch.cat([denominator, torch.full((N, 1), include_positive)], 1)
    rows = plain.sup_con_rows(z, positives, denominator)
    expected = plain.reduced(rows, counted=positives.any(1).tolist())
    actual = info_nce(
        d["q"],
        d["k"] if explicit else None,
        d["bank"],
        temperature=0.3,
        same_class="positive",
        query_labels=labels,
        bank_labels=d["bank_labels"],
        own_index=True,
        bank_valid=16,
        include_positive=include_positive,
    )
    same(actual, expected, [d["q"], d["k"], d["bank"]] if explicit else [d["q"], d["bank"]])


def test_batched_and_shared_banks_equal_a_loop(data):
    d = data
    q, k = torch.randn(2, 3, N, D, dtype=torch.float64), torch.randn(2, 3, N, D, dtype=torch.float64)
    banks = torch.randn(2, 3, M, D, dtype=torch.float64)
    labels, bank_labels = torch.randint(0, 3, (2, 3, N)), torch.randint(0, 3, (2, 3, M))
    for bank in (banks, d["bank"].detach()):
        shared = bank.dim() == 2
        own_labels = bank_labels[0, 0] if shared else bank_labels
        options = dict(query_labels=labels, bank_labels=own_labels, reduction="none", label_smoothing=0.1)
        batched = info_nce(q, k, bank, **options)
        for a in range(2):
            for b in range(3):
                one = info_nce(
                    q[a, b],
                    k[a, b],
                    bank if shared else bank[a, b],
                    query_labels=labels[a, b],
                    bank_labels=own_labels if shared else own_labels[a, b],
                    reduction="none",
                    label_smoothing=0.1,
                )
                torch.testing.assert_close(batched[a, b], one)


def test_rows_whose_negatives_are_all_excluded(data):
    d = data
    same_label = dict(query_labels=torch.zeros(N, dtype=torch.long), bank_labels=torch.zeros(M, dtype=torch.long))
    loss = info_nce(d["q"], d["k"], d["bank"], **same_label)
    assert loss == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(loss, [d["q"], d["k"], d["bank"]]))
    some = torch.tensor([0, 1, 0, 0, 0, 0, 0])
    dropped = info_nce(d["q"], d["k"], d["bank"], query_labels=some, bank_labels=torch.zeros(M, dtype=torch.long), include_positive=False)
    alone = info_nce(d["q"][1:2], d["k"][1:2], d["bank"], include_positive=False)
    torch.testing.assert_close(dropped, alone)
    assert torch.isfinite(torch.autograd.grad(dropped, d["q"])[0]).all()
    assert info_nce(d["q"], d["k"], d["bank"], bank_valid=0) == 0


def test_normalize_and_scale_invariance(data):
    d = data
    unit = {name: F.normalize(d[name], dim=-1) for name in ("q", "k", "bank")}
    expected = info_nce(unit["q"], unit["k"], unit["bank"])
    torch.testing.assert_close(info_nce(3 * d["q"], d["k"] / 7, d["bank"], normalize=True), expected)


def test_bank_without_gradient_may_be_pushed_between_forward_and_backward(data):
    d = data
    bank = d["bank"].detach().clone()
    targets = torch.arange(N)
    loss = lambda: info_nce(d["q"], bank=bank, targets=targets, own_index=targets + 1, temperature=d["tau"])
    expected = torch.autograd.grad(loss(), [d["q"], d["tau"]])
    pending = loss()
    bank.fill_(torch.nan)
    for a, b in zip(torch.autograd.grad(pending, [d["q"], d["tau"]]), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_as_accurate_as_the_plain_formula(dtype):
    q, k, bank = (F.normalize(torch.randn(n, 64), dim=-1).to(dtype) for n in (65, 65, 257))
    z = lambda t: torch.cat([(t(q) * t(k)).sum(-1, keepdim=True), t(q) @ t(bank).T], 1) / 0.1
    exact = F.cross_entropy(z(lambda x: x.double()), torch.zeros(65, dtype=torch.long))
    naive = F.cross_entropy(z(lambda x: x).float(), torch.zeros(65, dtype=torch.long))
    loss = info_nce(q, k, bank, temperature=0.1)
    assert loss.dtype == torch.float32
    assert (loss - exact).abs() <= 2 * (naive - exact).abs() + 4 * torch.finfo(torch.float32).eps * exact


def test_autocast_casts_the_rows_and_keeps_scores_and_loss_in_float32():
    q, k, bank = torch.randn(9, 16, requires_grad=True), torch.randn(9, 16), torch.randn(33, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(q, k, bank, normalize=True)
    assert loss.dtype == torch.float32
    exact = info_nce(q.double(), k.double(), bank.double(), normalize=True)
    assert abs(loss.item() - exact.item()) < 0.05
    loss.backward()
    assert q.grad.dtype == torch.float32


def test_second_derivative(data):
    d = data
    bank = d["bank"].detach()
    options = dict(query_labels=d["labels"], bank_labels=d["bank_labels"], own_index=torch.arange(N), label_smoothing=0.1)
    f = lambda q, k, tau: info_nce(q, k, bank, temperature=tau, **options)
    assert torch.autograd.gradcheck(f, (d["q"], d["k"], d["tau"]))
    assert torch.autograd.gradgradcheck(f, (d["q"], d["k"], d["tau"]))
    assert torch.autograd.gradgradcheck(lambda q, k: info_nce(q, k, temperature=0.5), (d["q"], d["k"]))
    f = lambda q, b: info_nce(q, None, b, same_class="positive", query_labels=d["labels"], bank_labels=d["bank_labels"])
    assert torch.autograd.gradgradcheck(f, (d["q"], d["bank"]))


def test_compiles_whole_and_differentiates_functionally():
    q, k, bank = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True), torch.randn(20, 8)
    labels, bank_labels = torch.randint(0, 3, (6,)), torch.randint(0, 3, (20,))

    def loss(q, k):
        return info_nce(q, k, bank, query_labels=labels, bank_labels=bank_labels, label_smoothing=0.1) + info_nce(q, k)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k), loss(q, k))
    for a, b in zip(torch.autograd.grad(compiled(q, k), [q, k]), torch.autograd.grad(loss(q, k), [q, k]), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.func.grad(loss)(q.detach(), k.detach()), torch.autograd.grad(loss(q, k), q)[0])


def test_strided_and_expanded_inputs():
    q = torch.randn(8, 6).T.contiguous().T
    k = torch.randn(1, 6).expand(8, 6)
    bank = torch.randn(6, 40)[:, ::2].T
    torch.testing.assert_close(info_nce(q, k, bank), info_nce(q.clone(), k.contiguous(), bank.contiguous()))


@pytest.mark.parametrize("same_class", ["exclude", "positive"])
def test_labels_shared_by_the_banks_of_a_batch(same_class):
    q, k, bank = torch.randn(2, 4, 8), torch.randn(2, 4, 8), torch.randn(2, 9, 8)
    query_labels, bank_labels = torch.arange(8).view(2, 4) % 3, torch.arange(9) % 3
    options = dict(query_labels=query_labels, same_class=same_class, reduction="none")
    shared = info_nce(q, k, bank, bank_labels=bank_labels, **options)
    torch.testing.assert_close(shared, info_nce(q, k, bank, bank_labels=bank_labels.expand(2, 9), **options))


def test_weights_of_positives_in_a_row_without_negatives():
    q, k, weights = torch.randn(3, 4), torch.randn(3, 2, 4), torch.rand(3, 2, requires_grad=True)
    index = torch.tensor([0, -1, -1])  # row 0 is left with nothing: dropped
    losses = info_nce(q, k, torch.randn(1, 4), positive_weights=weights, own_index=index, include_positive=False, reduction="none")
    grad = torch.autograd.grad(losses.sum(), weights)[0]
    assert losses[0] == 0 and (grad[0] == 0).all() and grad.isfinite().all()


def test_rows_that_begin_within_a_larger_tensor():
    q, k, bank = torch.randn(3, 4, 8).unbind()[1], torch.randn(3, 4, 8).unbind()[2], torch.randn(3, 9, 8).unbind()[1]
    for rows in ((q, k, bank), (q, k)):
        torch.testing.assert_close(info_nce(*rows), info_nce(*(x.clone() for x in rows)))


def test_empty_batch_counts_nothing():
    empty, bank = torch.zeros(0, 4, requires_grad=True), torch.randn(3, 4)
    assert info_nce(empty, empty, bank, reduction="none").shape == (0,)
    assert info_nce(empty, empty, bank, reduction="sum") == 0
    loss = info_nce(empty, empty, bank)
    assert loss == 0 and torch.autograd.grad(loss, empty)[0].shape == (0, 4)


def test_nan_stays_in_its_row():
    q = torch.randn(4, 8)
    q[2, 3] = torch.nan
    rows = info_nce(q, torch.randn(4, 8), torch.randn(10, 8), reduction="none")
    assert rows.isnan().tolist() == [False, False, True, False]


BAD = {
    "rank": (dict(query=torch.zeros(4)), ValueError, "query"),
    "dtype": (dict(query=torch.zeros(4, 8, dtype=torch.long)), TypeError, "query"),
    "mixed dtype": (dict(bank=torch.zeros(9, 8, dtype=torch.float64)), TypeError, "bank"),
    "width": (dict(bank=torch.zeros(9, 7)), ValueError, "bank"),
    "empty bank": (dict(bank=torch.zeros(0, 8)), ValueError, "bank"),
    "positive shape": (dict(positive=torch.zeros(5, 8)), ValueError, "positive"),
    "temperature": (dict(temperature=-0.1), ValueError, "temperature"),
    "temperature shape": (dict(temperature=torch.ones(3)), ValueError, "temperature"),
    "temperature type": (dict(temperature="hot"), TypeError, "temperature"),
    "labels without bank labels": (dict(query_labels=torch.zeros(4, dtype=torch.long)), ValueError, "bank_labels"),
    "bank labels alone": (dict(bank_labels=torch.zeros(9, dtype=torch.long)), ValueError, "query_labels"),
    "labels without a bank": (dict(bank=None, bank_labels=torch.zeros(9, dtype=torch.long)), ValueError, "bank_labels"),
    "label dtype": (dict(query_labels=torch.zeros(4), bank_labels=torch.zeros(9)), TypeError, "query_labels"),
    "both positives": (dict(targets=torch.zeros(4, dtype=torch.long)), ValueError, "targets"),
    "no positive": (dict(positive=None), ValueError, "positive"),
    "targets range": (dict(positive=None, targets=torch.tensor([0, 1, 9, 2])), IndexError, "targets"),
    "own range": (dict(own_index=torch.tensor([0, 1, 9, 2])), IndexError, "own_index"),
    "own too many": (dict(bank=torch.zeros(3, 8), own_index=True), ValueError, "own_index"),
    "same_class": (dict(same_class="attract"), ValueError, "same_class"),
    "reduction": (dict(reduction="max"), ValueError, "reduction"),
    "weight": (dict(weight=torch.ones(3)), ValueError, "weight"),
    "smoothing range": (dict(label_smoothing=1.0), ValueError, "label_smoothing"),
    "smoothing with margin": (dict(label_smoothing=0.1, false_negative_margin=0.1), ValueError, "label_smoothing"),
    "positive_weights": (dict(positive_weights=torch.ones(3)), ValueError, "positive_weights"),
    "impl": (dict(impl="fpga"), ValueError, "impl"),
    "impl elsewhere": (dict(impl="cuda"), ValueError, "cuda"),
    "precision": (dict(precision="fp8"), ValueError, "precision"),
    "bank type": (dict(bank=[1, 2]), TypeError, "bank"),
    "bank bias": (dict(bank_bias=torch.zeros(8)), ValueError, "bank_bias"),
    "bank bias type": (dict(bank_bias="high"), TypeError, "bank_bias"),
    "bank valid": (dict(bank_valid=-1), ValueError, "bank_valid"),
    "bank valid range": (dict(bank_valid=torch.tensor(10)), IndexError, "bank_valid"),
    "weight type": (dict(weight=[1, 1, 1, 1]), TypeError, "weight"),
    "weight dtype": (dict(weight=torch.ones(4, dtype=torch.complex64)), TypeError, "weight"),
    "weight device": (dict(weight=torch.ones(4, device="meta")), ValueError, "weight"),
    "positive_weights type": (dict(positive_weights="even"), TypeError, "positive_weights"),
    "positive_weights device": (dict(positive_weights=torch.ones(1, device="meta")), ValueError, "positive_weights"),
    "include_positive": (dict(include_positive="yes"), TypeError, "include_positive"),
    "margin type": (dict(false_negative_margin=[0.1]), TypeError, "false_negative_margin"),
    "margin shape": (dict(false_negative_margin=torch.zeros(4)), ValueError, "false_negative_margin"),
    "margin value": (dict(false_negative_margin=float("nan")), ValueError, "false_negative_margin"),
    "smoothing type": (dict(label_smoothing="some"), TypeError, "label_smoothing"),
}


@pytest.mark.parametrize("case", BAD, ids=lambda name: name.replace(" ", "-"))
def test_bad_input_names_the_argument(case):
    changes, error, name = BAD[case]
    arguments = dict(query=torch.zeros(4, 8), positive=torch.zeros(4, 8), bank=torch.zeros(9, 8)) | changes
    with pytest.raises(error, match=name):
        info_nce(arguments.pop("query"), arguments.pop("positive"), arguments.pop("bank"), **arguments)
