"""impl="triton": the ops of cpu.py with the same schemas, in torch.ops.kdfast_triton: tile sizes, launches, registration.

kernels.py has the kernels. They serve rows of up to 512 bytes (on small GPUs 256), as they are multiplied; wider ones, and exact
products of float32, go slab by slab (wide.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...._core import triton_runtime as runtime
from ...._core.architectures import Architecture
from .. import cpu
from . import second, sigmoid_second  # noqa: F401, they register their ops
from . import wide as triton_wide
from .formats import KERNELS, missing, products, refuses

MAX_BYTES, MAX_BYTES_SMALL = 512, 256  # of a row here, the second on small GPUs: wider tiles spill, or exceed shared memory


__all__ = ["KERNELS", "forward", "grad_keys", "grad_rows", "missing", "refuses", "tiles"]


class Tiles(NamedTuple):
    """Of a launch: rows and columns of a tile of scores, warps, stages of the pipeline that loads what streams by."""

    rows: int
    columns: int
    warps: int
    stages: int


def operands(dtype: torch.dtype, small_weights: bool) -> torch.dtype:
    """What rows of `dtype` take the room of here: float16 has none for weights that carry an upstream gradient, which tf32 has."""
    return torch.float32 if dtype == torch.float16 and small_weights else dtype


def in_slabs(query: Tensor, values: Tensor | None, precision: int, *, small_weights: bool, of_h: bool = False) -> bool:
    """Whether rows are too wide for a tile of their sums, or exact products of float32, by whole rows here, would spill kilobytes.

    `of_h`: where keys stay, and h passes by beside the queries.
    """
    exact = query.dtype == torch.float32 and precision in (KERNELS.products["ieee"], KERNELS.products["bf16x3"])
    arch = runtime.architecture(query.device.index or 0)
    most = 0 if arch.crowded else MAX_BYTES_SMALL if arch.small else MAX_BYTES
    widest = max(query.shape[2], 0 if values is None else values.shape[2])
    if of_h and widest > 128 and not arch.from_shared:  # 4 to 10 KB, of 64 keys or 128
        return True
    return exact or widest * operands(query.dtype, small_weights).itemsize > most


def tiles(width: int, dtype: torch.dtype, streams: int, arch: Architecture, sums: int = 0) -> Tiles:
    """For operands of `width` (a power of two) in `dtype`, `streams` matrices of them passing by, on a GPU of `arch`.

    The sums of a tile's rows stay in registers, rows x width floats: 64 to 128 of the 255 of a thread; scores and weights take as many
    more (all of them before Hopper, whose matrix instructions read operands from shared memory: wide rows are fewer there). There lie
    what stays, and two stages of what passes by: 96 to 192 KB; on small GPUs, whose rows are narrow here (MAX_BYTES_SMALL), at most 85.
    `sums`: where keys stay and queries pass by, the width of all sums of a key, of it and of its value.
    """
    if runtime.INTERPRETED:
        return Tiles(32, 32, 4, 1)
    wide = dtype == torch.float32
    fewer = arch.wide_warps or (not arch.from_shared and (not sums or (wide and streams < 3)))  # keys of three streams: fewer spill more
    most = 128 if fewer else 256
    rows = 128 if max(sums, width) * (1 + wide) <= most else 64
    columns = 128 if width <= 128 else 64
    if wide or streams > 1 or not arch.from_shared:
        columns //= 2
    if sums > width or (wide and (sums or streams > 2)) or arch.wide_warps:
        columns = min(columns, 32)
    return Tiles(rows, columns, 8, 2)


class Launch(NamedTuple):
    """What a problem's launches share."""

    tiles: Tiles
    tensors: tuple  # bias, query_labels, key_labels, key_index, limit, valid
    sizes: tuple  # rows, columns, width, value_width, batch strides of the bank's side
    constants: dict

    @property
    def options(self) -> dict:
        rows, columns, warps, stages = self.tiles
        return {**self.constants, "ROWS": rows, "COLUMNS": columns, **runtime.pipeline(warps, stages)}


def prepare(
    query, keys, values, scale, bias, query_labels, key_labels, key_index, limit, valid, precision, *, streams: int, small_weights: bool,
    of_keys: bool = False, of_values: bool = False,
) -> Launch:  # fmt: skip
    """`streams` matrices pass by beside what stays; `small_weights`: the products' weights carry an upstream gradient; `of_keys`,
    `of_values`: what there are sums of, where queries pass by."""
    import triton.language as tl

    arch, (rows, width) = runtime.architecture(query.device.index or 0), query.shape[1:]
    value_width = width if values is None else values.shape[2]
    of_width, of_value = runtime.power_of_two(width), runtime.power_of_two(value_width)
    half = query.dtype == torch.float16
    if half:
        dot = tl.float32 if small_weights else tl.float16
    else:
        dot = tl.bfloat16 if query.dtype == torch.bfloat16 or precision == KERNELS.products["bf16"] else tl.float32
    bank = (keys, keys if values is None else values, bias, key_labels, valid)
    strides = (0 if x is None or x.shape[0] == 1 else x.stride(0) for x in bank)  # 0 where the batch shares it
    constants = {
        "OVER_KEYS": values is None, "BIASED": bias is not None, "LABELLED": key_labels is not None,
        "INDICES": 0 if key_index is None else key_index.shape[2], "LIMITED": limit is not None, "COUNTED": valid is not None,
        "WIDTH": of_width, "VALUE_WIDTH": of_value, "EVEN": width == of_width, "EVEN_VALUES": value_width == of_value, "DOT": dot,
        "PRECISION": products(KERNELS.products["tf32"] if half else precision, arch), "INTERPRETED": runtime.INTERPRETED,
    }  # fmt: skip
    given = (bias, query_labels, key_labels, key_index, limit, valid)
    terms = tuple(scale if x is None else x for x in given)  # what is not there is never read
    shape = tiles(max(of_width, of_value), operands(query.dtype, small_weights), streams, arch, of_keys * of_width + of_values * of_value)
    sizes = (rows, keys.shape[1], width, value_width, *strides)
    return Launch(shape, terms, sizes, constants)


def forward(
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    start_logit: Tensor | None,
    values: Tensor | None,
    start_value: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    key_index: Tensor | None,
    limit: Tensor | None,
    valid: Tensor | None,
    pooled: bool,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As cpu.forward."""
    if in_slabs(query, values, precision, small_weights=False):
        return triton_wide.forward(
            query, keys, scale, bias, start_logit, values, start_value, query_labels, key_labels, key_index, limit, valid, pooled, precision
        )
    from . import kernels

    launch = prepare(
        query, keys, values, scale, bias, query_labels, key_labels, key_index, limit, valid, precision,
        streams=1 if values is None else 2, small_weights=False,
    )  # fmt: skip
    (batch, rows), (_, columns, _, value_width, *_), t = scale.shape, launch.sizes, launch.tiles
    lse, lse_low = torch.empty_like(scale), torch.empty_like(scale)
    out = scale.new_empty((batch, rows, value_width) if pooled else (0,))
    if lse.numel() == 0:
        return lse, out, lse_low
    row_tiles = -(-rows // t.rows)
    parts = runtime.splits(row_tiles * batch, columns, t.columns, query.device, runtime.SUMS if pooled else 0)
    part_top = part_total = part_pooled = scale
    if parts > 1:
        part_top, part_total = scale.new_empty(parts, batch, rows), scale.new_empty(parts, batch, rows)
        part_pooled = scale.new_empty((parts, batch, rows, value_width) if pooled else (0,))
    bias, *terms = launch.tensors
    kernels.forward[(row_tiles * parts * batch,)](
        query, keys, keys if values is None else values, scale, bias, scale if start_logit is None else start_logit,
        scale if start_value is None else start_value, *terms, lse, lse_low, out, part_top, part_total, part_pooled,
        *launch.sizes, batch, runtime.share(columns, parts, t.columns),
        STARTED=start_logit is not None, START_VALUE=pooled and start_value is not None, POOLED=pooled, SPLIT=parts > 1, **launch.options,
    )  # fmt: skip
    if parts > 1:
        merged = 16  # rows a program
        kernels.merge[(-(-batch * rows // merged),)](
            part_top, part_total, part_pooled, lse, lse_low, out, batch * rows, value_width, parts,
            POOLED=pooled, ROWS=merged, VALUE_WIDTH=launch.constants["VALUE_WIDTH"], num_warps=4,
        )  # fmt: skip
    return lse, out, lse_low


def grad_rows(
    slope: Tensor,
    h: Tensor | None,
    lse: Tensor,
    lse_low: Tensor | None,
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    key_index: Tensor | None,
    limit: Tensor | None,
    valid: Tensor | None,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As cpu.grad_rows."""
    if in_slabs(query, values, precision, small_weights=h is not None):
        return triton_wide.grad_rows(
            slope, h, lse, lse_low, query, keys, scale, bias, values, query_labels, key_labels, key_index, limit, valid,
            precision,
        )  # fmt: skip
    from . import kernels

    launch = prepare(
        query, keys, values, scale, bias, query_labels, key_labels, key_index, limit, valid, precision,
        streams=1 + (h is not None) + (values is not None), small_weights=h is not None,
    )  # fmt: skip
    (batch, rows), (_, columns, width, *_), t = scale.shape, launch.sizes, launch.tiles
    if scale.numel() == 0:
        return slope.new_empty(query.shape), torch.empty_like(slope), torch.empty_like(slope)
    row_tiles = -(-rows // t.rows)
    parts = runtime.splits(row_tiles * batch, columns, t.columns, query.device, runtime.SUMS)
    out = slope.new_empty(parts, batch, rows, width)
    mass, total = slope.new_empty(parts, batch, rows), slope.new_empty(parts, batch, rows)
    kernels.grad_rows[(row_tiles * parts * batch,)](
        slope, slope if h is None else h, lse, torch.zeros_like(lse) if lse_low is None else lse_low, query, keys,
        keys if values is None else values, scale, *launch.tensors, out, mass, total,
        *launch.sizes, batch, runtime.share(columns, parts, t.columns), WITH_H=h is not None, **launch.options,
    )  # fmt: skip
    return runtime.joined(out), runtime.joined(mass), runtime.joined(total)


def grad_keys(
    slope: Tensor,
    h: Tensor | None,
    lse: Tensor,
    lse_low: Tensor | None,
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    key_index: Tensor | None,
    limit: Tensor | None,
    valid: Tensor | None,
    want_keys: bool,
    want_bias: bool,
    want_values: bool,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As cpu.grad_keys."""
    if in_slabs(query, values, precision, small_weights=True, of_h=h is not None):
        return triton_wide.grad_keys(
            slope, h, lse, lse_low, query, keys, scale, bias, values, query_labels, key_labels, key_index, limit, valid,
            want_keys, want_bias, want_values, precision,
        )  # fmt: skip
    from . import kernels

    launch = prepare(
        query, keys, values, scale, bias, query_labels, key_labels, key_index, limit, valid, precision,
        streams=2 + (h is not None), small_weights=True, of_keys=want_keys or want_bias, of_values=want_values,
    )  # fmt: skip
    t = launch.tiles
    launch = launch._replace(tiles=t._replace(rows=t.columns, columns=t.rows))  # columns stay, rows stream by
    batch, (_, columns, width, value_width, *_) = len(query), launch.sizes
    dkeys = slope.new_empty((batch, columns, width) if want_keys else (0,))
    dbias = slope.new_empty((batch, columns) if want_bias else (0,))
    dvalues = slope.new_empty((batch, columns, value_width) if want_values else (0,))
    if batch == 0:
        return dkeys, dbias, dvalues
    kernels.grad_keys[(-(-columns // launch.tiles.columns) * batch,)](
        slope, slope if h is None else h, lse, torch.zeros_like(lse) if lse_low is None else lse_low, query, keys,
        keys if values is None else values, scale, *launch.tensors, dkeys, dbias, dvalues, *launch.sizes, batch,
        WITH_H=h is not None, WANT_KEYS=want_keys, WANT_BIAS=want_bias, WANT_VALUES=want_values, **launch.options,
    )  # fmt: skip
    return dkeys, dbias, dvalues


for _name, _function, _fake in (
    ("similarity_softmax", forward, cpu.forward_fake),
    ("similarity_grad_rows", grad_rows, cpu.grad_rows_fake),
    ("similarity_grad_keys", grad_keys, cpu.grad_keys_fake),
):
    runtime.register(_name, _function, _fake)
