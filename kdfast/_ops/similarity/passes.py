"""The passes over the bank that every implementation has: forward, and the sums that gradients are made of."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu, cuda, portable, triton

#: the compiled kernels by name of implementation
KERNELS = {"cpu": cpu.KERNELS, "cuda": cuda.KERNELS, "triton": triton.KERNELS}


class Want(NamedTuple):
    """Which sums are asked for."""

    rows: bool
    keys: bool
    bias: bool
    values: bool


class Sums(NamedTuple):
    """Sums weighted by p_ij and dz_ij = p_ij (slope_i + h_i.v_j); what was not asked for is empty, [0]."""

    rows: Tensor  # [B, N, D], sum_j dz_ij k_j; with it
    mass: Tensor  # [B, N], sum_j p_ij
    total: Tensor  # [B, N], sum_j dz_ij
    keys: Tensor  # [B, M, D], sum_i dz_ij s_i q_i, and sum_i p_ij h_i where the keys are the values
    bias: Tensor  # [B, M], sum_i dz_ij
    values: Tensor  # [B, M, Dv], sum_i p_ij h_i; not to be asked for where the keys are the values


def run_forward(impl, compute, need_pooled, query, keys, scale, bias, start_logit, values, start_value, *rules):
    """(lse, pooled, lse_low) as in portable.forward; `rules` = (query_labels, key_labels, key_index, limit, valid)."""
    if impl in KERNELS:
        query, keys, scale, bias, *rules = for_kernel(query, keys, scale, bias, *rules)
        start_logit, start_value = (None if x is None else x.contiguous() for x in (start_logit, start_value))
        values = None if values is None else dense(values)
        options = {"values": values, "panels": compute.panels, "products": compute.products, "kernels": KERNELS[impl]}
        return cpu.forward(query, keys, scale, bias, start_logit, start_value, *rules, need_pooled, **options)
    run = torch.ops.kdfast_torch.similarity_forward if torch.compiler.is_compiling() else portable.forward
    return run(query, keys, scale, bias, start_logit, start_value, *rules, need_pooled, values, compute.dtype)


def run_gradients(impl, compute, want: Want, slope, h, query, keys, scale, bias, values, lse, lse_low, *rules) -> Sums:
    """slope [B, N] and h [B, N, Dv] (None: 0) in the accumulator's dtype; lse and lse_low as the forward left them."""
    if impl in KERNELS:
        slope, h, lse, lse_low = (None if x is None else x.contiguous() for x in (slope, h, lse, lse_low))
        problem = (slope, lse, lse_low, *for_kernel(query, keys, scale, bias, *rules))
        options = {"h": h, "values": None if values is None else dense(values), "products": compute.products, "kernels": KERNELS[impl]}
        none = scale.new_empty(0)
        rows = cpu.grad_rows(*problem, **options) if want.rows else (none,) * 3
        columns = cpu.grad_keys(*problem, want.keys, want.bias, want.values, **options) if any(want[1:]) else (none,) * 3
        return Sums(*rows, *columns)
    # is_grads_batched knows no in-place operations, but runs an opaque op once for each upstream gradient
    opaque = torch.compiler.is_compiling() or any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in (slope, h))
    run = torch.ops.kdfast_torch.similarity_gradients if opaque else portable.gradients
    return Sums(*run(slope, h, query, keys, scale, bias, values, lse, lse_low, *rules, list(want), compute.dtype))


def run_pooled_gradients(
    compute, want: Want, g, h, weight, of_start,
    query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, pooled, *rules,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """All that upstreams g [B, N] (None: 0) of lse and h of pooled give, in the CPU's one pass: cpu.pooled_grad.

    weight, of_start: the start's p and its h.v, None and 0.0 where there is no start or no value of it.
    """
    g, h, lse, lse_low, pooled = (None if x is None else x.contiguous() for x in (g, h, lse, lse_low, pooled))
    problem = for_kernel(query, keys, scale, bias, *rules)
    options = {"values": None if values is None else dense(values), "products": compute.products}
    if weight is not None:
        options |= {"start_weight": weight.contiguous(), "start_slope": None if start_value is None else of_start.contiguous()}
    return cpu.pooled_grad(g, h, pooled, lse, lse_low, *problem, *want, **options)


def for_kernel(query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid):
    """As the compiled kernels want it: contiguous tensors (the bank's side may have batch stride 0)."""
    query_labels, key_index, limit = (None if x is None else x.contiguous() for x in (query_labels, key_index, limit))
    bias, key_labels, valid = (None if x is None else dense(x) for x in (bias, key_labels, valid))
    return query.contiguous(), dense(keys), scale.contiguous(), bias, query_labels, key_labels, key_index, limit, valid


def dense(x):
    """`x`, contiguous but for a batch dimension of stride 0, which stays."""
    one = x[:1] if x.shape[0] > 1 and x.stride(0) == 0 else x
    return one.contiguous().expand(x.shape)
