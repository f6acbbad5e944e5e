"""Methods that compare logits or relations inside the batch, each against its formula written out: value and gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from distill_cases import D, rows, same_value_and_gradient

from kdfast import Projector
from kdfast.distill import (
    CKD,
    DIST,
    IAA,
    ICKD,
    MLKD,
    MSE,
    PESFKD,
    REFILLED,
    RKD,
    SRD,
    TWIST,
    Cosine,
    FacultyOT,
    HybridDistill,
    MultiHeadKD,
    SpectralTail,
)


def kl(s, t, T=1.0):
    p = (t / T).softmax(-1)
    return T**2 * (p * (p.log() - (s / T).log_softmax(-1))).sum(-1).mean()


def smooth_l1(a, b):
    d = (a - b).abs()
    return torch.where(d < 1, d**2 / 2, d - 0.5)


def distances(x):
    return torch.stack([torch.stack([(a - b).norm() for b in x]) for a in x])


def rkd_distances(s, t):
    s, t = (distances(x) for x in (s, t))
    return smooth_l1(s / s[s > 0].mean(), t / t[t > 0].mean()).mean()


def angles(x):
    e = F.normalize(x[None] - x[:, None], dim=2)
    return torch.einsum("ijd,ikd->ijk", e, e)


def test_rkd_distances_and_angles():
    s, t = rows(6, 4, grad=True), rows(6, 3)
    expected = 2 * rkd_distances(s, t) + 3 * smooth_l1(angles(s), angles(t)).mean()
    same_value_and_gradient(RKD(2, 3)(s, t), expected, s)
    assert set(RKD(0, 3)(s, t).dim() == 0 and RKD(2, 0).extra_repr().split(", ")) == {"distance_weight=2", "angle_weight=0"}
    maps = rows(6, 4, 2, 2)
    torch.testing.assert_close(RKD()(maps, [t, t]), RKD()(maps.mean((2, 3)), t))


@pytest.mark.parametrize("p", [2.0, 1.0])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9)], ids=["tall", "wide"])
def test_spectral_tail_is_the_share_of_small_singular_values(shape, p):
    s = rows(*shape, grad=True)
    values = torch.linalg.svd(s - s.mean(0))[1]
    powers = values**p
    same_value_and_gradient(SpectralTail(2, p)(s, None), powers[2:].sum() / powers.sum(), s, rtol=1e-4 if p < 2 else 1e-8)


def test_spectral_tail_of_low_rank_and_of_nothing_is_zero():
    assert SpectralTail(2)(rows(8, 2) @ rows(2, 6)) < 1e-12 and SpectralTail(9)(rows(8, 5)) == 0
    constant = torch.ones(5, 3, dtype=D, requires_grad=True)
    SpectralTail(1)(constant).backward()
    assert torch.equal(constant.grad, torch.zeros_like(constant))
    uncentred = SpectralTail(1, center=False)
    tokens = rows(2, 3, 4)
    torch.testing.assert_close(uncentred(tokens), uncentred(tokens.flatten(0, 1)))


def icc(x):
    x = x.flatten(2)
    return F.normalize(torch.einsum("ncp,ndp->ncd", x, x), dim=2)


def test_ickd_compares_channel_grams_after_convolution_and_batchnorm():
    s, t = rows(3, 5, 4, 4, grad=True), rows(3, 6, 2, 2)
    loss = ICKD().double().build(s, t)
    norm, conv = loss.norms[0], loss.projectors[0].maps[0]
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    mapped = F.conv2d(F.avg_pool2d(s, 2), conv.weight[:, :, None, None])
    mean, var = mapped.mean((0, 2, 3), keepdim=True), mapped.var((0, 2, 3), keepdim=True, correction=0)
    mapped = (mapped - mean) / (var + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    expected = 2.5 * (icc(mapped) - icc(t)).square().sum() / (6 * 3)
    same_value_and_gradient(loss(s, t), expected, s, conv.weight, norm.weight, norm.bias)


def pearson(x, y):
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1) + 1e-8)


def test_dist_is_row_and_column_correlation():
    s, t = rows(7, 5, grad=True), rows(7, 5)
    y_s, y_t = (s / 4).softmax(1), (t / 4).softmax(1)
    expected = 16 * (2 * (1 - pearson(y_s, y_t).mean()) + 3 * (1 - pearson(y_s.T, y_t.T).mean()))
    same_value_and_gradient(DIST(2, 3, 4)(s, t), expected, s)
    maps_s, maps_t = rows(2, 5, 3, 3), rows(2, 5, 3, 3)
    flat = [torch.cat([m[:, :, i, j] for i in range(3) for j in range(3)]) for m in (maps_s, maps_t)]
    torch.testing.assert_close(DIST()(maps_s, maps_t), DIST()(*flat))


def standardized(x):
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-4).sqrt()


def test_srd_is_a_log_of_fourth_powers_and_the_divergence():
    s, t = {"logits": rows(7, 3, grad=True), "feat": rows(7, 4, 2, 2, grad=True)}, {"logits": rows(7, 3), "feat": rows(7, 6)}
    loss = SRD().double().build(s, t)
    affine = loss.projectors[0].maps[0]
    f_s = standardized(s["feat"].mean((2, 3)) @ affine.weight.T + affine.bias)
    expected = 2 * ((f_s - standardized(t["feat"])) ** 4).sum().log() + kl(s["logits"], t["logits"])
    same_value_and_gradient(loss(s, t), expected, s["logits"], s["feat"], affine.weight)
    two = loss(s, [t, t])
    torch.testing.assert_close(two, expected)
    views = loss({"a": s, "b": s}, {"a": t, "b": t})
    torch.testing.assert_close(views, expected)
    torch.testing.assert_close(loss({"a": s, "b": s}, t), expected)


def sup_con(query, keys, labels, tau):
    z = F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T / tau
    return torch.stack([-row.log_softmax(0)[labels == y].mean() for row, y in zip(z, labels, strict=True)]).mean()


def test_mlkd_adds_logits_relations_and_classes():
    y = torch.tensor([0, 1, 2, 0, 1, 0])
    s, t = {"logits": rows(6, 3, grad=True), "feat": rows(6, 4, grad=True)}, {"logits": rows(6, 3), "feat": rows(6, 5)}
    loss = MLKD(T=2, relation_weight=0.5, contrast_weight=0.7, temperature=0.3).double().build(s, t)
    affine = loss.projectors[0].maps[0]
    f_s = s["feat"] @ affine.weight.T + affine.bias
    expected = kl(s["logits"], t["logits"], 2) + 0.5 * rkd_distances(f_s, t["feat"]) + 0.7 * sup_con(f_s, t["feat"], y, 0.3)
    same_value_and_gradient(loss(s, t, labels=y), expected, s["logits"], s["feat"], affine.weight)


def test_multi_head_sums_over_heads():
    s, t = [rows(5, 4, grad=True), rows(5, 6, 2, 2, grad=True)], rows(5, 3)
    loss = MultiHeadKD(T=3, num_heads=2, num_classes=3).double().build(s, t)
    logits = [x @ head.weight.T + head.bias for x, head in zip((s[0], s[1].mean((2, 3))), loss.heads, strict=True)]
    same_value_and_gradient(loss(s, t), kl(logits[0], t, 3) + kl(logits[1], t, 3), *s)
    other = rows(5, 3)
    plain = MultiHeadKD(T=3)
    torch.testing.assert_close(plain([t, other], [other, t]), kl(t, other, 3) + kl(other, t, 3))


def test_pesf_trains_an_adapter_of_the_teacher():
    s, t, y = rows(5, 3, grad=True), rows(5, 3), torch.tensor([0, 2, 1, 0, 0])
    loss = PESFKD(T=2, hidden=4, ce_weight=0.5).double().build(s, t)
    down, up = loss.down, loss.up
    adapted = t + (t @ down.weight.T + down.bias).relu() @ up.weight.T + up.bias
    expected = kl(s, adapted, 2) - 0.5 * adapted.log_softmax(1)[torch.arange(5), y].mean()
    same_value_and_gradient(loss(s, t, labels=y), expected, s, down.weight, up.weight)


def test_hybrid_takes_tokens_of_one_teacher_and_values_of_the_other():
    s = {"tokens": rows(2, 5, 3, grad=True), "values": rows(2, 4, 7, 1, grad=True)}
    t = [{"tokens": rows(2, 5, 6)}, {"values": rows(2, 7, 2)}]

    def cosines(x):
        return torch.stack([F.cosine_similarity(sample[:, None], sample[None], dim=2) for sample in x])

    tokens = (cosines(s["tokens"]) - cosines(t[0]["tokens"])).square().mean()
    values = (cosines(s["values"].flatten(2).mT) - cosines(t[1]["values"])).square().mean()
    same_value_and_gradient(HybridDistill(2, 3)(s, t), 2 * tokens + 3 * values, s["tokens"], s["values"])


def test_twist_of_two_views():
    a, b = rows(6, 4, grad=True), rows(6, 4, grad=True)
    p, q = a.softmax(1), b.softmax(1)

    def entropy(x):
        return -(x * x.log()).sum(-1)

    expected = (kl(q.log(), p.log()) + kl(p.log(), q.log())) / 2 + 1.5 * (entropy(p).mean() + entropy(q).mean()) / 2
    expected = expected - 2 * (entropy(p.mean(0)) + entropy(q.mean(0))) / 2
    same_value_and_gradient(TWIST(0.5, 2)({"a": a, "b": b}), expected, a, b)
    hopeless = torch.tensor([[200.0, 0.0], [200.0, 0.0]], requires_grad=True)
    TWIST()({0: hopeless, 1: -hopeless}).backward()
    assert hopeless.grad.isfinite().all()


def test_ckd_finds_the_students_row_of_each_teacher_row():
    s, t = rows(6, 4, grad=True), rows(6, 4)
    z = F.normalize(t, dim=1) @ F.normalize(s, dim=1).T / 0.5
    same_value_and_gradient(CKD(0.5)(s, t), -z.log_softmax(1).diagonal().mean(), s)


@pytest.mark.parametrize("make", [MSE, Cosine, ICKD], ids=lambda make: make.__name__)
@pytest.mark.parametrize("invert", [False, True])
def test_an_inverted_projector_serves_any_feature_loss(make, invert):
    s, t = rows(4, 3, 2, 2, grad=True), rows(4, 5, 2, 2)
    loss = make(projector=Projector(invert=invert)).double().build(s, t)
    loss(s, t).backward()
    affine = loss.projectors[0].maps[0]
    assert tuple(affine.weight.shape) == ((3, 5) if invert else (5, 3))
    assert affine.weight.grad.abs().sum() > 0 and s.grad.abs().sum() > 0 and math.isfinite(float(loss.last[make.__name__.lower()]))


def test_an_inverted_projector_in_methods_of_logits_and_features():
    y = torch.tensor([0, 1, 1, 0])
    s, t = {"logits": rows(4, 2), "feat": rows(4, 3, grad=True)}, {"logits": rows(4, 2), "feat": rows(4, 5)}
    for make in (SRD, MLKD):
        loss = make(projector=Projector(invert=True)).double().build(s, t)
        loss(s, t, labels=y).backward()
        assert tuple(loss.projectors[0].maps[0].weight.shape) == (3, 5)


EXTREMES = {
    "saturated": torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, 1e4, 3.0]]),
    "constant": torch.ones(3, 3),
}
PLAIN = {
    "DIST": DIST,
    "CKD": CKD,
    "PESFKD": PESFKD,
    "MultiHeadKD": MultiHeadKD,
    "FacultyOT": FacultyOT,
    "REFILLED": REFILLED,
    "REFILLED, stage 2": lambda: REFILLED(2),
    "RKD": RKD,
    "SpectralTail": lambda: SpectralTail(1),
    "IAA": lambda: IAA(3, 3),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=list(PLAIN))
@pytest.mark.parametrize("student", EXTREMES)
@pytest.mark.parametrize("teacher", EXTREMES)
def test_extreme_values_give_finite_losses_and_gradients(make, student, teacher):
    s = EXTREMES[student].clone().requires_grad_()
    value = make()(s, -EXTREMES[teacher], labels=torch.arange(3))
    value.backward()
    assert value.isfinite() and s.grad.isfinite().all()


def test_zero_features_give_finite_gradients():
    maps, tokens = torch.zeros(2, 3, 2, 2, requires_grad=True), torch.zeros(2, 4, 3, requires_grad=True)
    ICKD()(maps, torch.ones(2, 3, 2, 2)).backward()
    values = {"tokens": tokens, "values": tokens}
    HybridDistill()(values, {name: x.detach() + 1 for name, x in values.items()}).backward()
    assert maps.grad.isfinite().all() and tokens.grad.isfinite().all()


def test_bad_input_is_named():
    x, maps = torch.randn(4, 3), torch.randn(4, 3, 2, 2)
    both, y = {"logits": x, "feat": x}, torch.zeros(4, dtype=torch.long)
    for call, message in (
        (lambda: RKD(-1), "distance_weight must be a finite number >= 0"),
        (lambda: RKD(0, 0), "must not both be 0"),
        (lambda: RKD()(x, x[:3]), "teacher must have the rows of student"),
        (lambda: SpectralTail(0), "rank must be >= 1"),
        (lambda: SpectralTail(1, p=0), "p must be a finite number > 0"),
        (lambda: SpectralTail(1)(x[0]), r"student must be \[N, C\]"),
        (lambda: ICKD()(x, maps), r"student must be \[N, C, H, W\]"),
        (lambda: DIST(temperature=0), "temperature must be"),
        (lambda: DIST()(x, x[:, :2]), "one shape"),
        (lambda: SRD()(x, x), "student must be a dict of logits, feat"),
        (lambda: SRD()(both, x), "teacher must be a dict of logits, feat"),
        (lambda: MLKD()(both, both), "labels must be given for MLKD"),
        (lambda: PESFKD()(x, x), "labels must be given for PESFKD"),
        (lambda: MultiHeadKD(num_heads=2), "given together"),
        (lambda: MultiHeadKD()([x, x], [x]), "each of student's 2 layers, got 1"),
        (lambda: MultiHeadKD(num_heads=2, num_classes=3)(x, x), "a list of 2 layers"),
        (lambda: HybridDistill()({"tokens": maps}, {"tokens": maps}), '"values"'),
        (lambda: HybridDistill()(both, [both] * 3), "a list of two, got 3"),
        (lambda: TWIST(-1), "sharpness must be"),
        (lambda: TWIST()(x), "student must be a dict of the views a, b"),
        (lambda: CKD(0), "temperature must be"),
        (lambda: CKD()(x, x[:, :2]), "one shape"),
        (lambda: PESFKD()(x, x[:, :2], labels=y), "one shape"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
