"""Scores along a direction (u, kappa, sigma) of queries, keys and scales, slab by slab: what second derivatives share.

A score s_i q_i.k_j moves at the rate e_i.k_j + s_i q_i.kappa_j, e_i = s_i u_i + sigma_i q_i. Weights A of scores and B of rates make

    rows_i = sum_j A k + B kappa      slopes_i = sum_j B k      keys_j = sum_i A s q + B e
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...._core import triton_runtime as runtime
from . import slabs


class Tangent(NamedTuple):
    query: Tensor  # [B, N, D]
    keys: Tensor  # [B, M, D]
    scale: Tensor  # [B, N]
    of_query: Tensor | None  # u [B, N, D]; None: 0, as the others
    of_keys: Tensor | None  # kappa [B, M, D]
    of_scale: Tensor | None  # sigma [B, N]
    direction: Tensor  # e [B, N, D], in the dtype it is multiplied in
    precision: int

    def parts(self, most: int) -> Iterator[tuple[slabs.Slab, slabs.Part]]:
        """Slabs and their operands, whose tiles leave room for several tiles of numbers. float16 rows are multiplied as tf32 here, for
        what is beside them, such as e, has no room in float16."""
        for slab, part in slabs.parts(self.query, self.keys, self.precision, most, narrow=True):
            if self.query.dtype == torch.float16:
                part = part._replace(tiles=part.tiles._replace(depth=min(part.tiles.depth, 32)))
            yield slab, part

    def operands(self, slab: slabs.Slab, part: slabs.Part) -> tuple[Tensor, ...]:
        """query, keys, e and kappa of a slab; what is not there is never read."""
        (e,), (kappa,) = slab.of_rows(self.direction), slab.of_columns(self.of_keys)
        return part.x, part.y, e, part.x if kappa is None else kappa

    def constants(self, part: slabs.Part) -> dict:
        import triton.language as tl

        dot = tl.bfloat16 if part.format.weights == torch.bfloat16 else tl.float32
        return {**part.options, "DOT": dot, "KEYS_MOVE": self.of_keys is not None}


def tangent(
    query: Tensor, keys: Tensor, scale: Tensor, of_query: Tensor | None, of_keys: Tensor | None, of_scale: Tensor | None, precision: int
) -> Tangent:
    direction = scale.new_zeros(query.shape) if of_query is None else scale[..., None] * of_query
    if of_scale is not None:
        direction = direction + of_scale[..., None] * query
    short = slabs.format_of(query.dtype, precision, runtime.architecture(query.device.index or 0)).weights
    return Tangent(query, keys, scale, of_query, of_keys, of_scale, direction.to(short), precision)


class Sums(NamedTuple):
    """The sums above, grown slab by slab: what is not wanted is None."""

    along: Tangent
    rows: Tensor  # [B, N, D]
    slopes: Tensor | None  # [B, N, D]
    keys: Tensor | None  # [B, M, D]
    scaled: Tensor | None  # s q, as it is multiplied, where keys are wanted

    @property
    def slopes_weigh(self) -> bool:
        """Whether there are sums that B makes."""
        return self.slopes is not None or self.keys is not None or self.along.of_keys is not None

    def add(self, slab: slabs.Slab, part: slabs.Part, a: Tensor, b: Tensor | None, valid: Tensor | None = None) -> None:
        """`valid` [entries]: keys are read below it."""
        t, to = self.along, slab.of_rows(self.rows, self.slopes)
        of_rows = {"transposed": False, "valid": valid, "first": slab.columns.start}
        slabs.add_products(a, part.y, to[0], part, **of_rows)
        if t.of_keys is not None:
            slabs.add_products(b, *slab.of_columns(t.of_keys), to[0], part, **of_rows)
        if to[1] is not None:
            slabs.add_products(b, part.y, to[1], part, **of_rows)
        if self.keys is not None:
            (of_keys,) = slab.of_columns(self.keys)
            for weights, rows in zip((a, b), slab.of_rows(self.scaled, t.direction), strict=True):
                slabs.add_products(weights, rows, of_keys, part, transposed=True)

    def of_rows(self, want_scale: bool) -> tuple[Tensor, Tensor]:
        """Gradients in the queries and, [0] unless wanted, in the scales."""
        t, dscale = self.along, self.rows.new_empty(0)
        dquery = t.scale[..., None] * self.rows
        if t.of_scale is not None:
            dquery += t.of_scale[..., None] * self.slopes
        if want_scale:
            dscale = (t.query * self.rows).sum(-1)
            if t.of_query is not None:
                dscale += (t.of_query * self.slopes).sum(-1)
        return dquery, dscale


def no_sums(along: Tangent, want_keys: bool, want_scale: bool) -> Sums:
    rows = along.scale.new_zeros(along.query.shape)
    slopes = torch.zeros_like(rows) if along.of_scale is not None or (want_scale and along.of_query is not None) else None
    if not want_keys:
        return Sums(along, rows, slopes, None, None)
    scaled = (along.scale[..., None] * along.query).to(along.direction.dtype)
    return Sums(along, rows, slopes, along.scale.new_zeros(along.keys.shape), scaled)
