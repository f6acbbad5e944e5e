"""Triton: whether it is here, whether its kernels run on a GPU or under its interpreter, and what a launch needs to know."""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import architectures
from .architectures import Architecture

#: kernels run on the CPU, one program after another, for tests. Triton reads it where kernels are defined: it is set before Python starts
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """Why Triton's kernels cannot run on this machine (None: they can)."""
    return _missing()


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no GPU is visible to PyTorch"
    if not INTERPRETED and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"it needs compute capability 8.0 or later, this GPU has {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    return None


def refuses_device(device_type: str) -> str | None:
    """Why kernels cannot serve tensors on `device_type` (None: they can)."""
    wanted = "cpu" if INTERPRETED else "cuda"
    return None if device_type == wanted else f"it runs on {wanted} tensors, these are on {device_type}"


@functools.cache
def architecture(device_index: int) -> Architecture:
    """Of a GPU; "sm_90" under the interpreter."""
    if INTERPRETED:
        return architectures.named("sm_90")
    if torch.version.hip is not None:
        return architectures.named(torch.cuda.get_device_properties(device_index).gcnArchName)
    major, minor = torch.cuda.get_device_capability(device_index)
    return architectures.named(f"sm_{major}{minor}")


def pipeline(warps: int, stages: int) -> dict:
    """A launch's warps and stages as the current GPU has them; tables count warps of 32 threads.

    On AMD's GPUs there are as many threads, and two stages: the first is in registers, and two blocks share 64 KB of LDS.
    """
    if torch.version.hip is not None:
        lanes = architecture(torch.cuda.current_device()).lanes
        warps, stages = warps * 32 // lanes, min(stages, 2)
    return {"num_warps": warps, "STAGES": stages}


@functools.cache
def processors(device_index: int) -> int:
    """Streaming multiprocessors of a GPU."""
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device_index).multi_processor_count


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least `n` and `least`, the least side of a matrix product's operands."""
    return max(least, 1 << (n - 1).bit_length()) if n > 0 else least


#: columns that a multiprocessor multiplies by and adds up, in 16 bits, while a row's sums over a part are written and read again: of
#: every sum 8 bytes beside 4 FLOP a column, at 240 FLOP for a byte of memory (an H200's; 150 to 330 of others), is 480
SUMS = 480
_ROUNDS = 8  # of programs where columns are split: memory for their sums, 70 MB of 128 a row on an H200


def splits(row_tiles: int, columns: int, tile: int, device: torch.device, part: int = 0) -> int:
    """Parts that columns are cut into, each of 4 tiles at least, so that neither few row tiles nor a last round of few programs leaves
    much of the GPU idle.

    A program has a multiprocessor to itself: where two fit, each takes twice as long. So as many rounds follow one another as there are
    programs for a multiprocessor. A program takes as long as its columns, two tiles to begin with, and of a split bank `part` columns
    for what is written and joined; of all numbers of rounds, that of the least sum is taken, and of it the most parts that fit.
    """
    if INTERPRETED:
        return max(1, min(2, columns // (4 * tile)))
    return _splits(max(1, row_tiles), columns, tile, processors(device.index or 0), part)


@functools.lru_cache(1024)
def _splits(row_tiles: int, columns: int, tile: int, processors: int, part: int) -> int:
    def time(parts: int) -> int:
        return -(-row_tiles * parts // processors) * (share(columns, parts, tile) + 2 * tile + (part if parts > 1 else 0))

    most = columns // (4 * tile)
    fitting = (min(rounds * processors // row_tiles, most) for rounds in range(1, _ROUNDS + 1))
    best = min((1, *(parts for parts in fitting if parts > 1)), key=time)
    return -(-columns // share(columns, best, tile)) if best > 1 else 1


def fill(row_tiles: int, columns: int, tile: int, device: torch.device) -> int:
    """As splits, of kernels that wait for memory: parts are made only where row tiles are fewer than multiprocessors."""
    if INTERPRETED:
        return splits(row_tiles, columns, tile, device)
    return max(1, min(processors(device.index or 0) // max(1, row_tiles), columns // (4 * tile)))


def share(columns: int, parts: int, tile: int) -> int:
    """Columns of a part, whole tiles."""
    return -(-columns // (parts * tile)) * tile


def joined(parts: Tensor) -> Tensor:
    """The sum over the first dimension, whose one part need not be copied."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


_library = torch.library.Library("kdfast_triton", "DEF")  # the ops live as long as it does


def register(name: str, function: Callable, fake: Callable) -> None:
    """`function` as torch.ops.kdfast_triton.`name`, launched on the device of its first argument."""

    def run(first: Tensor, *rest):
        with torch.cuda.device_of(first):
            return function(first, *rest)

    _library.define(name + torch.library.infer_schema(function, mutates_args=()))
    _library.impl(name, run, "CPU" if INTERPRETED else "CUDA")
    torch.library.register_fake(f"kdfast_triton::{name}", fake, lib=_library)


def register_vmap(name: str, rule: Callable) -> None:
    """The vmap `rule` (op, info, in_dims, *args) of an op registered here."""
    op = getattr(torch.ops.kdfast_triton, name).default
    torch.library.register_vmap(f"kdfast_triton::{name}", functools.partial(rule, op), lib=_library)


def one_by_one(op: Callable, info, in_dims: tuple, *args):
    """The vmap rule of an op whose entries fill a GPU each: a call for each of them."""

    def entry(i: int) -> tuple:
        return tuple(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True))

    found = [op(*entry(i)) for i in range(info.batch_size)]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])


class ScoreTiles(NamedTuple):
    """Of a launch that uses triton_scores.scores: rows, columns and depth of a tile's products, warps of 32, stages of the pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self, parts: int) -> dict:
        rows, columns, depth, warps, stages = self
        return {
            "ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "PARTS": parts, "INTERPRETED": INTERPRETED, **pipeline(warps, stages),
        }  # fmt: skip


def score_tiles(width: int, parts: int) -> ScoreTiles:
    """For rows of `width` in `parts` 16-bit parts, on every GPU from compute capability 8.0.

    Shared memory holds `stages` of `parts` x depth x (rows + columns) numbers: 108 KB of three parts. 32 registers of a thread hold
    scores; twice as many columns leave what a tile's masks and keys need too few (spills before Hopper and after).
    """
    if INTERPRETED:
        return ScoreTiles(32, 32, 16, 4, 1)
    return ScoreTiles(128, 64, min(32 if parts > 1 else 64, power_of_two(width)), 8, 3)


class Split(NamedTuple):
    """Rows as the sum of bfloat16 matrices."""

    parts: Tensor  # [parts, N, D'] or [B, parts, N, D'], D' the next multiple of a depth (zeros beyond D)
    square: Tensor  # [N] or [B, N] float32, |x|^2, inf or NaN where the row is


def split(x: Tensor, parts: int, depth: int) -> Split:
    """`x` [N, D] or [B, N, D] in parts, in one launch.

    0 where it is not finite: whoever ranks by such scores knows those rows by other means. With one part and 16-bit rows, they are it.
    """
    from .triton_split import split_rows

    x = x.contiguous()
    *batch, size, width = x.shape
    padded = -(-width // depth) * depth
    dtype = torch.bfloat16 if parts > 1 or x.dtype == torch.float32 else x.dtype
    out, square = x.new_empty((*batch, parts, size, padded), dtype=dtype), x.new_empty((*batch, size), dtype=torch.float32)
    each = min(16 if INTERPRETED else 64, power_of_two(padded))
    rows = square.numel()
    if rows:
        with torch.cuda.device_of(x):
            split_rows[(-(-rows // 16),)](x, out, square, rows, size, width, padded, PARTS=parts, ROWS=16, EACH=each, num_warps=4)
    return Split(out, square)
