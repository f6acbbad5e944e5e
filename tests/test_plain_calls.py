"""Plain calls take a short way (kdfast/_ops/similarity/plain*.py), with the bits of the general one; what is not plain is left to that."""

from functools import partial

import pytest
import torch

from kdfast import QueueBank
from kdfast._core import impls
from kdfast._ops.similarity import cpu
from kdfast._ops.similarity.losses import plain_distillation, plain_info_nce, plain_matching, plain_wasserstein
from kdfast.functional import clip_loss, info_nce, siglip_loss, similarity_distillation, wasserstein_dependency

pytestmark = pytest.mark.skipif(cpu.missing() is not None or impls.DEFAULT is not None, reason="only the compiled kernels have a short way")


@pytest.fixture
def taken(monkeypatch):
    """For each call that might be plain, whether it went the short way."""
    seen = []

    def watch(module, name):
        way = getattr(module, name)

        def watched(*args):
            loss = way(*args)
            seen.append(loss is not None)
            return loss

        monkeypatch.setattr(module, name, watched)

    watch(plain_info_nce, "info_nce_loss")
    watch(plain_distillation, "distillation_losses")
    watch(plain_matching, "matching_loss")
    watch(plain_wasserstein, "wasserstein_losses")
    return seen


def matrices(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def same_bits(loss, other, inputs):
    assert torch.equal(loss, other)
    for x, y in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(other, inputs), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 16, 7), (65, 63, 33)], ids=str)  # few keys, few queries, and neither
@pytest.mark.parametrize("bank_grad", [False, True], ids=["bank", "bank-grad"])
def test_info_nce_has_the_bits_of_the_general_way(taken, size, dtype, bank_grad):
    n, m, d = size
    query, positive, bank = matrices((n, d), (n, d), (m, d), dtype=dtype)
    bank.requires_grad_(bank_grad)
    loss = info_nce(query, positive, bank, temperature=0.2)
    assert taken == [True]
    same_bits(loss, info_nce(query, positive, bank, temperature=0.2, impl="cpu"), [x for x in (query, positive, bank) if x.requires_grad])
    assert taken == [True]


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("bank_grad", [False, True], ids=["bank", "bank-grad"])
@pytest.mark.parametrize("named", [False, True], ids=["positive", "targets"])
def test_info_nce_with_targets_and_label_smoothing(taken, named, bank_grad, dtype):
    query, positive, bank = matrices((9, 6), (9, 6), (17, 6), dtype=dtype)
    bank.requires_grad_(bank_grad)
    given = {"targets": torch.tensor([0, 16, 3, -1, 3, 7, 1, -1, 2])} if named else {"positive": positive}
    temperature = torch.tensor(0.3, requires_grad=True)
    inputs = [x for x in (query, given.get("positive"), bank, temperature) if x is not None and x.requires_grad]
    for smoothing in (0.0, 0.2):
        call = partial(info_nce, query, bank=bank, temperature=temperature, label_smoothing=smoothing, **given)
        same_bits(call(), call(impl="cpu"), inputs)
        both = [torch.autograd.grad(call(impl=impl), inputs, create_graph=True) for impl in (None, "cpu")]
        second = [torch.autograd.grad(sum(x.square().sum() for x in grads), inputs) for grads in both]
        torch.testing.assert_close(*second)  # a temperature's is added up in another order
    assert taken == [True] * 4


@pytest.mark.parametrize("bank_grad", [False, True], ids=["bank", "bank-grad"])
@pytest.mark.parametrize("form", ["positive", "targets", "attraction", "smoothing", "a row left out"])
def test_info_nce_with_a_bias(taken, form, bank_grad):
    query, positive, bank = matrices((9, 6), (9, 6), (17, 6))
    bank.requires_grad_(bank_grad)
    bias = torch.randn(17)
    bias[5] = -torch.inf
    given = {"bank_bias": bias, "temperature": 0.3}
    given |= {"targets": torch.arange(9) + 6} if form == "targets" else {} if form == "attraction" else {"positive": positive}
    given |= {"label_smoothing": 0.2, "bank_bias": bias.nan_to_num(neginf=-3.0)} if form == "smoothing" else {}
    given |= {"own_index": torch.arange(9)} if form == "a row left out" else {}
    if form == "attraction":
        given |= {
            "same_class": "positive",
            "query_labels": torch.arange(9) % 4,
            "bank_labels": torch.arange(17) % 4,
            "bank_bias": bias.exp(),
        }
    inputs = [x for x in (query, given.get("positive"), bank) if x is not None and x.requires_grad]
    call = partial(info_nce, query, bank=bank, **given)
    same_bits(call(), call(impl="cpu"), inputs)
    both = [torch.autograd.grad(call(impl=impl), inputs, create_graph=True) for impl in (None, "cpu")]
    second = [torch.autograd.grad(sum(x.square().sum() for x in grads), inputs) for grads in both]
    torch.testing.assert_close(*second)
    assert taken == [True] * 2


@pytest.mark.parametrize("bank", [None, "fixed", "learnt"])
@pytest.mark.parametrize("form", ["positive", "targets", "attraction", "attraction beside a positive"])
@pytest.mark.parametrize("normalize", [False, True])
def test_info_nce_with_classes(taken, form, bank, normalize):
    query, positive, keys = matrices((9, 6), (9, 6), (17, 6))
    if bank is None and form != "attraction beside a positive":
        pytest.skip("within a batch the positives are given, and classes attract")
    given = {"query_labels": torch.arange(9) % 4, "normalize": normalize, "temperature": torch.tensor(0.3, requires_grad=True)}
    if bank is not None:
        given |= {"bank": keys.requires_grad_(bank == "learnt"), "bank_labels": torch.arange(17) % 3 - 1}
    given |= {"targets": torch.arange(9)} if form == "targets" else {"same_class": "positive"} if "attraction" in form else {}
    given |= {"positive": positive} if "positive" in form else {}
    inputs = [x for x in (query, *given.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    call = partial(info_nce, query, **given)
    losses = call(), call(impl="cpu")
    same_bits(*losses, inputs)
    both = [torch.autograd.grad(call(impl=impl), inputs, create_graph=True) for impl in (None, "cpu")]
    second = [torch.autograd.grad(sum(x.square().sum() for x in grads), inputs) for grads in both]
    torch.testing.assert_close(*second)  # a temperature's is added up in another order
    assert taken == [True] * 2


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("bank", [None, "fixed", "learnt"])
def test_info_nce_with_a_temperature_that_is_a_tensor(taken, bank, dtype):
    query, positive, keys = matrices((9, 6), (9, 6), (17, 6), dtype=dtype)
    bank = None if bank is None else keys.requires_grad_(bank == "learnt")
    for learnt in (False, True):
        temperature = torch.tensor(0.3, requires_grad=learnt)
        inputs = [x for x in (query, positive, bank, temperature) if x is not None and x.requires_grad]
        losses = [info_nce(query, positive, bank, temperature=temperature, impl=impl) for impl in (None, "cpu")]
        same_bits(*losses, inputs)
        both = [torch.autograd.grad(info_nce(query, positive, bank, temperature=temperature, impl=impl), inputs, create_graph=True)
                for impl in (None, "cpu")]  # fmt: skip
        second = [torch.autograd.grad(sum(x.square().sum() for x in grads), inputs) for grads in both]
        torch.testing.assert_close(*second)  # a temperature's is added up in another order
    assert taken == [True] * 4


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("bank_grad", [False, True], ids=["bank", "bank-grad"])
def test_distillation_with_temperatures_that_are_tensors(taken, bank_grad, dtype):
    student, keys, teacher, teacher_keys = matrices((9, 6), (17, 6), (9, 5), (17, 5), dtype=dtype)
    keys.requires_grad_(bank_grad)
    for learnt in (False, True):
        own, theirs = torch.tensor(0.3, requires_grad=learnt), torch.tensor(0.2)
        inputs = [x for x in (student, keys, own) if x.requires_grad]
        given = student, teacher.detach(), keys, teacher_keys.detach()
        call = partial(similarity_distillation, *given, student_temperature=own, teacher_temperature=theirs)
        same_bits(call(), call(impl="cpu"), inputs)
        both = [torch.autograd.grad(call(impl=impl), inputs, create_graph=True) for impl in (None, "cpu")]
        second = [torch.autograd.grad(sum(x.square().sum() for x in grads), inputs) for grads in both]
        torch.testing.assert_close(*second)
    assert taken == [True] * 4


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (64, 33), (257, 65)], ids=str)  # without others, few pairs, and many
def test_info_nce_within_a_batch_has_the_bits_of_the_general_way(taken, size, dtype):
    query, positive = matrices(size, size, dtype=dtype)
    for smoothing in (0.0, 0.2):
        both = (info_nce(query, positive, label_smoothing=smoothing, impl=impl) for impl in (None, "cpu"))
        same_bits(*both, [query, positive])
    labels = torch.arange(len(query))  # each of its own class: nothing more is left out
    rows = info_nce(query, positive, query_labels=labels, reduction="none")
    torch.testing.assert_close(info_nce(query, positive, reduction="none"), rows)
    assert taken == [True] * 4


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (9, 7), (65, 33)], ids=str)
def test_label_smoothing_within_a_batch_has_the_bits_of_the_general_way(taken, size, dtype):
    query, positive = matrices(size, size, dtype=dtype)
    call = partial(info_nce, query, positive, label_smoothing=0.2)
    same_bits(call(), call(impl="cpu"), [query, positive])
    assert taken == [True]


def test_full_banks(taken):
    query, positive, keys, teacher = matrices((9, 6), (9, 6), (17, 6), (9, 6))
    bank, theirs, short = QueueBank(17, 6, labels=True), QueueBank(17, 6), QueueBank(17, 6)
    bank.push(keys, torch.arange(17)), theirs.push(keys.flip(0)), short.push(keys[:5])
    same_bits(info_nce(query, positive, bank), info_nce(query, positive, bank, impl="cpu"), [query, positive])
    given, temperatures = (teacher.detach(), bank), dict(student_temperature=0.2, teacher_temperature=0.1)
    for more in ((), (theirs,)):
        losses = [similarity_distillation(query, *given, *more, impl=impl, **temperatures) for impl in (None, "cpu")]
        same_bits(*losses, [query])
    assert taken == [True] * 3
    torch.testing.assert_close(info_nce(query, positive, short), info_nce(query, positive, short.keys))
    assert taken[3:] == [False, True]


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ["ce", "kl"])
@pytest.mark.parametrize("banks", ["two", "one", "given twice", "own"])
def test_distillation_has_the_bits_of_the_general_way(taken, divergence, dtype, banks):
    student, keys = matrices((9, 6), (17, 6), dtype=dtype)
    teacher, teacher_keys = (x.detach() for x in matrices((9, 5), (17, 5), dtype=dtype))
    if banks == "own":
        teacher = (student.detach() + 1).to(dtype)
        teacher_keys = keys.detach().flip(0)
    elif banks != "two":
        keys = keys.detach()
        teacher, teacher_keys = student.detach().flip(0), None if banks == "one" else keys
    options = dict(student_temperature=0.2, teacher_temperature=0.1, divergence=divergence, own=banks == "own")
    loss = similarity_distillation(student, teacher, keys, teacher_keys, **options)
    assert taken == [True]
    inputs = [x for x in (student, keys) if x.requires_grad]
    same_bits(loss, similarity_distillation(student, teacher, keys, teacher_keys, impl="cpu", **options), inputs)


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("bank_grad", [False, True], ids=["bank", "bank-grad"])
@pytest.mark.parametrize("own", [False, True], ids=["", "own"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_distillation_of_rows_and_their_sum(taken, reduction, own, bank_grad, dtype):
    student, keys = matrices((9, 6), (17, 6), dtype=dtype)
    teacher, teacher_keys = ((x.detach() * 0.7 + 0.1).to(dtype) for x in (student, keys))
    keys.requires_grad_(bank_grad)
    inputs = [student, keys] if bank_grad else [student]
    options = dict(student_temperature=0.2, teacher_temperature=0.1, own=own, reduction=reduction)
    upstream = torch.linspace(-1, 2, 9) if reduction == "none" else torch.tensor(1.5)
    found = []
    for impl in (None, "cpu"):
        losses = similarity_distillation(student, teacher, keys, teacher_keys, impl=impl, **options)
        first = torch.autograd.grad(losses, inputs, upstream, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
        losses_again = similarity_distillation(student, teacher, keys, teacher_keys, impl=impl, **options)
        found.append((losses, *first, *second, *torch.autograd.grad(losses_again, inputs, upstream)))
    for got, wanted in zip(*found, strict=True):
        assert (got - wanted).abs().max() <= (2e-4 if dtype == torch.float32 else 4e-2) * wanted.abs().max()
    assert taken == [True, True]


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("bank_grad", [False, True], ids=["bank", "bank-grad"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_distillation_with_what_rows_may_have_of_their_own(taken, reduction, bank_grad, dtype):
    """Weights, own rows and temperatures, alone and together; the bits, and the second derivatives, of the general way."""
    student, keys = matrices((9, 6), (17, 6), dtype=dtype)
    teacher, teacher_keys = ((x.detach() * 0.7 + 0.1).to(dtype) for x in (student, keys))
    keys.requires_grad_(bank_grad)
    mine, theirs = (0.1 + torch.rand(9)).requires_grad_(), 0.1 + torch.rand(9)
    forms = dict(weight=torch.rand(9)), dict(own_index=torch.arange(9) - 1), dict(student_temperature=mine, teacher_temperature=theirs)
    upstream = torch.linspace(-1, 2, 9) if reduction == "none" else torch.tensor(1.5)
    for more in (*forms, forms[0] | forms[1] | forms[2]):
        inputs = [student, *([keys] if bank_grad else []), *([mine] if "student_temperature" in more else [])]
        given = dict(student_temperature=0.2, teacher_temperature=0.1, reduction=reduction) | more
        call = partial(similarity_distillation, student, teacher, keys, teacher_keys, **given)
        losses = [call(impl=impl) for impl in (None, "cpu")]
        assert torch.equal(*losses)
        for x, y in zip(*(torch.autograd.grad(loss, inputs, upstream) for loss in losses), strict=True):
            assert torch.equal(x, y)
        both = [torch.autograd.grad(call(impl=impl), inputs, upstream, create_graph=True) for impl in (None, "cpu")]
        torch.testing.assert_close(*[torch.autograd.grad(sum(x.square().sum() for x in grads), inputs) for grads in both])
    assert taken == [True] * 8


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_distillation_under_a_sharp_teacher(taken, dtype):
    student, keys = (torch.nn.functional.normalize(x.detach().float(), dim=1).to(dtype) for x in matrices((9, 6), (17, 6), dtype=dtype))
    student.requires_grad_()
    given = dict(student_temperature=0.2, teacher_temperature=1e-4, own=True)
    losses = (similarity_distillation(student, student.detach().flip(0), keys, impl=impl, **given) for impl in (None, "cpu"))
    same_bits(*losses, [student])
    assert taken == [dtype == torch.float32]


def test_distillation_from_a_bank_that_is_not_full(taken):
    student, teacher, rows = matrices((9, 6), (9, 6), (20, 6))
    bank = QueueBank(40, 6)
    bank.push(rows.detach())
    given = dict(student_temperature=0.2, teacher_temperature=0.1, own_index=torch.arange(9))
    call = partial(similarity_distillation, student, teacher.detach(), **given)
    same_bits(call(bank), call(bank, impl="cpu"), [student])
    same_bits(call(bank.keys, bank_valid=20), call(bank, impl="cpu"), [student])
    assert taken == [True, True]
    with pytest.raises(ValueError, match="bank_valid"):
        similarity_distillation(student, teacher.detach(), bank.keys, bank_valid=41, **given)
    with pytest.raises(IndexError, match="own_index"):
        similarity_distillation(student, teacher.detach(), bank.keys, **(given | dict(own_index=torch.full((9,), 40))))


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", ["", "weight", "bank_valid", "own_index", "labels", "normalize", "temperature", "all"])
def test_wasserstein_dependency(taken, form, reduction, dtype):
    """Values, gradients and second derivatives against the formula in float64."""
    matrices_ = matrices((9, 6), (9, 6), (17, 6), dtype=dtype)
    tau = torch.tensor(0.2, requires_grad=True)
    labels = torch.arange(9) % 4, torch.arange(17) % 5
    options = dict(weight=torch.rand(9), bank_valid=12, own_index=torch.arange(9), normalize=True)
    given = {k: v for k, v in options.items() if form in (k, "all")}
    given |= dict(query_labels=labels[0], bank_labels=labels[1]) if form in ("labels", "all") else {}
    upstream = torch.linspace(-1, 2, 9) if reduction == "none" else torch.tensor(1.5)

    def definition(query, positive, bank, tau):
        if "normalize" in given:
            query, positive, bank = (torch.nn.functional.normalize(x, dim=1) for x in (query, positive, bank))
        admitted = torch.ones(9, 17, dtype=torch.bool)
        admitted[:, given.get("bank_valid", 17) :] = False
        admitted &= (labels[0][:, None] != labels[1]) | ("query_labels" not in given)
        admitted &= (torch.arange(9)[:, None] != torch.arange(17)) | ("own_index" not in given)
        losses = (((query @ bank.T) * admitted).sum(1) / admitted.sum(1) - (query * positive).sum(1)) / tau
        weight = given.get("weight", torch.ones(9))
        return {"none": weight * losses, "sum": (weight * losses).sum(), "mean": (weight * losses).sum() / weight.sum()}[reduction]

    def derivatives(loss, leaves, tau):
        value = loss(*leaves, tau)
        leaves = [*leaves, tau] if tau.requires_grad else leaves
        first = torch.autograd.grad(value, leaves, upstream.to(value.dtype), create_graph=True)
        once = torch.autograd.grad(loss(*leaves[:3], tau), leaves, upstream.to(value.dtype))
        return value, *once, *torch.autograd.grad(sum(x.double().square().sum() for x in first), leaves)

    learnt = form in ("temperature", "all")
    ours = lambda *x: wasserstein_dependency(*x[:3], temperature=x[3] if learnt else 0.2, reduction=reduction, **given)
    wide = [x.detach().double().requires_grad_() for x in (*matrices_, tau)]
    found = derivatives(ours, matrices_, tau if learnt else tau.detach())
    wanted = derivatives(definition, wide[:3], wide[3] if learnt else wide[3].detach())
    assert found[0].dtype == torch.float32 and all(x.dtype == y.dtype for x, y in zip(found[1:4], matrices_, strict=True))
    for got, truth in zip(found, wanted, strict=True):
        assert (got - truth).abs().max() <= 16 * torch.finfo(dtype).eps * truth.abs().max().clamp(min=1)
    assert taken == [True, True]


def test_wasserstein_dependency_of_banks_and_of_bad_input(taken):
    query, positive, keys = matrices((9, 6), (9, 6), (17, 6))
    bank = QueueBank(40, 6)
    bank.push(keys.detach())
    given = dict(temperature=0.2, own_index=torch.arange(9))
    keys = bank.keys[:17].clone()  # of unit length
    expected = wasserstein_dependency(query, positive, keys, **given)
    torch.testing.assert_close(wasserstein_dependency(query, positive, bank, **given), expected)
    assert taken == [True, True]
    torch.testing.assert_close(wasserstein_dependency(query, positive, keys, temperature=0.2, own_index=True), expected)  # the general way
    assert taken == [True, True, False]
    with pytest.raises(ValueError, match="positive must have shape"):
        wasserstein_dependency(query, positive[:3], keys, temperature=0.2)
    with pytest.raises((TypeError, ValueError), match="temperature"):
        wasserstein_dependency(query, positive, keys, temperature=0.0)
    with pytest.raises(IndexError, match="own_index"):
        wasserstein_dependency(query, positive, keys, temperature=0.2, own_index=torch.full((9,), 17))


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("loss", [clip_loss, partial(clip_loss, label_smoothing=0.2), siglip_loss], ids=["clip", "smoothed", "siglip"])
def test_matching_losses_have_the_bits_of_the_general_way(taken, loss, dtype):
    image, text = matrices((33, 7), (33, 7), dtype=dtype)
    scale, shift = torch.tensor(7.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    for numbers in ((7.0, -3.0), (scale, shift)):
        numbers = numbers if loss is siglip_loss else numbers[:1]
        leaves = [image, text, *(x for x in numbers if isinstance(x, torch.Tensor))]
        same_bits(loss(image, text, *numbers), loss(image, text, *numbers, impl="cpu"), leaves)
    same_bits(loss(image.mT, text.mT, *numbers), loss(image.mT, text.mT, *numbers, impl="cpu"), [image, text])
    assert taken == [True] * 3
    loss(image.double(), text.double(), *numbers)
    assert taken[3:] == [False]


@pytest.mark.parametrize("numbers", [(-1.0, 0.0), (True, 0.0), (1.0, True), (1.0, None), (torch.ones(2), 0.0)], ids=str)
def test_wrong_scales_are_named(numbers):
    image, text = matrices((4, 3), (4, 3))
    with pytest.raises((TypeError, ValueError), match=r"logit_(scale|bias)"):
        siglip_loss(image, text, *numbers)


def test_second_derivatives(taken):
    query, positive, bank, teacher, teacher_bank = matrices((4, 3), (4, 3), (5, 3), (4, 2), (5, 2))
    given = teacher.detach(), bank.detach(), teacher_bank.detach()
    temperatures = dict(student_temperature=0.5, teacher_temperature=0.5)
    for loss in (partial(info_nce, query, positive, given[1]), partial(similarity_distillation, query, *given, **temperatures)):
        second = [torch.autograd.grad(loss(impl=impl), query, create_graph=True)[0].square().sum() for impl in (None, "cpu")]
        same_bits(*second, [query])
    given, temperatures["own"] = (query.detach() + 1, bank), True
    both = [
        torch.autograd.grad(similarity_distillation(query, *given, impl=impl, **temperatures), (query, bank), create_graph=True)
        for impl in (None, "cpu")
    ]
    second = [torch.autograd.grad(sum(x.square().sum() for x in grads), (query, bank)) for grads in both]
    torch.testing.assert_close(*second)
    learnt = query, positive, bank
    second = [
        sum(x.square().sum() for x in torch.autograd.grad(info_nce(*learnt, impl=impl), learnt, create_graph=True))
        for impl in (None, "cpu")
    ]
    same_bits(*second, learnt)
    assert taken == [True] * 4


@pytest.mark.parametrize("learnt", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_gradients_of_some_inputs(taken, learnt):
    given = [x.detach() for x in matrices((9, 6), (9, 6), (17, 6))]
    inputs = [given[i].requires_grad_() for i in learnt]
    same_bits(info_nce(*given), info_nce(*given, impl="cpu"), inputs)
    with torch.no_grad():
        assert torch.equal(info_nce(*given), info_nce(*given, impl="cpu"))
    assert taken == [True, True]


@pytest.mark.parametrize("distilled", [False, True])
def test_a_bank_without_gradient_may_change_before_the_backward_and_not_before_a_second_one(distilled):
    query, positive, bank = matrices((9, 6), (9, 6), (17, 6))
    bank.requires_grad_(False)

    def loss():
        if not distilled:
            return info_nce(query, positive, bank)
        return similarity_distillation(query, positive.detach(), bank, student_temperature=0.2, teacher_temperature=0.1)

    (expected,) = torch.autograd.grad(loss(), query)
    changed, twice = loss(), loss()
    (first,) = torch.autograd.grad(twice, query, create_graph=True)
    bank.add_(1)
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(changed, query, retain_graph=True)[0], expected)
    with pytest.raises(RuntimeError, match="double backward through"):
        first.sum().backward()


NOT_PLAIN = {
    "float64": lambda q, p, b: info_nce(q.double(), p.double(), b.double()),
    "leading dimensions": lambda q, p, b: info_nce(q[None], p[None], b),
    "two positives": lambda q, p, b: info_nce(q, torch.stack([p, p], 1), b),
    "temperatures of rows in double": lambda q, p, b: info_nce(q, p, b, temperature=torch.full((4,), 0.07, dtype=torch.float64)),
    "temperatures within a batch": lambda q, p, b: info_nce(q, p, temperature=torch.full((4,), 0.07)),
    "weights in double": lambda q, p, b: info_nce(q, p, b, weight=torch.ones(4, dtype=torch.float64)),
    "weights with gradient": lambda q, p, b: info_nce(q, p, b, weight=torch.ones(4, requires_grad=True)),
    "a part of a bank with gradient": lambda q, p, b: info_nce(q, p, b, bank_valid=3),
    "none of a bank": lambda q, p, b: info_nce(q, p, b.detach(), bank_valid=0),
    "targets and an own row": lambda q, p, b: info_nce(q, None, b, targets=torch.arange(4), own_index=torch.zeros(4, dtype=torch.int64)),
    "an own row within a batch": lambda q, p, b: info_nce(q, p, own_index=torch.zeros(4, dtype=torch.int64)),
    "classes and smoothing within a batch": lambda q, p, b: info_nce(q, p, query_labels=torch.arange(4), label_smoothing=0.1),
    "a temperature in double": lambda q, p, b: info_nce(q, p, b, temperature=torch.tensor(0.07, dtype=torch.float64)),
    "a temperature of zero": lambda q, p, b: info_nce(q, p, b, temperature=torch.tensor(0.0)),
    "an extreme temperature": lambda q, p, b: info_nce(q, p, b, temperature=1e4),
    "no rows": lambda q, p, b: info_nce(q[:0], p[:0], b),
    "classes in int32": lambda q, p, b: info_nce(q, p, b, query_labels=torch.arange(4).int(), bank_labels=torch.arange(len(b)).int()),
    "a bias with gradient": lambda q, p, b: info_nce(q, p, b, bank_bias=torch.zeros(len(b), requires_grad=True)),
    "a bias in double": lambda q, p, b: info_nce(q, p, b, bank_bias=torch.zeros(len(b), dtype=torch.float64)),
    "a bias and a part of a bank": lambda q, p, b: info_nce(q, p, b.detach(), bank_bias=torch.zeros(len(b)), bank_valid=3),
    "a subclass": lambda q, p, b: info_nce(q.as_subclass(type("Sub", (torch.Tensor,), {})), p, b),
}


@pytest.mark.parametrize("call", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_not_plain_goes_the_general_way(taken, call):
    assert call(*matrices((4, 3), (4, 3), (5, 3))).dim() == 0
    assert taken == [False]


def test_modes_and_transforms_go_the_general_way(taken):
    query, positive, bank = matrices((4, 3), (4, 3), (5, 3))
    with torch.autocast("cpu", torch.bfloat16):
        info_nce(query, positive, bank)
    torch.func.grad(info_nce)(query, positive, bank)
    torch.func.vmap(info_nce)(query[None], positive[None], bank[None])
    assert taken == [False] * 4  # vmap's asks again for the whole batch
    compiled = torch.compile(lambda *x: info_nce(*x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, positive, bank), info_nce(query, positive, bank))
    assert taken[4:] == [False, True]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(include_positive=1), "include_positive must be a bool"),
        (dict(normalize=0), "normalize must be a bool"),
        (dict(label_smoothing=False), "label_smoothing must be a float"),
        (dict(temperature=True), "temperature must be a float"),
        (dict(bank=torch.rand(5, 4)), "bank must have the width of query"),
        (dict(bank=torch.rand(5, 3).half()), "bank must have the dtype of query"),
        (dict(positive=torch.rand(3, 3)), "positive must have shape"),
        (dict(label_smoothing=1.0), "label_smoothing must be"),
        (dict(targets=torch.zeros(4, dtype=torch.int64)), "positive and targets must not both be given"),
        (dict(positive=None, targets=torch.zeros(3, dtype=torch.int64)), "targets must have shape"),
        (dict(positive=None), "positive or targets must be given"),
    ],
)
def test_errors_are_those_of_the_general_way(given, message):
    query, positive, bank = matrices((4, 3), (4, 3), (5, 3))
    with pytest.raises((TypeError, ValueError), match=message):
        info_nce(**dict(query=query, positive=positive, bank=bank) | given)


@pytest.mark.parametrize("wrong", [-2, 5])
def test_targets_out_of_range_are_an_index_error(wrong):
    query, bank = matrices((4, 3), (5, 3))
    with pytest.raises(IndexError, match="targets"):
        info_nce(query, bank=bank, targets=torch.tensor([0, 1, wrong, 2]))
