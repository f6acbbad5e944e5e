"""Losses in which the batch is its own bank, scaled to unit length inside: InfoNCE and NT-Xent of two views, SupCon of labelled samples."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.functional import info_nce, nt_xent, sup_con

from ... import peers
from ...registry import Case

TAU = 0.1
CLASS = 4  # samples


class Views(NamedTuple):
    view1: Tensor  # [N, D]
    view2: Tensor  # [N, D]


class Labelled(NamedTuple):
    features: Tensor  # [N, D]
    labels: Tensor  # [N], CLASS samples of each or, of the last, more


def views(shape: tuple[int, int], dtype: torch.dtype) -> Views:
    generator = torch.Generator().manual_seed(0)
    view1, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    return Views(view1.to(dtype), (view1 + noise).to(dtype))


def labelled(shape: tuple[int, int], dtype: torch.dtype) -> Labelled:
    n, d = shape
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(n) // CLASS).clamp(max=n // CLASS - 1)
    centres = torch.randn(int(labels.max()) + 1, d, generator=generator)
    return Labelled((centres[labels] + torch.randn(n, d, generator=generator)).to(dtype), labels)


def scores(features: Tensor) -> Tensor:
    """Cosines over TAU, -inf on the diagonal."""
    unit = F.normalize(features, dim=-1)
    return (unit @ unit.T / TAU).masked_fill(torch.eye(len(unit), dtype=torch.bool, device=unit.device), -torch.inf)


def info_nce_formula(view1: Tensor, view2: Tensor) -> Tensor:
    logits = F.normalize(view1, dim=-1) @ F.normalize(view2, dim=-1).T / TAU
    return F.cross_entropy(logits, torch.arange(len(view1), device=view1.device))


def nt_xent_formula(view1: Tensor, view2: Tensor) -> Tensor:
    n = len(view1)
    return F.cross_entropy(scores(torch.cat([view1, view2])), torch.arange(2 * n, device=view1.device).roll(n))


def sup_con_formula(features: Tensor, labels: Tensor) -> Tensor:
    log_p = scores(features).log_softmax(-1)
    positive = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return -(log_p.masked_fill(~positive, 0).sum(-1) / positive.sum(-1)).mean()


def info_nce_pytorch():
    from info_nce import info_nce as loss

    return partial(loss, temperature=TAU)


def lightly():
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=TAU)


def metric_learning():
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=TAU)


NT_XENT = Case(
    shapes={
        "quick": ((64, 128), (128, 128)),
        "default": ((64, 128), (128, 128), (2048, 128)),
        "full": ((64, 128), (128, 128), (512, 128), (2048, 128), (4096, 256)),
        "cuda": ((8192, 128), (4096, 512)),
    },
    axes="N D",
    dtypes=(torch.float32, torch.bfloat16),
    inputs=views,
    reference=lambda x: peers.step(nt_xent_formula, *(t.double() for t in x), leaves=2),
    flop=lambda shape: 6 * (2 * shape[0]) ** 2 * shape[1],  # the columns are the rows: one product has both halves of the gradient
    peers=(
        peers.steps("kdfast", partial(nt_xent, temperature=TAU), leaves=2),
        peers.steps("eager", nt_xent_formula, leaves=2),
        peers.compiled(nt_xent_formula, leaves=2),
        peers.library("lightly", "lightly", lightly, leaves=2),
        *peers.bare_mm(peers.gradient_products, lambda x: (torch.cat(x), torch.cat(x))),
    ),
)
IN_BATCH = NT_XENT._replace(
    shapes={
        "quick": ((64, 128),),
        "default": ((64, 128), (256, 128), (4096, 128)),
        "full": ((64, 128), (256, 128), (4096, 128), (8192, 256)),
        "cuda": ((8192, 128),),
    },
    reference=lambda x: peers.step(info_nce_formula, *(t.double() for t in x), leaves=2),
    flop=lambda shape: 6 * shape[0] ** 2 * shape[1],
    peers=(
        peers.steps("kdfast", partial(info_nce, temperature=TAU, normalize=True), leaves=2),
        peers.steps("eager", info_nce_formula, leaves=2),
        peers.compiled(info_nce_formula, leaves=2),
        peers.library("info-nce-pytorch", "info_nce", info_nce_pytorch, leaves=2),
        *peers.bare_mm(peers.gradient_products, lambda x: x),
    ),
)
SUP_CON = NT_XENT._replace(
    shapes={
        "quick": ((128, 128), (256, 128)),
        "default": ((128, 128), (256, 128), (4096, 128)),
        "full": ((128, 128), (256, 128), (1024, 128), (4096, 128), (8192, 256)),
        "cuda": ((8192, 256),),
    },
    inputs=labelled,
    reference=lambda x: peers.step(sup_con_formula, x.features.double(), x.labels),
    flop=lambda shape: 6 * shape[0] ** 2 * shape[1],
    peers=(
        peers.steps("kdfast", partial(sup_con, temperature=TAU)),
        peers.steps("eager", sup_con_formula),
        peers.compiled(sup_con_formula),
        peers.library("pytorch-metric-learning", "pytorch_metric_learning", metric_learning),
        *peers.bare_mm(peers.gradient_products, lambda x: (x.features, x.features)),
    ),
)
