"""Sums over very many keys, and over rows whose terms nearly cancel, keep the digits that the plain formula's keep."""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from kdfast._core import impls
from kdfast.functional import clip_loss, info_nce, nt_xent, similarity_distillation, sup_con
from kdfast.ops import similarity_softmax

KEYS = 1 << 18
needs_kernels = pytest.mark.skipif(impls.table()["info_nce"]["cpu"] is not None, reason="no compiled kernels")


def beside_one(logits: list[float], others: float) -> torch.Tensor:
    """Keys [KEYS, 1] that have these logits under a query of 1; of the others a block together may be half a unit of the first's weight."""
    keys = torch.full((KEYS, 1), others)
    keys[: len(logits), 0] = torch.tensor(logits)
    return keys


def log_sum_exp_keeps_small_terms(impl, others):
    keys = beside_one([0.0], others)
    for bank in (keys, keys.roll(KEYS // 2, 0)):
        lse, _ = similarity_softmax(torch.ones(3, 1), bank, impl=impl)
        assert (lse.double() - keys.double().logsumexp(0)).abs().max() < 1e-6


def distillation_keeps_small_terms(impl, divergence):
    student, teacher = beside_one([-5.0, 0.0], -22.0), beside_one([0.0, -9.0], -22.0)
    rows = torch.ones(3, 1)
    losses = similarity_distillation(
        rows, rows, student, teacher, student_temperature=1.0, teacher_temperature=1.0, divergence=divergence, reduction="none", impl=impl
    )
    ours, theirs = (torch.log_softmax(keys.double()[:, 0], 0) for keys in (student, teacher))
    truth = (theirs.exp() * ((theirs if divergence == "kl" else 0.0) - ours)).sum()
    assert (losses.double() - truth).abs().max() < 4e-6


@needs_kernels
def test_log_sum_exp_of_many_keys(isa):
    log_sum_exp_keeps_small_terms("cpu", -20.5)  # one float for the sum of all blocks loses 2e-5 of 3e-4


@needs_kernels
@pytest.mark.parametrize("divergence", ["ce", "kl"])
def test_distillation_over_many_keys(isa, divergence):
    distillation_keeps_small_terms("cpu", divergence)


def test_portable_sums_over_many_keys():
    log_sum_exp_keeps_small_terms("torch", -18.0)  # 3e-6 of 4e-3
    distillation_keeps_small_terms("torch", "ce")
    distillation_keeps_small_terms("torch", "kl")


def clip(x, y, scale, **how):
    z, own = scale * x @ y.T, torch.arange(len(x))
    return (F.cross_entropy(z, own, **how) + F.cross_entropy(z.T, own, **how)) / 2


def among_views(x, y, scale):
    rows = torch.cat([x, y])
    z = (scale * rows @ rows.T).masked_fill(torch.eye(len(rows), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(z, torch.arange(len(rows)).roll(len(x)))


def within(x, y, scale, **how):
    return F.cross_entropy(scale * x @ y.T, torch.arange(len(x)), **how)


def beside_bank(x, y, scale):
    """Each row's match beside the matches of the first 60."""
    z = torch.cat([(x * y).sum(1, keepdim=True), x @ y[:60].T], 1)
    return F.cross_entropy(scale * z, torch.zeros(len(x), dtype=torch.long))


def in_classes(x, y, scale):
    rows = torch.cat([x, y])
    labels = torch.arange(len(rows)) // 4
    same = (labels[:, None] == labels) & ~torch.eye(len(rows), dtype=torch.bool)
    z = (scale * rows @ rows.T).masked_fill(torch.eye(len(rows), dtype=torch.bool), -torch.inf)
    return -(z.log_softmax(1).masked_fill(~same, 0).sum(1) / same.sum(1)).mean()


SMOOTHED = {"label_smoothing": 0.1}
LOSSES = {
    "clip_loss": (clip_loss, clip),
    "nt_xent": (lambda x, y, scale, **how: nt_xent(x, y, temperature=1 / scale, **how), among_views),
    "info_nce": (lambda x, y, scale, **how: info_nce(x, y, temperature=1 / scale, **how), within),
    "info_nce, few pairs": (lambda x, y, scale, **how: info_nce(x, y, y[:60], temperature=1 / scale, **how), beside_bank),
    "sup_con": (
        lambda x, y, scale, **how: sup_con(torch.cat([x, y]), torch.arange(2 * len(x)) // 4, temperature=1 / scale, **how),
        in_classes,
    ),
    "clip_loss, smoothed": (partial(clip_loss, **SMOOTHED), partial(clip, **SMOOTHED)),
    "info_nce, smoothed": (lambda x, y, s, **how: info_nce(x, y, temperature=1 / s, **SMOOTHED, **how), partial(within, **SMOOTHED)),
}


def gradient_of_scale(f, dtype, x, y, scale, others):
    """`others`: whether the rows have a gradient too."""
    x, y = (t.to(dtype).requires_grad_(others) for t in (x, y))
    s = torch.tensor(scale, dtype=dtype, requires_grad=True)
    return torch.autograd.grad(f(x, y, s), (s, x, y) if others else s)[0].double()


def root_mean_square(errors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(errors).square().mean().sqrt()


def compare_scale_gradients(name, impl, problems, truths, naive_error, scale, others=False):
    """Our root mean square over the problems is held to that of the formula."""
    loss = lambda *a: LOSSES[name][0](*a, normalize=False, impl=impl)
    ours = root_mean_square(
        [gradient_of_scale(loss, torch.float32, *rows, scale, others) - truth for rows, truth in zip(problems, truths, strict=True)]
    )
    assert ours <= 2 * naive_error, (ours, naive_error)


def by_formula(name, problems, scale):
    """The gradients in float64, and the root mean square of the float32 formula's errors."""
    truths = [gradient_of_scale(LOSSES[name][1], torch.float64, *rows, scale, False) for rows in problems]
    naive = [gradient_of_scale(LOSSES[name][1], torch.float32, *rows, scale, False) for rows in problems]
    return truths, root_mean_square([x - truth for x, truth in zip(naive, truths, strict=True)])


@pytest.mark.parametrize("name", ["clip_loss", "nt_xent"])
def test_portable_gradient_of_a_scale_where_all_logits_are_large_and_alike(name):
    """A row's logits less its match's are small; the sums over all rows of both are not."""

    def problem():
        centres = F.normalize(torch.randn(4, 16), dim=-1)[torch.randint(4, (64,))]
        x = F.normalize(centres + 0.01 * torch.randn(64, 16), dim=-1) * 20
        return x, F.normalize(x / 20 + 0.1 * torch.randn(64, 16), dim=-1) * 20

    problems = [problem() for _ in range(10)]
    compare_scale_gradients(name, "torch", problems, *by_formula(name, problems, 2.0), 2.0)


@cache
def tight_class(name, rows, scale):
    """Problems of rows about one centre, and what the formula gives for them: the same for every instruction set."""
    torch.manual_seed(0)

    def problem():
        centre = F.normalize(torch.randn(64), dim=0)
        return tuple(F.normalize(centre + 0.02 / 8 * torch.randn(2, rows, 64), dim=-1))

    problems = [problem() for _ in range(12)]
    return problems, *by_formula(name, problems, scale)


@needs_kernels
@pytest.mark.parametrize("others", [False, True], ids=["scale", "scale and rows"])
@pytest.mark.parametrize(("rows", "scale"), [(90, 500.0), (400, 500.0), (400, 16.0)])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_a_scale_in_one_tight_class(isa, name, rows, scale, others):
    """Weights that add up to 0 but for 1e-7, and a sum of rows beside one of most of the weight, leave as much of the common logit."""
    compare_scale_gradients(name, "cpu", *tight_class(name, rows, scale), scale, others)
