"""What the API promises of every method in a training run: bf16 accuracy, accumulation, compiled students, checkpoints with bags."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from distill_cases import CLASSES, TRAIN, Net, problem, trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from kdfast import Distiller, IndexedBank, QueueBank, Term, distill
from kdfast.study.recipes import RECIPES, Recipe

every_method = pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))


# -- bf16 ------------------------------------------------------------------------------------------------------------------------


def rounded(x):
    return x.bfloat16().to(x.dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x


class EveryOpInBFloat16(TorchDispatchMode):
    """What the formula gives when each operation's result is a bf16 number: products accumulate in float32, as hardware does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            for x in (*args, *(kwargs or {}).values()):
                if isinstance(x, torch.Tensor) and x is out:
                    x.copy_(rounded(x))
            return out
        aliases = any(r.alias_info is not None for r in func._schema.returns)
        return out if aliases else tree_map(rounded, out)


def seen_by_the_method(recipe, batches=3):
    """(the loss after a step, its arguments in the next forwards)."""
    run, seen = trainer(recipe), []
    run.step()
    loss = run.distiller.losses["method"]
    handle = loss.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    for _ in range(batches):
        run.forward()
    handle.remove()
    return loss.eval(), seen


def evaluated(loss, args, kwargs, dtype, context):
    """Value and gradient of the student's values, which are bf16 numbers in `dtype`."""
    leaves = []

    def leaf(x):
        if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
            return x
        leaves.append(x.detach().bfloat16().to(dtype).requires_grad_())
        return leaves[-1]

    args, kwargs = tree_map(leaf, (args, kwargs))
    student = leaves[: len(tree_leaves(args[0]))]
    torch.manual_seed(3)
    with context:
        value = loss(*args, **kwargs)
        gradients = torch.autograd.grad(value, student, allow_unused=True)
    return value.detach(), torch.cat([g.bfloat16().float().flatten() for g in gradients if g is not None])


@every_method
def test_bf16_error_is_at_most_twice_that_of_the_formula_in_bf16(recipe, monkeypatch):
    loss, batches = seen_by_the_method(recipe)
    low = copy.deepcopy(loss)
    with torch.no_grad():
        for x in (*low.parameters(), *low.buffers()):
            if x.dim() and x.is_floating_point():
                x.copy_(rounded(x))
    values, gradients, scale = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    for inputs in batches:
        exact = evaluated(loss, *inputs, torch.float32, nullcontext())
        ours = evaluated(loss, *inputs, torch.bfloat16, torch.autocast("cpu", torch.bfloat16))
        with monkeypatch.context() as patch:
            patch.setenv("KDFAST_IMPL", "torch")
            naive = evaluated(low, *inputs, torch.float32, EveryOpInBFloat16())
        scale += torch.stack([exact[0].abs(), exact[1].norm()])
        values += torch.stack([(x[0] - exact[0]).abs() for x in (ours, naive)])
        gradients += torch.stack([(x[1] - exact[1]).norm() for x in (ours, naive)])
    half_ulp = 2**-9 * scale  # a bf16 number cannot say its value better
    assert values[0] <= 2 * values[1] + half_ulp[0], values / scale[0]
    assert gradients[0] <= 2 * gradients[1] + half_ulp[1], gradients / scale[1]


# -- accumulation ----------------------------------------------------------------------------------------------------------------


def tensors(state):
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


@every_method
def test_micro_batches_accumulate_and_each_pushes(recipe):
    """Backward after each micro-batch, or once after all of them: banks pushed in between change no gradient."""
    one, two = trainer(recipe), trainer(recipe)
    for run in (one, two):
        torch.manual_seed(2)
        run.step()
        run.optimizer.zero_grad()
        losses = []
        for _ in range(3):
            losses.append(run.forward()[0] / 3)
            if run is one:
                losses.pop().backward()
    sum(losses).backward()
    for p, q in zip(one.distiller.parameters(), two.distiller.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    assert tensors(one.distiller.state_dict()).keys() == tensors(two.distiller.state_dict()).keys()
    for name, value in tensors(one.distiller.state_dict()).items():
        torch.testing.assert_close(value, two.distiller.state_dict()[name], rtol=0, atol=0)


MEANS = {
    **{name: RECIPES[name] for name in ("KD", "Cosine", "FacultyOT")},
    "SEED": Recipe(lambda s: distill.SEED(QueueBank(96, 24), teacher_temperature=0.05, push=False), at="pool"),
}


@pytest.mark.parametrize("recipe", MEANS.values(), ids=list(MEANS))
def test_micro_batches_of_a_mean_over_samples_are_the_whole_batch(recipe):
    run = trainer(recipe)
    run.student.eval()  # batch statistics would tie the samples
    x, _, y, index = run.batch()
    parameters = list(run.distiller.parameters())

    def gradient(part):
        loss, _ = run.distiller(x[part], y[part], index=index[part], task=F.cross_entropy)
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    parts = [gradient(part) for part in torch.arange(len(x)).chunk(4)]
    for whole, *pieces in zip(gradient(torch.arange(len(x))), *parts, strict=True):
        if whole is not None:
            torch.testing.assert_close(sum(pieces) / 4, whole, rtol=1e-4, atol=1e-6)


# -- compiled students -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CoDIR", "SSKD", "CoNe"])
def test_a_compiled_student_keeps_its_hooks(name):
    """Hooks on a list of layers, on a dict with views, beside a moving average of the student: one graph, the eager numbers."""
    recipe = RECIPES[name]
    plain, compiled = trainer(recipe), trainer(recipe)
    term = compiled.distiller.terms["method"]
    student = torch.compile(compiled.student, backend="aot_eager", fullgraph=True)
    compiled.distiller = Distiller(student, compiled.teachers, {"method": Term(term.loss, at=recipe.at, weight=recipe.weight)})
    for _ in range(2):
        torch.manual_seed(4)
        want, parts = plain.forward()
        torch.manual_seed(4)
        got, compiled_parts = compiled.forward()
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(compiled_parts, parts)
    wanted = torch.autograd.grad(want, list(plain.student.parameters()))
    for g, w in zip(torch.autograd.grad(got, list(compiled.student.parameters())), wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


# -- checkpoints -----------------------------------------------------------------------------------------------------------------


class BagRun:
    """BINGO with bags and a queue, WCoRD with drawn negatives of an indexed bank; every source of chance has its generator."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        data = problem()
        with torch.no_grad():
            features = data.teachers["one"](data.x)
        self.generators = {name: torch.Generator().manual_seed(seed) for name in ("order", "bags", "noise")}
        bags = distill.make_bags(features, "label", k=3, labels=data.y, generator=torch.Generator().manual_seed(0))
        inputs = distill.BagDataset(list(data.x[:96]), bags[:96].where(bags[:96] < 96, -1), self._noisy, self.generators["bags"])
        self.loader = DataLoader(inputs, 24, shuffle=True, generator=self.generators["order"])
        negatives = torch.Generator().manual_seed(seed)
        terms = {
            "bingo": Term(distill.BINGO("released", bank=QueueBank(70, CLASSES), warmup_epochs=1), weight=0.1),
            "wcord": Term(distill.WCoRD(IndexedBank(TRAIN, 8), dim=8, num_negatives=20, generator=negatives), at="pool"),
        }
        self.distiller = Distiller(Net(12), data.teachers["one"], {"bingo": terms["bingo"]}).build(self._views(*data.x[:12].view(3, 4, 8)))
        self.second = Distiller(self.distiller.student, data.teachers["one"], {"wcord": terms["wcord"]}).build(data.x[:4])
        self.parameters = list(dict.fromkeys([*self.distiller.parameters(), *self.second.parameters()]))
        self.optimizer = torch.optim.Adam(self.parameters, lr=0.01)

    def _noisy(self, x):
        return x + 0.1 * torch.randn(x.shape, generator=self.generators["noise"])

    @staticmethod
    def _views(anchor, member, mix):
        return {"a": anchor, "p": member, "mix": mix}

    def epoch(self, number: int) -> list[float]:
        losses = []
        for a1, a2, p1, p2, index in self.loader:
            extra = {"bingo": {"lam": 0.7, "epoch": number}}
            views = self._views(a1, p1, 0.7 * a1 + 0.3 * p1)
            bingo, _ = self.distiller(views, None, teacher_input={"a": a2, "p": p2}, extra=extra)
            wcord, _ = self.second(a1, None, index=index)
            self.optimizer.zero_grad()
            (bingo + wcord).backward()
            self.optimizer.step()
            losses.append((bingo + wcord).item())
        return losses

    def parts(self):
        return {"distiller": self.distiller, "second": self.second, "optimizer": self.optimizer}

    def save(self, path) -> None:
        generators = {name: g.get_state() for name, g in self.generators.items()}
        torch.save({"generators": generators, **{name: part.state_dict() for name, part in self.parts().items()}}, path)

    def load(self, path) -> None:
        saved = torch.load(path, weights_only=True)
        for name, generator in self.generators.items():
            generator.set_state(saved["generators"][name])
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])


def test_a_run_with_banks_samplers_and_bags_resumes_bit_for_bit(tmp_path):
    run = BagRun(0)
    run.epoch(0)
    run.save(tmp_path / "checkpoint.pt")
    resumed = BagRun(1)
    resumed.load(tmp_path / "checkpoint.pt")
    for number in (1, 2):
        assert run.epoch(number) == resumed.epoch(number)
    for part, twin in zip(run.parts().values(), resumed.parts().values(), strict=True):
        if part is not run.optimizer:
            for name, value in tensors(part.state_dict()).items():
                assert torch.equal(value, twin.state_dict()[name]), name
