"""impl="cpu": the fused C++ kernels, torch.ops.kdfast.similarity_softmax, .similarity_grad_rows, .similarity_grad_keys,
.similarity_pooled_grad, .similarity_second and .similarity_pooled_second.

docs/cpu-kernels.md describes them. Triton's have the same schemas in a namespace of their own (triton/__init__.py), which `kernels` names.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast._core import extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kernels(NamedTuple):
    """Compiled kernels: the namespace of their ops, and the number that each way to form products has there."""

    ops: object
    products: dict[str, int]


KERNELS = Kernels(torch.ops.kdfast, {"ieee": 0, "tf32": 0, "bf16x3": 1, "bf16": 2})


def missing() -> str | None:
    """Why the kernels are not on this machine (None: they are)."""
    return extension.missing_cpu()


def refuses(*, device_type: str = "cpu", dtype: torch.dtype = torch.float32, **_facts) -> str | None:
    """Why they cannot serve a call on this device type and dtype (None: it can)."""
    if device_type != "cpu":
        return f"it runs on CPU tensors, these are on {device_type}"
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 or float16, not {dtype}"
    return None


def product_number(name: str | None, query: Tensor, kernels: Kernels = KERNELS) -> int:
    """The kernels' number for a way to form products; None: as the queries' dtype suggests."""
    return kernels.products[name or ("bf16" if query.dtype == torch.bfloat16 else "ieee")]


def forward(
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    start_logit: Tensor | None,
    start_value: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    key_index: Tensor | None,
    limit: Tensor | None,
    valid: Tensor | None,
    pooled: bool,
    *,
    values: Tensor | None = None,
    panels: Tensor | None = None,
    products: str | None = None,
    kernels: Kernels = KERNELS,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse [B, N], pooled [B, N, Dv], lse_low [B, N]) in float32; pooled is empty, [0], unless asked for.

    lse + lse_low is the log-sum-exp with twice a float's digits.

    z_ij = scale_i q_i.k_j + bias_j over the admitted columns j, and start_i. Contiguous, except that what belongs to the columns
    may be shared by the batch (stride 0): query [B, N, D], keys [B, M, D], scale [B, N] float32, bias [B, M] float32,
    start_logit [B, N] float32 with start_value [B, N, D] (None: zero), query_labels [B, N] with key_labels [B, M] int64,
    key_index [B, N, E] int64 (-1 none), limit [B, N] float32, valid [B] int64. RuntimeError for anything else.
    values [B, M, Dv] (None: the keys) are what is pooled. The matrices may differ in dtype; `products` says how they are multiplied.
    panels: a packed copy of the keys (torch.ops.kdfast.bank_panels), read in their place where it is for these products and this
    instruction set; else without effect.
    """
    return kernels.ops.similarity_softmax(
        query, keys, scale, bias, start_logit, values, start_value, query_labels, key_labels, key_index, limit, valid, pooled,
        product_number(products, query, kernels), *(() if panels is None else (panels,)),
    )  # fmt: skip


def grad_rows(
    slope: Tensor,
    lse: Tensor,
    lse_low: Tensor | None,
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    key_index: Tensor | None,
    limit: Tensor | None,
    valid: Tensor | None,
    *,
    h: Tensor | None = None,
    values: Tensor | None = None,
    products: str | None = None,
    kernels: Kernels = KERNELS,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_j dz_ij k_j [B, N, D], sum_j p_ij [B, N], sum_j dz_ij [B, N]) in float32, with dz_ij = p_ij (slope_i + h_i.v_j).

    p_ij = exp(z_ij - lse_i - lse_low_i), 0 where excluded and in rows with lse -inf. slope [B, N], h [B, N, Dv] (None: 0), and lse
    and lse_low (None: 0) [B, N], as `forward` left them, are float32; the rest as there.
    """
    return kernels.ops.similarity_grad_rows(
        slope, h, lse, lse_low, query, keys, scale, bias, values, query_labels, key_labels, key_index, limit, valid,
        product_number(products, query, kernels),
    )  # fmt: skip


def grad_keys(
    slope: Tensor,
    lse: Tensor,
    lse_low: Tensor | None,
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    key_index: Tensor | None,
    limit: Tensor | None,
    valid: Tensor | None,
    want_keys: bool,
    want_bias: bool,
    want_values: bool = False,
    *,
    h: Tensor | None = None,
    values: Tensor | None = None,
    products: str | None = None,
    kernels: Kernels = KERNELS,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_i dz_ij s_i q_i [B, M, D], sum_i dz_ij [B, M], sum_i p_ij h_i [B, M, Dv]) in float32; what is not wanted is empty, [0].

    dz and the arguments as in `grad_rows`. Where the keys are the values, the last sum is part of the first. Keys that the batch shares
    get a gradient for each entry.
    """
    return kernels.ops.similarity_grad_keys(
        slope, h, lse, lse_low, query, keys, scale, bias, values, query_labels, key_labels, key_index, limit, valid,
        want_keys, want_bias, want_values, product_number(products, query, kernels),
    )  # fmt: skip


def pooled_grad(
    g: Tensor | None,
    h: Tensor,
    pooled: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    key_index: Tensor | None,
    limit: Tensor | None,
    valid: Tensor | None,
    want_rows: bool,
    want_keys: bool,
    want_bias: bool,
    want_values: bool,
    *,
    values: Tensor | None = None,
    start_weight: Tensor | None = None,
    start_slope: Tensor | None = None,
    products: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum_j dz_ij k_j [B, N, D], mean [B, N], sum_i dz_ij s_i q_i [B, M, D], sum_i dz_ij [B, M], sum_i p_ij h_i [B, M, Dv]) in float32.

    dz_ij = p_ij (g_i + w_ij - mean_i) with w_ij = h_i.v_j and mean_i = sum_j p_ij w_ij. What is not wanted is empty, [0]; mean too if only
    values are. g [B, N] (None: 0), h [B, N, Dv], the start's p and w_i0 [B, N], and pooled, lse and lse_low, as `forward` left them, are
    float32. A row's p are brought to a sum of 1. The rest as in `grad_keys`.
    """
    return torch.ops.kdfast.similarity_pooled_grad(
        g, h, pooled, lse, lse_low, query, keys, scale, bias, values, start_weight, start_slope, query_labels, key_labels, key_index, limit,
        valid, want_rows, want_keys, want_bias, want_values, product_number(products, query),
    )  # fmt: skip


def second_order(
    g: Tensor,
    query_direction: Tensor | None,
    keys_direction: Tensor | None,
    scale_direction: Tensor | None,
    lse: Tensor,
    lse_low: Tensor,
    pooled: Tensor,
    query: Tensor,
    keys: Tensor,
    *rest: Tensor | None,
    want_keys: bool,
    products: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of <directions, gradients of <g, lse>> in (g [B, N], query, keys, scale [B, N]) in float32; the keys' [0] unless wanted.

    lse, lse_low and pooled as `forward` left them, without start and other values; `rest` = (scale, bias, ..., valid) as there. Directions
    None: 0. Those of matrices may have other dtypes than these.
    """
    return torch.ops.kdfast.similarity_second(
        g, query_direction, keys_direction, scale_direction, lse, lse_low, pooled, query, keys, *rest, want_keys,
        product_number(products, query),
    )  # fmt: skip


def pooled_second_order(
    g: Tensor,
    h: Tensor,
    query_direction: Tensor | None,
    keys_direction: Tensor | None,
    scale_direction: Tensor | None,
    values_direction: Tensor | None,
    lse: Tensor,
    lse_low: Tensor,
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *rules: Tensor | None,
    values: Tensor | None,
    want_h: bool,
    want_keys: bool,
    want_scale: bool,
    want_values: bool,
    products: str | None = None,
    kernels: Kernels = KERNELS,
    beyond: tuple[Tensor | None, Tensor | None, bool] = (),
) -> tuple[Tensor, ...]:
    """Gradients of <directions, gradients of <g, lse> + <h, pooled>> in (g, h, query, keys, scale, values) in float32.

    What is not wanted is [0]. g [B, N] and h [B, N, Dv], lse and lse_low as `forward` left them, without start; the rest as there.
    Directions None: 0. Those of matrices may have other dtypes than these.

    Triton's kernels alone take `beyond`: a direction of the bias [B, M], what the start brings to its row (its p, rate, h.v and
    h.(tangent of v), [4, B, N]), and whether the bias' gradient is wanted. They return that and the rows' moments [5, B, N] float64 too:
    what p add up to, means of rate, h.v and h.(tangent of v), and the covariance of the first two.
    """
    return kernels.ops.similarity_pooled_second(
        g, h, query_direction, keys_direction, scale_direction, values_direction, lse, lse_low, query, keys, scale, bias, values, *rules,
        want_h, want_keys, want_scale, want_values, product_number(products, query, kernels), *beyond,
    )  # fmt: skip


def forward_fake(query: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    values, pooled = args[4], args[11]
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    width = query.shape[-1] if values is None else values.shape[-1]
    return lse, query.new_empty((*lse.shape, width) if pooled else (0,), dtype=torch.float32), torch.empty_like(lse)


def grad_rows_fake(slope, h, lse, lse_low, query, *args) -> tuple[Tensor, Tensor, Tensor]:
    return slope.new_empty(query.shape), torch.empty_like(slope), torch.empty_like(slope)


def grad_keys_fake(slope, h, lse, lse_low, query, keys, scale, bias, values, *args) -> tuple[Tensor, Tensor, Tensor]:
    want_keys, want_bias, want_values = args[-4:-1]
    return (
        slope.new_empty(keys.shape if want_keys else (0,)),
        slope.new_empty(keys.shape[:2] if want_bias else (0,)),
        slope.new_empty(values.shape if want_values else (0,)),
    )


def pooled_grad_fake(g, h, pooled, lse, lse_low, query, keys, scale, bias, values, *args) -> tuple[Tensor, ...]:
    want_rows, want_keys, want_bias, want_values = args[-5:-1]
    return (
        lse.new_empty(query.shape if want_rows else (0,)),
        lse.new_empty(lse.shape if want_rows or want_keys or want_bias else (0,)),
        lse.new_empty(keys.shape if want_keys else (0,)),
        lse.new_empty(keys.shape[:2] if want_bias else (0,)),
        lse.new_empty(values.shape if want_values else (0,)),
    )


def second_order_fake(g, of_query, of_keys, of_scale, lse, lse_low, pooled, query, keys, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    want_keys = args[-2]
    return torch.empty_like(g), g.new_empty(query.shape), g.new_empty(keys.shape if want_keys else (0,)), torch.empty_like(g)


def pooled_second_order_fake(g, h, *args) -> tuple[Tensor, ...]:
    query, keys, values = args[6], args[7], args[10]
    want_h, want_keys, want_scale, want_values = args[-5:-1]
    return (
        torch.empty_like(g),
        g.new_empty(h.shape if want_h else (0,)),
        g.new_empty(query.shape),
        g.new_empty(keys.shape if want_keys else (0,)),
        g.new_empty(g.shape if want_scale else (0,)),
        g.new_empty(values.shape if want_values else (0,)),
    )


if missing() is None:
    torch.library.register_fake("kdfast::similarity_second", second_order_fake)
    torch.library.register_fake("kdfast::similarity_pooled_second", pooled_second_order_fake)
    torch.library.register_fake("kdfast::similarity_softmax", forward_fake)
    torch.library.register_fake("kdfast::similarity_grad_rows", grad_rows_fake)
    torch.library.register_fake("kdfast::similarity_grad_keys", grad_keys_fake)
    torch.library.register_fake("kdfast::similarity_pooled_grad", pooled_grad_fake)
