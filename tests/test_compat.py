"""kdfast.compat but for pml: each adapter against its formula written plainly, and against the original where it is installed."""

import ast
import importlib
import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdfast.compat
from kdfast.compat import geomloss, lightly, open_clip, repdistiller, sentence_transformers, swav


def needs(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


def rows(n=12, d=6, dtype=torch.float64):
    return torch.randn(n, d, dtype=dtype, requires_grad=True)


def agree(got, want, *inputs, **tolerance):
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(got, want, **tolerance)
    for x in inputs:
        torch.testing.assert_close(*(torch.autograd.grad(v, x, retain_graph=True)[0] for v in (got, want)), **tolerance)


def test_no_module_imports_its_library():
    for path in Path(kdfast.compat.__path__[0]).rglob("*.py"):
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
        named = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        named |= {node.module for node in imports if isinstance(node, ast.ImportFrom) and not node.level}
        assert {name.partition(".")[0] for name in named} <= {"torch", *sys.stdlib_module_names}, path


# -- RepDistiller ----------------------------------------------------------------------------------------------------------------


def test_distill_kl():
    s, t = rows(5, 7), rows(5, 7)
    p = (t.detach() / 3).softmax(1)
    agree(repdistiller.DistillKL(3)(s, t), 9 * (p * (p.log() - (s / 3).log_softmax(1))).sum() / 5, s)


def test_rkd_flattens_and_compares_relations():
    s, t = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True), rows(6, 5)

    def relations(x):
        d = torch.stack([torch.stack([(a - b).norm() if i != j else 0 * a.sum() for j, b in enumerate(x)]) for i, a in enumerate(x)])
        e = torch.stack([torch.stack([F.normalize(b - a, dim=0) if i != j else 0 * a for j, b in enumerate(x)]) for i, a in enumerate(x)])
        return d / d[d > 0].mean(), torch.einsum("ijd,ikd->ijk", e, e)

    (d_s, a_s), (d_t, a_t) = relations(s.flatten(1)), relations(t.detach())
    want = 25 * F.smooth_l1_loss(d_s, d_t) + 50 * F.smooth_l1_loss(a_s, a_t)
    loss = repdistiller.RKDLoss()
    agree(loss(s, t), want, s)
    assert (loss.w_d, loss.w_a) == (25, 50)


OPT = SimpleNamespace(s_dim=6, t_dim=8, feat_dim=5, n_data=30, nce_k=7, nce_t=0.2, nce_m=0.5)


class PlainCRD:
    """The published loss, with the rows gathered and the exponentials formed."""

    def __init__(self, loss):
        state = {name: value.detach().clone() for name, value in loss.state_dict().items()}
        self.maps = {side: (state[f"embed_{side}.linear.weight"], state[f"embed_{side}.linear.bias"]) for side in "st"}
        self.banks = {"s": state["contrast.memory_v1"], "t": state["contrast.memory_v2"]}
        self.z = {}

    def __call__(self, f_s, f_t, idx, contrast_idx):
        v = {side: F.normalize(F.linear(f.flatten(1), *self.maps[side]), dim=1) for side, f in (("s", f_s), ("t", f_t))}
        noise, loss = OPT.nce_k / OPT.n_data, 0
        for side, other in (("s", "t"), ("t", "s")):
            x = (self.banks[other][contrast_idx] @ v[side][:, :, None]).squeeze(-1).div(OPT.nce_t).exp()
            self.z.setdefault(side, (x.mean() * OPT.n_data).detach())
            x = x / self.z[side]
            loss = loss - (x[:, 0] / (x[:, 0] + noise + 1e-7)).log().mean() - (noise / (x[:, 1:] + noise + 1e-7)).log().sum(1).mean()
        for side in "st":
            moved = OPT.nce_m * self.banks[side][idx] + (1 - OPT.nce_m) * v[side].detach()
            self.banks[side][idx] = F.normalize(moved, dim=1)
        return loss


def crd_steps(count):
    for _ in range(count):
        idx = torch.randperm(30)[:4]
        contrast = torch.cat([idx[:, None], torch.randint(0, 30, (4, OPT.nce_k))], 1)
        yield rows(4, 6, torch.float32), torch.randn(4, 2, 2, 2), idx, contrast


def test_crd_is_the_published_loss_over_several_steps():
    loss = repdistiller.CRDLoss(OPT)
    plain = PlainCRD(loss)
    for f_s, f_t, idx, contrast in crd_steps(3):
        agree(loss(f_s, f_t, idx, contrast), plain(f_s, f_t, idx, contrast), f_s, rtol=1e-4, atol=1e-5)
    state = loss.state_dict()
    torch.testing.assert_close(state["contrast.memory_v1"], plain.banks["s"])
    torch.testing.assert_close(state["contrast.params"], torch.tensor([7, 0.2, plain.z["s"], plain.z["t"], 0.5]))


def test_crd_state_has_the_originals_names_and_resumes():
    holder = nn.ModuleList([repdistiller.CRDLoss(OPT)])  # under a prefix, as in the training script
    shapes = {name: tuple(value.shape) for name, value in holder.state_dict().items()}
    assert shapes == {
        "0.embed_s.linear.weight": (5, 6),
        "0.embed_s.linear.bias": (5,),
        "0.embed_t.linear.weight": (5, 8),
        "0.embed_t.linear.bias": (5,),
        "0.contrast.params": (5,),
        "0.contrast.memory_v1": (30, 5),
        "0.contrast.memory_v2": (30, 5),
    }
    assert holder.state_dict()["0.contrast.params"].tolist() == pytest.approx([7, 0.2, -1, -1, 0.5])
    again = nn.ModuleList([repdistiller.CRDLoss(OPT)])
    steps = list(crd_steps(4))
    for i, step in enumerate(steps):
        if i in (0, 2):  # before the first step, and in the middle
            again.load_state_dict(holder.state_dict())
        assert torch.equal(holder[0](*step), again[0](*step))
    assert {id(p) for p in (*again[0].embed_s.parameters(), *again[0].embed_t.parameters())} == {id(p) for p in again.parameters()}
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict({name: value for name, value in holder.state_dict().items() if "memory_v1" not in name})


def test_crd_draws_for_itself_and_leaves_its_state_in_eval():
    loss = repdistiller.CRDLoss(OPT)
    f_s, f_t, idx, contrast = next(crd_steps(1))
    value = loss(f_s, f_t, idx)
    value.backward()
    assert value.isfinite() and loss.embed_s.linear.weight.grad.abs().sum() > 0
    before = loss.contrast.memory_v1.clone()
    loss.eval()(f_s, f_t, idx)
    assert torch.equal(before, loss.contrast.memory_v1)
    torch.testing.assert_close(loss.embed_t(f_t).norm(dim=1), torch.ones(4))
    assert [name for name, _ in loss.named_parameters()] == [f"embed_{side}.linear.{part}" for side in "st" for part in ("weight", "bias")]
    with pytest.raises(ValueError, match="contrast_idx must have shape"):
        loss(f_s, f_t, idx, contrast[:, :-1])


# -- SwAV ------------------------------------------------------------------------------------------------------------------------


def plain_codes(scores, epsilon=0.05, iterations=3):
    q = (scores.double() / epsilon - (scores.double() / epsilon).max()).exp().T  # [K, N]
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def test_swav_codes():
    scores = F.normalize(torch.randn(20, 8), dim=1) @ F.normalize(torch.randn(8, 6), dim=0)
    torch.testing.assert_close(swav.distributed_sinkhorn(scores).double(), plain_codes(scores), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(swav.distributed_sinkhorn(scores, 0.1, 5).double(), plain_codes(scores, 0.1, 5), rtol=1e-4, atol=1e-6)
    half = swav.distributed_sinkhorn(scores.half())
    assert half.dtype == torch.float16 and half.isfinite().all()  # exp(1 / 0.05) is beyond float16
    assert swav.distributed_sinkhorn(100 * scores).isfinite().all()


# -- lightly ---------------------------------------------------------------------------------------------------------------------


def test_lightly_in_batch():
    x, y = rows(), rows()
    z = F.normalize(torch.cat([x, y]), dim=1)
    scores = (z @ z.T / 0.5).masked_fill(torch.eye(24, dtype=torch.bool), -math.inf)
    agree(lightly.NTXentLoss()(x, y), F.cross_entropy(scores, torch.arange(24).roll(12)), x, y)


def test_lightly_with_a_bank_wraps_round():
    loss = lightly.NTXentLoss(0.1, memory_bank_size=(16, 6))
    bank, pointer = loss.memory_bank.storage.clone(), 0
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(16))
    for _ in range(3):
        x, y = rows(6, dtype=torch.float32), rows(6, dtype=torch.float32)
        q, k = F.normalize(x, dim=1), F.normalize(y, dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ bank.T], 1) / 0.1
        agree(loss(x, y), F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64)), x, y, rtol=1e-4, atol=1e-5)
        bank[(pointer + torch.arange(6)) % 16] = k.detach()
        pointer = (pointer + 6) % 16
        torch.testing.assert_close(loss.memory_bank.storage, bank)
    loss(x.detach(), y)
    torch.testing.assert_close(loss.memory_bank.storage, bank)  # pushed for training alone


@needs("lightly")
@pytest.mark.parametrize("size", [0, (12, 6)])
def test_lightly_is_the_librarys(size):
    from lightly.loss import NTXentLoss

    ours, theirs = lightly.NTXentLoss(0.2, size), NTXentLoss(0.2, size)
    if size:
        theirs.memory_bank.bank.copy_(ours.memory_bank.storage)
    for _ in range(4):  # batches that divide the bank: there it loses nothing
        x, y = rows(4, dtype=torch.float32), rows(4, dtype=torch.float32)
        agree(ours(x, y), theirs(x, y), x, y, rtol=1e-4, atol=1e-5)


# -- open_clip -------------------------------------------------------------------------------------------------------------------


def test_open_clip():
    x, y, scale, bias = rows(), rows(), torch.tensor(7.0, dtype=torch.float64, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    scores = scale * x @ y.T
    want = (F.cross_entropy(scores, torch.arange(12)) + F.cross_entropy(scores.T, torch.arange(12))) / 2
    agree(open_clip.ClipLoss()(x, y, scale), want, x, y, scale)
    biased = open_clip.ClipLoss()(x, y, scale, logit_bias=bias, output_dict=True)["contrastive_loss"]
    agree(biased, want, x, y, scale)
    assert torch.autograd.grad(biased, bias)[0].item() == 0


@needs("open_clip")
def test_open_clip_is_the_librarys():
    library = importlib.import_module("open_clip.loss")
    x, y, scale = rows(), rows(), torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    agree(open_clip.ClipLoss()(x, y, scale), library.ClipLoss()(x, y, scale), x, y, scale)


# -- geomloss --------------------------------------------------------------------------------------------------------------------


def plain_transport(x, y, p, epsilon, rho=None, a=None, b=None, iterations=600):
    """The dual value at convergence, iterations in the log domain, differentiable as an envelope."""
    a = torch.full((len(x),), 1 / len(x), dtype=x.dtype) if a is None else a
    b = torch.full((len(y),), 1 / len(y), dtype=x.dtype) if b is None else b
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** p / p
    f, g, damp = torch.zeros_like(a), torch.zeros_like(b), 1 if rho is None else rho / (rho + epsilon)
    with torch.no_grad():
        for _ in range(iterations):
            f = -damp * epsilon * ((g - cost) / epsilon + b.log()).logsumexp(1)
            g = -damp * epsilon * ((f[:, None] - cost) / epsilon + a.log()[:, None]).logsumexp(0)
    plan = a[:, None] * b * ((f[:, None] + g - cost) / epsilon).exp()
    mass = epsilon * (plan.sum() - a.sum() * b.sum())
    if rho is None:
        return f @ a + g @ b - mass
    return rho * (a @ (1 - (-f / rho).exp()) + b @ (1 - (-g / rho).exp())) - mass


def plain_samples_loss(x, y, p, blur, reach=None, debias=True, a=None, b=None):
    epsilon, rho = blur**p, None if reach is None else reach**p
    value = plain_transport(x, y, p, epsilon, rho, a, b)
    if not debias:
        return value
    value = value - (plain_transport(x, x, p, epsilon, rho, a, a) + plain_transport(y, y, p, epsilon, rho, b, b)) / 2
    if rho is not None:
        mass = [1.0 if w is None else w.sum() for w in (a, b)]
        value = value + epsilon / 2 * (mass[0] - mass[1]) ** 2
    return value


SAMPLES = [
    pytest.param(dict(p=2, blur=0.5), id="divergence"),
    pytest.param(dict(p=1, blur=0.5), id="divergence, p = 1"),
    pytest.param(dict(p=2, blur=0.5, debias=False), id="biased"),
    pytest.param(dict(p=1, blur=0.3, debias=False), id="biased, p = 1"),
    pytest.param(dict(p=2, blur=0.5, reach=0.8), id="unbalanced"),
    pytest.param(dict(p=2, blur=0.5, reach=0.8, debias=False), id="unbalanced, biased"),
]


@pytest.mark.parametrize("options", SAMPLES)
def test_samples_loss_converges_to_its_definition(options):
    x, y = ((points.detach() / 2).requires_grad_() for points in (rows(9, 3), rows(7, 3) + 0.5))
    agree(geomloss.SamplesLoss(**options, scaling=0.7)(x, y), plain_samples_loss(x, y, **options), x, y, rtol=2e-4, atol=2e-5)
    a, b = torch.rand(9, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    a, b = a / a.sum(), b / b.sum()
    want = plain_samples_loss(x, y, **options, a=a, b=b)
    agree(geomloss.SamplesLoss(**options, scaling=0.7)(a, x, b[:, None], y), want, x, y, rtol=2e-4, atol=2e-5)


def test_samples_loss_of_a_batch_and_of_a_given_cost():
    x, y = torch.randn(3, 8, 2), torch.randn(3, 9, 2)
    loss = geomloss.SamplesLoss(blur=0.3, diameter=5.0)
    torch.testing.assert_close(loss(x, y), torch.stack([loss(*pair) for pair in zip(x, y, strict=True)]))
    cost = geomloss.SamplesLoss(blur=0.3, diameter=5.0, cost=lambda u, v: torch.cdist(u, v).square() / 2)
    torch.testing.assert_close(cost(x, y), loss(x, y), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(cost(x[0], y[0]), loss(x[0], y[0]), rtol=1e-3, atol=1e-4)
    assert loss(x[0], x[0]).abs() < 1e-5
    assert geomloss.SamplesLoss(blur=10.0)(x[0], y[0]).isfinite()  # wider than the points: nothing to anneal


@needs("geomloss")
@pytest.mark.parametrize("options", SAMPLES)
def test_samples_loss_is_nearer_to_convergence_than_the_librarys(options):
    from geomloss import SamplesLoss

    x, y = ((points.detach() / 2).requires_grad_() for points in (rows(30, 4), rows(25, 4)))
    truth, ours, theirs = plain_samples_loss(x, y, **options), geomloss.SamplesLoss(**options)(x, y), SamplesLoss(**options)(x, y)
    torch.testing.assert_close(ours, SamplesLoss(**options, scaling=0.99)(x, y), rtol=1e-2, atol=1e-4)
    assert (ours - truth).abs() <= (theirs - truth).abs() + 1e-9
    exact, ours, theirs = (torch.autograd.grad(value, x, retain_graph=True)[0] for value in (truth, ours, theirs))
    assert (ours - exact).norm() <= (theirs - exact).norm() + 1e-9
    assert (ours - exact).norm() <= 1e-2 * exact.norm()


# -- sentence-transformers -------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def forward(self, features):
        return {"sentence_embedding": features["x"]}

    def get_sentence_embedding_dimension(self):
        return 6


def triplet_losses(x, labels, metric, margin):
    """(hardest an anchor, semi-hard a positive pair, all) hinge arguments d_ap - d_an + margin, over valid anchors."""
    unit = F.normalize(x, dim=1)
    d = 1 - unit @ unit.T if metric == "cosine" else torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    hard, semi, everything = [], [], []
    for i in range(len(x)):
        positive = [d[i, j] for j in range(len(x)) if j != i and labels[j] == labels[i]]
        negative = [d[i, j] for j in range(len(x)) if labels[j] != labels[i]]
        if positive and negative:
            hard.append(max(positive) - min(negative) + margin)
            for d_ap in positive:
                semi.append(d_ap - min([v for v in negative if v > d_ap], default=max(negative)) + margin)
                everything += [d_ap - d_an + margin for d_an in negative]
    return (torch.stack(values) for values in (hard, semi, everything))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_batch_triplet_losses(metric):
    x, labels, model = rows(14), torch.tensor([0] * 4 + [1] * 5 + [2] * 4 + [3]), Encoder()
    margin = 0.5
    hard, semi, everything = triplet_losses(x, labels, metric, margin)
    features = [{"x": x}]
    agree(sentence_transformers.BatchHardTripletLoss(model, metric, margin)(features, labels), hard.relu().mean(), x)
    agree(sentence_transformers.BatchSemiHardTripletLoss(model, metric, margin)(features, labels), semi.relu().mean(), x)
    positive = everything[everything > 0]
    agree(sentence_transformers.BatchAllTripletLoss(model, metric, margin)(features, labels), positive.mean(), x)
    soft = sentence_transformers.BatchHardSoftMarginTripletLoss(model, metric)(features, labels)
    agree(soft, F.softplus(hard - margin).mean(), x)


@needs("sentence_transformers")
@pytest.mark.parametrize("metric", ["euclidean_distance", "cosine_distance"])
def test_batch_triplet_losses_are_the_librarys(metric):
    library = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    x, labels, model = rows(16, dtype=torch.float32), torch.arange(16) % 4, Encoder()
    distance = getattr(library.BatchHardTripletLossDistanceFunction, metric)
    for name in ("BatchHardTripletLoss", "BatchHardSoftMarginTripletLoss", "BatchSemiHardTripletLoss", "BatchAllTripletLoss"):
        ours, theirs = (getattr(source, name)(model, distance) for source in (sentence_transformers, library))
        agree(ours([{"x": x}], labels), theirs([{"x": x}], labels), x, rtol=1e-4, atol=1e-5)
        assert vars(ours).keys() >= {"training"} and ours.get_config_dict().items() >= theirs.get_config_dict().items()


def test_bank_info_nce_pushes_first_and_leaves_out_the_own_pair():
    loss, kept = sentence_transformers.BankInfoNCELoss(Encoder(), bank_size=10), torch.empty(0, 6)
    for _ in range(4):
        x, y = rows(4, dtype=torch.float32), rows(4, dtype=torch.float32)
        q, k = F.normalize(x, dim=1), F.normalize(y, dim=1)
        kept = torch.cat([kept, k.detach()])[-10:]
        scores = 20 * q @ kept.T
        scores[torch.arange(4), len(kept) - 4 + torch.arange(4)] = 20 * (q * k).sum(1)
        want = F.cross_entropy(scores, len(kept) - 4 + torch.arange(4))
        agree(loss([{"x": x}, {"x": y}]), want, x, y, rtol=1e-4, atol=1e-5)
    fill = loss.bank.pointer.clone()
    loss.eval()([{"x": x}, {"x": y}])
    assert torch.equal(fill, loss.bank.pointer)


# -- arguments -------------------------------------------------------------------------------------------------------------------


def test_what_is_not_served_is_named():
    x, labels, model = rows(), torch.arange(12) % 3, Encoder()
    for wrong, kind, message in (
        (lambda: lightly.NTXentLoss(temperature=0.0), ValueError, "temperature must be"),
        (lambda: lightly.NTXentLoss(memory_bank_size=4096), ValueError, "memory_bank_size must be"),
        (lambda: lightly.NTXentLoss(memory_bank_size=(4, 5, 6)), ValueError, "memory_bank_size must be"),
        (lambda: open_clip.ClipLoss(use_horovod=True), ValueError, "use_horovod is not supported"),
        (lambda: open_clip.ClipLoss(world_size=2)(x, x, 1.0), ValueError, "world_size must be"),
        (lambda: geomloss.SamplesLoss("gaussian"), ValueError, "loss must be one of"),
        (lambda: geomloss.SamplesLoss(p=3), ValueError, "p must be one of"),
        (lambda: geomloss.SamplesLoss(blur=0), ValueError, "blur must be"),
        (lambda: geomloss.SamplesLoss(reach=-1), ValueError, "reach must be"),
        (lambda: geomloss.SamplesLoss(scaling=1), ValueError, "scaling must be in"),
        (lambda: geomloss.SamplesLoss(backend="gpu"), ValueError, "backend must be one of"),
        (lambda: geomloss.SamplesLoss(potentials=True), ValueError, "potentials is not supported"),
        (lambda: geomloss.SamplesLoss(kernel=max), ValueError, "kernel is not supported"),
        (lambda: geomloss.SamplesLoss(cost="SqDist(X,Y)"), ValueError, "cost must be None or a callable"),
        (lambda: geomloss.SamplesLoss()(x), ValueError, "got 1 arguments"),
        (lambda: geomloss.SamplesLoss()(x[None, None], x), ValueError, r"x must be \[N, D\]"),
        (lambda: sentence_transformers.BatchHardTripletLoss(model, torch.cdist), ValueError, "distance_metric must be"),
        (lambda: sentence_transformers.BatchAllTripletLoss(model)([{"x": x}], labels[:5]), ValueError, "labels must have shape"),
        (lambda: sentence_transformers.BankInfoNCELoss(model, 8)([{"x": x}]), ValueError, r"must be \(anchor, positive\)"),
        (lambda: sentence_transformers.BankInfoNCELoss(model, scale=0), ValueError, "scale must be"),
        (lambda: repdistiller.DistillKL(0), ValueError, "T must be"),
        (lambda: swav.distributed_sinkhorn(x, epsilon=0), ValueError, "epsilon must be"),
        (lambda: swav.distributed_sinkhorn(x, sinkhorn_iterations=1.5), TypeError, "sinkhorn_iterations must be"),
        (lambda: lightly.NTXentLoss(memory_bank_size=(4.5, 6)), TypeError, "memory_bank_size must be"),
        (lambda: lightly.NTXentLoss()(x, x[:5]), ValueError, "out1 must have shape"),
        (lambda: open_clip.ClipLoss()(x, x[:5], 1.0), ValueError, "text_features must have shape"),
        (lambda: geomloss.SamplesLoss(blur=1e-200), ValueError, "blur"),
        (lambda: geomloss.SamplesLoss(scaling="0.5"), TypeError, "scaling must be"),
        (lambda: geomloss.SamplesLoss()(x, x[:, :2]), ValueError, "y must have the width of x"),
        (lambda: geomloss.SamplesLoss()(x, x[:0]), ValueError, "x and y must have at least one point"),
        (lambda: geomloss.SamplesLoss()(x, x * torch.inf), ValueError, "x and y must be finite"),
        (lambda: geomloss.SamplesLoss()(torch.ones(5), x, torch.ones(12), x), ValueError, "a must have a weight a point"),
        (lambda: repdistiller.DistillKL(4)(x, None), TypeError, "y_t must be"),
        (lambda: repdistiller.RKDLoss("1"), TypeError, "w_d must be"),
        (lambda: repdistiller.RKDLoss()(x, x[:5]), ValueError, "f_t must have the rows of f_s"),
    ):
        with pytest.raises(kind, match=message):
            wrong()
