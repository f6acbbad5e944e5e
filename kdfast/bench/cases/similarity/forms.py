"""The other forms of InfoNCE: each leaves rows out, adds to the scores, or spreads the target; loss and query gradient in one step.

Each query has a row in the bank that is nearly the same, as false negatives are.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.functional import info_nce

from ... import peers
from ...registry import Case
from .info_nce import INFO_NCE, TAU

CLASSES, COPIES = 16, 4
MARGIN, SMOOTHING = 0.1, 0.1


class Inputs(NamedTuple):
    query: Tensor  # [N, D], unit rows, as the others
    temperature: Tensor  # [N]
    positives: Tensor  # [N, COPIES, D]
    bank: Tensor  # [M, D]
    targets: Tensor  # [N], rows of the bank
    labels: Tensor  # [N]
    bank_labels: Tensor  # [M]
    bias: Tensor  # [M]
    weight: Tensor  # [N]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> Inputs:
    n, m, d = shape
    generator = torch.Generator().manual_seed(0)

    def unit(*size: int) -> Tensor:
        return F.normalize(torch.randn(size, generator=generator), dim=-1)

    query, bank = unit(n, d), unit(m, d)
    near = min(n, m)
    bank[:near] = F.normalize(query[:near] + 0.3 * unit(near, d), dim=-1)
    positives = F.normalize(query[:, None] + unit(n, COPIES, d), dim=-1)
    rows = (x.to(dtype) for x in (positives, bank))
    labels = torch.randint(CLASSES, (n,), generator=generator), torch.randint(CLASSES, (m,), generator=generator)
    temperature, weight = (torch.rand(n, generator=generator) for _ in range(2))
    targets = torch.randint(m, (n,), generator=generator)
    return Inputs(query.to(dtype), 0.05 + 0.1 * temperature, *rows, targets, *labels, torch.randn(m, generator=generator), weight)


def logits(x: Inputs) -> Tensor:
    return torch.cat([(x.query * x.positives[:, 0]).sum(-1, keepdim=True), x.query @ x.bank.T], dim=1) / TAU  # [N, 1 + M]


def first(z: Tensor, **options) -> Tensor:
    """Cross-entropy of each row's first entry."""
    return F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long, device=z.device), **options)


def targets(x: Inputs) -> Tensor:
    return F.cross_entropy(x.query @ x.bank.T / TAU, x.targets)


def exclusion(x: Inputs) -> Tensor:
    z = logits(x)
    return first(torch.cat([z[:, :1], z[:, 1:].masked_fill(x.labels[:, None] == x.bank_labels, -torch.inf)], dim=1))


def attraction(x: Inputs) -> Tensor:
    log_p = (x.query @ x.bank.T / TAU).log_softmax(-1)
    positive = x.labels[:, None] == x.bank_labels
    return -(log_p.masked_fill(~positive, 0).sum(-1) / positive.sum(-1)).mean()


def several(x: Inputs) -> Tensor:
    z = (x.query[:, None] * x.positives).sum(-1) / TAU  # [N, COPIES]
    negative = (x.query @ x.bank.T / TAU).logsumexp(-1, keepdim=True)
    return (torch.logaddexp(negative, z) - z).mean()


def margin(x: Inputs) -> Tensor:
    z = logits(x)
    limit = z[:, :1].detach() + MARGIN / TAU
    return first(torch.cat([z[:, :1], z[:, 1:].masked_fill(z[:, 1:].detach() > limit, -torch.inf)], dim=1))


def smoothing(x: Inputs) -> Tensor:
    return first(logits(x), label_smoothing=SMOOTHING)


def decoupled(x: Inputs) -> Tensor:
    z = logits(x)
    return (z[:, 1:].logsumexp(-1) - z[:, 0]).mean()


def learnable(x: Inputs) -> Tensor:
    return first(logits(x) * (TAU / x.temperature[:, None]))


def weighted(x: Inputs) -> Tensor:
    """Of the bank's first three quarters, whose scores have a bias; rows of different weights."""
    z, valid = logits(x), three_quarters(len(x.bank))
    z = torch.cat([z[:, :1], z[:, 1 : 1 + valid] + x.bias[:valid]], dim=1)
    return (first(z, reduction="none") * x.weight).sum() / x.weight.sum()


def three_quarters(rows: int) -> int:
    return max(1, 3 * rows // 4)


def whole(rows: int) -> int:
    return rows


def fused(options: Callable[[Inputs], dict], x: Inputs) -> Tensor:
    given = {"temperature": TAU, "positive": x.positives[:, 0], "bank": x.bank} | options(x)
    return info_nce(x.query, given.pop("positive"), given.pop("bank"), **given)


def form(
    formula: Callable[[Inputs], Tensor],
    options: Callable[[Inputs], dict],
    leaves: int = 1,
    valid: Callable[[int], int] = whole,
    on_gpu: bool = False,
) -> Case:
    """`options`: what info_nce is told for it, beside or instead of one positive, the bank and TAU. `valid`: of how many bank rows.
    `on_gpu`: measured there too, where the other forms are the streaming softmax with a mask."""

    def of_tensors(loss: Callable[[Inputs], Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors: loss(Inputs(*tensors))

    def reference(x: Inputs) -> tuple[Tensor, ...]:
        wide = (t.double() if t.is_floating_point() else t for t in x)
        return peers.step(of_tensors(formula), *wide, leaves=leaves)

    return Case(
        shapes={
            "quick": ((64, 256, 128),),
            "default": ((64, 256, 128), (1024, 16384, 128)),
            "full": ((64, 256, 128), (1024, 16384, 128), (256, 65536, 128)),
            **({"cuda": ((4096, 65536, 128),)} if on_gpu else {}),
        },
        axes=INFO_NCE.axes,
        dtypes=INFO_NCE.dtypes,
        inputs=inputs,
        reference=reference,
        flop=lambda shape: 4 * shape[0] * valid(shape[1]) * shape[2],
        peers=(
            peers.steps("kdfast", of_tensors(partial(fused, options)), leaves=leaves),
            peers.steps("eager", of_tensors(formula), leaves=leaves),
            peers.compiled(of_tensors(formula), leaves=leaves),
            *peers.bare_mm(peers.attention_products, lambda x: (x.query, x.bank[: valid(len(x.bank))])),
        ),
    )


FORMS = {
    "targets": form(targets, lambda x: {"positive": None, "targets": x.targets}),
    "exclusion": form(exclusion, lambda x: {"query_labels": x.labels, "bank_labels": x.bank_labels}),
    "attraction": form(
        attraction,
        lambda x: {"positive": None, "query_labels": x.labels, "bank_labels": x.bank_labels, "same_class": "positive"},
        on_gpu=True,
    ),
    "positives": form(several, lambda x: {"positive": x.positives}),
    "margin": form(margin, lambda x: {"false_negative_margin": MARGIN}),
    "smoothing": form(smoothing, lambda x: {"label_smoothing": SMOOTHING}),
    "decoupled": form(decoupled, lambda x: {"include_positive": False}),
    "learnable": form(learnable, lambda x: {"temperature": x.temperature}, leaves=2),
    "weighted": form(
        weighted,
        lambda x: {"bank_bias": x.bias, "bank_valid": three_quarters(len(x.bank)), "weight": x.weight},
        valid=three_quarters,
    ),
}
