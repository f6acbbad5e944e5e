"""CRD's loss over sampled bank rows: loss and query gradient in one step."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast._ops.gather import reference as gather
from kdfast.functional import sampled_nce

from ... import peers
from ...registry import Case, octaves

TAU = 0.07


class Inputs(NamedTuple):
    query: Tensor  # [N, D], unit rows, as the bank's
    bank: Tensor  # [M, D]
    index: Tensor  # [N, 1 + K], the positive first


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    n, m, d, k = shape
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(m, d, generator=generator), dim=-1)
    index = torch.randint(m, (n, 1 + k), generator=generator)
    query = F.normalize(bank[index[:, 0]] + F.normalize(torch.randn(n, d, generator=generator), dim=-1), dim=-1)
    return Inputs(query.to(dtype), bank.to(dtype), index)


def nce(z: Tensor, bank: Tensor) -> Tensor:
    """The loss of scores [N, 1 + K] as the paper writes it, with Z = M: log(x_0 / (x_0 + c)) and log(c / (x_k + c)), c = K/M."""
    x, noise = z.float().exp() / len(bank), (z.shape[1] - 1) / len(bank)
    positive, negatives = x[:, 0], x[:, 1:]
    return -(torch.log(positive / (positive + noise + 1e-7)).sum() + torch.log(noise / (negatives + noise + 1e-7)).sum()) / len(z)


def scores(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    rows = bank.index_select(0, index.flatten()).view(*index.shape, -1)  # [N, 1 + K, D]
    return torch.bmm(rows, query[:, :, None])[..., 0] / TAU


def formula(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    return nce(scores(query, bank, index), bank)


def reference(x: Inputs) -> tuple[Tensor, ...]:
    def rows(query: Tensor, index: Tensor, bank: Tensor) -> Tensor:
        return gather.sampled_nce(query, bank, index, TAU, len(bank), query.new_tensor(float(len(bank))))[0].mean()

    return peers.in_chunks(rows, (x.query.double(), x.index), x.bank.double(), size=1)


def fused(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    return sampled_nce(query, bank, index, temperature=TAU, num_data=len(bank), normalizer=float(len(bank)))[0]


CRD = Case(
    shapes={
        "quick": ((64, 5_000, 128, 1_638), (64, 100_000, 128, 256)),
        "default": ((64, 50_000, 128, 16_384), (256, 1_000_000, 128, 1_024)),
        "full": ((64, 50_000, 128, 16_384), (256, 1_000_000, 128, 1_024), (64, 1_281_167, 128, 16_384)),
        "cuda": ((256, 1_000_000, 128, 4_096), (64, 50_000, 128, 16_384)),
    },
    axes="N M D K",
    dtypes=(torch.float32, torch.bfloat16),
    inputs=inputs,
    reference=reference,
    flop=lambda shape: 4 * shape[0] * shape[2] * (1 + shape[3]),
    peers=(peers.steps("kdfast", fused), peers.steps("index_select + bmm", formula), peers.compiled(formula)),
)
GROWTH = CRD._replace(
    shapes={
        "quick": octaves((16, 5_000, 32, 128), entries=(0, 2, 3), count=1),
        "default": octaves((32, 50_000, 64, 1_024), entries=(0, 2, 3)),
        "full": octaves((64, 200_000, 64, 2_048), entries=(0, 2, 3)),
        "cuda": octaves((128, 200_000, 64, 2_048), entries=(0, 2, 3)),
    },
    peers=CRD.peers[:2],
)
