"""The second derivative of the streaming softmax, in the same tiles, for every implementation. README.md derives it."""

from typing import NamedTuple

import torch
from torch import Tensor

from .portable import Logits, above_nothing, pooled_is_over_keys, start_weight
from .tiles import contract_tangent


class Tangent(NamedTuple):
    """Cotangents of the first-order gradients, that is the direction of the second derivative; None is zero."""

    query: Tensor | None  # [B, N, D]
    keys: Tensor | None  # [B, M, D]
    scale: Tensor | None  # [B, N]
    bias: Tensor | None  # [B, M]
    start_logit: Tensor | None  # [B, N]
    values: Tensor | None  # [B, M, Dv]
    start_value: Tensor | None  # [B, N, Dv]


class Derivatives(NamedTuple):
    """Gradients of <tangent, first-order gradients>, in the accumulator's dtype (keys: theirs). None where not wanted or not given."""

    g: Tensor
    h: Tensor | None
    query: Tensor
    keys: Tensor | None
    scale: Tensor
    bias: Tensor | None
    start_logit: Tensor | None
    values: Tensor | None
    start_value: Tensor | None


class _Means(NamedTuple):
    """Softmax-weighted means over a row's candidates, the start included."""

    rate: Tensor  # [B, N]
    rate_value: Tensor | None  # [B, N, Dv] of rate x value; with h
    value_tangent: Tensor | None  # [B, N, Dv] of the values' tangent; with h


def second_order(
    logits: Logits,
    tangent: Tangent,
    g: Tensor,  # [B, N], upstream of lse
    h: Tensor | None,  # [B, N, Dv], upstream of pooled
    start_logit: Tensor | None,
    start_value: Tensor | None,
    values: Tensor | None,  # None: keys
    lse: Tensor,
    lse_low: Tensor,
    pooled: Tensor,
    *,
    want_keys: bool,
    want_bias: bool,
    want_values: bool,
) -> Derivatives:
    """One pass over the tiles for the sums, after one for the rows' means where these have no closed form."""
    scores = logits.scores
    closed = pooled_is_over_keys(h, values, start_value) and tangent.keys is None and tangent.bias is None
    over_keys = h is not None and values is None
    if over_keys:
        values, want_values, tangent = scores.keys, want_keys, tangent._replace(values=tangent.keys)
    q, scale = scores.rounded_query(), scores.scale
    u = torch.zeros_like(q) if tangent.query is None else tangent.query.to(scale.dtype)
    sigma = torch.zeros_like(scale) if tangent.scale is None else tangent.scale
    direction = scale[..., None] * u + sigma[..., None] * q
    start = _start(start_logit, start_value, tangent, lse, lse_low)
    means = _row_means(logits, tangent, direction, start, h, values, lse, pooled, closed)

    # with w = h.v and eta = h.(tangent of v), both about a row's mean: c = g + w, phi = mean of c rate + eta
    mean_w = torch.zeros_like(lse) if h is None else (h * pooled).sum(-1)
    phi = (g - mean_w) * means.rate
    if h is not None:
        phi = phi + (h * (means.rate_value + means.value_tangent)).sum(-1)
    dbias = lse.new_zeros(scores.keys.shape[:2]) if want_bias else None
    dvalues = lse.new_zeros(values.shape) if want_values else None

    def weigh(b, r, c, score, rate):
        p, rate = _softmax(logits, lse, b, r, c, score), _rate(tangent, b, c, rate)
        if h is None:
            weight_b = p * g[b, r, None]
            weight_a = weight_b * (rate - means.rate[b, r, None])
        else:
            w = torch.bmm(h[b, r], scores.column_tile(values, b, c).mT) - mean_w[b, r, None]
            slope = w + g[b, r, None]
            weight_b = p * slope
            inner = slope * rate - phi[b, r, None] - w * means.rate[b, r, None]
            if tangent.values is not None:
                inner.baddbmm_(h[b, r], tangent.values[b, c].to(p.dtype).mT)
            weight_a = p * inner
            if want_values:
                dvalues[b, c].baddbmm_((p * (rate - means.rate[b, r, None])).mT, h[b, r])
        if want_bias:
            dbias[b, c] += weight_a.sum(1)
        return weight_a, weight_b

    rows_a, rows_b, dkeys = contract_tangent(scores, weigh, direction, tangent.keys, want_rows=True, want_columns=want_keys)
    if over_keys and want_keys:
        dkeys, dvalues = dkeys + dvalues, None
    dstart_logit = dstart_value = None
    if start is not None:
        if h is None:
            dstart_logit = start.weight * g * (start.rate - means.rate)
        else:
            w0, eta0 = (h * start.value).sum(-1) - mean_w, (h * start.value_tangent).sum(-1)
            dstart_logit = start.weight * ((g + w0) * start.rate + eta0 - phi - means.rate * w0)
            if start_value is not None:
                dstart_value = (start.weight * (start.rate - means.rate))[..., None] * h
    return Derivatives(
        g=means.rate,
        h=None if h is None else means.rate_value - means.rate[..., None] * pooled + means.value_tangent,
        query=scale[..., None] * rows_a + sigma[..., None] * rows_b,
        keys=dkeys,
        scale=(q * rows_a + u * rows_b).sum(-1),
        bias=dbias,
        start_logit=dstart_logit,
        values=dvalues,
        start_value=dstart_value,
    )


class _Start(NamedTuple):
    weight: Tensor  # [B, N]
    rate: Tensor  # [B, N]
    value: Tensor  # [B, N, Dv], or a 0-d zero
    value_tangent: Tensor


def _start(start_logit: Tensor | None, start_value: Tensor | None, tangent: Tangent, lse: Tensor, lse_low: Tensor) -> _Start | None:
    if start_logit is None:
        return None
    zero = lse.new_zeros(())
    return _Start(
        start_weight(start_logit, lse, lse_low),
        torch.zeros_like(lse) if tangent.start_logit is None else tangent.start_logit,
        zero if start_value is None else start_value.to(lse.dtype),
        zero if tangent.start_value is None else tangent.start_value.to(lse.dtype),
    )


def _softmax(logits: Logits, lse: Tensor, b: slice, r: slice, c: slice, score: Tensor) -> Tensor:
    return logits.from_scores(b, r, c, score).sub_(above_nothing(lse[b, r, None])).exp_()


def _rate(tangent: Tangent, b: slice, c: slice, rate: Tensor) -> Tensor:
    """A tile of the logits' rates from the scores', in place."""
    return rate if tangent.bias is None else rate.add_(tangent.bias[b, None, c])


def _row_means(logits, tangent, direction, start, h, values, lse, pooled, closed) -> _Means:
    rate = (direction * pooled).sum(-1) if closed else torch.zeros_like(lse)
    rate_value = value_tangent = None
    if h is not None:
        rate_value, value_tangent = torch.zeros_like(pooled), torch.zeros_like(pooled)

    def add(b, r, c, score, tile_rate):
        p = _softmax(logits, lse, b, r, c, score)
        weighted = p * _rate(tangent, b, c, tile_rate)
        rate[b, r] += weighted.sum(-1)
        if h is not None:
            rate_value[b, r].baddbmm_(weighted, logits.scores.column_tile(values, b, c))
            if tangent.values is not None:
                value_tangent[b, r].baddbmm_(p, tangent.values[b, c].to(p.dtype))
        return None, None

    if not closed:
        contract_tangent(logits.scores, add, direction, tangent.keys, want_rows=False, want_columns=False)
    if start is not None:
        rate = rate + start.weight * start.rate
        if h is not None:
            rate_value = rate_value + (start.weight * start.rate)[..., None] * start.value
            value_tangent = value_tangent + start.weight[..., None] * start.value_tangent
    return _Means(rate, rate_value, value_tangent)
