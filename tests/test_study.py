"""`kdfast distill`: its data, its loop, its tables, at sizes of seconds."""

import csv

import pytest
import torch
import torch.nn.functional as F

from kdfast import cli, study
from kdfast.demo import corpus
from kdfast.study import data_free, digits, mnist1d, report, subject, text
from kdfast.study.recipes import RECIPES, VIEWS
from kdfast.study.training import ALONE, Trainer

sklearn = pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def docstrings():
    return text.load()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(subject, "_STEPS", 3)
    monkeypatch.setattr(data_free, "_SYNTHESIS_STEPS", 2)
    monkeypatch.setattr(data_free, "_ROUNDS", 1)


@pytest.mark.parametrize(
    ("module", "seen", "labelled", "tested"), [(digits, 200, 200, 597), (mnist1d, 3500, 100, 1000), (text, 1600, 200, None)]
)
def test_subjects(quick, docstrings, module, seen, labelled, tested):
    given = docstrings if module is text else module.load()
    data = subject.prepare(given)
    assert len(data.x) == len(data.y) == seen and data.labelled == labelled
    assert torch.equal(data.y[:labelled], given.y[:labelled]) and data.setting.labels is data.y
    assert len(data.test[0]) == tested or (tested is None and len(data.test[0]) > 300)
    kept = {"train": given.x[: given.train], "validation": data.validation[0], "test": data.test[0]}
    rows = {name: {tuple(row.flatten().tolist()) for row in x} for name, x in kept.items()}
    if module is not text:  # short texts can be equal once their unknown words are one
        assert not rows["train"] & rows["test"] and not rows["validation"] & rows["test"] and not rows["train"] & rows["validation"]
    for teacher in ("one", "random", "self-supervised"):
        assert not data.teachers[teacher].training and data.teachers[teacher](data.x[:2]).shape == (2, 10)
    assert [half(data.x[:1]).shape[1] for half in data.teachers["halves"]] == [5, 5]
    assert data.teachers["other"](data.x[:1]).shape == (1, 4)
    index = torch.arange(4)

    def view(name):
        return data.view(name, index, torch.Generator().manual_seed(0))

    plain = view("plain")
    assert torch.equal(plain, view("a")) and plain.shape == (4, *data.x.shape[1:]) and not torch.equal(view("p"), plain)
    turned = [view(name) for name in VIEWS]
    assert all(torch.equal(given.turn(plain, i), x) for i, x in enumerate(turned))
    assert all(not torch.equal(a, b) for i, a in enumerate(turned) for b in turned[:i])


def test_batches_are_half_labelled_and_the_task_sees_labels_alone(quick):
    data = subject.prepare(mnist1d.load(), taught=False)
    wrong = data.y.clone()
    wrong[data.labelled :] = (wrong[data.labelled :] + 1) % 10
    losses = []
    for y in (data.y, wrong):
        trainer = Trainer(ALONE, data._replace(y=y), 0, batch_size=64, steps=2)
        _, _, targets, index = trainer.batch()
        assert len(index.unique()) == 64 and (index < data.labelled).sum() == 32 and torch.equal(targets, y[index])
        losses.append(trainer.forward()[1]["task"])
    assert losses[0] == losses[1]


def test_mnist1d_is_made_as_published():
    """Mean 0, variance 1, as many of each class; linear models find about a third of it, as the paper says (32 %)."""
    x, y = mnist1d.samples(5000, torch.Generator().manual_seed(1))
    assert x.shape == (5000, 40) and y.bincount().tolist() == [500] * 10
    torch.testing.assert_close(torch.stack([x.mean(), x.std()]), torch.tensor([0.0, 1.0]), atol=1e-3, rtol=0)
    again, _ = mnist1d.samples(5000, torch.Generator().manual_seed(1))
    assert torch.equal(x, again)
    from sklearn.linear_model import LogisticRegression

    score = LogisticRegression(max_iter=200).fit(x[:4000], y[:4000]).score(x[4000:], y[4000:])
    assert 0.26 < score < 0.38


def test_mnist1d_samples_hold_their_template(monkeypatch):
    """Without noise, shift, slope, stretch and scale a sample is its template, its zeros, and nothing else."""
    for name, value in {"_SMOOTH": 0, "_WHITE": 0, "_SHEAR": 0, "_SCALE": 0, "_SHIFTS": 1, "_PADDING": (60, 60), "POINTS": 72}.items():
        monkeypatch.setattr(mnist1d, name, value)
    x, y = mnist1d.samples(10, torch.Generator().manual_seed(0))
    whole = F.pad(mnist1d.templates(), (0, 60))[y]
    torch.testing.assert_close(x, ((whole - whole.mean()) / whole.std(correction=0)).float(), atol=1e-5, rtol=0)


def test_smoothing_is_scipys():
    ndimage = pytest.importorskip("scipy.ndimage")
    noise = torch.randn(3, 72, dtype=torch.float64)
    torch.testing.assert_close(mnist1d._smoothed(noise), torch.tensor(ndimage.gaussian_filter1d(noise.numpy(), 2, axis=1)))


def test_texts_are_numbered_by_the_teachers_words(monkeypatch):
    texts = [f"alpha beta gamma word{'abcdefghij'[i % 10]}" for i in range(40)] + ["delta alpha"]
    modules = [f"m{i % 10}" for i in range(40)] + ["m0"]
    monkeypatch.setattr(corpus, "load", lambda: corpus.Corpus(texts, modules, 30))
    monkeypatch.setattr(text, "TAUGHT", 40)
    found = text.load()
    assert found.y.tolist() == [*(i % 10 for i in range(40)), 0] and found.x.shape == (41, text.LONGEST)
    assert found.x[-1, :3].tolist() == [1, 2, 0] and len({found.x[i, 3].item() for i in range(10)}) == 10
    assert text.words("A list's x_1") == ["a", "list", "s", "x"]


def test_a_run_writes_a_row_a_student_and_a_table(quick, tmp_path, capsys):
    methods = ["--method", "KD", "--method", study.DATA_FREE]
    assert cli.main(["distill", *methods, "--seeds", "2", "--steps", "2", "--output", str(tmp_path)]) == 0
    with (tmp_path / "results.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in (study.BASELINE, "KD", study.DATA_FREE) for s in "01"]
    assert all(0 <= float(row["accuracy"]) <= 100 and float(row["step_ms"]) > 0 and float(row["step_mib"]) > 0 for row in rows)
    assert (tmp_path / "results.md").read_text().splitlines()[-1].startswith("| RGAL without data |")
    assert "| KD |" in capsys.readouterr().out


def test_weights_are_compared_on_the_validation_samples(quick, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        study, "_trained", lambda problem, name, seed, steps, factor: seen.append((problem, seed)) or {"accuracy": 50 + factor}
    )
    arguments = ["--method", "KD", "--tune", "--data", "mnist1d", "--seeds", "1", "--steps", "2", "--output", str(tmp_path)]
    assert cli.main(["distill", *arguments]) == 0
    assert all(problem.test is problem.validation and seed >= 100 for problem, seed in seen) and len(seen) == 3
    assert (tmp_path / "weights.md").read_text().splitlines()[-1] == "| KD | 0.09: 50.1, 0.9: 51.0, **9: 60.0** |"
    assert "| KD |" in capsys.readouterr().out


def test_gains_are_paired_by_seed():
    found = {"none": (80.0, 90.0), "KD": (82.0, 92.0)}
    costs = {"step_ms": 1.0, "step_mib": 2.0}
    rows = [{"method": m, "seed": i, "accuracy": a, **costs} for m, accuracies in found.items() for i, a in enumerate(accuracies)]
    assert report.table(rows[:1], 99.0, "none")[-1] == "| none | 80.0 |  | 1.0 | 2.0 |"
    assert report.table(rows, 99.0, "none")[-2:] == ["| none | 85.0 ± 7.1 |  | 1.0 | 2.0 |", "| KD | 87.0 ± 7.1 | +2.0 ± 0.0 | 1.0 | 2.0 |"]


def test_unknown_names_are_named(tmp_path, capsys):
    assert cli.main(["distill", "--method", "nonsense", "--output", str(tmp_path)]) == 1
    assert "'nonsense'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="data must be one of"):
        study.run([], tmp_path, data="imagenet")
    with pytest.raises(ValueError, match="method must be one of"):
        study.run([study.DATA_FREE], tmp_path, data="text")


def test_every_recipe_trains_on_text(quick, docstrings):
    """Maps of one row, tokens and views of words reach every method."""
    data = subject.prepare(docstrings, taught=False)
    for name, recipe in RECIPES.items():
        assert abs(Trainer(recipe, data, 0, batch_size=16, steps=1).step()) < float("inf"), name
