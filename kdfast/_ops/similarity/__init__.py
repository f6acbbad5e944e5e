"""The streaming softmax of queries over a bank of keys: public functions and the implementations they choose from."""

import torch
from torch import Tensor

from ..._core import impls
from . import cpu, cuda, triton
from .apply import streaming_softmax
from .arguments import Spec, problem
from .exclusions import Harder, KeyIndex, SameLabel
from .plain_pooled import pooled_softmax
from .portable import start_weight
from .symmetric import symmetric_lse

__all__ = ["Harder", "KeyIndex", "SameLabel", "similarity_lse", "similarity_softmax", "symmetric_lse"]


impls.register(
    "similarity_softmax",
    impls.Implementation("cpu", cpu.missing, cpu.refuses),
    impls.Implementation("cuda", cuda.missing, cuda.refuses),
    impls.Implementation("triton", triton.missing, triton.refuses),
)


def similarity_softmax(
    query: Tensor,
    keys: Tensor,
    *,
    scale: float | Tensor = 1.0,
    values: Tensor | None = None,
    bias: Tensor | None = None,
    start: tuple[Tensor, Tensor | None] | None = None,
    exclude: tuple = (),
    valid: int | Tensor | None = None,
    precision: str | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of every query's scores over a bank of keys, and the softmax-weighted mean of the values, in one pass.

    With z_ij = scale_i q_i.k_j + bias_j over the admitted keys j and p = softmax_j(z):
    lse_i = log sum_j exp(z_ij), pooled_i = sum_j p_ij v_j. No N x M tensor is formed, forward or backward.

    Args:
        query: [*B, N, D].
        keys: [*B, M, D], or [M, D] shared by the whole batch (never copied). M >= 1.
        scale: 1 / temperature: a float, or a tensor [] or [*B, N] (or [N]).
        values: [*B, M, Dv] or [M, Dv], as `keys`; default: the keys.
        bias: [*B, M] or [M], added to the scores (a logQ correction); -inf drops a key.
        start: (logit [*B, N], value [*B, N, Dv] or None for zero): one more candidate of each query, which no exclusion removes.
        exclude: at most one each of SameLabel, KeyIndex, Harder.
        valid: an int, or an integer tensor [] or [*B]: only the first `valid` keys count; default all, 0 is legal.
        precision: how products of float32 inputs are formed: "ieee", "tf32", "bf16x3" or "bf16"; None follows PyTorch's global
            setting. impl="torch" rounds the operands for "bf16"; for the others its products are PyTorch's own.
        impl: an implementation by name; None: the best that can serve the call.

    Returns:
        lse [*B, N] and pooled [*B, N, Dv], fp32 (fp64 for fp64 inputs). A query that admits nothing has lse -inf and pooled 0.

    Gradients (reverse mode, twice): query, keys, values, bias, scale and start, each in its own dtype. Under autocast queries,
    keys and values are rounded to its dtype tile by tile; scale, bias and start's logit never are. keys and values are saved for
    the backward, so they must not change before it (a contrastive loss of lse alone has no such rule).

    Raises:
        TypeError: a wrong type or dtype, or dtypes of query, keys and values that differ outside autocast.
        ValueError: a wrong shape or device, an empty bank, `valid` beyond M, two exclusions of a kind, an `impl` that cannot serve.
        IndexError: a KeyIndex outside [-1, M), or a `valid` tensor outside [0, M], on the CPU.

    Source: the online softmax of Milakov and Gimelshein (2018), pooled in one pass as in FlashAttention (Dao et al., 2022).
    """
    if start is precision is impl is None:
        found = pooled_softmax(query, keys, values, scale, bias, exclude, valid)
        if found is not None:
            return found
    spec, tensors = problem(query, keys, scale, values, bias, start, exclude, valid, precision, impl)
    lse, pooled, _ = streaming_softmax(spec, tensors.folded(spec), pool=True, need_pooled=True)
    return _unfold(spec, lse, pooled)


def similarity_lse(
    query: Tensor,
    keys: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    start: tuple[Tensor, Tensor | None] | None = None,
    exclude: tuple = (),
    valid: int | Tensor | None = None,
    precision: str | None = None,
    impl: str | None = None,
    need_pooled: bool = False,
    panels: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`similarity_softmax` whose pooled output carries no gradient: (lse [*B, N], pooled [*B, N, D] or None).

    For losses of lse alone. The gradient of the queries comes from the forward pass, so a bank that needs no gradient is read
    once and may be updated in place as soon as this returns; a double backward after such an update raises RuntimeError.
    pooled is over the keys; None unless `need_pooled`. panels: the keys' packed copy, from a QueueBank.
    """
    spec, tensors = problem(query, keys, scale, None, bias, start, exclude, valid, precision, impl, panels)
    folded = tensors.folded(spec)
    lse, pooled, lse_low = streaming_softmax(spec, folded._replace(start_value=None), pool=False, need_pooled=need_pooled)
    if need_pooled and folded.start_value is not None:
        with torch.no_grad():
            pooled = pooled + start_weight(folded.start_logit, lse, lse_low)[..., None] * folded.start_value
    lse, pooled = _unfold(spec, lse, pooled if need_pooled else None)
    return lse, None if pooled is None else pooled.detach()


def _unfold(spec: Spec, lse: Tensor, pooled: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return lse.reshape(spec.rows), None if pooled is None else pooled.reshape(*spec.rows, pooled.shape[-1])
