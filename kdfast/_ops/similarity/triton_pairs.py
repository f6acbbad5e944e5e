"""impl="triton" of losses over all pairs of two sides: slabs of pairs, launches, registration in torch.ops.kdfast_triton.

triton_pairs_kernels.py has the kernels, which take rows of any width. A backward pass goes slab by slab: the weights of its pairs are
stored, in 16 bits for inputs of 16 bits, and multiply first one side's rows and then the other's.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._core import triton_runtime as runtime
from . import triton
from .triton import KERNELS, PRECISIONS

STATISTICS_PAIRS = 1 << 28  # of a launch: what it leaves of a pair is 2^-3 bytes
WEIGHTS_PAIRS = 1 << 24  # of a slab: 32 MB in 16 bits, most of which stay in the L2 of an H200; 4096 x 4096 fill its multiprocessors


missing = runtime.missing


def refuses(**facts) -> str | None:
    return triton.refuses(**(facts | {"width": 0}))


class Tiles(NamedTuple):
    """Of scores, and of weights and their products with rows: rows, columns, depth of a product; warps, stages of the pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tiles(dtype: torch.dtype, narrow: bool) -> Tiles:
    """On every GPU from compute capability 8.0: three stages are 96 KB of shared memory, a tile's scores 64 registers of a thread.

    `narrow`: half the columns, where a column brings so much to its pairs that registers would spill.
    """
    if runtime.INTERPRETED:
        return Tiles(32, 16 if narrow else 32, 16, 4, 1)
    return Tiles(128, 64 if narrow else 128, 32 if dtype == torch.float32 else 64, 8, 3)


class Format(NamedTuple):
    """How operands of a dtype are multiplied."""

    scores: object  # Triton's dtype for the product of two rows
    weights: torch.dtype  # of stored weights; fp16 has no room for an upstream gradient, which tf32 has
    precision: str  # of float32 products


def format_of(dtype: torch.dtype, precision: int) -> Format:
    import triton.language as tl

    if dtype == torch.float16:
        return Format(tl.float16, torch.float32, "tf32")
    if dtype == torch.bfloat16 or precision == KERNELS.products["bf16"]:
        return Format(tl.bfloat16, torch.bfloat16, "ieee")
    return Format(tl.float32, torch.float32, PRECISIONS[precision])


class Slab(NamedTuple):
    """A part of the pairs: several entries of the batch, or a part of one."""

    entries: slice
    rows: slice
    columns: slice

    def of_rows(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x[self.entries, self.rows] for x in tensors)

    def of_columns(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x[self.entries, self.columns] for x in tensors)


def slabs(batch: int, rows: int, columns: int, most: int, shape: Tiles) -> Iterator[Slab]:
    """The pairs of `batch` entries in parts of about `most`, as nearly square as they come, in whole tiles."""
    padded = _whole(rows, shape.rows) * _whole(columns, shape.columns)
    if padded == 0:
        return
    if padded <= most:
        step = most // padded
        for b in range(0, batch, step):
            yield Slab(slice(b, min(b + step, batch)), slice(0, rows), slice(0, columns))
        return
    high = min(rows, max(math.isqrt(most), most // _whole(columns, shape.columns)) // shape.rows * shape.rows)
    wide = min(columns, most // _whole(high, shape.rows) // shape.columns * shape.columns)
    for b in range(batch):
        for r in range(0, rows, high):
            for c in range(0, columns, wide):
                yield Slab(slice(b, b + 1), slice(r, min(r + high, rows)), slice(c, min(c + wide, columns)))


def _whole(count: int, tile: int) -> int:
    return -(-count // tile) * tile


class Part(NamedTuple):
    """A slab's operands and what its launches share."""

    x: Tensor  # [b, r, D]
    y: Tensor  # [b, c, D]
    tiles: Tiles
    format: Format

    @property
    def grid(self) -> tuple[int, int, int]:
        """Entries of the batch, tiles of rows, tiles of columns."""
        return len(self.x), -(-self.x.shape[1] // self.tiles.rows), -(-self.y.shape[1] // self.tiles.columns)

    @property
    def programs(self) -> tuple[int]:
        return (math.prod(self.grid),)

    @property
    def sizes(self) -> tuple[int, ...]:
        """rows, columns, width, batch strides, entries."""
        (entries, rows, width), columns = self.x.shape, self.y.shape[1]
        return rows, columns, width, self.x.stride(0), self.y.stride(0), entries

    @property
    def options(self) -> dict:
        rows, columns, depth, warps, stages = self.tiles
        return {
            "ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "EVEN": self.x.shape[2] % depth == 0, "DOT": self.format.scores,
            "PRECISION": self.format.precision, "STAGES": stages, "INTERPRETED": runtime.INTERPRETED, "num_warps": warps,
        }  # fmt: skip

    def of_rows(self) -> Tensor:
        """A number for each row and tile of columns."""
        entries, _, column_tiles = self.grid
        return self.x.new_empty((column_tiles, entries, self.x.shape[1]), dtype=torch.float32)

    def of_columns(self) -> Tensor:
        entries, row_tiles, _ = self.grid
        return self.x.new_empty((row_tiles, entries, self.y.shape[1]), dtype=torch.float32)

    @property
    def leading(self) -> tuple[int, int]:
        """Strides of the weights' rows and entries."""
        _, row_tiles, column_tiles = self.grid
        columns = column_tiles * self.tiles.columns
        return columns, row_tiles * self.tiles.rows * columns

    def weights(self) -> Tensor:
        columns, entry = self.leading
        return self.x.new_empty((len(self.x), entry // columns, columns), dtype=self.format.weights)


def parts(x: Tensor, y: Tensor, precision: int, most: int, *, narrow: bool = False) -> Iterator[tuple[Slab, Part]]:
    shape, format = tiles(x.dtype, narrow), format_of(x.dtype, precision)
    for slab in slabs(len(x), x.shape[1], y.shape[1], most, shape):
        yield slab, Part(*slab.of_rows(x), *slab.of_columns(y), shape, format)


class Running(NamedTuple):
    """Sums of exponentials total 2^top, [B, N] or [B, M], and their logarithms, which grow slab by slab."""

    top: Tensor
    total: Tensor
    lse: Tensor
    low: Tensor

    def add(self, at: tuple[slice, slice], top: Tensor, total: Tensor) -> None:
        """Parts [P, b, n] for the entries and rows `at`."""
        from .triton_pairs_kernels import merge_statistics

        kept, count, each = [x[at] for x in self], top[0].numel(), 128
        merge_statistics[(-(-count // each),)](top, total, *kept, count, len(top), PARTS=32, COUNT=each, num_warps=4)


def nothing_yet(like: Tensor) -> Running:
    """Of the rows of `like` [B, N, D]."""
    zeros = like.new_zeros(like.shape[:2], dtype=torch.float32)
    nothing = torch.full_like(zeros, -math.inf)
    return Running(nothing, zeros, nothing.clone(), zeros.clone())


def add_products(weights: Tensor, part: Part, out: Tensor, *, transposed: bool) -> None:
    """out [b, n, D] float32 grows by the rows of y times a slab's weights; `transposed`: by the rows of x, for its columns."""
    import triton.language as tl

    from .triton_pairs_kernels import weighted_sums

    values = part.x if transposed else part.y
    (entries, count, width), inner = out.shape, values.shape[1]
    _, _, depth, warps, stages = part.tiles
    high, wide = part.tiles.columns if transposed else part.tiles.rows, min(part.tiles.rows, runtime.power_of_two(width))
    programs = -(-width // wide) * -(-count // high) * entries
    splits = runtime.splits(programs, inner, depth, out.device)
    to = out if splits == 1 else out.new_empty((splits, *out.shape))
    weighted_sums[(programs * splits,)](
        weights, values, to, count, inner, width, weights.stride(1), weights.stride(0), values.stride(0), entries,
        runtime.share(inner, splits, depth), TRANSPOSED=transposed, ADD=splits == 1, EVEN=width % wide == 0, ROWS=high, WIDTH=wide,
        DEPTH=depth, DOT=tl.bfloat16 if weights.dtype == torch.bfloat16 else tl.float32, PRECISION=part.format.precision, STAGES=stages,
        INTERPRETED=runtime.INTERPRETED, num_warps=warps,
    )  # fmt: skip
    if splits > 1:
        out.add_(to.sum(0))


class Sides(NamedTuple):
    """Gradients, grown slab by slab: what is not wanted is None."""

    x: Tensor | None  # [B, N, D]
    y: Tensor | None  # [B, M, D]
    slope: Tensor  # [B, N], sums of the rows' weights
    moment: Tensor  # [B, N], and of them times the scores

    @property
    def products(self) -> bool:
        return self.x is not None or self.y is not None

    def add(self, slab: Slab, part: Part, weights: Tensor, slope: Tensor, moment: Tensor) -> None:
        for total, more in ((self.slope, slope), (self.moment, moment)):
            slab.of_rows(total)[0].add_(more.sum(0))
        if self.x is not None:
            add_products(weights, part, *slab.of_rows(self.x), transposed=False)
        if self.y is not None:
            add_products(weights, part, *slab.of_columns(self.y), transposed=True)

    def found(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return tuple(self.slope.new_empty(0) if x is None else x for x in self)


def no_sums(x: Tensor, y: Tensor, want_x: bool, want_y: bool) -> Sides:
    sides = (torch.zeros_like(t, dtype=torch.float32) if want else None for t, want in ((x, want_x), (y, want_y)))
    slope = x.new_zeros(x.shape[:2], dtype=torch.float32)
    return Sides(*sides, slope, slope.clone())


def symmetric_lse(
    x: Tensor, y: Tensor, scale: Tensor, x_labels: Tensor | None, y_labels: Tensor | None, precision: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row_lse [B, N], column_lse [B, M] and what both rounded off, of x [B, N, D], y [B, M, D], scale [B, N] and labels [B, N], [B, M]."""
    rows, columns = nothing_yet(x), nothing_yet(y)
    for slab, part in parts(x, y, precision, STATISTICS_PAIRS):
        of_rows, of_columns = (part.of_rows(), part.of_rows()), (part.of_columns(), part.of_columns())
        _statistics(slab, part, scale, x_labels, y_labels, None, of_rows, of_columns)
        rows.add((slab.entries, slab.rows), *of_rows)
        columns.add((slab.entries, slab.columns), *of_columns)
    return rows.lse, columns.lse, rows.low, columns.low


def _statistics(slab, part, scale, x_labels, y_labels, classes, of_rows, others) -> None:
    """`others`: statistics of the columns, or, with `classes`, of the others of each row's class."""
    from .triton_pairs_kernels import symmetric_statistics

    labels = (*slab.of_rows(x_labels), *slab.of_columns(y_labels), classes)
    unused = (scale, scale)
    symmetric_statistics[part.programs](
        part.x, part.y, *slab.of_rows(scale), *(scale if x is None else x for x in labels), *of_rows,
        *(others if classes is None else unused), *(unused if classes is None else others),
        *part.sizes, slab.rows.start, slab.columns.start, LABELLED=x_labels is not None, CLASSES=classes is not None, **part.options,
    )  # fmt: skip


def symmetric_gradients(
    row_g: Tensor,
    column_g: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    row_low: Tensor,
    column_low: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_labels: Tensor | None,
    y_labels: Tensor | None,
    want_x: bool,
    want_y: bool,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy (empty where not wanted) and dscale [B, N] in float32 of sum row_g row_lse + sum column_g column_lse."""
    row_side, column_side = (row_g, row_lse, row_low), (column_g, column_lse, column_low)
    dx, dy, _, dscale = _gradients(x, y, scale, x_labels, y_labels, None, None, row_side, column_side, want_x, want_y, precision)
    return dx, dy, dscale


def _gradients(x, y, scale, x_labels, y_labels, classes, share, row_side, column_side, want_x, want_y, precision) -> tuple[Tensor, ...]:
    """Sides.found; each side is (g, lse, low)."""
    from .triton_pairs_kernels import symmetric_weights

    sums = no_sums(x, y, want_x, want_y)
    narrow = classes is not None or runtime.architecture(x.device.index or 0) >= 100
    for slab, part in parts(x, y, precision, WEIGHTS_PAIRS, narrow=narrow):
        weights, slope, moment = part.weights() if sums.products else scale, part.of_rows(), part.of_rows()
        given = (*slab.of_rows(x_labels), *slab.of_columns(y_labels), classes, *slab.of_rows(share))
        symmetric_weights[part.programs](
            part.x, part.y, *slab.of_rows(scale), *(scale if x is None else x for x in given),
            *slab.of_rows(*row_side), *slab.of_columns(*column_side), weights, slope, moment,
            *part.sizes, slab.rows.start, slab.columns.start, *part.leading, LABELLED=x_labels is not None, CLASSES=classes is not None,
            WANTED=sums.products, **part.options,
        )  # fmt: skip
        sums.add(slab, part, weights, slope, moment)
    return sums.found()


def sigmoid_losses(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, positive: Tensor, precision: int) -> Tensor:
    """Losses [B, N] of x [B, N, D], y [B, M, D], scale, shift and positive [B, N]."""
    losses = torch.zeros_like(scale)
    for slab, part in parts(x, y, precision, STATISTICS_PAIRS):
        of_rows = part.of_rows()
        _sigmoid(slab, part, scale, shift, positive, None, of_rows, scale, scale, scale, wanted=False)
        slab.of_rows(losses)[0].add_(of_rows.sum(0))
    return losses


def _sigmoid(slab, part, scale, shift, positive, g, loss, weights, slope, moment, *, wanted: bool) -> None:
    from .triton_pairs_kernels import sigmoid_pairs

    sigmoid_pairs[part.programs](
        part.x, part.y, *slab.of_rows(scale, shift, positive, scale if g is None else g), loss, weights, slope, moment,
        *part.sizes, slab.columns.start, *part.leading, GRADIENT=g is not None, WANTED=wanted, **part.options,
    )  # fmt: skip


def sigmoid_gradients(
    g: Tensor, x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, positive: Tensor, want_x: bool, want_y: bool, precision: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dy (empty where not wanted), dshift and dscale [B, N] in float32 of the losses' sum weighted by g [B, N]."""
    sums = no_sums(x, y, want_x, want_y)
    for slab, part in parts(x, y, precision, WEIGHTS_PAIRS):
        weights, slope, moment = part.weights() if sums.products else scale, part.of_rows(), part.of_rows()
        _sigmoid(slab, part, scale, shift, positive, g, slope, weights, slope, moment, wanted=sums.products)
        sums.add(slab, part, weights, slope, moment)
    return sums.found()


def sup_con(x: Tensor, scale: Tensor, labels: Tensor, mean: bool, precision: int) -> tuple[Tensor, Tensor]:
    """Losses [N] or their mean, and [3, N]: lse, its low digits, 1 / others of the class (0: none), of x [N, D], scale [], labels [N]."""
    x, of_rows = x[None], scale.expand(1, len(x)).contiguous()
    rows, same, others = nothing_yet(x), torch.zeros_like(of_rows), torch.zeros_like(of_rows)
    classes = _classes(labels)
    for slab, part in parts(x, x, precision, STATISTICS_PAIRS, narrow=True):
        tops, of_class = (part.of_rows(), part.of_rows()), (part.of_rows(), part.of_rows())
        _statistics(slab, part, of_rows, None, None, classes, tops, of_class)
        rows.add((slab.entries, slab.rows), *tops)
        for total, more in zip((same, others), of_class, strict=True):
            slab.of_rows(total)[0].add_(more.sum(0))
    inverse = torch.where(others > 0, 1 / others, 0.0)
    losses = torch.where(others > 0, (rows.lse - scale * same * inverse) + rows.low, 0.0)[0]
    if mean:
        losses = losses.sum() / (others > 0).sum().clamp(min=1)
    return losses, torch.cat((rows.lse, rows.low, inverse))


def _classes(labels: Tensor) -> Tensor:
    """A class by the place of its first label in order: 32 bits, for a tile's columns are in registers."""
    return torch.searchsorted(labels.sort().values, labels).to(torch.int32)


def sup_con_grad(
    g: Tensor, statistics: Tensor, x: Tensor, scale: Tensor, labels: Tensor, want_x: bool, want_scale: bool, precision: int
) -> list[Tensor]:
    """The gradients in x and scale that are wanted; g is [N], or [] of the mean."""
    lse, low, share = statistics[:, None].unbind()
    counted = share > 0
    g = torch.where(counted, g / counted.sum().clamp(min=1) if g.dim() == 0 else g, 0.0)
    side, sides, of_rows = (g, lse, low), x[None], scale.expand(1, len(x)).contiguous()
    dx, _, _, moment = _gradients(sides, sides, of_rows, None, None, _classes(labels), share, side, side, want_x, False, precision)
    found = [dx[0].to(x.dtype)] if want_x else []
    return [*found, moment.sum() / 2] if want_scale else found  # a pair's weight is that of both of its rows


# ---- shapes for the compiler --------------------------------------------------------------------------------------------------


def _symmetric_lse_fake(x, y, *_):
    sides = [t.new_empty(t.shape[:2], dtype=torch.float32) for t in (x, y)]
    return *sides, *map(torch.empty_like, sides)


def _sides_fake(x, y, scale, want_x, want_y):
    return *(scale.new_empty(t.shape if want else (0,)) for t, want in ((x, want_x), (y, want_y))), torch.empty_like(scale)


def _symmetric_gradients_fake(row_g, column_g, row_lse, column_lse, row_low, column_low, x, y, scale, _x, _y, want_x, want_y, _):
    return _sides_fake(x, y, scale, want_x, want_y)


def _sigmoid_gradients_fake(g, x, y, scale, shift, positive, want_x, want_y, _):
    return *_sides_fake(x, y, scale, want_x, want_y), torch.empty_like(scale)


def _sup_con_fake(x, scale, labels, mean, _):
    return scale.new_empty(() if mean else x.shape[:1]), scale.new_empty((3, len(x)))


def _sup_con_grad_fake(g, statistics, x, scale, labels, want_x, want_scale, _):
    return [torch.empty_like(t) for t, wanted in ((x, want_x), (scale, want_scale)) if wanted]


for _name, _function, _fake in (
    ("symmetric_lse", symmetric_lse, _symmetric_lse_fake),
    ("symmetric_gradients", symmetric_gradients, _symmetric_gradients_fake),
    ("sigmoid_pairs", sigmoid_losses, lambda x, y, scale, *_: torch.empty_like(scale)),
    ("sigmoid_gradients", sigmoid_gradients, _sigmoid_gradients_fake),
    ("sup_con", sup_con, _sup_con_fake),
    ("sup_con_grad", sup_con_grad, _sup_con_grad_fake),
):
    runtime.register(_name, _function, _fake)
