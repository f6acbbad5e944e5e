"""NT-Xent, SupCon, CLIP and SigLIP against formulas over the full score matrix."""

import plain
import pytest
import torch
import torch.nn.functional as F
from similarity_cases import IMPLS, assert_as_good_as
from test_info_nce import same

from kdfast.functional import clip_loss, nt_xent, siglip_loss, sup_con

N, D = 6, 5


@pytest.fixture
def views():
    return [torch.randn(N, D, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def nt_xent_rows(x, y, tau, labels=None):
    z = F.normalize(torch.cat([x, y]), dim=-1)
    scores = z @ z.T / tau
    mask = ~torch.eye(2 * N, dtype=torch.bool)
    partner = (torch.arange(2 * N) + N) % (2 * N)
    if labels is not None:
        mask &= labels.repeat(2)[:, None] != labels.repeat(2)[None]
    mask[torch.arange(2 * N), partner] = False
    return plain.info_nce_rows(scores.gather(1, partner[:, None]), scores, mask)


@pytest.mark.parametrize("labelled", [False, True])
def test_nt_xent(views, labelled):
    labels = torch.tensor([0, 1, 0, 2, 1, 3]) if labelled else None
    rows = nt_xent_rows(*views, 0.5, labels)
    same(nt_xent(*views, labels=labels), plain.reduced(rows), views)
    torch.testing.assert_close(nt_xent(*views, labels=labels, reduction="none"), torch.stack(rows))


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nt_xent_with_a_temperature_for_each_row(views, labelled, dtype):
    labels = torch.tensor([0, 1, 0, 2, 1, 3]) if labelled else None
    tau, weight = (0.3 + torch.rand(2 * N, dtype=torch.float64)).requires_grad_(), torch.rand(2 * N)
    leaves = [*views, tau]
    cast = [x.detach().to(dtype).requires_grad_() for x in leaves]
    rows = nt_xent_rows(*views, tau[:, None], labels)
    found = [nt_xent(*cast[:2], temperature=cast[2], labels=labels, **more) for more in ({}, {"weight": weight}, {"reduction": "none"})]
    for ours, wanted in zip(found, (plain.reduced(rows), plain.reduced(rows, weight), torch.stack(rows)), strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(x.sum(), y, retain_graph=True) for x, y in ((ours, cast), (wanted, leaves))]
        for mine, its in zip(*grads, strict=True):
            torch.testing.assert_close(mine.double(), its, rtol=1e-4, atol=1e-5)


def test_sup_con(views):
    x = views[0]
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    z = F.normalize(x, dim=-1)
    others = ~torch.eye(N, dtype=torch.bool)
    positives = others & (labels[:, None] == labels[None])
    rows = plain.sup_con_rows(z @ z.T / 0.1, positives, others)
    same(sup_con(x, labels), plain.reduced(rows, counted=positives.any(1).tolist()), [x])


def test_sup_con_without_any_pair_is_zero_with_a_graph(views):
    loss = sup_con(views[0], torch.arange(N))
    loss.backward()
    assert loss == 0 and views[0].grad.abs().max() == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_clip(views, smoothing):
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    scores, target = scale * views[0] @ views[1].T, torch.arange(N)
    entropy = lambda s: F.cross_entropy(s, target, label_smoothing=smoothing)
    same(clip_loss(*views, scale, label_smoothing=smoothing), (entropy(scores) + entropy(scores.T)) / 2, [*views, scale])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("impl", IMPLS)
def test_clip_is_as_good_as_the_plain_formula(impl, dtype):
    image, text = (F.normalize(torch.randn(150, 40), dim=-1).to(dtype) for _ in range(2))
    text = F.normalize(image + 0.3 * text, dim=-1)  # pairs that match, as in training
    weight = torch.rand(150)

    def entropy(image, text, scale, *, weight, label_smoothing, reduction):
        scores, target = scale * image @ text.T, torch.arange(150)
        rows = [F.cross_entropy(s, target, reduction="none", label_smoothing=label_smoothing) for s in (scores, scores.T)]
        return sum(rows) / 2 * weight.to(image.dtype)

    def results(loss, dtype, **options):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (image, text)]
        scale = torch.tensor(40.0, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
        rows = loss(*leaves, scale, weight=weight, label_smoothing=0.1, reduction="none", **options)
        return rows, *torch.autograd.grad(rows.sum(), [*leaves, scale])

    ours, naive, truth = results(clip_loss, dtype, impl=impl), results(entropy, dtype), results(entropy, torch.float64)
    for got, rough, true in zip(ours, naive, truth, strict=True):
        assert_as_good_as(got, rough, true)


def test_siglip(views):
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    shift = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    sign = 2 * torch.eye(N, dtype=torch.float64) - 1
    expected = -F.logsigmoid(sign * (scale * views[0] @ views[1].T + shift)).sum() / N
    same(siglip_loss(*views, scale, shift), expected, [*views, scale, shift])


def test_second_derivatives(views):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    shift = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    x, y = (v.detach()[:4].requires_grad_() for v in views)
    assert torch.autograd.gradgradcheck(nt_xent, (x, y))
    assert torch.autograd.gradgradcheck(lambda x: sup_con(x, labels[:4]), (x,))
    assert torch.autograd.gradgradcheck(clip_loss, (x, y, scale))
    assert torch.autograd.gradgradcheck(siglip_loss, (x, y, scale, shift))


def test_empty_batches():
    empty = torch.zeros(0, 4, requires_grad=True)
    for loss in (lambda r: nt_xent(empty, empty, reduction=r), lambda r: clip_loss(empty, empty, 3.0, reduction=r)):
        assert loss("sum") == 0 and loss("mean") == 0 and loss("none").shape == (0,)
    assert sup_con(empty, torch.zeros(0, dtype=torch.long)) == 0
    assert siglip_loss(empty, empty, 3.0, -1.0, reduction="sum") == 0


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: nt_xent(torch.zeros(3, 4), torch.zeros(2, 4)), ValueError, "view2"),
        (lambda: nt_xent(torch.zeros(3, 4), torch.zeros(3, 4), labels=torch.zeros(3)), TypeError, "labels"),
        (lambda: nt_xent(torch.zeros(3, 4), torch.zeros(3, 4), temperature=0), ValueError, "temperature"),
        (lambda: sup_con(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long)), ValueError, "labels"),
        (lambda: sup_con(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), bank_valid=2), ValueError, "bank_valid"),
        (lambda: clip_loss(torch.zeros(3, 4), torch.zeros(3, 5), 1.0), ValueError, "text"),
        (lambda: clip_loss(torch.zeros(3, 4), torch.zeros(3, 4), -1.0), ValueError, "logit_scale"),
        (lambda: clip_loss(torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(1)), ValueError, "logit_scale"),
        (lambda: clip_loss(torch.zeros(3, 4), torch.zeros(3, 4), 1.0, label_smoothing=1.0), ValueError, "label_smoothing"),
        (lambda: siglip_loss(torch.zeros(3, 4), torch.zeros(3, 4).double(), 1.0, 0.0), TypeError, "text"),
        (lambda: siglip_loss(torch.zeros(3, 4), torch.zeros(3, 4), 1.0, "zero"), TypeError, "logit_bias"),
        (lambda: siglip_loss(torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(3), 0.0), ValueError, "logit_scale"),
    ],
)
def test_bad_input_names_the_argument(call, error, name):
    with pytest.raises(error, match=name):
        call()
