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
from .tangent import Tangent, no_sums, tangent
from .wide import Terms

KINDS = 8  # numbers that a row of a tile has of moments


class Problem(NamedTuple):
    """What tiles are made of."""

    along: Tangent
    g: Tensor  # [B, N]
    h: Tensor  # [B, N, Dv], in the dtype it is multiplied in
    lse: Tensor  # [B, N]
    low: Tensor  # [B, N]
    values: Tensor  # [B, M, Dv]
    values_direction: Tensor | None  # [B, M, Dv]
    bias_direction: Tensor | None  # [B, M]
    terms: Terms

    def arguments(self, slab: slabs.Slab, part: slabs.Part) -> tuple[tuple, tuple, tuple, dict]:
        """Tensors before and after the moments', sizes and constants, of a launch."""
        query, keys, direction, keys_direction = self.along.operands(slab, part)
        h, lse, low = slab.of_rows(self.h, self.lse, self.low)
        (values,), moving = slab.of_columns(self.values), slab.of_columns(self.values_direction, self.bias_direction)
        of_values, of_bias = (query if x is None else x for x in moving)  # what is not there is never read
        of_slab, width = self.terms.of(slab), values.shape[2]
        operands = query, keys, direction, keys_direction, h, values, of_values, of_bias, lse, low
        strides = (x.stride(0) for x in (h, values, keys_direction, of_values, of_bias))
        sizes = *part.sizes, width, *strides, *of_slab.strides, slab.columns.start
        constants = {
            **self.along.constants(part), **of_slab.constants, "VALUES_MOVE": moving[0] is not None, "BIAS_MOVES": moving[1] is not None,
            "EVEN_VALUES": width % part.tiles.depth == 0,
        }  # fmt: skip
        return operands, of_slab.tensors, sizes, constants

    def add_moments(self, moments: Tensor) -> None:
        """`moments` [5, B, N] float64, those of the start or of nothing, become all candidates': what a row weighs, means of rate, slope
        and h.(tangent of v), covariance of rate and slope."""
        from .second_kernels import merge_moments, tile_moments

        for slab, part in self.along.parts(slabs.STATISTICS_PAIRS >> 2):
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
    along, over_keys = tangent(query, keys, scale, query_direction, keys_direction, scale_direction, precision), values is None
    p = Problem(
        along, g, h.to(along.direction.dtype), lse, lse_low, keys if over_keys else values,
        keys_direction if over_keys else values_direction, bias_direction,
        Terms(scale, bias, query_labels, key_labels, key_index, limit, valid),
    )  # fmt: skip
    moments = torch.zeros((5, *g.shape), dtype=torch.float64, device=g.device)
    if start is not None:
        moments[:4] = start
    p.add_moments(moments)
    sums = no_sums(along, want_keys, want_scale)
    dh, dbias, dvalues = (
        g.new_zeros(shape) if want else None
        for shape, want in ((h.shape, want_h), (keys.shape[:2], want_bias), (p.values.shape, want_values))
    )
    of_values = sums.keys if over_keys else dvalues
    wanted = sums.slopes_weigh, want_h or of_values is not None, want_h and p.values_direction is not None, want_bias
    for slab, part in along.parts(slabs.WEIGHTS_PAIRS):
        a, b, moved, plain, of_columns = p.weights(slab, part, moments, *wanted)
        below = None if valid is None else valid[slab.entries]
        sums.add(slab, part, a, b, below)
        for weights, of in ((moved, p.values), (plain, p.values_direction)):
            if want_h and of is not None:
                slabs.add_products(
                    weights, *slab.of_columns(of), *slab.of_rows(dh), part, transposed=False, valid=below, first=slab.columns.start
                )
        if of_values is not None:
            slabs.add_products(moved, *slab.of_rows(p.h), *slab.of_columns(of_values), part, transposed=True)
        if want_bias:
            slab.of_columns(dbias)[0].add_(of_columns.sum(0))
    dquery, dscale = sums.of_rows(want_scale)
    dh, dkeys, dvalues, dbias = (g.new_empty(0) if x is None else x for x in (dh, sums.keys, dvalues, dbias))
    return moments[1].float(), dh, dquery, dkeys, dscale, dvalues, dbias, moments


def _fake(g: Tensor, h: Tensor, *args) -> tuple[Tensor, ...]:
    """`args` may end before those that have defaults."""
    given, beyond = args[:21], args[21:]
    keys, want_bias = given[7], len(beyond) == 3 and beyond[2]
    dbias = g.new_empty(keys.shape[:2] if want_bias else (0,))
    return *cpu.pooled_second_order_fake(g, h, *given), dbias, g.new_empty((5, *g.shape), dtype=torch.float64)


runtime.register("similarity_pooled_second", pooled_second, _fake)
