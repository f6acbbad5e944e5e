"""impl="torch": bank blocks outermost, query blocks within, a running list of the best candidates of each query.

A block's scores rank only: the candidates kept are a few more than k, and their distances are then computed from the
rows themselves. Scores are [n, m] blocks; what grows with the queries is the list of candidates alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.centre import middle
from ..._core.dtypes import accumulator

_BANK_BLOCK, _QUERY_BLOCK = 8192, 128  # scores of 4 MB in float32
_GATHER = 1 << 20  # elements of candidate rows at a time
_GROUP = 16  # columns reduced to their minimum before any selection


class Problem(NamedTuple):
    """Row blocks are read by `rows(source, selection)`, so that a source on disk is never read whole."""

    query: object  # [N, D]
    bank: object  # [M, D]
    rows: Callable[[object, "slice | Tensor"], Tensor]
    metric: str
    own: Tensor | None  # [N], -1: none
    query_labels: Tensor | None  # [N]
    bank_labels: Tensor | None  # [M]
    same_class: str
    dropped: Callable[[slice], Tensor | None]  # columns no query may have: bool [m]


def queries(p: Problem, selection: "slice | Tensor") -> Problem:
    """The problem of some of its queries."""
    own, labels = (None if x is None else x[selection] for x in (p.own, p.query_labels))
    return p._replace(query=p.rows(p.query, selection), own=own, query_labels=labels)


def blocks(n: int, m: int) -> int:
    """How often `step` is called."""
    return -(-n // _QUERY_BLOCK) * -(-m // _BANK_BLOCK)


def knn(p: Problem, k: int, candidates: int, step: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """(distance [N, k], index [N, k]), ascending, ties to the lower index, missing (inf, -1)."""
    n, m = len(p.query), len(p.bank)
    candidates = min(candidates, m)
    first = p.rows(p.query, slice(0, 1))
    device, wide = first.device, accumulator(first.dtype)
    best = torch.full((n, candidates), torch.inf, dtype=wide, device=device)
    index = torch.full((n, candidates), -1, device=device)
    centre = None
    for start in range(0, m, _BANK_BLOCK):
        columns = slice(start, min(start + _BANK_BLOCK, m))
        keys = p.rows(p.bank, columns).to(wide)
        if centre is None:
            centre = middle(keys)
        keys = _prepared(keys, p.metric, centre)
        norms = None if p.metric == "cosine" else keys.square().sum(dim=1)
        dropped = p.dropped(columns)
        for i in range(0, n, _QUERY_BLOCK):
            block = slice(i, min(i + _QUERY_BLOCK, n))
            score = _scores(_prepared(p.rows(p.query, block).to(wide), p.metric, centre), keys, norms)  # [n, m]
            _mask(score, p, block, columns, dropped)
            value, position = _smallest(score, min(candidates, score.shape[1]))
            # the list comes first: its indices are the lower ones, so equal values stay in order
            value = torch.cat([best[block], value], dim=1)
            both = torch.cat([index[block], torch.where(value[:, candidates:] == torch.inf, -1, position + start)], dim=1)
            chosen = _first(value, candidates)
            best[block], index[block] = value.gather(1, chosen), both.gather(1, chosen)
            step()
    return _exact(p, index.sort(dim=1).values, k, wide)


def _prepared(x: Tensor, metric: str, centre: Tensor) -> Tensor:
    """Unit rows; or rows about the middle of the bank's first block, so that a far-off cloud loses no digits."""
    return F.normalize(x, dim=1) if metric == "cosine" else x - centre


def _scores(query: Tensor, keys: Tensor, norms: Tensor | None) -> Tensor:
    """What ranks a query's keys: -cos, or ||k||^2 - 2 q.k. Not finite: the largest float, before what is masked (inf)."""
    with torch.autocast(device_type=query.device.type, enabled=False):
        if norms is None:
            score = torch.addmm(query.new_zeros(()), query, keys.T, beta=0, alpha=-1)
        else:
            score = torch.addmm(norms, query, keys.T, alpha=-2)
    largest = torch.finfo(score.dtype).max
    score.nan_to_num_(nan=largest, posinf=largest, neginf=-largest)
    if score.dtype == torch.float64:  # a product's last bits depend on the column's place: to 38 bits, equal rows stay tied, however many
        score.view(torch.int64).bitwise_and_(-(1 << 14))
    return score


def _mask(score: Tensor, p: Problem, rows: slice, columns: slice, dropped: Tensor | None) -> None:
    """Write inf where a bank row may not be a neighbour."""
    if p.own is not None:
        own = p.own[rows, None] - columns.start
        here = (own >= 0) & (own < score.shape[1])
        own = own.clamp(0, score.shape[1] - 1)
        score.scatter_(1, own, torch.where(here, torch.inf, score.gather(1, own)))
    if p.query_labels is not None:
        same = p.query_labels[rows, None] == p.bank_labels[None, columns]
        score.masked_fill_(same if p.same_class == "exclude" else ~same, torch.inf)
    if dropped is not None:
        score.masked_fill_(dropped, torch.inf)


def _smallest(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest values of each row and their columns, ties to the lower column.

    The k best lie in the k groups of columns whose best is best, so most columns are only ever compared in a minimum.
    """
    if 2 * k * _GROUP > score.shape[1]:
        chosen = _first(score, k)
        return score.gather(1, chosen), chosen
    score = F.pad(score, (0, -score.shape[1] % _GROUP), value=torch.inf)
    groups = score.unflatten(1, (-1, _GROUP))  # [n, groups, _GROUP]
    chosen = _first(groups.amin(dim=2), k).sort(dim=1).values  # [n, k]
    columns = (chosen[..., None] * _GROUP + torch.arange(_GROUP, device=score.device)).flatten(1)  # ascending
    values = score.gather(1, columns)
    within = _first(values, k)
    return values.gather(1, within), columns.gather(1, within)


def _first(value: Tensor, k: int) -> Tensor:
    """Positions of the k smallest entries of each row, ascending, ties to the lower position. No NaN among them."""
    if value.dtype == torch.float64:
        return torch.sort(value, dim=1, stable=True).indices[:, :k]
    # one integer a value, ordered as (value, position): float32's bits, those of negative numbers flipped, above the position
    bits = (value + 0.0).view(torch.int32)  # -0 becomes +0
    bits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    keys = bits | torch.arange(value.shape[1], device=value.device)
    return torch.topk(keys, k, dim=1, largest=False).values & 0xFFFFFFFF


def _exact(p: Problem, index: Tensor, k: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The k best of the candidates `index` (ascending in each row, -1: none) by distances from the rows themselves."""
    n, candidates = index.shape
    out = torch.full((n, k), torch.inf, dtype=wide, device=index.device), torch.full((n, k), -1, device=index.device)
    if candidates == 0:
        return out
    kept = min(k, candidates)
    width = p.rows(p.query, slice(0, 1)).shape[1]
    step = max(1, _GATHER // max(1, candidates * width))
    for i in range(0, n, step):
        block = slice(i, min(i + step, n))
        some = index[block] >= 0
        keys = p.rows(p.bank, index[block].clamp(min=0).flatten()).to(wide).unflatten(0, some.shape)  # [n, candidates, D]
        distance = _distances(p.rows(p.query, block).to(wide)[:, None], keys, p.metric)
        rank = torch.nan_to_num(distance, nan=torch.finfo(wide).max, posinf=torch.finfo(wide).max)
        chosen = _first(torch.where(some, rank, torch.inf), kept)
        out[0][block, :kept] = torch.where(some, distance, torch.inf).gather(1, chosen)
        out[1][block, :kept] = index[block].gather(1, chosen)
    return out


def _distances(query: Tensor, keys: Tensor, metric: str) -> Tensor:
    """query [n, 1, D], keys [n, c, D] -> [n, c], from differences: equal rows are at distance exactly 0."""
    if metric == "cosine":
        query, keys = F.normalize(query, dim=2), F.normalize(keys, dim=2)
        half = (query - keys).square().sum(dim=2) / 2  # 1 - cos of unit rows, without the cancellation
        zero = (query == 0).all(dim=2) | (keys == 0).all(dim=2)
        return torch.where(zero & ~half.isnan(), 1.0, half)
    square = (query - keys).square().sum(dim=2)
    return square if metric == "sqeuclidean" else square.sqrt()
