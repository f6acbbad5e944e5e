"""The first derivative of the streaming softmax, from sums over the bank. README.md derives it."""

from typing import NamedTuple

import torch
from torch import Tensor

from .passes import Sums, Want, run_gradients
from .portable import above_nothing


class Start(NamedTuple):
    """The start candidate's part in a row."""

    weight: Tensor  # [B, N], p
    slope: Tensor  # [B, N], what its logit's gradient is p times


def start_weight(start_logit: Tensor, lse: Tensor, lse_low: Tensor) -> Tensor:
    """p_i of the start candidate, [B, N]."""
    return torch.exp(start_logit - above_nothing(lse) - lse_low)


def pooled_is_over_keys(values: Tensor | None, start_value: Tensor | None) -> bool:
    """Whether the pooled output is sum_j p_ij k_j, the gradient of lse in s_i q_i."""
    return values is None and start_value is None


def corrected(sums: Sums, start: Start | None, expected: Tensor, key_mean: Tensor | None) -> Tensor:  # [B, N, D]
    """The rows' sums without the errors that all candidates of a row share.

    lse and what the slopes contain are rounded, so a row's p add up to m = 1 + O(eps) and its dz to t in place of `expected`. Such errors
    add up in the row's sum, which is therefore divided by m; and (t / m - expected) sum_j p_ij k_j is taken off, where that mean is known.
    """
    mass, total = sums.mass, sums.total
    if start is not None:
        mass, total = mass + start.weight, total + start.weight * start.slope
    mass = torch.where(mass == 0, 1.0, mass)
    rows = sums.rows / mass[..., None]
    return rows if key_mean is None else rows - (total / mass - expected)[..., None] * key_mean


def first_order(impl, compute, want, g, h, query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, pooled, *rules):
    """(dquery, dkeys, dscale, dbias, dstart_logit, dvalues, dstart_value); `want` = (query, scale, keys, bias, values), None if not."""
    want_query, want_scale, want_keys, want_bias, want_values = want
    closed = h is None and pooled_is_over_keys(values, start_value)
    slope = g if h is None else g - (h * pooled).sum(-1)  # of a candidate whose value is zero
    start = dstart_logit = dstart_value = None
    if start_logit is not None:
        of_start = slope if h is None or start_value is None else slope + (h * start_value.to(h.dtype)).sum(-1)
        start = Start(start_weight(start_logit, lse, lse_low), of_start)
        dstart_logit = start.weight * start.slope
        if h is not None and start_value is not None:
            dstart_value = (start.weight[..., None] * h).to(start_value.dtype)

    wanted = Want((want_query or want_scale) and not closed, want_keys, want_bias, want_values and h is not None)
    sums = None
    if any(wanted):
        sums = run_gradients(impl, compute, wanted, slope, h, query, keys, scale, bias, values, lse, lse_low, *rules)
    if wanted.rows:
        key_mean = None
        if h is not None and values is None:
            key_mean = pooled if start_value is None else pooled - start.weight[..., None] * start_value.to(pooled.dtype)
        rows = corrected(sums, start, g, key_mean)
    dquery = dscale = None
    if want_query:
        factor = scale * g if closed else scale
        dquery = (factor[..., None] * (pooled if closed else rows)).to(query.dtype)
    if want_scale:
        dscale = (query.to(compute.dtype).to(scale.dtype) * (pooled if closed else rows)).sum(-1)
        dscale = g * dscale if closed else dscale
    return (
        dquery,
        sums.keys.to(keys.dtype) if want_keys else None,
        dscale,
        sums.bias if want_bias else None,
        dstart_logit,
        sums.values.to(values.dtype) if wanted.values else None,
        dstart_value,
    )
