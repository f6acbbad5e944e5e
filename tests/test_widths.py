"""Rows without columns are refused by name, everywhere: no kernel meets them."""

import pytest
import torch

import kdfast
from kdfast import functional as F
from kdfast import ops

X, BANK = torch.zeros(4, 0), torch.zeros(6, 0)
LABELS = torch.tensor([0, 0, 1, 1])
INDEX = torch.zeros(4, 3, dtype=torch.long)

CALLS = {
    "info_nce": ("query", lambda: F.info_nce(X, X, BANK)),
    "info_nce, unit rows": ("query", lambda: F.info_nce(X, X, normalize=True)),
    "info_nce, bank": ("bank", lambda: F.info_nce(torch.ones(4, 2), None, BANK, targets=LABELS)),
    "nt_xent": ("view1", lambda: F.nt_xent(X, X)),
    "sup_con": ("features", lambda: F.sup_con(X, LABELS)),
    "clip_loss": ("image", lambda: F.clip_loss(X, X, 1.0)),
    "siglip_loss": ("image", lambda: F.siglip_loss(X, X, 1.0, 0.0)),
    "similarity_distillation": ("student", lambda: F.similarity_distillation(X, X, BANK, student_temperature=1.0, teacher_temperature=1.0)),
    "wasserstein_dependency": ("query", lambda: F.wasserstein_dependency(X, X, BANK, temperature=1.0)),
    "sampled_info_nce": ("query", lambda: F.sampled_info_nce(X, X, BANK, INDEX)),
    "sampled_nce": ("query", lambda: F.sampled_nce(X, BANK, INDEX, num_data=6)),
    "triplet_loss": ("embeddings", lambda: F.triplet_loss(X, LABELS)),
    "triplet_loss, layers": ("embeddings", lambda: F.triplet_loss([torch.ones(4, 2), X], LABELS, sample_on=torch.ones(4, 2))),
    "mine_triplets": ("embeddings", lambda: F.mine_triplets(X, LABELS)),
    "multi_similarity_loss": ("embeddings", lambda: F.multi_similarity_loss(X, LABELS)),
    "contrastive_loss": ("embeddings", lambda: F.contrastive_loss(X, LABELS)),
    "margin_loss": ("embeddings", lambda: F.margin_loss(X, LABELS)),
    "angular_loss": ("embeddings", lambda: F.angular_loss(X, LABELS)),
    "mmd_rbf": ("x", lambda: F.mmd_rbf(X, X, sigmas=(1.0,))),
    "rkd_distance": ("student", lambda: F.rkd_distance(X, X)),
    "rkd_angle, teacher": ("teacher", lambda: F.rkd_angle(torch.ones(4, 2), X)),
    "sinkhorn_loss": ("x", lambda: F.sinkhorn_loss(X, X)),
    "sinkhorn_divergence": ("x", lambda: F.sinkhorn_divergence(X, X)),
    "sinkhorn": ("x", lambda: ops.sinkhorn(x=X, y=X)),
    "similarity_softmax": ("query", lambda: ops.similarity_softmax(X, BANK)),
    "similarity_softmax, values": ("values", lambda: ops.similarity_softmax(torch.ones(4, 2), torch.ones(6, 2), values=BANK)),
    "symmetric_lse": ("x", lambda: ops.symmetric_lse(X, X)),
    "gather_similarity": ("query", lambda: ops.gather_similarity(X, BANK, INDEX)),
    "knn": ("query", lambda: ops.knn(X, BANK, 2)),
    "knn, arrays": ("query", lambda: ops.knn(X.numpy(), BANK.numpy(), 2)),
    "row_extrema": ("x", lambda: ops.row_extrema(X, X, LABELS, LABELS)),
    "a bank's rows": ("keys", lambda: kdfast.QueueBank(8, 2).push(BANK)),
}


@pytest.mark.parametrize("call", CALLS)
def test_rows_without_columns(call):
    name, run = CALLS[call]
    with pytest.raises(ValueError, match=rf"^{name}\S* must have at least 1 column"):
        run()
