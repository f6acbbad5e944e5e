"""impl="triton" of the losses over all pairs and over all triplets of the set minings: the ops of `dense.py`, launched on a GPU.

They take what the C++ ops take: rows sorted by label, ready for the metric, in float32. Scores and weighted sums are products of three
bfloat16 parts, as exact as float32's. A table [taken, N] holds distances of positives: as many positives at a time as it has room for,
and further launches for the others, whose programs end at once where no class is that large.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...._core import triton_runtime as runtime
from ..dense import gradients_fake
from . import parted

PARTS, PRODUCTS = 3, 6  # of a row, and of two rows' parts
#: columns of an output that a program keeps in registers
CHUNK = 128
#: numbers in the table of positives' distances
TABLE = 2**23
_EXTREMES, _PAIRS, _SIMILARITY, _TRIPLETS = range(4)  # as in dense_kernels
_BATCH_ALL, _, _MULTI_SIMILARITY = range(3)  # mining.SETS
_COSINE = 2  # chosen.METRICS


class Side(NamedTuple):
    """A matrix of rows: as it is, in parts, and its squares (triton.parted)."""

    x: Tensor
    parts: Tensor
    square: Tensor


class Pairs(NamedTuple):
    """Anchors and references of a call, both sorted by label, and what launches share."""

    x: Side
    y: Side
    classes: tuple[Tensor, ...]  # first, last, own [N], exist []
    metric: int

    @property
    def tiles(self) -> runtime.ScoreTiles:
        return runtime.score_tiles(self.x.x.shape[1], PARTS)

    def marks(self) -> Tensor:
        """[row tiles, column tiles], 1 where a gradient is."""
        t = self.tiles
        return self.classes[0].new_zeros((-(-len(self.x.x) // t.rows), -(-len(self.y.x) // t.columns)), dtype=torch.uint8)


def small_tiles(t: runtime.ScoreTiles, fewer_rows: bool = False) -> runtime.ScoreTiles:
    """Where a thread's registers hold more than scores: by what the compiler spills."""
    return t._replace(rows=t.rows // 2 if fewer_rows else t.rows, columns=t.columns // 2)


class Rule(NamedTuple):
    """What a launch sums: the constants of row_sums and gradient, and what belongs to anchors."""

    rule: int
    a: Tensor | None = None  # [N]
    b: Tensor | None = None
    near: Tensor | None = None
    far: Tensor | None = None
    table: Tensor | None = None  # [taken, N]
    active: Tensor | None = None
    start: int = 0
    taken: int = 0
    alpha: float = 0.0
    beta: float = 0.0
    epsilon: float = 0.0
    margin: float = 0.0
    sign: float = 1.0
    mining: int = 0

    def numbers(self) -> tuple:
        return self.start, self.taken, self.alpha, self.beta, self.epsilon, self.margin, self.sign

    def rows(self, like: Tensor) -> tuple[Tensor, ...]:
        """A kernel reads no pointer that its rule does not need, but takes one."""
        return tuple(like if t is None else t for t in (self.a, self.b, self.near, self.far))

    def tables(self, like: Tensor) -> tuple[Tensor, ...]:
        return tuple(like if t is None else t for t in (self.table, self.active))


def pairs(x: Tensor, y: Tensor | None, first: Tensor, last: Tensor, own: Tensor, exist: Tensor, metric: int) -> Pairs:
    depth = runtime.score_tiles(x.shape[1], PARTS).depth
    x, y = (None if t is None else t.contiguous() for t in (x, y))
    mine = side(x, metric, depth)
    return Pairs(mine, mine if y is None else side(y, metric, depth), (first, last, own, exist), metric)


def side(x: Tensor, metric: int, depth: int) -> Side:
    return Side(x, *parted(x, PARTS, depth, metric != _COSINE))


def _row_sums(p: Pairs, rule: Rule, marks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums [parts, 2, N] and counts [2, N] of row_sums (dense_kernels.py)."""
    from . import dense_kernels as kernels

    t = p.tiles
    rows, columns = len(p.x.x), len(p.y.x)
    row_tiles = -(-rows // t.rows)
    parts = runtime.splits(row_tiles, columns, t.columns, p.x.x.device)
    sums = p.x.x.new_zeros((parts, 2, rows))
    found = p.classes[0].new_zeros((parts, 2, rows))
    like = p.x.square
    if rows:
        kernels.row_sums[(row_tiles, parts)](
            p.x.parts, p.y.parts, p.x.square, p.y.square, *p.classes, *rule.rows(like), *rule.tables(like),
            found if marks is None else marks, sums, found, rows, columns, p.x.parts.shape[2], runtime.share(columns, parts, t.columns),
            -(-columns // t.columns), *rule.numbers(),
            RULE=rule.rule, MINING=rule.mining, METRIC=p.metric, **t.options(PARTS),
        )  # fmt: skip
    return sums, found.sum(0)


def _gradients(p: Pairs, rule: Rule, up: tuple[Tensor, Tensor], marks: Tensor, want: tuple[bool, bool]) -> list[Tensor]:
    """dx and dy of the launch's losses where they are wanted (else empty); in batch dx is both sides', and dy empty."""
    in_batch = p.x is p.y
    dx = _gradient(p, rule, up, marks, False) if want[0] else p.x.x.new_empty(0)
    dy = _gradient(p, rule, up, marks, True) if want[0 if in_batch else 1] else p.x.x.new_empty(0)
    return [dx + dy if want[0] else dx, p.x.x.new_empty(0)] if in_batch else [dx, dy]


def _gradient(p: Pairs, rule: Rule, up: tuple[Tensor, Tensor], marks: Tensor, transposed: bool) -> Tensor:
    """d/dx_i of the launch's losses, or TRANSPOSED d/dy_j: sum_j w_ij (x_i - y_j), of the cosine -sum_j w_ij y_j."""
    from . import dense_kernels as kernels

    t = small_tiles(p.tiles, transposed and not runtime.architecture(p.x.x.device.index or 0).blackwell)
    mine, other = (p.y, p.x) if transposed else (p.x, p.y)
    rows, columns, width = len(mine.x), len(other.x), mine.parts.shape[2]
    row_tiles, chunks = -(-rows // t.rows), -(-width // CHUNK)
    parts = runtime.splits(row_tiles * chunks, columns, t.columns, mine.x.device, runtime.SUMS // PRODUCTS)
    out, total = mine.x.new_empty((parts, rows, width)), mine.x.new_empty((parts, rows))
    like = mine.square
    kernels.gradient[(row_tiles, parts, chunks)](
        mine.parts, other.parts, mine.square, other.square, *p.classes, *up, *rule.rows(like), *rule.tables(like), marks, out, total,
        rows, columns, width, runtime.share(columns, parts, t.columns), marks.shape[1], *rule.numbers(),
        RULE=rule.rule, MINING=rule.mining, METRIC=p.metric, TRANSPOSED=transposed, CHUNK=min(CHUNK, runtime.power_of_two(width)),
        MARK_ROWS=p.tiles.rows, MARK_COLUMNS=p.tiles.columns, **t.options(PARTS),
    )  # fmt: skip
    out = runtime.joined(out)[:, : mine.x.shape[1]]
    return -out if p.metric == _COSINE else runtime.joined(total)[:, None] * mine.x - out


def pair_hinges(
    x: Tensor, y: Tensor | None, first: Tensor, last: Tensor, own: Tensor, exist: Tensor, levels: Tensor, metric: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [N, 2] and counts [N, 4] of pairs.pair_hinges, and marks."""
    p = pairs(x, y, first, last, own, exist, metric)
    marks = p.marks()
    a, b = levels.unbind(-1)
    sums, active = _row_sums(p, Rule(_PAIRS, a.contiguous(), b.contiguous()), marks)
    return sums.sum(0).T.contiguous(), torch.stack([*numbers(p), *active], -1), marks


def pair_hinges_grad(
    grad: Tensor, marks: Tensor, x: Tensor, y: Tensor | None, first: Tensor, last: Tensor, own: Tensor, exist: Tensor, levels: Tensor,
    metric: int, want_x: bool, want_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    p = pairs(x, y, first, last, own, exist, metric)
    a, b, *up = (t.contiguous() for t in (*levels.unbind(-1), *grad.unbind(-1)))
    return tuple(_gradients(p, Rule(_PAIRS, a, b), tuple(up), marks, (want_x, want_y)))


def numbers(p: Pairs) -> tuple[Tensor, Tensor]:
    """How many positives and negatives each anchor has [N]."""
    first, last, own, exist = p.classes
    inside = (own >= first) & (own < last)
    outside = (own >= 0) & (own < exist) & ~inside
    return last - first - inside.long(), exist - (last - first) - outside.long()


class Extremes(NamedTuple):
    far: Tensor  # [N] of the positives, -inf: none
    near: Tensor  # [N] of the negatives, inf: none
    poisoned: Tensor  # [N] has both kinds, and a NaN among its distances


def _extremes(p: Pairs) -> Extremes:
    sums, found = _row_sums(p, Rule(_EXTREMES))
    far, near = sums.amax(0)
    return Extremes(far.contiguous(), -near, (found[0] > 0) & _both(p))


def _both(p: Pairs) -> Tensor:
    positives, negatives = numbers(p)
    return (positives > 0) & (negatives > 0)


def multi_similarity(
    x: Tensor, y: Tensor | None, first: Tensor, last: Tensor, own: Tensor, exist: Tensor, alpha: float, beta: float, base: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses [N, 1], no counts [N, 0], the levels of the slopes [2, N], the extremes [2, N], and marks.

    With d = 1 - s the exponents are alpha (d - 1 + base) and beta (1 - base - d), the largest of them known from the extremes.
    """
    p = pairs(x, y, first, last, own, exist, _COSINE)
    marks, extremes = p.marks(), _extremes(p)
    far, near, poisoned = extremes
    sums, _ = _row_sums(p, Rule(_SIMILARITY, near=near, far=far, alpha=alpha, beta=beta, epsilon=epsilon), marks)
    pull, push = sums.sum(0)
    middle = 1 - base
    pull, push = (_log1p_exp(top, total) for top, total in ((alpha * (far - middle), pull), (beta * (middle - near), push)))
    loss = pull / alpha + push / beta
    loss = torch.where(poisoned, torch.nan, loss)
    # a row of one kind keeps no pair, so its levels are not read
    levels = torch.stack([middle + pull / alpha, middle - push / beta])
    return loss[:, None], first.new_empty((len(x), 0)), levels, torch.stack([near, far]), marks


def _log1p_exp(top: Tensor, total: Tensor) -> Tensor:
    """log(1 + e^top total), 0 where the total is 0."""
    some = total > 0
    log = torch.where(some, top + torch.where(some, total, 1.0).log(), -torch.inf)
    return torch.logaddexp(log, torch.zeros_like(log))


def multi_similarity_grad(
    grad: Tensor, levels: Tensor, extremes: Tensor, marks: Tensor, x: Tensor, y: Tensor | None, first: Tensor, last: Tensor, own: Tensor,
    exist: Tensor, alpha: float, beta: float, base: float, epsilon: float, want_x: bool, want_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    p = pairs(x, y, first, last, own, exist, _COSINE)
    up = grad[:, 0].contiguous()
    rule = Rule(_SIMILARITY, *levels.unbind(0), *extremes.unbind(0), alpha=alpha, beta=beta, epsilon=epsilon)
    return tuple(_gradients(p, rule, (up, up), marks, (want_x, want_y)))


def triplet_hinges(
    x: Tensor, y: Tensor | None, first: Tensor, last: Tensor, own: Tensor, exist: Tensor, metric: int, positives: int, mining: int,
    sign: float, margin: float, epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses [N, 1], counts [N, 2] of triplets mined and active, the extremes [2, N], the first table with its active negatives, marks."""
    p = pairs(x, y, first, last, own, exist, metric)
    extremes = x.new_zeros((2, len(x)))
    if mining == _MULTI_SIMILARITY:
        far, near, _ = _extremes(p)
        extremes = torch.stack([near, far])
    rule = _triplet_rule(extremes, mining, sign, margin, epsilon)
    marks, kept = p.marks(), []
    loss, number = x.new_zeros((2, len(x))), first.new_zeros((2, len(x)))
    for start, taken in _rounds(p, positives):
        current = with_table(p, rule, start, taken)
        sums, found = _row_sums(p, current, marks)
        loss, number = loss + sums.sum(0), number + found
        kept = kept or [current.table, current.active]
    of_positives, of_negatives = numbers(p)
    both = (of_positives > 0) & (of_negatives > 0)
    mined, active = number
    if mining == _BATCH_ALL:
        mined = of_positives.clamp_max(positives) * of_negatives
    counts = torch.where(both, torch.stack([mined, active]), 0)
    return torch.where(both, loss.sum(0), 0.0)[:, None], counts.T.contiguous(), extremes, *kept, marks


def _triplet_rule(extremes: Tensor, mining: int, sign: float, margin: float, epsilon: float) -> Rule:
    near, far = extremes
    return Rule(_TRIPLETS, near=near, far=far, epsilon=epsilon, margin=margin, sign=sign, mining=mining)


def _rounds(p: Pairs, positives: int) -> list[tuple[int, int]]:
    """First positive and number of positives of each table."""
    positives, taken = min(positives, len(p.y.x)), _taken(len(p.x.x), len(p.y.x), positives)
    return [(start, min(taken, positives - start)) for start in range(0, positives, taken)]


def _taken(n: int, m: int, positives: int) -> int:
    """Positives in a table."""
    return max(1, min(positives, m, TABLE // max(n, 1)))


def with_table(p: Pairs, rule: Rule, start: int, taken: int) -> Rule:
    """The rule with the distances of positives number `start` ..., and room for their active negatives."""
    from . import dense_kernels as kernels

    t = small_tiles(p.tiles)
    rows, columns = len(p.x.x), len(p.y.x)
    table, active = p.x.x.new_empty((taken, rows)), p.classes[0].new_zeros((taken, rows), dtype=torch.int32)
    first, last, own, _ = p.classes
    if rows:
        kernels.positive_distances[(-(-rows // t.rows),)](
            p.x.parts, p.y.parts, p.x.square, p.y.square, first, last, own, rule.near, table, rows, columns, p.x.parts.shape[2],
            start, taken, rule.epsilon, MINING=rule.mining, METRIC=p.metric, **t.options(PARTS),
        )  # fmt: skip
    return rule._replace(table=table, active=active, start=start, taken=taken)


def triplet_hinges_grad(
    grad: Tensor, extremes: Tensor, table: Tensor, active: Tensor, marks: Tensor, x: Tensor, y: Tensor | None, first: Tensor, last: Tensor,
    own: Tensor, exist: Tensor, metric: int, positives: int, mining: int, sign: float, margin: float, epsilon: float, want_x: bool,
    want_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    p = pairs(x, y, first, last, own, exist, metric)
    rule = _triplet_rule(extremes, mining, sign, margin, epsilon)
    up = grad[:, 0].contiguous()
    total = None
    for start, taken in _rounds(p, positives):
        if start == 0:
            current = rule._replace(table=table, active=active, taken=taken)
        else:  # what was active with later positives was not kept
            current = with_table(p, rule, start, taken)
            _row_sums(p, current, torch.empty_like(marks))
        parts = _gradients(p, current, (up, up), marks, (want_x, want_y))
        total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
    return tuple(total)


def _pair_hinges_fake(x, y, first, last, own, exist, levels, metric):
    return x.new_empty(len(x), 2), first.new_empty(len(x), 4), _fake_marks(x, y)


def _multi_similarity_fake(x, y, first, *rest):
    n = len(x)
    return x.new_empty(n, 1), first.new_empty(n, 0), x.new_empty(2, n), x.new_empty(2, n), _fake_marks(x, y)


def _triplet_hinges_fake(x, y, first, last, own, exist, metric, positives, *rest):
    n, m = len(x), len(x if y is None else y)
    taken = _taken(n, m, positives)
    table = x.new_empty(taken, n), x.new_empty(taken, n, dtype=torch.int32)
    return x.new_empty(n, 1), first.new_empty(n, 2), x.new_empty(2, n), *table, _fake_marks(x, y)


def _fake_marks(x: Tensor, y: Tensor | None) -> Tensor:
    t = runtime.score_tiles(x.shape[1], PARTS)
    shape = -(-len(x) // t.rows), -(-len(x if y is None else y) // t.columns)
    return x.new_empty(shape, dtype=torch.uint8)


for _function, _fake, _gradient_of, _kept in (
    (pair_hinges, _pair_hinges_fake, pair_hinges_grad, 1),
    (triplet_hinges, _triplet_hinges_fake, triplet_hinges_grad, 4),
    (multi_similarity, _multi_similarity_fake, multi_similarity_grad, 3),
):
    runtime.register(_function.__name__, _function, _fake)
    runtime.register(_gradient_of.__name__, _gradient_of, gradients_fake(_kept))
