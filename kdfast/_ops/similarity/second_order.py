"""The second derivative of the streaming softmax's lse, from the passes of the first. README.md derives it."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu
from .first_order import Start, corrected, pooled_is_over_keys
from .passes import Want, for_kernel, run_forward, run_gradients
from .portable import start_weight


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


def second_order_of_lse(
    impl: str, compute, want_keys: bool, want_bias: bool, tangent: Tangent, g: Tensor,
    query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, pooled: Tensor | None, *rules,
) -> Derivatives:  # fmt: skip
    """Where only lse has an upstream gradient. pooled: the forward's, if at hand.

    Along the tangent the logits move at the rates zdot_ij = e_i.k_j + s_i q_i.kappa_j + beta_j, and lse at their mean: the pooled output
    for the values v_j = (k_j, kappa_j, beta_j), in the direction (e_i, s_i q_i, 1). So the sums are those of that output's gradient.
    """
    plain = start_logit is None and tangent.bias is None and not want_bias and pooled_is_over_keys(values, start_value)
    if impl == "cpu" and plain and pooled is not None:
        return _by_one_op(compute, want_keys, tangent, g, lse, lse_low, pooled, query, keys, scale, bias, *rules)
    q = query.to(compute.dtype).to(scale.dtype)
    u = torch.zeros_like(q) if tangent.query is None else tangent.query.to(scale.dtype)
    sigma = torch.zeros_like(scale) if tangent.scale is None else tangent.scale
    scaled = scale[..., None] * q

    parts, direction = [], [scale[..., None] * u + sigma[..., None] * q]  # of the values beside the keys, and e
    if tangent.keys is not None:
        parts.append(tangent.keys)
        direction.append(scaled)
    if tangent.bias is not None:
        parts.append(tangent.bias[..., None])
        direction.append(torch.ones_like(scale)[..., None])
    width = query.shape[-1]

    def mean(of: Tensor | None) -> Tensor:
        return run_forward(impl, compute, True, query, keys, scale, bias, start_logit, of, None, *rules)[1]

    of_rates = torch.cat([keys, *parts], -1) if parts else None
    direction = torch.cat(direction, -1)
    if pooled is None or not pooled_is_over_keys(values, start_value):
        means = mean(of_rates)
    else:
        means = torch.cat([pooled, mean(torch.cat(parts, -1))], -1) if parts else pooled
    rate = (direction * means).sum(-1)  # the mean of zdot
    start = None
    if start_logit is not None:
        weight = start_weight(start_logit, lse, lse_low)
        own = torch.zeros_like(lse) if tangent.start_logit is None else tangent.start_logit
        rate = rate + weight * own
        start = Start(weight, g * (own - rate))

    want = Want(True, want_keys, want_bias, want_keys and bool(parts))
    sums = run_gradients(impl, compute, want, -g * rate, g[..., None] * direction, query, keys, scale, bias, of_rates, lse, lse_low, *rules)
    key_mean = means[..., :width]
    rows_a = corrected(sums, start, key_mean)
    rows_b = g[..., None] * key_mean
    if tangent.keys is not None:
        rows_a = rows_a + g[..., None] * means[..., width : 2 * width]
    dkeys = None
    if want_keys:
        dkeys = sums.keys + sums.values[..., :width] if parts else sums.keys
    return Derivatives(
        g=rate,
        h=None,
        query=scale[..., None] * rows_a + sigma[..., None] * rows_b,
        keys=dkeys,
        scale=(q * rows_a + u * rows_b).sum(-1),
        bias=sums.bias if want_bias else None,
        start_logit=None if start is None else start.weight * start.slope,
        values=None,
        start_value=None,
    )


def _by_one_op(compute, want_keys: bool, tangent: Tangent, g, lse, lse_low, pooled, *problem) -> Derivatives:
    along = (None if x is None else x.contiguous() for x in (tangent.query, tangent.keys, tangent.scale))
    found = (g.contiguous(), *along, lse.contiguous(), lse_low.contiguous(), pooled.contiguous())
    dg, dquery, dkeys, dscale = cpu.second_order(*found, *for_kernel(*problem), want_keys=want_keys, products=compute.products)
    return Derivatives(dg, None, dquery, dkeys if want_keys else None, dscale, None, None, None, None)
