"""Drawing K bank rows for each sample: in proportion to weights, never its own (alias); evenly, never of its class (other_class).

Draws differ. What is compared is how often rows are drawn, those of five groups apart, over as many draws as show it; a row that
may not be drawn makes it NaN. The correctness gate sees the first call.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.bank import AliasSampler, ClassSampler

from ...registry import Call, Case, Peer

GROUPS, CLASSES = 5, 10
DRAWN = 1 << 17  # rows, by which the gate judges
ALLOWANCE = 0.03  # of the largest group's share: eight standard deviations


class Inputs(NamedTuple):
    rows: Tensor  # [N], the samples' own
    weights: Tensor  # [M]
    labels: Tensor  # [M]
    k: int


Draw = Callable[[], Tensor]  # [N, K]
Weigh = Callable[[Inputs], Tensor]  # each sample's weight of each row -> [N, M]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> Inputs:
    n, m, k = shape
    generator = torch.Generator().manual_seed(0)
    weights = (torch.arange(m) % GROUPS).to(dtype)  # those of the first group are never drawn
    return Inputs(torch.randint(m, (n,), generator=generator), weights, torch.randint(CLASSES, (m,), generator=generator), k)


def by_weight(x: Inputs) -> Tensor:
    return x.weights.expand(len(x.rows), -1).scatter(1, x.rows[:, None], 0)


def by_class(x: Inputs) -> Tensor:
    return (x.labels[x.rows][:, None] != x.labels).to(x.weights.dtype)


def of_groups(rows: Tensor, counts: Tensor) -> Tensor:
    """Sums of `counts` over the rows of each group."""
    return torch.zeros(GROUPS, dtype=torch.float64, device=counts.device).index_add_(0, rows % GROUPS, counts.double())


def reference(weigh: Weigh, x: Inputs) -> tuple[Tensor, ...]:
    weights = weigh(x).double()
    chances = (weights / weights.sum(-1, keepdim=True)).mean(0)
    return (of_groups(torch.arange(len(chances), device=chances.device), chances),)


def shares(weigh: Weigh, draw: Draw, x: Inputs) -> Tensor:
    index = torch.cat([draw() for _ in range(math.ceil(DRAWN / (len(x.rows) * x.k)))], dim=1)
    rows = index.flatten()
    right = bool((weigh(x).gather(1, index) > 0).all()) and index.shape[1] % x.k == 0
    return of_groups(rows, torch.full(rows.shape, 1 / len(rows) if right else torch.nan, device=rows.device))


def drawing(weigh: Weigh, sampler: Callable[[Inputs], Draw], x: Inputs) -> Call:
    draw, seen = sampler(x), []

    def call() -> tuple[Tensor, ...]:
        if seen:
            draw()
        else:
            seen.append(shares(weigh, draw, x))
        return tuple(seen)

    return call


def alias(x: Inputs) -> Draw:
    return partial(AliasSampler(x.weights, x.k, generator=torch.Generator().manual_seed(0)).draw, x.rows)


def other_class(x: Inputs) -> Draw:
    return partial(ClassSampler(x.labels, x.k, generator=torch.Generator().manual_seed(0)).draw, x.rows)


def multinomial(weigh: Weigh, x: Inputs) -> Draw:
    return lambda: weigh(x).multinomial(x.k, replacement=True)


def search(x: Inputs) -> Draw:
    """In the cumulative sums of the weights, past the sample's own."""
    ends = x.weights.double().cumsum(0)
    own = x.weights[x.rows].double()[:, None]
    before = ends[x.rows][:, None] - own

    def draw() -> Tensor:
        place = torch.rand(len(own), x.k, dtype=torch.float64, device=own.device) * (ends[-1] - own)
        return torch.searchsorted(ends, torch.where(place < before, place, place + own), right=True)

    return draw


def places(x: Inputs) -> Draw:
    """Among the rows in order of their classes, past the sample's class."""
    ascending, ordered = torch.sort(x.labels, stable=True)
    own = x.labels[x.rows][:, None]
    first = torch.searchsorted(ascending, own)
    count = torch.searchsorted(ascending, own, right=True) - first

    def draw() -> Tensor:
        place = (torch.rand(len(own), x.k, dtype=torch.float64, device=own.device) * (len(ordered) - count)).long()
        return ordered[torch.where(place < first, place, place + count)]

    return draw


def case(weigh: Weigh, **samplers: Callable[[Inputs], Draw]) -> Case:
    return Case(
        shapes={
            "quick": ((64, 5_000, 256),),
            "default": ((64, 256, 64), (64, 50_000, 16_384)),
            "full": ((64, 256, 64), (64, 50_000, 16_384), (256, 200_000, 4_096)),
        },
        axes="N M K",
        dtypes=(torch.float32,),
        inputs=inputs,
        reference=partial(reference, weigh),
        flop=None,
        peers=tuple(Peer(name, partial(drawing, weigh, sampler), allowance=ALLOWANCE) for name, sampler in samplers.items()),
    )


ALIAS = case(by_weight, kdfast=alias, multinomial=partial(multinomial, by_weight), searchsorted=search)
OTHER_CLASS = case(by_class, kdfast=other_class, multinomial=partial(multinomial, by_class), places=places)
