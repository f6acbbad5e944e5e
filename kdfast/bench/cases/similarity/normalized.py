"""InfoNCE of raw features, scaled to unit length inside the loss: what the libraries' losses compute.

The bank has unit rows already. kdfast and the plain formula leave it alone; info-nce-pytorch and pytorch-metric-learning
scale it again, which changes nothing but the time.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import functional

from ... import peers
from ...registry import Call, Peer
from . import info_nce as unit
from .info_nce import INFO_NCE, TAU, Inputs


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    x = unit.inputs(shape, torch.float32)
    lengths = torch.linspace(0.5, 2.0, len(x.query))[:, None]
    return Inputs((x.query * lengths).to(dtype), (x.positive / lengths).to(dtype), x.bank.to(dtype))


def formula(query: Tensor, positive: Tensor, bank: Tensor) -> Tensor:
    return unit.formula(F.normalize(query, dim=-1), F.normalize(positive, dim=-1), bank)


def reference(x: Inputs) -> tuple[Tensor, ...]:
    query, positive, bank = (t.double() for t in x)
    return peers.in_chunks(formula, (query, positive), bank)


def loss(query: Tensor, positive: Tensor, bank) -> Tensor:
    return functional.info_nce(F.normalize(query, dim=-1), F.normalize(positive, dim=-1), bank, temperature=TAU)


def info_nce_pytorch():
    from info_nce import info_nce

    return partial(info_nce, temperature=TAU)


def metric_learning(x: Inputs) -> Call:
    """SupConLoss with one positive a query is InfoNCE, and keeps N x M masks where NTXentLoss keeps N x (N M)."""
    from pytorch_metric_learning.losses import SupConLoss

    n, m = len(x.query), len(x.bank)
    row, negative = torch.arange(n, device=x.query.device), torch.arange(n, n + m, device=x.query.device)
    pairs = row, row, row.repeat_interleave(m), negative.repeat(n)  # (anchor, positive, anchor, negative), rows of the references
    criterion = SupConLoss(temperature=TAU)

    def metric_loss(query: Tensor, positive: Tensor, bank: Tensor) -> Tensor:
        return criterion(query, indices_tuple=pairs, ref_emb=torch.cat([positive, bank]))

    return partial(peers.step, metric_loss, *x)


NORMALIZED = INFO_NCE._replace(
    shapes=INFO_NCE.shapes | {"cuda": ((4096, 65536, 128),)},
    inputs=inputs,
    reference=reference,
    peers=(
        peers.steps("kdfast", loss),
        peers.steps("eager", formula),
        peers.compiled(formula),
        peers.library("info-nce-pytorch", "info_nce", info_nce_pytorch),
        Peer("pytorch-metric-learning", metric_learning, missing=peers.installed("pytorch_metric_learning", "pytorch-metric-learning")),
    ),
)
