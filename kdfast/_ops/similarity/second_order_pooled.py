"""The second derivative of the streaming softmax with its pooled output, by one op of compiled kernels, else in tiles.

README.md derives it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu, cuda
from .passes import KERNELS, dense, for_kernel
from .portable import Logits, above_nothing, make_logits, start_weight
from .second_order import Derivatives, Tangent
from .tiles import contract_tangent


class Wanted(NamedTuple):
    """Which gradients are asked for beside those that cost nothing."""

    h: bool
    keys: bool
    scale: bool
    bias: bool
    values: bool


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
    impl: str, compute, want: Wanted, tangent: Tangent, g: Tensor, h: Tensor,
    query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, *rules,
) -> Derivatives:  # fmt: skip
    """Where pooled has an upstream gradient, h [B, N, Dv], beside g [B, N] of lse. values None: the keys."""
    start = _start(h, start_logit, start_value, tangent, lse, lse_low)
    kernels = cuda.GRADIENTS.KERNELS if impl == "cuda" else KERNELS.get(impl)
    plain = start is None and tangent.bias is None and not want.bias
    if kernels is not None and (plain or kernels is not cpu.KERNELS):
        return _by_one_op(kernels, compute, want, tangent, g, h, start, lse, lse_low, values, query, keys, scale, bias, *rules)
    logits = make_logits(query, keys, scale, bias, *rules, compute.dtype)
    return _in_tiles(logits, want, tangent, g, h, start, values, lse, lse_low)


def _by_one_op(kernels: cpu.Kernels, compute, want: Wanted, tangent: Tangent, g, h, start, lse, lse_low, values, *problem) -> Derivatives:
    along = tangent.query, tangent.keys, tangent.scale, None if values is None else tangent.values
    given = (None if x is None else x.contiguous() for x in (g, h, *along, lse, lse_low))
    beyond = ()
    if kernels is not cpu.KERNELS:
        of_bias = None if tangent.bias is None else tangent.bias.contiguous()
        beyond = of_bias, None if start is None else torch.stack(start.moments[:4]), want.bias
    dg, dh, dquery, dkeys, dscale, dvalues, *more = cpu.pooled_second_order(
        *given, *for_kernel(*problem), values=None if values is None else dense(values), want_h=want.h, want_keys=want.keys,
        want_scale=want.scale, want_values=want.values, products=compute.products, kernels=kernels, beyond=beyond,
    )  # fmt: skip
    dstart_logit = dstart_value = None
    if start is not None:
        dstart_logit, more_of_h, dstart_value = start.derivatives(_Moments(*more[1]), g, h)
        dh = dh + more_of_h if want.h else dh
    return Derivatives(
        g=dg,
        h=dh if want.h else None,
        query=dquery,
        keys=dkeys if want.keys else None,
        scale=dscale if want.scale else None,
        bias=more[0] if want.bias else None,
        start_logit=dstart_logit,
        values=dvalues if want.values else None,
        start_value=dstart_value,
    )


def _in_tiles(
    logits: Logits, want: Wanted, tangent: Tangent, g: Tensor, h: Tensor, start: "_Start | None", values: Tensor | None,
    lse: Tensor, lse_low: Tensor,
) -> Derivatives:  # fmt: skip
    """Two passes over the tiles, the first for the rows' moments: rates and slopes less a mean that is not one of the very numbers in the
    tiles would not cancel where a candidate holds nearly all of its row.
    """
    scores = logits.scores
    over_keys = values is None
    if over_keys:
        values, want, tangent = scores.keys, want._replace(values=want.keys), tangent._replace(values=tangent.keys)
    q, scale = scores.rounded_query(), scores.scale
    u = torch.zeros_like(q) if tangent.query is None else tangent.query.to(scale.dtype)
    sigma = torch.zeros_like(scale) if tangent.scale is None else tangent.scale
    direction = scale[..., None] * u + sigma[..., None] * q
    level = above_nothing(lse), lse_low

    def numbers_of(b, r, c, rate):
        """Tiles of the logits' rates from the scores', in place, of the slopes and of the values' tangent's (None: 0)."""
        if tangent.bias is not None:
            rate.add_(tangent.bias[b, None, c])
        slope = torch.bmm(h[b, r], scores.column_tile(values, b, c).mT)
        return rate, slope, None if tangent.values is None else torch.bmm(h[b, r], tangent.values[b, c].to(slope.dtype).mT)

    means = _row_moments(logits, tangent, direction, start, level, numbers_of)
    level = level[0], lse_low + torch.log(_whole(means.mass))

    # A = p (c (rate - mean rate) + eta - its mean - covariance), with c = g + h.v less its mean and eta = h.(tangent of v)
    dh = torch.zeros_like(h)
    dbias = lse.new_zeros(scores.keys.shape[:2]) if want.bias else None
    dvalues = lse.new_zeros(values.shape) if want.values else None

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
        if want.values:
            dvalues[b, c].baddbmm_(moved.mT, h[b, r])
        weight_a, weight_b = p * inner, p * slope
        if want.bias:
            dbias[b, c] += weight_a.sum(1)
        return weight_a, weight_b

    rows_a, rows_b, dkeys = contract_tangent(scores, weigh, direction, tangent.keys, want_rows=True, want_columns=want.keys)
    if over_keys and want.keys:
        dkeys, dvalues = dkeys + dvalues, None
    dstart_logit = dstart_value = None
    if start is not None:
        dstart_logit, more_of_h, dstart_value = start.derivatives(means, g, h)
        dh += more_of_h
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
    """The start candidate of each row."""

    moments: _Moments  # its own
    value: Tensor | None  # [B, N, Dv]
    value_tangent: Tensor | None  # [B, N, Dv]

    def derivatives(self, means: _Moments, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor | float, Tensor | None]:
        """Of its logit, what it adds to that of h, and of its value; in the dtype of g. `means`: all candidates' moments."""
        own = self.moments
        weight, moved = own.mass / _whole(means.mass), own.rate - means.rate
        inner = moved * (g + (own.slope - means.slope)) + (own.tangent - means.tangent) - means.covariance
        of_logit, weight, moved = (x.to(g.dtype)[..., None] for x in (weight * inner, weight, weight * moved))
        of_h = 0.0 if self.value is None else moved * self.value
        of_h = of_h if self.value_tangent is None else of_h + weight * self.value_tangent
        return of_logit[..., 0], of_h, None if self.value is None else moved * h


def _start(h: Tensor, start_logit: Tensor | None, start_value: Tensor | None, tangent: Tangent, lse, lse_low) -> _Start | None:
    if start_logit is None:
        return None
    zero = torch.zeros_like(lse)
    values = [None if x is None else x.to(lse.dtype) for x in (start_value, tangent.start_value)]
    of_values = (zero if x is None else _product(h, x) for x in values)
    rate = zero if tangent.start_logit is None else tangent.start_logit
    return _Start(_Moments(start_weight(start_logit, lse, lse_low), rate, *of_values, zero), *values)


def _whole(mass: Tensor) -> Tensor:
    """`mass`, and 1 where there is none."""
    return torch.where(mass == 0, 1.0, mass)


def _product(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


def _softmax(logits: Logits, level: tuple[Tensor, Tensor], b: slice, r: slice, c: slice, score: Tensor) -> Tensor:
    """A tile of p = exp(z - lse - lse_low), in place of the scores."""
    return logits.from_scores(b, r, c, score).sub_(level[0][b, r, None]).sub_(level[1][b, r, None]).exp_()


def _row_moments(logits, tangent, direction, start, level, numbers_of) -> _Moments:
    """Of all candidates, the start included. What a row's p add up to is not 1: another kernel's lse is of scores that round otherwise."""
    zero = torch.zeros_like(level[0])
    found = _Moments(*(zero.clone() for _ in _Moments._fields))
    if start is not None:
        found = found.merged(start.moments)

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
