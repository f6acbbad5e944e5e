"""impl="triton" where weights of pairs are stored: slabs of pairs, tiles, statistics that grow slab by slab, products of a slab's weights.

pairs_kernels.py has the kernels, which take rows of any width. A backward pass stores the weights of a slab's pairs, in 16 bits for
inputs of 16 bits, and multiplies first one side's rows by them and then the other's.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...._core import triton_runtime as runtime
from ...._core.architectures import Architecture
from .formats import KERNELS, products

STATISTICS_PAIRS = 1 << 28  # of a launch: what it leaves of a pair is 2^-3 bytes
HALF_PAIRS = 1 << 26  # of a launch that leaves out half: programs that have nothing to do take their time as well
WEIGHTS_PAIRS = 1 << 24  # of a slab: 32 MB in 16 bits, most of which stay in the L2 of an H200; 4096 x 4096 fill its multiprocessors


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


def format_of(dtype: torch.dtype, precision: int, arch: Architecture) -> Format:
    import triton.language as tl

    if dtype == torch.float16:
        return Format(tl.float16, torch.float32, products(KERNELS.products["tf32"], arch))
    if dtype == torch.bfloat16 or precision == KERNELS.products["bf16"]:
        return Format(tl.bfloat16, torch.bfloat16, "ieee")
    return Format(tl.float32, torch.float32, products(precision, arch))


class Slab(NamedTuple):
    """A part of the pairs: several entries of the batch, or a part of one."""

    entries: slice
    rows: slice
    columns: slice

    def of_rows(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x[self.entries, self.rows] for x in tensors)

    def of_columns(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x[self.entries, self.columns] for x in tensors)

    @property
    def on_diagonal(self) -> bool:
        """Of one matrix's rows with one another: whether both sides are the same ones."""
        return self.rows == self.columns


def cut(batch: int, rows: int, columns: int, most: int, shape: Tiles) -> Iterator[Slab]:
    """The pairs of `batch` entries in parts of about `most`, at least a tile, as nearly square as they come, in whole tiles."""
    padded = _whole(rows, shape.rows) * _whole(columns, shape.columns)
    if padded == 0:
        return
    if padded <= most:
        step = most // padded
        for b in range(0, batch, step):
            yield Slab(slice(b, min(b + step, batch)), slice(0, rows), slice(0, columns))
        return
    high = min(rows, max(shape.rows, max(math.isqrt(most), most // _whole(columns, shape.columns)) // shape.rows * shape.rows))
    wide = min(columns, max(shape.columns, most // _whole(high, shape.rows) // shape.columns * shape.columns))
    for b in range(batch):
        for r in range(0, rows, high):
            for c in range(0, columns, wide):
                yield Slab(slice(b, b + 1), slice(r, min(r + high, rows)), slice(c, min(c + wide, columns)))


def cut_half(rows: int, most: int, shape: Tiles) -> Iterator[Slab]:
    """The pairs of one matrix's rows with one another in squares of about `most`, those below the diagonal left out."""
    tile = max(shape.rows, shape.columns)
    side = max(tile, math.isqrt(most) // tile * tile)
    parts = [slice(first, min(first + side, rows)) for first in range(0, rows, side)]
    for i, of_rows in enumerate(parts):
        for of_columns in parts[i:]:
            yield Slab(slice(0, 1), of_rows, of_columns)


def _whole(count: int, tile: int) -> int:
    return -(-count // tile) * tile


class Part(NamedTuple):
    """A slab's operands and what its launches share."""

    x: Tensor  # [b, r, D]
    y: Tensor  # [b, c, D]
    tiles: Tiles
    format: Format
    crowded: bool = False  # whether operands are in registers, as before Hopper, and three products make them so many that they would spill

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
            "PRECISION": self.format.precision, "INTERPRETED": runtime.INTERPRETED, **runtime.pipeline(warps, stages),
        }  # fmt: skip

    def of_rows(self) -> Tensor:
        """A number for each row and tile of columns."""
        entries, _, column_tiles = self.grid
        return self.x.new_empty((column_tiles, entries, self.x.shape[1]), dtype=torch.float32)

    def of_columns(self) -> Tensor:
        entries, row_tiles, _ = self.grid
        return self.x.new_empty((row_tiles, entries, self.y.shape[1]), dtype=torch.float32)

    def of_probabilities(self) -> "Part":
        """With weights of at most 1, for which fp16 has room."""
        half = self.x.dtype == torch.float16
        return self._replace(format=self.format._replace(weights=torch.float16)) if half else self

    @property
    def leading(self) -> tuple[int, int]:
        """Strides of the weights' rows and entries."""
        _, row_tiles, column_tiles = self.grid
        columns = column_tiles * self.tiles.columns
        return columns, row_tiles * self.tiles.rows * columns

    def depth_of_sums(self, weights: torch.dtype) -> int:
        """Of their products with rows: fp16 rows may have weights twice as wide; FMA units' operands of longer steps would spill."""
        short = weights == torch.float32 and (self.crowded or self.format.precision == "ieee")
        return min(self.tiles.depth, 16 if short else 128 // weights.itemsize)

    def weights(self) -> Tensor:
        columns, entry = self.leading
        return self.x.new_empty((len(self.x), entry // columns, columns), dtype=self.format.weights)


def parts(x: Tensor, y: Tensor, precision: int, most: int, *, narrow: bool = False, half: bool = False) -> Iterator[tuple[Slab, Part]]:
    """`half`: x [1, N, D] is y, and what is below the diagonal is left out."""
    arch = runtime.architecture(x.device.index or 0)
    format = format_of(x.dtype, precision, arch)
    crowded = format.precision in ("tf32x3", "bf16x3") and not arch.from_shared
    shape = tiles(x.dtype, narrow or crowded)
    for slab in cut_half(x.shape[1], most, shape) if half else cut(len(x), x.shape[1], y.shape[1], most, shape):
        yield slab, Part(*slab.of_rows(x), *slab.of_columns(y), shape, format, crowded)


class Running(NamedTuple):
    """Sums of exponentials total 2^top, [B, N] or [B, M], and their logarithms, which grow slab by slab."""

    top: Tensor
    total: Tensor
    lse: Tensor
    low: Tensor

    def add(self, at: tuple[slice, slice], top: Tensor, total: Tensor, carry: Tensor | None = None, *, classes: tuple = ()) -> None:
        """Parts [P, b, n] for the entries and rows `at`. With `carry` [b, n], `top` becomes their factors, and `carry` that of before.

        `classes`: sums of differences from the largest logits and the numbers of their terms, of the parts, and those of all, which grow.
        """
        from .pairs_kernels import merge_statistics

        kept, count, each = [x[at] for x in self], top[0].numel(), 128
        of_parts, of_all = (classes[:2], [x[at] for x in classes[2:]]) if classes else ((top, total), (top, total))  # these not read
        merge_statistics[(-(-count // each),)](
            top, total, *of_parts, *kept, *of_all, top if carry is None else carry, count, len(top),
            FACTORS=carry is not None, CLASSES=bool(classes), PARTS=32, COUNT=each, num_warps=4,
        )  # fmt: skip


def nothing_yet(like: Tensor) -> Running:
    """Of the rows of `like` [B, N, D]."""
    # two tensors of two, filled at once; what is returned comes first
    (lse, top), (low, total) = (like.new_full((2, *like.shape[:2]), x, dtype=torch.float32) for x in (-math.inf, 0.0))
    return Running(top, total, lse, low)


def add_products(
    weights: Tensor,
    values: Tensor,
    out: Tensor,
    part: Part,
    *,
    transposed: bool,
    factors: Tensor | None = None,
    valid: Tensor | None = None,
    first: int = 0,
) -> None:
    """out [b, n, E] float32 grows by a slab's weights times values [b, k, E]; `transposed`: by the weights' transpose times them.

    `factors` [tiles of columns, b, n]: of each row's weights. `valid` [b]: values are read where first + k is below it.
    """
    import triton.language as tl

    from .pairs_kernels import weighted_sums

    (entries, count, width), inner = out.shape, values.shape[1]
    rows, columns, _, warps, stages = part.tiles
    depth = part.depth_of_sums(weights.dtype)
    high, wide = columns if transposed else rows, min(rows, runtime.power_of_two(width))
    programs = -(-width // wide) * -(-count // high) * entries
    splits = runtime.splits(programs, inner, depth, out.device, 2 * runtime.SUMS)  # half as many products a sum
    to = out if splits == 1 else out.new_empty((splits, *out.shape))
    dot = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[weights.dtype]
    weighted_sums[(programs * splits,)](
        weights, values, to, to if factors is None else factors, to if valid is None else valid, count, inner, width,
        weights.stride(1), weights.stride(0), values.stride(0), 0 if valid is None else valid.stride(0), first, entries,
        runtime.share(inner, splits, depth), TRANSPOSED=transposed, ADD=splits == 1, FACTORS=factors is not None, COUNTED=valid is not None,
        EVEN=width % wide == 0, ROWS=high, COLUMNS=columns, WIDTH=wide, DEPTH=depth, DOT=dot, PRECISION=part.format.precision,
        INTERPRETED=runtime.INTERPRETED, **runtime.pipeline(warps, stages),
    )  # fmt: skip
    if splits > 1:
        out.add_(to.sum(0))
