"""InfoNCE against sampled bank rows, the first the positive: loss and query gradient in one step."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.functional import sampled_info_nce

from ... import peers
from .crd import CRD, TAU, Inputs, scores
from .scores import SCORES


def formula(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    return F.cross_entropy(scores(query, bank, index), torch.zeros(len(query), dtype=torch.long, device=query.device))


def fused(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    return sampled_info_nce(query, bank[index[:, 0]], bank, index[:, 1:], temperature=TAU)


def reference(x: Inputs) -> tuple[Tensor, ...]:
    return peers.in_chunks(lambda query, index, bank: formula(query, bank, index), (x.query.double(), x.index), x.bank.double(), size=1)


INFO_NCE = CRD._replace(
    shapes=SCORES.shapes,
    reference=reference,
    peers=(peers.steps("kdfast", fused), peers.steps("index_select + bmm", formula), peers.compiled(formula)),
)
