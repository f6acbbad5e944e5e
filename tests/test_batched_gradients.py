"""Gradients for many upstream gradients at once, `torch.autograd.grad(..., is_grads_batched=True)`: each is that of one alone."""

import pytest
import torch

import kdfast.functional as F

N, M, D = 6, 11, 5
LABELS, BANK_LABELS, INDEX = torch.arange(N) % 3, torch.arange(M) % 3, torch.arange(4 * N).view(N, 4) % M


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def distilled(x, **options):
    temperatures = {"student_temperature": x["tau"] if not options.get("own") else 0.3, "teacher_temperature": 0.2}
    return F.similarity_distillation(x["q"], x["t"], x["b"], x["tb"], **temperatures, **options)


REDUCED = {
    "info_nce": lambda x, **o: F.info_nce(x["q"], x["p"], x["b"], temperature=x["tau"], **o),
    "info_nce, fixed bank": lambda x, **o: F.info_nce(x["q"], x["t"], x["tb"], temperature=0.3, **o),
    "info_nce, bias": lambda x, **o: F.info_nce(x["q"], x["p"], x["b"], bank_bias=torch.zeros(M), **o),
    "info_nce, batch": lambda x, **o: F.info_nce(x["q"][None], x["p"][None], x["b"], **o),
    "info_nce, attraction": lambda x, **o: F.info_nce(
        x["q"], None, x["b"], query_labels=LABELS, bank_labels=BANK_LABELS, same_class="positive", **o
    ),
    "info_nce, in batch": lambda x, **o: F.info_nce(x["q"], x["p"], **o),
    "info_nce, in batches": lambda x, **o: F.info_nce(x["q"].view(2, 3, D), x["p"].view(2, 3, D), **o),
    "nt_xent": lambda x, **o: F.nt_xent(x["q"], x["p"], **o),
    "sup_con": lambda x, **o: F.sup_con(x["q"], LABELS, **o),
    "clip_loss": lambda x, **o: F.clip_loss(x["q"], x["p"], 1 / x["tau"], **o),
    "siglip_loss": lambda x, **o: F.siglip_loss(x["q"], x["p"], 1 / x["tau"], x["tau"], **o),
    "similarity_distillation": distilled,
    "similarity_distillation, own": lambda x, **o: distilled(x, own=True, **o),
    "similarity_distillation, weighted": lambda x, **o: distilled(x, weight=torch.linspace(0, 1, N), **o),
    "wasserstein_dependency": lambda x, **o: F.wasserstein_dependency(x["q"], x["t"], x["tb"], temperature=0.2, **o),
    "sampled_info_nce": lambda x, **o: F.sampled_info_nce(x["q"], x["p"], x["b"], INDEX, temperature=0.2, **o),
    "triplet_loss": lambda x, **o: F.triplet_loss(x["q"], LABELS, **o),
    "triplet_loss, all": lambda x, **o: F.triplet_loss(x["q"], LABELS, mining="batch_all", **o),
    "multi_similarity_loss": lambda x, **o: F.multi_similarity_loss(x["q"], LABELS, **o),
    "margin_loss": lambda x, **o: F.margin_loss(x["q"], LABELS, **o),
    "angular_loss": lambda x, **o: F.angular_loss(x["q"], LABELS, **o),
    "contrastive_loss": lambda x, **o: F.contrastive_loss(x["q"], LABELS, **o),
}
ALONE = {
    "sampled_nce": lambda x: F.sampled_nce(x["q"], x["b"], INDEX, temperature=0.2, num_data=M)[0],
    "mmd_rbf": lambda x: F.mmd_rbf(x["q"], x["p"], sigmas=(1.0,)),
    "rkd_distance": lambda x: F.rkd_distance(x["q"], x["t"]),
    "rkd_angle": lambda x: F.rkd_angle(x["q"], x["t"]),
    "sinkhorn_loss": lambda x: F.sinkhorn_loss(x["q"], x["p"]),
    "sinkhorn_divergence": lambda x: F.sinkhorn_divergence(x["q"], x["p"]),
    "log_optimal_transport": lambda x: F.log_optimal_transport(x["q"] @ x["p"].T, torch.tensor(1.0)),
    "sinkhorn_normalize": lambda x: F.sinkhorn_normalize(x["q"] @ x["p"].T),
}
EVERY = {f"{name}, {r}": lambda x, f=f, r=r: f(x, reduction=r) for name, f in REDUCED.items() for r in ("mean", "none")} | ALONE


@pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)
def test_each_is_that_of_one_alone(loss):
    torch.manual_seed(0)
    inputs = {"q": unit(N, D), "p": unit(N, D), "b": unit(M, D), "tau": torch.tensor(0.3)}
    leaves = [x.requires_grad_() for x in inputs.values()]
    value = loss(inputs | {"t": unit(N, D), "tb": unit(M, D)})
    upstream = torch.randn(3, *value.shape)
    together = torch.autograd.grad(value, leaves, upstream, is_grads_batched=True, retain_graph=True, allow_unused=True)
    for i, g in enumerate(upstream):
        for found, expected in zip(together, torch.autograd.grad(value, leaves, g, retain_graph=True, allow_unused=True), strict=True):
            assert (found is None) == (expected is None)
            if expected is not None:
                torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-6)
