"""impl="triton" of rows that the keys of their class attract: launches slab by slab, registration in torch.ops.kdfast_triton.

A weight is the difference of two numbers that are close where a row is learnt, p_ij and the share of its class, and is formed before
anything is summed; so is a loss, from logits less the row's largest.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...._core import triton_runtime as runtime
from . import slabs

#: implementations of the streaming softmax beside which these kernels run
BESIDE = ("cuda", "triton")
LN2 = math.log(2)


class Problem(NamedTuple):
    """Rows, keys and what belongs to their logits, as cpu.forward has it."""

    query: Tensor  # [B, N, D]
    keys: Tensor  # [B, M, D]
    scale: Tensor  # [B, N]
    bias: Tensor | None  # [B, M]
    query_labels: Tensor  # [B, N]
    key_labels: Tensor  # [B, M]
    key_index: Tensor | None  # [B, N, E]
    valid: Tensor | None  # [B]
    include: bool  # whether those of a row's class are in its denominator
    precision: int

    def parts(self, most: int):
        return slabs.parts(self.query, self.keys, self.precision, most, narrow=True)

    def launch(self, kernel, slab: slabs.Slab, part: slabs.Part, of_rows: tuple, out: tuple, **constants) -> None:
        """`of_rows` [B, N]: what the kernel has before the problem; `out`: after it, with strides of weights after the sizes."""
        scale, query_labels, key_index = slab.of_rows(self.scale, self.query_labels, self.key_index)
        bias, key_labels = slab.of_columns(self.bias, self.key_labels)
        valid = None if self.valid is None else self.valid[slab.entries]
        terms = [scale if x is None else x for x in (bias, query_labels, key_labels, key_index, valid)]  # what is not there is not read
        strides = [0 if x is None else x.stride(0) for x in (bias, key_labels, valid)]
        kernel[part.programs](
            *slab.of_rows(*of_rows), part.x, part.y, scale, *terms, *out, *part.sizes, *strides, slab.columns.start,
            *(part.leading if of_rows else ()), INCLUDED=self.include, BIASED=bias is not None, COUNTED=valid is not None,
            INDICES=0 if key_index is None else key_index.shape[2], **constants, **part.options,
        )  # fmt: skip

    def gradients(self, g: Tensor, statistics: Tensor, *, want_query: bool, want_keys: bool) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """(dquery, dkeys, dscale [B, N]) in float32 of the losses' sum weighted by g [B, N]; None where not wanted."""
        from .attraction_kernels import class_weights

        lse, low, share = statistics
        dquery, dkeys = (
            torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) if want else None
            for x, want in ((self.query, want_query), (self.keys, want_keys))
        )
        dscale = torch.zeros_like(self.scale)
        for slab, part in self.parts(slabs.WEIGHTS_PAIRS):
            wanted, slope, moment = want_query or want_keys, part.of_rows(), part.of_rows()
            weights = part.weights() if wanted else moment
            self.launch(class_weights, slab, part, (g, share, lse, low), (weights, slope, moment), WANTED=wanted)
            slab.of_rows(dscale)[0].add_(moment.sum(0))
            if want_query:
                valid = None if self.valid is None else self.valid[slab.entries]
                options = {"valid": valid, "first": slab.columns.start}
                slabs.add_products(weights, part.y, *slab.of_rows(dquery), part, transposed=False, **options)
            if want_keys:
                slabs.add_products(weights, part.x, *slab.of_columns(dkeys), part, transposed=True)
        return dquery, dkeys, dscale


def attracted(
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    query_labels: Tensor,
    key_labels: Tensor,
    key_index: Tensor | None,
    valid: Tensor | None,
    logits: Tensor | None,
    include: bool,
    pull: bool,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [B, N], 0 of rows that do not count; statistics [3, B, N]: lse, its low digits, 1 / positives (0: the row does not count);
    and with `pull` the gradients of the losses' sum in query and scale [B, N], else [0].

    logits: [B, N, J], of positives that are no keys.
    """
    from .attraction_kernels import class_statistics

    p = Problem(query, keys, scale, bias, query_labels, key_labels, key_index, valid, include, precision)
    rows, same, count = slabs.nothing_yet(query), torch.zeros_like(scale), torch.zeros_like(scale)
    for slab, part in p.parts(slabs.STATISTICS_PAIRS):
        found = tuple(part.of_rows() for _ in range(4))
        p.launch(class_statistics, slab, part, (), found)
        rows.add((slab.entries, slab.rows), *found[:2], classes=(*found[2:], same, count))
    top, total = rows.top, rows.total
    if logits is not None:
        top, total, same, count = _with_logits(top, total, same, count, logits / LN2, include)
    counted = (count > 0) & (total != 0)
    share = torch.where(counted, 1 / count, 0.0)
    # both relative to the largest logit: lse less a mean logit would round as the logits do
    losses = torch.where(counted, total.log() - LN2 * same * share, 0.0)
    level = (top.double() + total.double().log2()) * LN2
    lse = level.float()
    statistics = torch.stack((lse, torch.where(lse.isfinite(), level - lse.double(), 0.0).float(), share))
    nothing = scale.new_empty(0)
    if not pull:
        return losses, statistics, nothing, nothing.clone()
    dquery, _, dscale = p.gradients(counted.to(scale.dtype), statistics, want_query=True, want_keys=False)
    return losses, statistics, dquery, dscale


def _with_logits(top, total, same, count, more, include: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums [B, N] relative to 2^top with further positives, of base-2 logits `more` [B, N, J]."""
    before, inside = top, more if include else more[..., :0]
    for one in inside.unbind(-1):
        top = torch.maximum(top, one)
    shift, moved = (torch.where(x.isinf(), 0.0, x) for x in (top, before))
    step, beside = moved - shift, more - shift[..., None]
    total = total * torch.where(total == 0, 0.0, step).exp2() + (inside - shift[..., None]).exp2().sum(-1)
    return top, total, same + torch.where(count == 0, 0.0, step * count) + beside.sum(-1), count + more.shape[-1]


def attracted_grad(
    g: Tensor,
    statistics: Tensor,
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    query_labels: Tensor,
    key_labels: Tensor,
    key_index: Tensor | None,
    valid: Tensor | None,
    include: bool,
    want_query: bool,
    want_keys: bool,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dquery, dkeys [B, M, D] (empty, [0], where not wanted) and dscale [B, N] in float32 of the losses' sum weighted by g [B, N]."""
    p = Problem(query, keys, scale, bias, query_labels, key_labels, key_index, valid, include, precision)
    found = p.gradients(g, statistics, want_query=want_query, want_keys=want_keys)
    return tuple(scale.new_empty(0) if x is None else x for x in found)


def _attracted_fake(query, keys, scale, bias, query_labels, key_labels, key_index, valid, logits, include, pull, _):
    of_rows = (scale.new_empty(query.shape), torch.empty_like(scale)) if pull else (scale.new_empty(0), scale.new_empty(0))
    return torch.empty_like(scale), scale.new_empty((3, *scale.shape)), *of_rows


def _attracted_grad_fake(g, statistics, query, keys, scale, *rest):
    want_query, want_keys, _ = rest[-3:]
    sides = (scale.new_empty(x.shape if want else (0,)) for x, want in ((query, want_query), (keys, want_keys)))
    return *sides, torch.empty_like(scale)


runtime.register("attracted", attracted, _attracted_fake)
runtime.register("attracted_grad", attracted_grad, _attracted_grad_fake)
