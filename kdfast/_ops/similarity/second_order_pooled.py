"""The second derivative of the streaming softmax with its pooled output, in tiles, for every implementation. README.md derives it."""

from typing import NamedTuple

import torch
from torch import Tensor

from .first_order import start_weight
from .portable import Logits, above_nothing
from .second_order import Derivatives, Tangent
from .tiles import contract_tangent


class _Moments(NamedTuple):
    """What a row's candidates, or some of them, weigh, and under these weights means and a covariance of their numbers, [B, N]."""

    mass: Tensor
    rate: Tensor  # of a logit
    slope: Tensor  # h.v
    tangent: Tensor  # h.(tangent of v)
    covariance: Tensor  # of rate and slope

    def merged(self, other: "_Moments") -> "_Moments":
        """Those of both together. Where one candidate holds nearly all of its row, the means stay its numbers to the bit."""
        mass = self.mass + other.mass
        share = other.mass / _whole(mass)
        first, second = other.rate - self.rate, other.slope - self.slope
        return _Moments(
            mass,
            torch.lerp(self.rate, other.rate, share),
            torch.lerp(self.slope, other.slope, share),
            torch.lerp(self.tangent, other.tangent, share),
            torch.lerp(self.covariance, other.covariance, share) + share * (1 - share) * first * second,
        )


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
    """Two passes over the tiles, the first for the rows' moments: rates and slopes less a mean that is not one of the very numbers in the
    tiles would not cancel where a candidate holds nearly all of its row.
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

    def numbers_of(b, r, c, rate):
        """Tiles of the logits' rates from the scores', in place, of the slopes and of the values' tangent's (None: 0)."""
        if tangent.bias is not None:
            rate.add_(tangent.bias[b, None, c])
        slope = torch.bmm(h[b, r], scores.column_tile(values, b, c).mT)
        return rate, slope, None if tangent.values is None else torch.bmm(h[b, r], tangent.values[b, c].to(slope.dtype).mT)

    means = _row_moments(logits, tangent, direction, h, start, level, numbers_of)
    level = level[0], lse_low + torch.log(_whole(means.mass))
    if start is not None:
        start = start._replace(weight=start.weight / _whole(means.mass))

    # A = p (c (rate - mean rate) + eta - its mean - covariance), with c = g + h.v less its mean and eta = h.(tangent of v)
    dh = torch.zeros_like(h)
    dbias = lse.new_zeros(scores.keys.shape[:2]) if want_bias else None
    dvalues = lse.new_zeros(values.shape) if want_values else None

    def weigh(b, r, c, score, rate):
        p = _softmax(logits, level, b, r, c, score)
        rate, slope, eta = numbers_of(b, r, c, rate)
        rate.sub_(means.rate[b, r, None])
        slope.sub_(means.slope[b, r, None]).add_(g[b, r, None])
        change = -means.tangent[b, r, None] if eta is None else eta.sub_(means.tangent[b, r, None])
        inner = (slope * rate).sub_(means.covariance[b, r, None]).add_(change)
        moved = p * rate
        dh[b, r].baddbmm_(moved, scores.column_tile(values, b, c))
        if eta is not None:
            dh[b, r].baddbmm_(p, tangent.values[b, c].to(p.dtype))
        if want_values:
            dvalues[b, c].baddbmm_(moved.mT, h[b, r])
        weight_a, weight_b = p * inner, p * slope
        if want_bias:
            dbias[b, c] += weight_a.sum(1)
        return weight_a, weight_b

    rows_a, rows_b, dkeys = contract_tangent(scores, weigh, direction, tangent.keys, want_rows=True, want_columns=want_keys)
    if over_keys and want_keys:
        dkeys, dvalues = dkeys + dvalues, None
    dstart_logit = dstart_value = None
    if start is not None:
        moved = start.rate - means.rate
        slope = g + (_product(h, start.value) - means.slope)
        eta = _product(h, start.value_tangent) - means.tangent
        dstart_logit = start.weight * (slope * moved + eta - means.covariance)
        dh += (start.weight * moved)[..., None] * start.value + start.weight[..., None] * start.value_tangent
        if start_value is not None:
            dstart_value = (start.weight * moved)[..., None] * h
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


def _whole(mass: Tensor) -> Tensor:
    """`mass`, and 1 where there is none."""
    return torch.where(mass == 0, 1.0, mass)


def _product(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


def _softmax(logits: Logits, level: tuple[Tensor, Tensor], b: slice, r: slice, c: slice, score: Tensor) -> Tensor:
    """A tile of p = exp(z - lse - lse_low), in place of the scores."""
    return logits.from_scores(b, r, c, score).sub_(level[0][b, r, None]).sub_(level[1][b, r, None]).exp_()


def _row_moments(logits, tangent, direction, h, start, level, numbers_of) -> _Moments:
    """Of all candidates, the start included. What a row's p add up to is not 1: another kernel's lse is of scores that round otherwise."""
    zero = torch.zeros_like(level[0])
    found = _Moments(*(zero.clone() for _ in _Moments._fields))
    if start is not None:
        found = found.merged(_Moments(start.weight, start.rate, _product(h, start.value), _product(h, start.value_tangent), zero))

    def add(b, r, c, score, rate):
        p = _softmax(logits, level, b, r, c, score)
        here = _moments_of(p, *numbers_of(b, r, c, rate))
        for all_rows, x in zip(found, _Moments(*(x[b, r] for x in found)).merged(here), strict=True):
            all_rows[b, r] = x
        return None, None

    contract_tangent(logits.scores, add, direction, tangent.keys, want_rows=False, want_columns=False)
    return found


def _moments_of(p: Tensor, rate: Tensor, slope: Tensor, eta: Tensor | None) -> _Moments:
    """Of tiles, which are lost. A mean is corrected by what the numbers less it miss 0 by."""
    mass = p.sum(-1)
    p.div_(_whole(mass)[..., None])

    def centred(x):
        first = _product(p, x)
        rest = _product(p, x.sub_(first[..., None]))
        x.sub_(rest[..., None])
        return first + rest

    rates, slopes = centred(rate), centred(slope)
    etas = torch.zeros_like(mass) if eta is None else centred(eta)
    return _Moments(mass, rates, slopes, etas, _product(p, slope.mul_(rate)))
