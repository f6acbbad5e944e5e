"""Distiller: terms, views, teachers, building, wrappers, state."""

import copy
import gc
import pickle

import pytest
import torch
import torch.distributed.fsdp
import torch.nn.functional as F
from ranks import needs_gloo, on_two_ranks
from torch import nn
from torch.nn.parameter import is_lazy

from kdfast import Distiller, Features, Projector, QueueBank, Term
from kdfast.distill import KD, MSE, Cosine, DistillLoss, WCoRD


class Net(nn.Module):
    def __init__(self, hidden: int, classes: int = 3, dropout: float = 0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout))
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x):
        return self.fc(self.body(x))


class Spy(DistillLoss):
    """Keeps what it was called with."""

    def forward(self, student, teacher, *, index=None, labels=None, **extra):
        self.seen = student, teacher, index, labels, extra
        return self._report(spy=sum(s.sum() for s in _leaves(student)))


def _leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for part in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(part)]


def batch(n=8):
    return torch.randn(n, 6), torch.randint(0, 3, (n,))


def kd_and_mse(student, teacher, **options):
    terms = {"kd": Term(KD(T=2), weight=0.9), "feat": Term(MSE(projector="linear"), at="body", weight=2.0)}
    return Distiller(student, teacher, terms, **options)


# -- the sum ---------------------------------------------------------------------------------------------------


def test_loss_is_the_weighted_sum_written_out():
    student, teacher, (x, y) = Net(4), Net(5), batch()
    d = kd_and_mse(student, teacher).build(x)
    out = d(x)
    loss, parts = d.loss(y, task=F.cross_entropy, task_weight=0.1)

    with torch.no_grad():
        feat_t = teacher.body(x)
        logits_t = teacher.fc(feat_t)
    feat_s = student.body(x)
    logits_s = student.fc(feat_s)
    p = (logits_t / 2).softmax(-1)
    kd = 4 * (p * (p.log() - (logits_s / 2).log_softmax(-1))).sum() / len(x)
    affine = d.losses["feat"].projectors[0].maps[0]
    expected = 0.1 * F.cross_entropy(logits_s, y) + 0.9 * kd + 2 * (affine(feat_s) - feat_t).square().mean()
    torch.testing.assert_close(out, logits_s)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(sum(parts.values()), loss.detach())
    assert list(parts) == ["task", "kd", "feat"] and not any(p.requires_grad or p.dim() for p in parts.values())

    parameters = list(d.parameters())
    assert {id(p) for p in parameters} == {id(p) for p in [*student.parameters(), *affine.parameters()]}
    for got, want in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(got, want)


def test_one_forward_form_is_the_two_step_form():
    x, y = batch()
    d = kd_and_mse(Net(4), Net(5)).build(x)
    d(x)
    two, _ = d.loss(y, task=F.cross_entropy)
    one, _ = d(x, y, task=F.cross_entropy)
    torch.testing.assert_close(one, two)
    assert d(x, None)[1].keys() == {"kd", "feat"}


def test_labels_default_to_an_integer_target_and_extra_reaches_one_term():
    spy = Spy()
    d = Distiller(Net(4), None, {"spy": Term(spy), "other": Term(Spy())})
    (x, y), i = batch(), torch.arange(8)
    d(x, y, index=i, extra={"spy": {"lam": 0.3}})
    assert spy.seen[1] is None and spy.seen[2] is i and spy.seen[3] is y and spy.seen[4] == {"lam": 0.3}
    d(x, y.float(), index=i)
    assert spy.seen[3] is None and spy.seen[4] == {}
    d(x, y, labels=i)
    assert spy.seen[3] is i


def test_any_callable_is_a_term():
    x, _ = batch()
    student, teacher = Net(4), Net(5)
    d = Distiller(student, teacher, {"mse": Term(nn.MSELoss()), "l1": Term(F.l1_loss, weight=0.5)})
    loss, _ = d(x, None)
    with torch.no_grad():
        t = teacher(x)
    s = student(x)
    torch.testing.assert_close(loss, F.mse_loss(s, t) + 0.5 * F.l1_loss(s, t))


def test_specs_lists_dicts_inputs_and_pairs():
    spy = Spy()
    x, _ = batch()
    student, teacher = Net(4), Net(5)
    d = Distiller(student, teacher, {"spy": Term(spy, at=({"logits": None, "feat": "fc:in"}, ["body.0", "body"]))})
    d(x, None)
    s, t = spy.seen[:2]
    torch.testing.assert_close(student.fc(s["feat"]), s["logits"])
    assert [v.shape[1] for v in t] == [5, 5] and torch.equal(t[0], teacher.body[0](x))


def test_outputs_with_logits_and_keyword_inputs():
    class Wrapped(Net):
        def forward(self, *, x):
            return {"loss": None, "logits": super().forward(x)}

    x, y = batch()
    d = Distiller(Wrapped(4), Wrapped(5), {"kd": Term(KD())})
    loss, parts = d(({"x": x}, {"x": x}), y, task=F.cross_entropy)  # two views of keywords
    assert loss.isfinite() and parts["task"] > 0


# -- views and teachers ----------------------------------------------------------------------------------------


def test_views_run_one_forward_each_and_the_losses_see_a_dict():
    spy = Spy()
    student, teacher = Net(4), Net(5)
    d = Distiller(student, teacher, {"spy": Term(spy), "kd": Term(KD())})
    (a, _), (b, y) = batch(), batch()
    calls = []
    student.register_forward_hook(lambda *_: calls.append(1))
    _, parts = d({"a": a, "b": b}, y, task=F.cross_entropy)
    s, t = spy.seen[:2]
    assert list(s) == list(t) == ["a", "b"] and len(calls) == 2
    torch.testing.assert_close(t["b"], teacher(b))
    expected = (F.cross_entropy(s["a"], y) + F.cross_entropy(s["b"], y)) / 2
    torch.testing.assert_close(parts["task"], expected.detach())
    torch.testing.assert_close(parts["kd"], ((KD()(s["a"], t["a"]) + KD()(s["b"], t["b"])) / 2).detach())
    assert list(d((a, b))) == [0, 1]


def test_teachers_may_see_views_of_their_own():
    spy = Spy()
    d = Distiller(Net(4), Net(5), {"spy": Term(spy)})
    (a, _), (b, _), (c, _) = batch(), batch(), batch()
    d({"a": a, "p": b}, None, teacher_input={"a": c})
    assert list(spy.seen[0]) == ["a", "p"] and list(spy.seen[1]) == ["a"]
    torch.testing.assert_close(spy.seen[1]["a"], d.teachers[0](c))


def test_several_teachers_are_a_list_and_teacher_picks_one():
    all_, second = Spy(), Spy()
    teachers = [Net(5), Net(7)]
    terms = {"all": Term(all_), "second": Term(second, at=("fc:in", "body"), teacher=1), "kd": Term(KD())}
    d = Distiller(Net(4), teachers, terms)
    x, _ = batch()
    _, parts = d(x, None)
    for got, teacher in zip(all_.seen[1], teachers, strict=True):
        torch.testing.assert_close(got, teacher(x))
    torch.testing.assert_close(second.seen[1], teachers[1].body(x))
    expected = sum(KD()(d.student(x), t(x)) for t in teachers) / 2
    torch.testing.assert_close(parts["kd"], expected.detach())


def test_features_are_a_teacher_looked_up_by_index():
    teacher, x = Net(5).eval(), torch.randn(20, 6)
    with torch.no_grad():
        features = Features({"output": teacher(x), "body": teacher.body(x).half()}, torch.arange(20))
    student, pick = Net(4), torch.tensor([3, 17, 3, 0])
    live, stored = kd_and_mse(student, teacher), kd_and_mse(student, features)
    live.build(x)
    stored.build(x)
    stored.load_state_dict(live.state_dict())
    student.eval()
    torch.testing.assert_close(stored(x[pick], None, index=pick)[0], live(x[pick], None)[0], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="index must be given when the teacher is Features"):
        stored(x, None)
    wrong = Distiller(student, features, {"kd": Term(KD(), at=(None, "head"))})
    with pytest.raises(ValueError, match="Features hold no 'head'"):
        wrong(x[pick], None, index=pick)


def test_teachers_stay_frozen_and_out_of_state():
    teacher = Net(5, dropout=0.5)
    d = Distiller(Net(4), teacher, {"kd": Term(KD())})
    x, _ = batch()
    d.train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    teacher.train()
    before = teacher.body[1].running_mean.clone()
    d(x, None)
    assert not teacher.training and torch.equal(before, teacher.body[1].running_mean)
    assert all(key.startswith("student.") for key in d.state_dict())
    d.double()
    assert teacher.fc.weight.dtype == torch.float64


def test_an_averaged_model_is_a_teacher_made_before_or_after():
    student, (x, _) = Net(4), batch()
    before = torch.optim.swa_utils.AveragedModel(student)
    d = Distiller(student, before, {"feat": Term(MSE(), at="body")})
    d(x, None)
    after = torch.optim.swa_utils.AveragedModel(student)  # a copy of a model with hooks
    d2 = Distiller(student, after, {"feat": Term(MSE(), at="body")})
    after.update_parameters(student)
    student.eval()
    torch.testing.assert_close(d2(x, None)[0].item(), 0.0)
    assert d(x, None)[0].isfinite()


def test_a_teacher_may_not_share_the_students_parameters():
    student = Net(4)
    with pytest.raises(ValueError, match="must not share parameters"):
        Distiller(student, student, {"kd": Term(KD())})


# -- building --------------------------------------------------------------------------------------------------


def test_build_keeps_statistics_modes_and_random_state():
    student, (x, _) = Net(4, dropout=0.5), batch()
    student.body[1].eval()
    d = kd_and_mse(student, Net(5))
    state, rng = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    assert d.build(x) is d
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), student.state_dict().values(), strict=True))
    assert student.training and not student.body[1].training
    assert not any(is_lazy(p) for p in d.parameters())


def test_parameters_before_build_say_so():
    d = kd_and_mse(Net(4), Net(5))
    for ask in (d.parameters, d.named_parameters):
        with pytest.raises(RuntimeError, match=r"losses\.feat.*call build\(x\)"):
            ask()
    assert list(Distiller(Net(4), Net(5), {"kd": Term(KD())}).parameters())  # nothing to build


def test_an_early_optimiser_on_the_loss_holds_the_parameters():
    loss = MSE(projector="linear")
    held = list(loss.parameters())
    d = Distiller(Net(4), Net(5), {"feat": Term(loss, at="body")}).build(batch()[0])
    assert {id(p) for p in held} < {id(p) for p in d.parameters()}


def test_a_loss_builds_by_itself():
    loss = Cosine(projector="mlp")
    s, t = torch.randn(2, 4), torch.randn(2, 5)
    rng = torch.get_rng_state()
    assert loss.build(s, t) is loss
    assert torch.equal(rng, torch.get_rng_state()) and not any(is_lazy(p) for p in loss.parameters())


def test_state_round_trip_into_an_unbuilt_distiller():
    class Banked(Spy):
        def __init__(self):
            super().__init__(bank=QueueBank(16, 3))

        def forward(self, student, teacher, **_):
            self.bank.push(teacher)
            return super().forward(student, teacher)

    def make():
        terms = {"feat": Term(MSE(projector="mlp"), at="body"), "bank": Term(Banked())}
        return Distiller(Net(4), Net(5), terms)

    d, (x, _) = make(), batch()
    d.build(x)
    d(x, None)
    fresh = make()
    fresh.load_state_dict(d.state_dict())
    assert torch.equal(fresh.losses["bank"].bank.keys, d.losses["bank"].bank.keys)
    for a, b in zip(d.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_copies_and_pickles_capture_for_themselves():
    d, (x, _) = kd_and_mse(Net(4), Net(5)), batch()
    d.build(x).eval()
    want = d(x, None)[0]
    for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        torch.testing.assert_close(twin(x, None)[0], want)


def test_a_student_that_outlives_its_distiller_has_no_hooks():
    student, teacher, (x, _) = Net(4), Net(5), batch()
    d = kd_and_mse(student, teacher).build(x)
    d(x)
    del d
    gc.collect()
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (student, teacher) for m in net.modules())


# -- wrappers, precision ---------------------------------------------------------------------------------------


def test_a_compiled_student_with_hooks_in_one_graph():
    student, teacher, (x, _) = Net(4), Net(5), batch()
    plain = kd_and_mse(student, teacher).build(x)
    want, _ = plain(x, None)
    grads = torch.autograd.grad(want, student.fc.weight)
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    d = kd_and_mse(compiled, teacher).build(x)
    d.losses.load_state_dict(plain.losses.state_dict())
    loss, _ = d(x, None)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, student.fc.weight), grads)


def test_a_whole_step_compiles_to_one_graph():
    x, y = batch()
    d = kd_and_mse(Net(4), Net(5)).build(x).eval()
    want, parts = d(x, y, task=F.cross_entropy)
    got, compiled_parts = torch.compile(d, backend="aot_eager", fullgraph=True)(x, y, task=F.cross_entropy)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(compiled_parts, parts)
    parameters = list(d.parameters())
    torch.testing.assert_close(torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters))


def test_autocast_reaches_student_and_teacher_and_losses_stay_float32():
    spy = Spy()
    (x, y), teacher = batch(), Net(5)
    terms = {
        "kd": Term(KD()),
        "feat": Term(MSE(projector="linear"), at="body"),
        "cos": Term(Cosine(), at=None),
        "spy": Term(spy, weight=0.0),
    }
    d = Distiller(Net(4), teacher, terms).build(x)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = d(x, y, task=F.cross_entropy)
    assert spy.seen[0].dtype == spy.seen[1].dtype == torch.bfloat16
    assert parts["kd"].dtype == parts["feat"].dtype == parts["cos"].dtype == torch.float32
    loss.backward()
    d.teacher_dtype = torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        d(x)
    assert d.loss(y)[0].isfinite()  # outside autocast the mixed dtypes meet
    assert spy.seen[0].dtype == torch.bfloat16 and spy.seen[1].dtype == torch.float32
    d.teacher_dtype = torch.bfloat16
    d(x, None)
    assert spy.seen[1].dtype == torch.bfloat16


def ddp_gradients(rank: int):
    x, y, student, teacher = _ddp_problem()
    torch.manual_seed(100 + rank)  # projectors start differently: build makes them equal
    d = _ddp_distiller(student, teacher).build(x)
    start = {name: value.clone() for name, value in d.state_dict().items()}
    ddp = nn.parallel.DistributedDataParallel(d)
    mine = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2)
    loss, _ = ddp(x[mine], y[mine], task=F.cross_entropy)
    loss.backward()
    grads = [p.grad.clone() for p in d.parameters()]
    sharded = _ddp_distiller(*_ddp_problem()[2:])
    sharded.load_state_dict(start)
    torch.distributed.fsdp.fully_shard(sharded)
    sharded(x[mine], y[mine], task=F.cross_entropy)[0].backward()
    for p, want in zip(sharded.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), want)
    torch.optim.SGD(d.parameters(), lr=0.1).step()
    gathered = [None] * 2
    torch.distributed.all_gather_object(gathered, d.state_dict())
    equal = all(torch.equal(gathered[0][name], gathered[1][name]) for name in start)
    return start, grads, d.losses["wcord"].bank.keys, equal


def _ddp_problem():
    torch.manual_seed(0)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 3, (8,))
    student = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    teacher = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return x, y, student, teacher


def _ddp_distiller(student, teacher):
    bank = QueueBank(24, 4, dtype=torch.float64)
    bank.push(torch.linspace(-1, 1, 40, dtype=torch.float64).view(10, 4).sin())
    terms = {
        "wcord": Term(WCoRD(bank, dim=4, local_weight=0.0), at="1"),
        "kd": Term(KD()),
        "feat": Term(MSE(projector=Projector()), at="1"),
        "inverse": Term(Cosine(projector=Projector(invert=True)), at="1"),
    }
    return Distiller(student, teacher, terms).double()


@needs_gloo
def test_ddp_and_fully_shard_give_the_single_process_gradient_and_keep_projectors_and_banks_equal():
    start, grads, keys, equal = on_two_ranks(ddp_gradients)[0]
    assert equal
    x, y, student, teacher = _ddp_problem()
    d = _ddp_distiller(student, teacher)
    d.load_state_dict(start)
    loss, _ = d(x, y, task=F.cross_entropy)
    torch.testing.assert_close(d.losses["wcord"].bank.keys, keys)
    for p, got in zip(d.parameters(), grads, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(loss, p, retain_graph=True)[0])


# -- errors ----------------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    student, teacher, (x, y) = Net(4), Net(5), batch()
    for wrong, message in (
        (lambda: Distiller(student, teacher), "terms must hold at least one Term"),
        (lambda: Distiller(student, teacher, {"kd": KD()}), r"terms\['kd'\] must be a Term, got KD"),
        (lambda: Distiller(student, teacher, {"task": Term(KD())}), "cannot be called 'task'"),
        (lambda: Distiller(student, teacher, {"a.b": Term(KD())}), "cannot be called 'a.b'"),
        (lambda: Distiller(student, teacher, {"kd": Term(KD(), teacher=1)}), r"must be in \[0, 1\), got 1"),
        (lambda: Distiller(student, "resnet", {"kd": Term(KD())}), "teacher must be an nn.Module"),
        (lambda: Distiller(lambda x: x, teacher, {"kd": Term(KD())}), "student must be an nn.Module"),
        (lambda: Distiller(student, teacher, {"m": Term(MSE(), at="avgpool")}), "'avgpool' names no module"),
        (lambda: Term(3), "loss must be callable"),
        (lambda: Term(KD(), at=("a", "b", "c")), "got 3 specs"),
        (lambda: Term(KD(), at=3), "at must be None"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            wrong()
    d = Distiller(student, teacher, {"kd": Term(KD())})
    with pytest.raises(RuntimeError, match="call the Distiller on a batch first"):
        d.loss(y)
    with pytest.raises(ValueError, match="target must be given with task"):
        d(x, task=F.cross_entropy)
    with pytest.raises(ValueError, match=r"extra must name terms \(kd\), got 'bingo'"):
        d(x, extra={"bingo": {}})
    with pytest.raises(ValueError, match="one shape"):
        Distiller(student, teacher, {"m": Term(MSE(), at="body")})(x, None)
