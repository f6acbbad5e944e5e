"""impl="triton" of the second derivative of the pooled output: slab by slab, for rows of any width.

One pass finds the rows' moments; another makes a slab's weights, from tiles of scores, rates and slopes formed again, which are stored for
every sum that takes them. second_kernels.py has the kernels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...._core import triton_runtime as runtime
from .. import cpu
from . import slabs
from .wide import Terms

KINDS = 8  # numbers that a row of a tile has of moments


class Problem(NamedTuple):
    """What tiles are made of. Rows' matrices are in the dtype they are multiplied in, or float32."""

    g: Tensor  # [B, N]
    h: Tensor  # [B, N, Dv]
    lse: Tensor  # [B, N]
    low: Tensor  # [B, N]
    query: Tensor  # [B, N, D]
    keys: Tensor  # [B, M, D]
    direction: Tensor  # [B, N, D], e = s u + sigma q
    keys_direction: Tensor | None  # [B, M, D]
    values: Tensor  # [B, M, Dv]
    values_direction: Tensor | None  # [B, M, Dv]
    bias_direction: Tensor | None  # [B, M]
    terms: Terms
    precision: int

    def parts(self, most: int):
        """Slabs and their operands, whose tiles leave room for four tiles of numbers a pair. float16 rows are multiplied as tf32 here, for
        what is beside them, such as h, has no room in float16."""
        for slab, part in slabs.parts(self.query, self.keys, self.precision, most, narrow=True):
            if self.query.dtype == torch.float16:
                part = part._replace(tiles=part.tiles._replace(depth=min(part.tiles.depth, 32)))
            yield slab, part

    def arguments(self, slab: slabs.Slab, part: slabs.Part) -> tuple[tuple, tuple, tuple, dict]:
        """Tensors before and after the moments', sizes and constants, of a launch."""
        import triton.language as tl

        direction, h, lse, low = slab.of_rows(self.direction, self.h, self.lse, self.low)
        moving = slab.of_columns(self.keys_direction, self.values_direction, self.bias_direction)
        along_keys, along_values, along_bias = (part.x if x is None else x for x in moving)  # what is not there is never read
        (values,), of_slab = slab.of_columns(self.values), self.terms.of(slab)
        operands = part.x, part.y, direction, along_keys, h, values, along_values, along_bias, lse, low
        width = values.shape[2]
        strides = (x.stride(0) for x in (h, values, along_keys, along_values, along_bias))
        sizes = *part.sizes, width, *strides, *of_slab.strides, slab.columns.start
        constants = {
            **part.options, **of_slab.constants, "KEYS_MOVE": moving[0] is not None, "VALUES_MOVE": moving[1] is not None,
            "BIAS_MOVES": moving[2] is not None, "EVEN_VALUES": width % part.tiles.depth == 0,
            "DOT": tl.bfloat16 if part.format.weights == torch.bfloat16 else tl.float32,
        }  # fmt: skip
        return operands, of_slab.tensors, sizes, constants

    def add_moments(self, moments: Tensor) -> None:
        """`moments` [5, B, N] float64, those of the start or of nothing, become all candidates': what a row weighs, means of rate, slope
        and h.(tangent of v), covariance of rate and slope."""
        from .second_kernels import merge_moments, tile_moments

        for slab, part in self.parts(slabs.STATISTICS_PAIRS >> 2):
            operands, terms, sizes, constants = self.arguments(slab, part)
            found = part.of_rows().new_empty((KINDS, *part.of_rows().shape))
            tile_moments[part.programs](*operands, *terms, found, *sizes, found.stride(0), **constants)
            kept, (entries, rows, _), each = moments[:, slab.entries, slab.rows], part.x.shape, 32
            merge_moments[(-(-entries * rows // each),)](
                found, kept, entries * rows, found.shape[1], found.stride(0), kept.stride(0),
                VALUES_MOVE=self.values_direction is not None, PARTS=32, COUNT=each, num_warps=4,
            )  # fmt: skip

    def weights(self, slab: slabs.Slab, part: slabs.Part, moments: Tensor, slopes: bool, rates: bool, values: bool, bias: bool):
        """(A, B, p rate, p) of a slab, None where not wanted, and [tiles of rows, entries, columns] sums of A."""
        from .second_kernels import second_weights

        operands, terms, sizes, constants = self.arguments(slab, part)
        (g,), found = slab.of_rows(self.g), moments[:, slab.entries, slab.rows]
        made = [part.weights() if want else None for want in (True, slopes, rates, values)]
        sums = part.of_columns() if bias else g
        second_weights[part.programs](
            g, *operands, found, *terms, *(made[0] if x is None else x for x in made), sums, *sizes, found.stride(0), *part.leading,
            WANT_SLOPES=slopes, WANT_RATES=rates, WANT_VALUES=values, WANT_BIAS=bias, **constants,
        )  # fmt: skip
        return *made, sums


def pooled_second(
    g: Tensor,
    h: Tensor,
    query_direction: Tensor | None,
    keys_direction: Tensor | None,
    scale_direction: Tensor | None,
    values_direction: Tensor | None,
    lse: Tensor,
    lse_low: Tensor,
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
    want_h: bool,
    want_keys: bool,
    want_scale: bool,
    want_values: bool,
    precision: int,
    bias_direction: Tensor | None = None,
    start: Tensor | None = None,
    want_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As cpu.pooled_second_order."""
    direction = g.new_zeros(query.shape) if query_direction is None else scale[..., None] * query_direction
    if scale_direction is not None:
        direction = direction + scale_direction[..., None] * query
    short = slabs.format_of(query.dtype, precision, runtime.architecture(query.device.index or 0)).weights
    over_keys = values is None
    p = Problem(
        g, h.to(short), lse, lse_low, query, keys, direction.to(short), keys_direction, keys if over_keys else values,
        keys_direction if over_keys else values_direction, bias_direction,
        Terms(scale, bias, query_labels, key_labels, key_index, limit, valid), precision,
    )  # fmt: skip
    moments = torch.zeros((5, *g.shape), dtype=torch.float64, device=g.device)
    if start is not None:
        moments[:4] = start
    p.add_moments(moments)
    rows = g.new_zeros(query.shape)
    of_slopes = g.new_zeros(query.shape if scale_direction is not None or (want_scale and query_direction is not None) else (0,))
    dh, dkeys, dbias, dvalues = (
        g.new_zeros(shape if want else (0,))
        for shape, want in ((h.shape, want_h), (keys.shape, want_keys), (keys.shape[:2], want_bias), (p.values.shape, want_values))
    )
    to_values = dkeys if over_keys else dvalues
    scaled = (scale[..., None] * query).to(short) if want_keys else query
    wanted = (
        keys_direction is not None or want_keys or of_slopes.numel() > 0, want_h or to_values.numel() > 0,
        want_h and p.values_direction is not None, want_bias,
    )  # fmt: skip
    for slab, part in p.parts(slabs.WEIGHTS_PAIRS):
        a, b, moved, plain, sums = p.weights(slab, part, moments, *wanted)
        here = {"transposed": False, "valid": None if valid is None else valid[slab.entries], "first": slab.columns.start}

        def add(weights, of, to, part=part, slab=slab, here=here):
            """Sums over columns."""
            slabs.add_products(weights, *slab.of_columns(of), *slab.of_rows(to), part, **here)

        def add_transposed(weights, of, to, part=part, slab=slab):
            slabs.add_products(weights, *slab.of_rows(of), *slab.of_columns(to), part, transposed=True)

        add(a, keys, rows)
        if keys_direction is not None:
            add(b, keys_direction, rows)
        if of_slopes.numel():
            add(b, keys, of_slopes)
        if want_h:
            add(moved, p.values, dh)
            if plain is not None:
                add(plain, p.values_direction, dh)
        if want_keys:
            add_transposed(a, scaled, dkeys)
            add_transposed(b, p.direction, dkeys)
        if to_values.numel():
            add_transposed(moved, p.h, to_values)
        if want_bias:
            slab.of_columns(dbias)[0].add_(sums.sum(0))
    dquery, dscale = scale[..., None] * rows, g.new_empty(0)
    if scale_direction is not None:
        dquery += scale_direction[..., None] * of_slopes
    if want_scale:
        dscale = (query * rows).sum(-1)
        if query_direction is not None:
            dscale += (query_direction * of_slopes).sum(-1)
    return moments[1].float(), dh, dquery, dkeys, dscale, dvalues, dbias, moments


def _fake(g: Tensor, h: Tensor, *args) -> tuple[Tensor, ...]:
    """`args` may end before those that have defaults."""
    given, beyond = args[:21], args[21:]
    keys, want_bias = given[7], len(beyond) == 3 and beyond[2]
    dbias = g.new_empty(keys.shape[:2] if want_bias else (0,))
    return *cpu.pooled_second_order_fake(g, h, *given), dbias, g.new_empty((5, *g.shape), dtype=torch.float64)


runtime.register("similarity_pooled_second", pooled_second, _fake)
