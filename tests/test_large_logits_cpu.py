"""Gradients where logits are in the thousands to billions: none may cost digits that the plain formula keeps, under any instruction set."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast._core import impls
from kdfast.functional import clip_loss, info_nce, nt_xent, siglip_loss, similarity_distillation, sup_con
from kdfast.ops import similarity_softmax

pytestmark = pytest.mark.skipif(impls.table()["info_nce"]["cpu"] is not None, reason="no compiled kernels")

N, WIDTH = 20, 16
LABELS = torch.arange(N) // 4


# ---- embeddings whose inner products, times the scale, are about `level` -----------------------------------------------------------------


def cold(count: int, level: float) -> tuple[Tensor, float]:
    """Unit rows at a tiny temperature."""
    return F.normalize(torch.randn(count, WIDTH, dtype=torch.float64), dim=-1).float(), level


def long(count: int, level: float) -> tuple[Tensor, float]:
    """Long rows: a softmax of one."""
    return torch.randn(count, WIDTH) * math.sqrt(level / WIDTH), 1.0


def uncentred(count: int, level: float) -> tuple[Tensor, float]:
    """Logits that are exact in floats, and share all digits but those of small integers."""
    rows = torch.randint(-1, 2, (count, WIDTH)).float()
    rows[:, 0] = 2.0 ** round(math.log2(level) / 2)
    return rows, 1.0


# ---- losses: how many rows each argument has, how many of them have a gradient, ours, the formula ----------------------------------------


def contrast(query, positive, bank, scale):
    z = torch.cat([(query * positive).sum(-1, keepdim=True), query @ bank.T], 1) * scale
    return F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long))


def match(x, y, scale):
    z, own = scale * x @ y.T, torch.arange(len(x))
    return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2


def among_themselves(x, scale):
    return (x @ x.T * scale).masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)


def views(x, y, scale):
    return F.cross_entropy(among_themselves(torch.cat([x, y]), scale), torch.arange(2 * N).roll(N))


def classes(x, scale):
    same = (LABELS[:, None] == LABELS) & ~torch.eye(N, dtype=torch.bool)
    return -(among_themselves(x, scale).log_softmax(1).masked_fill(~same, 0).sum(1) / same.sum(1)).mean()


def sigmoid(x, y, scale):
    return -F.logsigmoid((2 * torch.eye(N) - 1) * (scale * x @ y.T - 10)).sum() / N


def distillation(student, bank, teacher, teacher_bank, scale):
    return -((teacher @ teacher_bank.T * scale).softmax(1) * (student @ bank.T * scale).log_softmax(1)).sum(1).mean()


def our_contrast(query, positive, bank, scale):
    return info_nce(query, positive, bank, temperature=1 / scale, impl="cpu")


def our_distillation(student, bank, teacher, teacher_bank, scale):
    temperatures = dict(student_temperature=1 / scale, teacher_temperature=1 / scale)
    return similarity_distillation(student, teacher, bank, teacher_bank, impl="cpu", **temperatures)


LOSSES = {
    "info_nce, few pairs": ((N, N, 70), 3, our_contrast, contrast),
    "info_nce, many keys": ((N, N, 600), 3, our_contrast, contrast),
    "info_nce, frozen bank": ((N, N, 70), 2, our_contrast, contrast),
    "info_nce, bank in place": ((5, 5, 70), 3, our_contrast, contrast),
    "clip": ((N, N), 2, lambda x, y, scale: clip_loss(x, y, scale, impl="cpu"), match),
    "nt_xent": ((N, N), 2, lambda x, y, scale: nt_xent(x, y, temperature=1 / scale, normalize=False, impl="cpu"), views),
    "sup_con": ((N,), 1, lambda x, scale: sup_con(x, LABELS, temperature=1 / scale, normalize=False, impl="cpu"), classes),
    "siglip": ((N, N), 2, lambda x, y, scale: siglip_loss(x, y, scale, -10.0, impl="cpu"), sigmoid),
    "distillation": ((N, 70, N, 70), 2, our_distillation, distillation),
    "lse": (
        (N, 70),
        2,
        lambda query, keys, scale: similarity_softmax(query, keys, scale=scale, impl="cpu")[0].mean(),
        lambda query, keys, scale: (query @ keys.T * scale).logsumexp(1).mean(),
    ),
}


# but for distillation of uncentred keys: there it is the difference of two pooled keys that has lost the digits they share
CASES = [(name, rows) for name in LOSSES for rows in (cold, long, uncentred) if (name, rows) != ("distillation", uncentred)]


@pytest.mark.parametrize("level", [1e3, 6e4, 6e6, 1e9, 1e11], ids="{:.0e}".format)
@pytest.mark.parametrize(("name", "embeddings"), CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_as_accurate_as_the_formula(isa, name, embeddings, level):
    counts, learnt, ours, formula = LOSSES[name]
    made = [embeddings(count, level) for count in counts]
    rows, scale = [x for x, _ in made], made[0][1]

    def gradients(loss, dtype):
        leaves = [x.to(dtype).requires_grad_(i < learnt) for i, x in enumerate(rows)]
        return torch.autograd.grad(loss(*leaves, scale), leaves[:learnt])

    got, naive, truth = (gradients(f, dtype) for f, dtype in ((ours, torch.float32), (formula, torch.float32), (formula, torch.float64)))
    for g, n, t in zip(got, naive, truth, strict=True):
        assert (g - t).norm() <= 2 * (n - t).norm() + 4 * torch.finfo(torch.float32).eps * t.norm()


# few pairs, whose scores are kept; one more than 12 whole tiles; 257: several blocks of columns
@pytest.mark.parametrize("rows", [90, 193, 257])
@pytest.mark.parametrize("loss", ["sup_con", "nt_xent"])
def test_both_sides_of_a_batch_see_the_same_scores(isa, loss, rows):
    """A gradient weighs (i, j) by the log-sum-exps of rows i and j: that of j must be one of scores with the same bits."""

    def ours(x):
        if loss == "sup_con":
            return sup_con(x, labels, temperature=0.01, normalize=False, impl="cpu")
        return nt_xent(*x.unflatten(0, (2, rows)), temperature=0.01, normalize=False, impl="cpu")

    def formula(x):
        same = (labels[:, None] == labels) & ~torch.eye(len(x), dtype=torch.bool)
        log_p = among_themselves(x, 100.0).log_softmax(1).masked_fill(~same, 0)
        return -(log_p.sum(1) / same.sum(1)).mean()

    labels = torch.arange(rows if loss == "sup_con" else 2 * rows) % (rows // 4 if loss == "sup_con" else rows)
    made = torch.randn(len(labels), 96, dtype=torch.float64).float()

    def gradient(f, dtype):
        x = made.to(dtype).requires_grad_()
        return torch.autograd.grad(f(x), x)[0].double()

    got, naive, truth = gradient(ours, torch.float32), gradient(formula, torch.float32), gradient(formula, torch.float64)
    assert (got - truth).norm() <= 2 * (naive - truth).norm() + 4 * torch.finfo(torch.float32).eps * truth.norm()


@pytest.mark.parametrize("given", ["pooled", "both"])
@pytest.mark.parametrize("length", [10, 30, 80])
@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_pooled_of_nearly_one_key(impl, length, given):
    """p (h.v - h.pooled) is p (1 - p) times a difference: an h.pooled with other roundings than h.v would leave 1e-7 |h| |v| |q|."""
    shapes = {"query": (N, WIDTH), "keys": (70, WIDTH), "values": (70, 19)}
    made = {name: length * torch.randn(shape) for name, shape in shapes.items()}
    h, g = torch.randn(N, 19), torch.randn(N)

    def gradients(softmax, dtype):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in made.items()}
        lse, pooled = softmax(**leaves)
        loss = (pooled * h.to(dtype)).sum() + (lse * g.to(dtype)).sum() * (given == "both")
        return torch.autograd.grad(loss, tuple(leaves.values()))

    def formula(query, keys, values):
        z = query @ keys.T
        return z.logsumexp(1), z.softmax(1) @ values

    got = gradients(lambda **rows: similarity_softmax(**rows, impl=impl), torch.float32)
    naive, truth = gradients(formula, torch.float32), gradients(formula, torch.float64)
    for a, b, c in zip(got, naive, truth, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + 4 * torch.finfo(torch.float32).eps * c.norm() + 1e-9


@pytest.mark.parametrize("temperature", [0.1, 0.05, 0.03])
def test_losses_of_learnt_classes_have_their_digits(isa, temperature):
    """Of 1e-3 to 1e-10: the positive is all but that of the sum, which no float of size 1 can tell."""
    labels = torch.arange(256) // 2
    x = F.normalize(torch.randn(128, 128)[labels] + 0.02 * torch.randn(256, 128), dim=1)
    z = among_themselves(x.double(), 1 / temperature)
    own, mate = torch.arange(256), torch.arange(256) ^ 1
    others = z.index_put((own, mate), torch.tensor(-torch.inf, dtype=torch.float64)).logsumexp(1)
    truth = F.softplus(others - z[own, mate], threshold=40).mean()
    assert abs(sup_con(x, labels, temperature=temperature, normalize=False, impl="cpu").double() / truth - 1) < 1e-5


@pytest.mark.parametrize("rows", [5, N], ids=["bank in place", "bank packed"])
def test_scores_beyond_a_softmax_of_floats(isa, rows):
    """A float logit of 1e10 is off by up to 512, whose exponential is infinite."""
    query, bank = torch.randn(rows, WIDTH) * 1e5, torch.randn(70, WIDTH) * 1e5
    lse, pooled = similarity_softmax(query, bank, impl="cpu")
    z = query.double() @ bank.double().T
    assert torch.equal(pooled, bank[z.argmax(1)])
    torch.testing.assert_close(lse.double(), z.amax(1), rtol=1e-6, atol=0)
