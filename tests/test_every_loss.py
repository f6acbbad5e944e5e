"""What every loss must stand: torch.vmap, differentiated in and outside of it, and a second derivative."""

import pytest
import torch

import kdfast.functional as F
from kdfast import ops

N, M, D = 5, 7, 6
BANK, OTHER = torch.randn(M, D, generator=torch.Generator().manual_seed(1)), torch.randn(N, D, generator=torch.Generator().manual_seed(2))
LABELS, BANK_LABELS, INDEX = torch.arange(N) // 2, torch.arange(M) % 3, torch.arange(3 * N).view(N, 3) % M
LOSSES = {
    "similarity_softmax": lambda x: sum(out.square().sum() for out in ops.similarity_softmax(x, BANK)),
    "symmetric_lse": lambda x: sum(out.square().sum() for out in ops.symmetric_lse(x, BANK)),
    "gather_similarity": lambda x: ops.gather_similarity(x, BANK, INDEX).square().sum(),
    "row_extrema": lambda x: ops.row_extrema(x, BANK, LABELS, BANK_LABELS).hardest_negative.value.sum(),
    "info_nce": lambda x: F.info_nce(x, OTHER, BANK, normalize=True),
    "info_nce-in-batch": lambda x: F.info_nce(OTHER, x),
    "nt_xent": lambda x: F.nt_xent(x, OTHER),
    "sup_con": lambda x: F.sup_con(x, LABELS),
    "sup_con-bank": lambda x: F.sup_con(x, LABELS, bank=BANK, bank_labels=BANK_LABELS),
    "clip_loss": lambda x: F.clip_loss(x, OTHER, 2.0),
    "siglip_loss": lambda x: F.siglip_loss(x, OTHER, 2.0, -1.0),
    "similarity_distillation": lambda x: F.similarity_distillation(x, OTHER, BANK, student_temperature=0.3, teacher_temperature=0.2),
    "wasserstein_dependency": lambda x: F.wasserstein_dependency(x, OTHER, BANK, temperature=0.5),
    "sampled_info_nce": lambda x: F.sampled_info_nce(x, OTHER, BANK, INDEX),
    "sampled_nce": lambda x: F.sampled_nce(x, BANK, INDEX, num_data=20)[0],
    "triplet_loss": lambda x: F.triplet_loss(x, LABELS),
    "triplet_loss-all": lambda x: F.triplet_loss(x, LABELS, mining="batch_all", ref=BANK, ref_labels=BANK_LABELS),
    "multi_similarity_loss": lambda x: F.multi_similarity_loss(x, LABELS),
    "margin_loss": lambda x: F.margin_loss(x, LABELS),
    "contrastive_loss": lambda x: F.contrastive_loss(x, LABELS),
    "angular_loss": lambda x: F.angular_loss(x, LABELS),
    "mmd_rbf": lambda x: F.mmd_rbf(x, BANK, sigmas=(1.0, 2.0)),
    "rkd_distance": lambda x: F.rkd_distance(x, OTHER),
    "rkd_angle": lambda x: F.rkd_angle(x, OTHER),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_outside_vmap(name, dtype, monkeypatch):
    """Inside, an argument does not say that it needs a gradient."""
    monkeypatch.setitem(globals(), "BANK", BANK.to(dtype))
    monkeypatch.setitem(globals(), "OTHER", OTHER.to(dtype))
    loss, x = LOSSES[name], torch.randn(3, N, D, dtype=dtype, requires_grad=True)
    each = torch.stack([loss(one) for one in x])
    expected = torch.autograd.grad(each.sum(), x)[0]
    values = torch.vmap(loss)(x)
    torch.testing.assert_close(values, each)
    torch.testing.assert_close(torch.autograd.grad(values.sum(), x)[0], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x.detach()), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivative(name):
    """Of rows that are not contiguous, which kernels copy, and by torch.func.grad of itself."""
    loss, x, v = LOSSES[name], torch.randn(N, D), torch.randn(N, D)

    def product(x):  # with the Hessian
        gradient = torch.autograd.grad(loss(x), x, create_graph=True)[0]
        linear = not gradient.requires_grad
        return gradient, torch.zeros_like(x) if linear else torch.autograd.grad((gradient * v).sum(), x)[0]

    again = product(x.clone().requires_grad_())[1]
    torch.testing.assert_close(torch.func.grad(lambda x: (torch.func.grad(loss)(x) * v).sum())(x), again, rtol=1e-4, atol=1e-4)
    for ours, expected in zip(product(x.T.contiguous().T.requires_grad_()), product(x.requires_grad_()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode(name):
    """The tangent is the gradient's product with the direction; what has none says so. Kernels would lose it without a word."""
    loss, x, direction = LOSSES[name], torch.randn(N, D), torch.randn(N, D)
    expected = (torch.func.grad(loss)(x) * direction).sum()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        if name in ("gather_similarity", "sampled_info_nce", "sampled_nce"):
            with pytest.raises(NotImplementedError, match="jvp"):
                loss(dual)
            return
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)


def test_forward_mode_has_no_kernels():
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="impl='cpu' has no forward-mode derivatives"):
        ops.similarity_softmax(torch.randn(N, D), BANK, impl="cpu")
