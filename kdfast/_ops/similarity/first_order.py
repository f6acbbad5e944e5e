"""The first derivative of the streaming softmax, from sums over the bank. README.md derives it."""

from typing import NamedTuple

import torch
from torch import Tensor

from .passes import Sums, Want, run_forward, run_gradients, run_pooled_gradients
from .portable import start_weight


class Start(NamedTuple):
    """The start candidate's part in a row."""

    weight: Tensor  # [B, N], p
    slope: Tensor  # [B, N], what its logit's gradient is p times


def pooled_is_over_keys(values: Tensor | None, start_value: Tensor | None) -> bool:
    """Whether the pooled output is sum_j p_ij k_j, the gradient of lse in s_i q_i."""
    return values is None and start_value is None


class Excess(NamedTuple):
    """How far a row's sums are from what they would be without rounding."""

    mass: Tensor  # [B, N], sum_j p_ij, which would be 1; 1 for rows that admit nothing
    mean: Tensor  # [B, N], of the slopes under p, which would be 0 where what they have in common was taken off


def excess(sums: Sums, start: Start | None) -> Excess:
    mass, total = sums.mass, sums.total
    if start is not None:
        mass, total = mass + start.weight, total + start.weight * start.slope
    nothing = mass == 0
    mass = torch.where(nothing, 1.0, mass)
    return Excess(mass, torch.where(nothing, 0.0, total / mass))


def corrected(sums: Sums, start: Start | None, key_mean: Tensor) -> Tensor:  # [B, N, D]
    """The rows' sums, with slopes of mean 0, without the errors that all candidates of a row share.

    lse and what the slopes contain are rounded, so a row's p add up to m = 1 + O(eps) and its dz to t in place of 0. Such errors
    add up in the row's sum, which is therefore divided by m; and t / m sum_j p_ij k_j is taken off.
    """
    over = excess(sums, start)
    return sums.rows / over.mass[..., None] - over.mean[..., None] * key_mean


def first_order(impl, compute, want, g, h, *problem):
    """(dquery, dkeys, dscale, dbias, dstart_logit, dvalues, dstart_value), None where not wanted.

    `want` = (query, scale, keys, bias, values, lse), the last whether g is more than zeros.
    `problem` = (query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, pooled, *rules).
    """
    return _of_lse(impl, compute, want, g, *problem) if h is None else _of_both(impl, compute, want, g, h, *problem)


def _of_lse(impl, compute, want, g, query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, pooled, *rules):
    want_query, want_scale, want_keys, want_bias, *_ = want
    closed = pooled_is_over_keys(values, start_value)
    start = None if start_logit is None else Start(start_weight(start_logit, lse, lse_low), g)
    wanted = Want((want_query or want_scale) and not closed, want_keys, want_bias, False)
    sums = None
    if any(wanted):
        sums = run_gradients(impl, compute, wanted, g, None, query, keys, scale, bias, values, lse, lse_low, *rules)
    rows = sums.rows / excess(sums, start).mass[..., None] if wanted.rows else pooled
    factor = g if closed else None  # of rows; None: they have it
    dquery = dscale = None
    if want_query:
        dquery = ((scale if factor is None else scale * factor)[..., None] * rows).to(query.dtype)
    if want_scale:
        dscale = _wide(query, compute, scale, rows)
        dscale = dscale if factor is None else factor * dscale
    return (
        dquery,
        sums.keys.to(keys.dtype) if want_keys else None,
        dscale,
        sums.bias if want_bias else None,
        None if start is None else start.weight * start.slope,
        None,
        None,
    )


def _wide(query, compute, scale, rows):
    """q_i.rows_i, [B, N]."""
    return (query.to(compute.dtype).to(scale.dtype) * rows).sum(-1)


def _of_both(impl, compute, want, g, h, query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, pooled, *rules):
    want_query, want_scale, want_keys, want_bias, want_values, from_lse = want
    weight = None if start_logit is None else start_weight(start_logit, lse, lse_low)
    of_start = 0.0 if start_value is None else (h * start_value.to(h.dtype)).sum(-1)
    wanted = Want(want_query or want_scale, want_keys, want_bias, want_values)
    problem = (query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, pooled, *rules)
    if any(wanted) and impl == "cpu":
        rows, mean, dkeys, dbias, dvalues = run_pooled_gradients(compute, wanted, g if from_lse else None, h, weight, of_start, *problem)
        mean = mean if any(wanted[:3]) else (h * pooled).sum(-1)
    else:
        rows, mean, dkeys, dbias, dvalues = _pooled_sums(impl, compute, wanted, g, from_lse, h, weight, of_start, *problem)
    return (
        (scale[..., None] * rows).to(query.dtype) if want_query else None,
        dkeys.to(keys.dtype) if want_keys else None,
        _wide(query, compute, scale, rows) if want_scale else None,
        dbias if want_bias else None,
        None if weight is None else weight * (g + (of_start - mean)),
        dvalues.to(values.dtype) if want_values else None,
        None if weight is None or start_value is None else (weight[..., None] * h).to(start_value.dtype),
    )


def _pooled_sums(
    impl, compute, wanted, g, from_lse, h, weight, of_start,
    query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, pooled, *rules,
):  # fmt: skip
    """(rows' sums, means of h.v, keys' sums, bias', values'), None where not wanted.

    Where p is nearly one candidate's, h.v less its mean is 0 to many digits: the mean must be one of the h.v in the sums, to the bit. So
    rows come first, with a mean from `pooled`; by as much as their slopes miss zero that mean is moved before columns are summed. What g
    adds is apart, lest it be rounded to h.v.
    """
    mean = (h * pooled).sum(-1)

    def summed(wanted, slope, h):
        return run_gradients(impl, compute, wanted, slope, h, query, keys, scale, bias, values, lse, lse_low, *rules)

    rows = dkeys = dbias = dvalues = None
    if wanted.rows or wanted.keys or wanted.bias:
        of_rows = summed(Want(True, False, False, False), -mean, h)
        over = excess(of_rows, None if weight is None else Start(weight, of_start - mean))
        mean = mean + over.mean
    if wanted.rows:
        if values is not None:
            _, key_mean, _ = run_forward(impl, compute, True, query, keys, scale, bias, start_logit, None, None, *rules)
        elif start_value is not None:
            key_mean = pooled - weight[..., None] * start_value.to(pooled.dtype)
        else:
            key_mean = pooled
        rows = of_rows.rows / over.mass[..., None] + (g - over.mean)[..., None] * key_mean
    if any(wanted[1:]):
        columns = summed(wanted._replace(rows=False), -mean, h)
        dkeys, dbias, dvalues = columns.keys, columns.bias, columns.values
        if from_lse and (wanted.keys or wanted.bias):
            of_lse = summed(Want(False, wanted.keys, wanted.bias, False), g, None)
            dkeys, dbias = dkeys + of_lse.keys, dbias + of_lse.bias
    return rows, mean, dkeys, dbias, dvalues
