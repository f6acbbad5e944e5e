"""The second derivative of the streaming softmax with its pooled output, in tiles, for every implementation. README.md derives it."""

from typing import NamedTuple

import torch
from torch import Tensor

from .first_order import start_weight
from .portable import Logits, above_nothing
from .second_order import Derivatives, Tangent
from .tiles import contract_tangent


class _Means(NamedTuple):
    """Softmax-weighted means over a row's candidates, the start included."""

    rate: Tensor  # [B, N]
    value: Tensor  # [B, N, Dv]
    rate_value: Tensor  # [B, N, Dv] of rate x value
    value_tangent: Tensor  # [B, N, Dv] of the values' tangent


def second_order_of_pooled(
    logits: Logits,
    tangent: Tangent,
    g: Tensor,  # [B, N], upstream of lse
    h: Tensor,  # [B, N, Dv], upstream of pooled
    start_logit: Tensor | None,
    start_value: Tensor | None,
    values: Tensor | None,  # None: keys
    lse: Tensor,
    lse_low: Tensor,
    *,
    want_keys: bool,
    want_bias: bool,
    want_values: bool,
) -> Derivatives:
    """One pass over the tiles for the sums, after one for the rows' means, those of the values among them: slopes less a mean that another
    kernel has of its own scores would not cancel.
    """
    scores = logits.scores
    over_keys = values is None
    if over_keys:
        values, want_values, tangent = scores.keys, want_keys, tangent._replace(values=tangent.keys)
    q, scale = scores.rounded_query(), scores.scale
    u = torch.zeros_like(q) if tangent.query is None else tangent.query.to(scale.dtype)
    sigma = torch.zeros_like(scale) if tangent.scale is None else tangent.scale
    direction = scale[..., None] * u + sigma[..., None] * q
    start = _start(start_logit, start_value, tangent, lse, lse_low)
    level = above_nothing(lse), lse_low
    means, mass = _row_means(logits, tangent, direction, start, values, level)
    level = level[0], lse_low + torch.log(mass)
    start = None if start is None else start._replace(weight=start.weight / mass)

    # A = p (c (rate - mean rate) + eta - phi), with c = g + h.v less its mean, eta = h.(tangent of v) and phi their mean
    mean_w = (h * means.value).sum(-1)
    dh = means.rate_value - means.rate[..., None] * means.value + means.value_tangent
    phi = (h * dh).sum(-1)
    dbias = lse.new_zeros(scores.keys.shape[:2]) if want_bias else None
    dvalues = lse.new_zeros(values.shape) if want_values else None

    def weigh(b, r, c, score, rate):
        p, rate = _softmax(logits, level, b, r, c, score), _rate(tangent, b, c, rate).sub_(means.rate[b, r, None])
        slope = torch.bmm(h[b, r], scores.column_tile(values, b, c).mT).add_((g - mean_w)[b, r, None])
        inner = slope * rate - phi[b, r, None]
        if tangent.values is not None:
            inner.baddbmm_(h[b, r], tangent.values[b, c].to(p.dtype).mT)
        if want_values:
            dvalues[b, c].baddbmm_((p * rate).mT, h[b, r])
        weight_a, weight_b = p * inner, p * slope
        if want_bias:
            dbias[b, c] += weight_a.sum(1)
        return weight_a, weight_b

    rows_a, rows_b, dkeys = contract_tangent(scores, weigh, direction, tangent.keys, want_rows=True, want_columns=want_keys)
    if over_keys and want_keys:
        dkeys, dvalues = dkeys + dvalues, None
    dstart_logit = dstart_value = None
    if start is not None:
        w0, eta0 = (h * start.value).sum(-1) - mean_w, (h * start.value_tangent).sum(-1)
        rate0 = start.rate - means.rate
        dstart_logit = start.weight * ((g + w0) * rate0 + eta0 - phi)
        if start_value is not None:
            dstart_value = (start.weight * rate0)[..., None] * h
    return Derivatives(
        g=means.rate,
        h=dh,
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


def _softmax(logits: Logits, level: tuple[Tensor, Tensor], b: slice, r: slice, c: slice, score: Tensor) -> Tensor:
    """A tile of p = exp(z - lse - lse_low), in place of the scores."""
    return logits.from_scores(b, r, c, score).sub_(level[0][b, r, None]).sub_(level[1][b, r, None]).exp_()


def _rate(tangent: Tangent, b: slice, c: slice, rate: Tensor) -> Tensor:
    """A tile of the logits' rates from the scores', in place."""
    return rate if tangent.bias is None else rate.add_(tangent.bias[b, None, c])


def _row_means(logits, tangent, direction, start, values, level) -> tuple[_Means, Tensor]:
    """The means, and what a row's p add up to, 1 for one that admits nothing: another kernel's lse is of scores that round otherwise."""
    rate, mass = torch.zeros_like(level[0]), torch.zeros_like(level[0])
    value, rate_value, value_tangent = (rate.new_zeros(*rate.shape, values.shape[-1]) for _ in range(3))

    def add(b, r, c, score, tile_rate):
        p = _softmax(logits, level, b, r, c, score)
        mass[b, r] += p.sum(-1)
        weighted = p * _rate(tangent, b, c, tile_rate)
        rate[b, r] += weighted.sum(-1)
        v = logits.scores.column_tile(values, b, c)
        value[b, r].baddbmm_(p, v)
        rate_value[b, r].baddbmm_(weighted, v)
        if tangent.values is not None:
            value_tangent[b, r].baddbmm_(p, tangent.values[b, c].to(p.dtype))
        return None, None

    contract_tangent(logits.scores, add, direction, tangent.keys, want_rows=False, want_columns=False)
    if start is not None:
        rate = rate + start.weight * start.rate
        value = value + start.weight[..., None] * start.value
        rate_value = rate_value + (start.weight * start.rate)[..., None] * start.value
        value_tangent = value_tangent + start.weight[..., None] * start.value_tangent
        mass = mass + start.weight
    mass = torch.where(mass == 0, 1.0, mass)
    return _Means(rate / mass, value / mass[..., None], rate_value / mass[..., None], value_tangent / mass[..., None]), mass
