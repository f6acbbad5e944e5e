"""Similarities to sampled bank rows. Derivation: README.md; definition: reference.py."""

from torch import Tensor

from ..._core import checks, impls
from ..._core.dtypes import accumulator
from ..._core.recording import recorded
from . import cpu, triton
from .autograd import GatherScores, RowStatistic

__all__ = ["gather_similarity", "row_log_sum_exp", "row_noise_contrast"]

impls.register(
    "gather_similarity",
    impls.Implementation("cpu", cpu.missing, cpu.refuses),
    impls.Implementation("triton", triton.missing, triton.refuses),
)


def gather_similarity(query: Tensor, bank: Tensor, index: Tensor, *, scale: float | Tensor = 1.0, impl: str | None = None) -> Tensor:
    """z_nk = s_n q_n . k_{index_nk}: scores of each query against its own K sampled bank rows.

    The gathered rows [N, K, D] are never stored. All inputs but `index` are differentiable, to any order; the query's
    gradient is a weighted sum of bank rows, the bank's a sum in fixed order, dense [M, D]. The bank is read again by
    the backward and must not change before it (kdfast.functional.sampled_info_nce and sampled_nce have no such
    limit).

    Args:
        query: [N, D], float16, bfloat16, float32 or float64.
        bank: [M, D], M >= 1, of the query's dtype. Under autocast the dtypes may differ; products are formed in
            float32 (float64 for float64) either way.
        index: [N, K] integers in [0, M); duplicates are fine.
        scale: s, a float or a tensor [] or [N].
        impl: None, "cpu", "triton" or "torch".

    Returns:
        [N, K] in float32 (float64 for float64 queries).

    Raises:
        TypeError, ValueError: wrong type, dtype, device, rank, width; a bank of no rows; an unknown `impl`.
        IndexError: an index outside [0, M), on the CPU (on a GPU it is a device assert, or with impl="triton" NaN).
    """
    index = checked(query, bank, index)
    impl = choose(query, bank, impl)
    return GatherScores.apply(scaled(query, scale), bank, index, impl)


def choose(query: Tensor, bank: Tensor, impl: str | None) -> str:
    return impls.choose("gather_similarity", impl, device_type=query.device.type, dtype=query.dtype, bank_dtype=bank.dtype)


def checked(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """`index` as int64, after the checks that every op of this family makes."""
    checks.rows("query", query, ndim=2)
    checks.rows("bank", bank, ndim=2)
    checks.alike("bank", bank, "query", query)
    checks.same_width("bank", bank, "query", query)
    if len(bank) == 0:
        raise ValueError(f"bank must have at least 1 row, got shape {tuple(bank.shape)}")
    index = checks.integral("index", index, device=query.device)
    if index.dim() != 2 or len(index) != len(query):
        raise ValueError(f"index must have shape ({len(query)}, K), got {tuple(index.shape)}")
    checks.index_range("index", index, len(bank))
    return index


def scaled(query: Tensor, scale: float | Tensor) -> Tensor:
    """s_n q_n in the accumulator's dtype, contiguous: the scale rides on the query, so its gradient costs [N, D], not [N, K]."""
    wide = query.to(accumulator(query.dtype))
    if isinstance(scale, Tensor):
        checks.floating("scale", scale)
        if scale.dim() > 0:
            checks.exact_shape("scale", scale, (len(query),))
            scale = scale[:, None]
        scale = scale.to(wide)
    else:
        checks.number("scale", scale)
    return (wide * scale).contiguous()


def row_log_sum_exp(query: Tensor, bank: Tensor, index: Tensor, offset: Tensor | None, impl: str) -> Tensor:
    """log sum_k exp(q_n . k_{index_nk} + offset_nk), [N], of a scaled query, by a chosen `impl`; no gradient to `offset`."""
    return _statistic(query, bank, index, offset, None, impl)


def row_noise_contrast(query: Tensor, bank: Tensor, index: Tensor, shift: Tensor, offset: Tensor | None, impl: str) -> Tensor:
    """softplus(a - z_n0) + sum_{k > 0} softplus(z_nk - a), [N], z as above, a = `shift` []; no gradient to it."""
    return _statistic(query, bank, index, offset, shift, impl)


def _statistic(query: Tensor, bank: Tensor, index: Tensor, offset: Tensor | None, shift: Tensor | None, impl: str) -> Tensor:
    with_pooled = recorded(query) and not recorded(bank)
    return RowStatistic.apply(query, bank, index, offset, shift, with_pooled, impl)[0]
