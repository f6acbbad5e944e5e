"""impl="triton" of the minings of a negative for each positive pair: semi_hard_facenet, distance_weighted, focal.

The kernels find the negatives; the loss is that of the chosen triplets, in PyTorch's operations, block by block.
"""

import torch
from torch import Tensor

from ...._core import random
from ...._core import triton_runtime as runtime
from .. import blocks, chosen, classes, dense, distances, portable, sampling
from ..mining import Settings
from ..portable import Mined, Problem, Rows
from . import dense as triton_dense

_BATCH_ALL = 0  # mining.SETS: every positive's distance
#: numbers in the sums of weights of a slab of anchors
SUMS = 2**23
_NOTHING = torch.iinfo(torch.int64).max
#: numbers of a row that `draw` takes at a time
_DEPTH = 64


def triplet_rows(s: Settings, p: Problem, seed: Tensor) -> Rows:
    positive, negative, valid, unordered = _pairs(s, p, seed)
    rows, width = p.mine.shape[0], sum(x.shape[1] for x in p.layers)
    limit = blocks.budget(p.mine.device, sum(y.numel() for y in p.refs))
    plan = blocks.plan(rows, p.positives, 1, width, limit)
    sums, counts = blocks.row_sums(_picked, s, plan, p.layers, p.refs, (positive, negative, valid, unordered), ())
    return Rows(sums[:, 0], counts[:, 0], counts[:, 1])


def _picked(s, block, layers, refs, fixed_rows, fixed):
    """Losses of the triplets found, by the distances of their rows."""
    positive, negative, valid = (t[:, block.first : block.last] for t in fixed_rows[:3])
    loss = sum(portable.chosen(s, x[:, None], y, positive, negative) for x, y in zip(layers, refs, strict=True))
    return portable.summed(s, loss, valid, fixed_rows[3], (1,))


def mine(s: Settings, p: Problem, seed: Tensor) -> Mined:
    """The triplets themselves, at a static shape."""
    positive, negative, valid, _ = _pairs(s, p, seed)
    return Mined(torch.where(valid, positive, -1), torch.where(valid, negative, -1), valid)


@torch.no_grad()
def _pairs(s: Settings, p: Problem, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """positive, negative [N, P] and which are triplets, and anchors [N] of both kinds with a NaN among their distances."""
    positive, exists = classes.positives(p.anchors, p.classes, 0, p.positives)
    x, y = p.mine.contiguous(), p.mine_ref.contiguous()
    if s.mining == "semi_hard_facenet":
        order = dense.by_label(p.anchors, p.classes, False)
        sides = x.index_select(0, order.anchors), y.index_select(0, order.refs), order.first, order.last, order.own, order.exist
        negative, unordered = torch.ops.kdfast_triton.triplet_facenet(*sides, order.refs, chosen.METRICS[s.metric], p.positives)
        negative, unordered = negative.index_select(0, order.place), unordered.index_select(0, order.place)
    else:
        # u is keyed by the anchor and the positive, as in the portable form
        uniform = random.uniform(seed, p.anchors.row[:, None], positive, distances.wide(x))
        least, (low, high) = sampling.RANGES[s.mining]
        relations = (t.contiguous() for t in (p.anchors.label, p.anchors.own, p.classes.label, p.classes.exists))
        negative, unordered = torch.ops.kdfast_triton.triplet_weighted(
            x, y, *relations, uniform,
            chosen.METRICS[s.metric], low, high, low if least is None else least, s.fallback == "uniform",
        )  # fmt: skip
    valid = exists & (negative >= 0)
    return positive, negative.clamp_min(0), valid, unordered & (p.anchors.count > 0)


def facenet(
    x: Tensor, y: Tensor, first: Tensor, last: Tensor, own: Tensor, exist: Tensor, order: Tensor, metric: int, positives: int
) -> tuple[Tensor, Tensor]:
    """Of anchors and references sorted by label: the negative of each positive [N, positives] in the references' own order `order`
    (-1: none), and anchors [N] with negatives and a NaN among their distances.
    """
    from . import mining_kernels as kernels

    p = triton_dense.pairs(x, y, first, last, own, exist, metric)
    rows, columns = len(x), len(y)
    rule = triton_dense.with_table(p, triton_dense.Rule(0, near=p.x.square, mining=_BATCH_ALL), 0, positives)
    nearest, farthest = torch.full_like(rule.table, _NOTHING, dtype=torch.int64), torch.full_like(first, _NOTHING)
    unordered = torch.zeros_like(first, dtype=torch.int32)
    t = p.tiles
    row_tiles = -(-rows // t.rows)
    parts = runtime.splits(row_tiles, columns, t.columns, x.device)
    kernels.nearest_beyond[(row_tiles, parts)](
        p.x.parts, p.y.parts, p.x.square, p.y.square, *p.classes, order, rule.table, nearest, farthest, unordered,
        rows, columns, p.x.parts.shape[2], runtime.share(columns, parts, t.columns), positives,
        METRIC=metric, **t.options(triton_dense.PARTS),
    )  # fmt: skip
    found = torch.where(nearest == _NOTHING, farthest, nearest)
    return torch.where(found == _NOTHING, -1, found & 0xFFFFFFFF).T.contiguous(), (unordered > 0) & (triton_dense.numbers(p)[1] > 0)


def weighted(
    x: Tensor, y: Tensor, label: Tensor, own: Tensor, key_label: Tensor, exists: Tensor, uniform: Tensor, metric: int, low: float,
    high: float, least: float, fallback: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A negative for each uniform number of an anchor [N, K] (-1: none has weight), and anchors [N] as `facenet`."""
    width = x.shape[1]
    t = triton_dense.small_tiles(runtime.score_tiles(width, triton_dense.PARTS))
    references = triton_dense.side(y, metric, t.depth)
    tall = max(1, SUMS // -(-len(y) // t.columns))
    found = []
    for i in (slice(first, first + tall) for first in range(0, len(x), tall)):
        anchors = triton_dense.side(x[i], metric, t.depth)
        found.append(_draws(t, anchors, references, label[i], own[i], key_label, exists, uniform[i], metric, (low, high, least), fallback))
    return tuple(torch.cat(t) for t in zip(*found, strict=True))


def _draws(t, mine, other, label, own, key_label, exists, uniform, metric, reach, fallback) -> tuple[Tensor, Tensor]:
    from . import mining_kernels as kernels

    rows, columns, width = len(mine.x), len(other.x), mine.x.shape[1]
    row_tiles, column_tiles = -(-rows // t.rows), -(-columns // t.columns)
    parts = runtime.splits(row_tiles, columns, t.columns, mine.x.device)
    top, mass = (mine.x.new_empty((column_tiles, rows)) for _ in range(2))
    number = torch.empty_like(top, dtype=torch.int32)
    unordered = torch.zeros_like(own, dtype=torch.int32)
    kernels.weight_blocks[(row_tiles, parts)](
        mine.parts, other.parts, mine.square, other.square, label, own, key_label, exists, top, mass, number, unordered,
        rows, columns, mine.parts.shape[2], runtime.share(columns, parts, t.columns), *reach, float(width),
        METRIC=metric, **t.options(triton_dense.PARTS),
    )  # fmt: skip
    best = top.amax(0)
    none = best == -torch.inf
    mass = (mass * torch.exp2(top - torch.where(none, 0.0, best))).to(distances.wide(mass))
    if fallback:
        mass = torch.where(none, number.to(mass.dtype), mass)
    outer = mass.T.cumsum(1)  # [N, blocks]
    total = outer[:, -1:]
    target = uniform * total
    block = torch.searchsorted(outer, target, right=True).clamp_max(column_tiles - 1)
    inside = mass.T.gather(1, block)
    fraction = ((target - (outer.gather(1, block) - inside)) / inside).float().contiguous()
    column = torch.empty_like(block)
    kernels.draw[(block.numel(),)](
        mine.x, other.x, label, own, key_label, exists, none, block.contiguous(), fraction, column, columns, width, block.shape[1], *reach,
        float(width), COLUMNS=t.columns, DEPTH=_DEPTH, num_warps=4,
    )  # fmt: skip
    return torch.where(total > 0, column, -1), (unordered > 0) & (number.sum(0) > 0)


def _facenet_fake(x, y, first, last, own, exist, order, metric, positives):
    return first.new_empty(len(x), positives), first.new_empty(len(x), dtype=torch.bool)


def _weighted_fake(x, y, label, own, key_label, exists, uniform, *rest):
    return own.new_empty(uniform.shape), own.new_empty(len(x), dtype=torch.bool)


runtime.register("triplet_facenet", facenet, _facenet_fake)
runtime.register("triplet_weighted", weighted, _weighted_fake)
