"""impl="torch": the streaming softmax and its gradient in tiles of PyTorch operations, on any device.

README.md derives the formulas. Shapes as the compiled kernels take them: everything has one leading batch dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .tiles import Scores, contract, no_autocast


class Logits(NamedTuple):
    """z_ij = s_i q_i.k_j + b_j, -inf where key j is not admitted for query i."""

    scores: Scores
    bias: Tensor | None  # [B, M]
    query_labels: Tensor | None  # [B, N]
    key_labels: Tensor | None  # [B, M]
    key_index: Tensor | None  # [B, N, E], -1 none
    limit: Tensor | None  # [B, N]

    def from_scores(self, b: slice, r: slice, c: slice, score: Tensor) -> Tensor:
        """The logits [b, r, c] of a tile of scores, in place of it."""
        if self.limit is not None:
            score.masked_fill_(score > self.limit[b, r, None], -torch.inf)
        if self.bias is not None:
            score += self.bias[b, None, c]
        if self.query_labels is not None:
            score.masked_fill_(self.query_labels[b, r, None] == self.key_labels[b, None, c], -torch.inf)
        valid = self.scores.valid
        if self.key_index is not None or valid is not None:
            column = torch.arange(c.start, c.stop, device=score.device)
            if self.key_index is not None:
                for index in self.key_index.unbind(-1):
                    score.masked_fill_(index[b, r, None] == column, -torch.inf)
            if valid is not None:
                score.masked_fill_(column >= valid[b, None, None], -torch.inf)
        return score


def make_logits(query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid, compute) -> Logits:
    return Logits(Scores(query, keys, scale, compute, valid), bias, query_labels, key_labels, key_index, limit)


def above_nothing(lse: Tensor) -> Tensor:
    """lse with -inf (nothing admitted) as +inf, so that exp(z - lse) is 0 there, not NaN."""
    return torch.where(lse == -torch.inf, torch.inf, lse)


def start_weight(start_logit: Tensor, lse: Tensor, lse_low: Tensor) -> Tensor:
    """p_i of the start candidate, [B, N]."""
    return torch.exp(start_logit - above_nothing(lse) - lse_low)


@no_autocast
def forward(
    query: Tensor,  # [B, N, D]
    keys: Tensor,  # [B, M, D]
    scale: Tensor,  # [B, N], fp32 or, for fp64 inputs, fp64
    bias: Tensor | None,  # [B, M]
    start_logit: Tensor | None,  # [B, N]
    start_value: Tensor | None,  # [B, N, Dv]; None counts as zero
    query_labels: Tensor | None,  # [B, N]
    key_labels: Tensor | None,  # [B, M]
    key_index: Tensor | None,  # [B, N, E]
    limit: Tensor | None,  # [B, N]
    valid: Tensor | None,  # [B]
    pooled: bool,
    values: Tensor | None,  # [B, M, Dv]; None: keys
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse [B, N], pooled [B, N, Dv], lse_low [B, N]) in the dtype of `scale`; pooled is empty where it is not asked for.

    lse + lse_low is the log-sum-exp with twice the digits.
    """
    logits = make_logits(query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid, compute)
    scores = logits.scores
    width = keys.shape[-1] if values is None else values.shape[-1]
    lse, lse_low = torch.empty_like(scale), torch.empty_like(scale)
    out = scale.new_empty((*scale.shape, width) if pooled else (0,))
    batches, row_blocks, column_blocks = scores.blocks()
    for b in batches:
        for r in row_blocks:
            q = scores.query_tile(b, r)  # [b, r, D]
            top = torch.full_like(scale[b, r], -torch.inf) if start_logit is None else start_logit[b, r]
            total = torch.zeros_like(top) if start_logit is None else torch.exp(top - _finite(top))
            acc, rest = None, torch.zeros_like(total)
            if pooled:
                acc = top.new_zeros(*top.shape, width) if start_value is None else start_value[b, r].to(top.dtype) * total[..., None]
            for c in column_blocks:
                k = scores.column_tile(keys, b, c)  # [b, c, D]
                z = logits.from_scores(b, r, c, torch.bmm(q, k.mT))  # [b, r, c]
                higher = torch.maximum(top, z.amax(-1))
                shift = _finite(higher)
                weight = z.sub_(shift[..., None]).exp_()
                rescale = torch.exp(top - shift)  # 0 while nothing has been admitted
                total, rest = grown(total * rescale, rest * rescale, weight.sum(-1))
                if pooled:
                    v = k if values is None else scores.column_tile(values, b, c)
                    acc = torch.baddbmm(acc * rescale[..., None], weight, v)
                top = higher
            lse[b, r], lse_low[b, r] = _two_sum(_finite(top), torch.log(total))
            if pooled:
                out[b, r] = acc / torch.where(total == 0, 1.0, total)[..., None]
    return lse, out, lse_low


def grown(total: Tensor, rest: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """total + rest + more, and what that is rounded off by (Kahan): a total that one tile dominates loses the small sums of others."""
    more = more + rest
    after = total + more
    return after, _finite(more - (after - total))


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b and the rounding error of that sum (Knuth), 0 where it is infinite or NaN."""
    total = a + b
    of_b = total - a
    return total, _finite((a - (total - of_b)) + (b - of_b))


def _finite(top: Tensor) -> Tensor:
    """`top`, or 0 where it is infinite or NaN: the shift for a running maximum (inf - inf would make NaN of -inf and +inf)."""
    return torch.where(torch.isfinite(top), top, 0.0)


def gradients(
    slope: Tensor,  # [B, N]
    h: Tensor | None,  # [B, N, Dv]; None: 0
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    values: Tensor | None,  # None: keys
    lse: Tensor,
    lse_low: Tensor,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    key_index: Tensor | None,
    limit: Tensor | None,
    valid: Tensor | None,
    want: list[bool],  # rows, keys, bias, values
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """passes.Sums in one pass, keys outermost."""
    logits = make_logits(query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid, compute)
    want_rows, want_keys, want_bias, want_values = want
    over_keys = values is None
    if over_keys:
        values, want_values = keys, want_keys and h is not None
    empty = scale.new_empty(0)
    dbias = scale.new_zeros(keys.shape[:2]) if want_bias else empty.clone()
    dvalues = scale.new_zeros(values.shape) if want_values else empty.clone()
    mass, total = (torch.zeros_like(lse) if want_rows else empty.clone() for _ in range(2))
    level, correction = above_nothing(lse), torch.exp(-lse_low)  # p is both their exponentials
    slope = slope * correction
    h = None if h is None else h * correction[..., None]

    def weigh(b, r, c, score):
        p = logits.from_scores(b, r, c, score).sub_(level[b, r, None]).exp_()
        inner = slope[b, r, None]
        if h is not None:
            v = logits.scores.column_tile(values, b, c)
            inner = inner + torch.bmm(h[b, r], v.mT)
            if want_values:
                dvalues[b, c].baddbmm_(p.mT, h[b, r])
        if want_rows:
            mass[b, r] += p.sum(-1) * correction[b, r]
        weight = p.mul_(inner)
        if want_rows:
            total[b, r] += weight.sum(-1)
        if want_bias:
            dbias[b, c] += weight.sum(1)
        return weight

    rows, _, dkeys = contract(logits.scores, weigh, want_rows=want_rows, want_columns=want_keys)
    if over_keys and want_values:
        dkeys, dvalues = (dkeys.to(dvalues.dtype) + dvalues).to(keys.dtype), empty.clone()
    return rows if want_rows else empty, mass, total, dkeys if want_keys else empty.clone(), dbias, dvalues


def _forward_fake(query, keys, scale, bias, start_logit, start_value, ql, kl, index, limit, valid, pooled, values, compute):
    width = keys.shape[-1] if values is None else values.shape[-1]
    return torch.empty_like(scale), scale.new_empty((*scale.shape, width) if pooled else (0,)), torch.empty_like(scale)


def _gradients_fake(slope, h, query, keys, scale, bias, values, lse, lse_low, ql, kl, index, limit, valid, want, compute):
    want_rows, want_keys, want_bias, want_values = want
    shapes = (
        (query.shape, want_rows), (lse.shape, want_rows), (lse.shape, want_rows), (keys.shape, want_keys), (keys.shape[:2], want_bias),
        (keys.shape if values is None else values.shape, want_values),
    )  # fmt: skip
    dtypes = (scale.dtype, scale.dtype, scale.dtype, keys.dtype if want_keys else scale.dtype, scale.dtype, scale.dtype)
    return tuple(scale.new_empty(shape if wanted else (0,), dtype=dtype) for (shape, wanted), dtype in zip(shapes, dtypes, strict=True))


# Opaque to the compiler, which would otherwise unroll the loops over tiles; eager code calls the functions themselves.
torch.library.custom_op("kdfast_torch::similarity_forward", forward, mutates_args=()).register_fake(_forward_fake)
torch.library.custom_op("kdfast_torch::similarity_gradients", gradients, mutates_args=()).register_fake(_gradients_fake)
