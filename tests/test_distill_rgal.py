"""RGAL: the student's loss and the generator's terms against formulas written out, and both phases end to end without data."""

import copy

import pytest
import torch
import torch.nn.functional as F
from distill_cases import rows, same_value_and_gradient
from torch import nn

from kdfast import Distiller, Term
from kdfast.distill import RGAL, ImageGenerator, ImagePool, RGALSynthesizer
from kdfast.functional import mine_triplets, triplet_loss

CLASSES = 3


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))
        self.two = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))
        self.fc = nn.Linear(4 * width, CLASSES)

    def forward(self, x):
        return self.fc(self.two(self.one(x)).flatten(1))


def pictures(n):
    """Bars at one of three places, in noise: [n, 1, 8, 8]."""
    y = torch.randint(0, CLASSES, (n,))
    x = 0.2 * torch.rand(n, 1, 8, 8)
    for i, label in enumerate(y.tolist()):
        x[i, 0, :, 2 * label + 1] += 0.8
    return x.clamp(0, 1), y


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    net = Net(12)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(40):
        x, y = pictures(64)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def test_the_students_loss():
    s = {"logits": rows(9, 3, grad=True), "layers": [rows(9, 4, 2, 2, grad=True), rows(9, 5, grad=True)]}
    t = {"logits": rows(9, 3), "layers": [rows(9, 6), rows(9, 7, 2, 2)]}
    loss = RGAL(2, T=5, feature_weight=0.3, triplet_weight=0.7, margin=0.4).double().build(s, t)
    maps = [p.maps[0] for p in loss.projectors]
    pooled = [(s["layers"][0].mean((2, 3)), t["layers"][0]), (s["layers"][1], t["layers"][1].mean((2, 3)))]
    features = sum(F.mse_loss(a @ m.weight.T + m.bias, b) for m, (a, b) in zip(maps, pooled, strict=True))
    p = (t["logits"] / 5).softmax(1)
    kl = 25 * (p * (p.log() - (s["logits"] / 5).log_softmax(1))).sum(1).mean()
    y = t["logits"].argmax(1)
    torch.manual_seed(3)
    mined = mine_triplets(s["logits"].detach(), y, mining="distance_weighted")
    a, p, n = mined.to_tuple()
    e = F.normalize(s["layers"][1], dim=1)
    assert len(a) == sum(int((y == label).sum()) - 1 for label in y)  # every ordered positive pair
    triplet = ((e[a] - e[p]).norm(dim=1) - (e[a] - e[n]).norm(dim=1) + 0.4).relu().mean()
    torch.manual_seed(3)
    value = loss(s, t)
    same_value_and_gradient(value, kl + 0.3 * features + 0.7 * triplet, s["logits"], *s["layers"], *(m.weight for m in maps))


def made(teacher, **options):
    student = Net(6)
    options = {"num_classes": CLASSES, "layers": ["one", "two"], "batch_size": 12, "steps": 3, **options}
    return student, RGALSynthesizer(teacher, student, ImageGenerator(8, 4, 8, 1), **options)


@pytest.mark.parametrize("direction", ["confuse", "cluster"])
@pytest.mark.parametrize("triplet_on", ["student", "teacher"])
def test_the_generators_terms(teacher, direction, triplet_on, monkeypatch):
    student, synthesizer = made(teacher, steps=1, direction=direction, triplet_on=triplet_on, bn=2.0, oh=3.0, adv=4.0, triplet=5.0)
    student.eval()
    mined = {}

    def spy(layers, labels, **options):
        mined.update(options, layers=layers, labels=labels)
        return triplet_loss(layers, labels, **options)

    monkeypatch.setattr("kdfast.distill.synthesizer.triplet_loss", spy)
    terms = synthesizer.step()
    images, y = synthesizer.pool.images, synthesizer.pool.labels
    with torch.no_grad():
        one, two = teacher.one[0](images), teacher.two[0](teacher.one(images))
        bn = 0.0
        for x, norm in ((one, teacher.one[1]), (two, teacher.two[1])):
            x = x.transpose(0, 1).flatten(1)
            bn = bn + (x.var(1, correction=0) - norm.running_var).norm() + (x.mean(1) - norm.running_mean).norm()
        t, s = teacher(images), student(images)
        both = t.argmax(1) == s.argmax(1)
        kl = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
        torch.testing.assert_close(terms["bn"], 2 * bn, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(terms["oh"], 3 * F.cross_entropy(t, y))
        torch.testing.assert_close(terms["adv"], -4 * kl[both].sum() / both.sum().clamp(min=1))
        source = teacher if triplet_on == "teacher" else student
        for got, want in zip(mined["layers"], (source.one(images), source.two(source.one(images))), strict=True):
            torch.testing.assert_close(got, want.mean((2, 3)))
        torch.testing.assert_close(mined["sample_on"], t)
    assert torch.equal(mined["labels"], t.argmax(1)) and mined["mining"] == "focal" and mined["direction"] == direction
    assert terms["triplet"] >= 0 and images.shape == (12, 1, 8, 8) and images.min() >= 0 and images.max() <= 1


def test_a_step_leaves_the_models_alone_and_keeps_the_best_batch(teacher):
    student, synthesizer = made(teacher, steps=6)
    student.train()
    before = copy.deepcopy(student.state_dict())
    terms = synthesizer.step()
    assert student.training and all(p.grad is None for p in student.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), student.state_dict().values(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (teacher, student) for m in net.modules())
    with torch.no_grad():
        student.eval()
        torch.testing.assert_close(terms["oh"], F.cross_entropy(teacher(synthesizer.pool.images), synthesizer.pool.labels))
    synthesizer.step()
    assert len(synthesizer.pool) == 24
    fresh = made(teacher)[1]
    fresh.load_state_dict(synthesizer.state_dict())
    assert torch.equal(fresh.pool.images, synthesizer.pool.images) and torch.equal(fresh.pool[3][0], synthesizer.pool[3][0])


def test_the_pool_keeps_the_newest():
    pool = ImagePool(capacity=5, transform=lambda x: x + 1)
    for start in (0, 3):
        pool.add(torch.arange(start, start + 3.0)[:, None], torch.arange(start, start + 3))
    assert len(pool) == 5 and pool[0][0] == 2 and pool[4][1] == 5


def test_both_phases_teach_a_student_without_data(teacher):
    torch.manual_seed(1)
    student, synthesizer = made(teacher, steps=25, batch_size=48, lr=0.02)
    terms = {"rgal": Term(RGAL(2), at={"logits": None, "layers": ["one", "two"]})}
    d = Distiller(student, teacher, terms)
    d.build(torch.rand(4, 1, 8, 8))
    optimizer = torch.optim.Adam(d.parameters(), lr=0.01)
    values = []
    for _ in range(8):
        synthesizer.step()
        for x, _ in torch.utils.data.DataLoader(synthesizer.pool, 48, shuffle=True):
            loss, _ = d(x, None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(float(loss.detach()))
    x, y = pictures(200)
    student.eval()
    assert (teacher(x).argmax(1) == y).float().mean() > 0.95
    assert (student(x).argmax(1) == y).float().mean() > 0.9  # chance: a third
    assert sum(values[-3:]) < sum(values[:3])


def test_bad_input_is_named(teacher):
    x = {"logits": torch.randn(4, 3), "layers": [torch.randn(4, 2)]}
    for call, message in (
        (lambda: RGAL(0), "layers must be >= 1"),
        (lambda: RGAL(2)(x, x), r'student\["layers"\] must have 2 layers, got 1'),
        (lambda: RGAL()(x["logits"], x), "student must be a dict of logits, layers"),
        (lambda: made(teacher, triplet_on="both"), "triplet_on must be one of"),
        (lambda: made(teacher, direction="invert"), "direction must be one of"),
        (lambda: made(teacher, layers=["three"]), "'three' names no module"),
        (lambda: made(teacher, layers=[]), "layers must name at least one module"),
        (lambda: made(teacher, adv=-1.0), "adv must be a finite number >= 0"),
        (lambda: ImageGenerator(image_size=30), "multiple of 4"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
