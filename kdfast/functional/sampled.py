"""Contrastive losses over sampled bank rows: InfoNCE, and the noise-contrastive loss of CRD."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import bank_protocol, checks, collectives, dtypes
from .._core.reduction import NAMES as REDUCTIONS
from .._core.reduction import reduce_rows
from .._ops import gather
from .._ops.similarity.positives import dot
from ._candidates import inverse, normalized, own_columns

_CRD_EPS = 1e-7  # added to K/n in CRD's denominators


def sampled_info_nce(
    query: Tensor,
    positive: Tensor,
    bank,
    index: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    query_labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    bank_bias: Tensor | None = None,
    bank_valid: int | Tensor | None = None,
    own_index: bool | Tensor | None = None,
    include_positive: bool = True,
    normalize: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """InfoNCE against K sampled bank rows a query: logsumexp(z+_i, z_i1, ..., z_iK) - z+_i, z = similarity / temperature.

    The gathered rows [N, K, D] are never stored. A bank that needs no gradient may be updated in place between forward
    and backward: the query's gradient is ready after the forward. Autocast does not change the arithmetic, which is
    float32 (float64 for float64).

    Args:
        query, positive: [N, D], floating; the positive is in the denominator once and nothing removes it.
        bank: [M, D], or a kdfast bank, which brings its own fill, labels and bias.
        index: [N, K] integers in [0, M): each query's own negatives, duplicates counted as often as they occur.
        temperature: > 0; float, 0-d tensor or [N], which may need gradient.
        query_labels, bank_labels: integers [N] and [M]; sampled rows of the query's class are left out.
        bank_bias: [M], added to the scores (minus the log of a row's sampling probability, say; -inf drops it);
            receives no gradient.
        bank_valid: int or 0-d integer tensor: sampled rows past this prefix of the bank are left out.
        own_index: True (row i is bank row i) or integers [N] (-1: none): the sample's own row, left out.
        include_positive: False leaves the positive out of the denominator; a row with no negative left is then dropped.
        normalize: scale query, positive and bank rows to unit length first (the bank as a copy: rather keep it so).
        weight: [N] >= 0, the weight of each row.
        reduction: "mean", "sum" or "none" ([N]).
        impl: None, "cpu", "triton" or "torch".

    Raises:
        ValueError, TypeError, IndexError: naming the argument that is wrong and what is needed.
    """
    rows = _unpacked(bank, valid=bank_valid, labels=bank_labels, bias=bank_bias)
    checks.rows("query", query, ndim=2)
    checks.floating("positive", positive)
    checks.exact_shape("positive", positive, tuple(query.shape))
    checks.alike("positive", positive, "query", query)
    checks.flag("include_positive", include_positive)
    checks.flag("normalize", normalize)
    if bank_labels is not None and query_labels is None:
        raise ValueError("bank_labels need query_labels")
    index = _checked(query, rows.rows, index, temperature, weight, reduction)
    index, offset = _admitted(query, rows, index, query_labels, own_index)
    bank, impl = rows.rows, gather.choose(query, rows.rows, impl)
    if normalize:
        query, positive, bank = normalized(query), normalized(positive), normalized(bank)
    scaled = gather.scaled(query, inverse("temperature", temperature, query))
    z_positive = dot(scaled, positive)
    z_negatives = gather.row_log_sum_exp(scaled, bank, index, offset, impl)
    if include_positive:
        # = logaddexp(z_negatives, z_positive) - z_positive, whose second derivative overflows beyond a difference of 88
        return reduce_rows(-F.logsigmoid(z_positive - z_negatives), weight=weight, reduction=reduction)
    return reduce_rows(z_negatives - z_positive, counted=z_negatives != -torch.inf, weight=weight, reduction=reduction)


def sampled_nce(
    query: Tensor,
    bank,
    index: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    num_data: int,
    normalizer: float | Tensor | None = None,
    normalize: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
    group=None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """CRD's noise-contrastive loss: tell a query's own bank row from K rows of a uniform noise distribution.

    With x = exp(z) / Z and K / n the noise density of K draws out of n = num_data,
        l_i = -log(x_i0 / (x_i0 + K/n + 1e-7)) - sum_{k=1..K} log((K/n) / (x_ik + K/n + 1e-7)),
    evaluated as softplus(a - z_i0) + sum_k softplus(z_ik - a) + K log(1 + 1e-7 n/K), a = log Z + log(K/n + 1e-7), so no
    exponential leaves the range of float32. The bank may be updated between forward and backward, as with
    `sampled_info_nce`.

    Args:
        query: [N, D], floating.
        bank: [M, D], or a kdfast bank; its rows not yet written count as x = 0, and a sample whose own row is such a
            row is not counted.
        index: [N, 1 + K] integers in [0, M), K >= 1; index[:, 0] is the sample's own row: the positive.
        temperature: > 0; float, 0-d tensor or [N], which may need gradient.
        num_data: n, the number of samples of the data set.
        normalizer: Z > 0, a float or 0-d tensor, constant for the gradient. None: n times the mean of exp(z) over this
            batch, which is what CRD does in its first step and then keeps; 0 where the bank holds nothing yet.
        normalize, weight, reduction, impl: as in `sampled_info_nce`.
        group: torch.distributed group over whose ranks the estimate of Z is taken; None: this process.

    Returns:
        (loss, normalizer): the loss float32 (float64 for float64), a scalar or [N]; Z detached, 0-d, finite in float32
        as long as n exp(z) is (similarity / temperature below about 75).

    Raises:
        ValueError, TypeError, IndexError: naming the argument that is wrong and what is needed.

    Source: Tian, Krishnan, Isola 2020 (CRD), eqs. 17-19 with the constants of the released code.
    """
    rows = _unpacked(bank)
    checks.rows("query", query, ndim=2)
    index = _checked(query, rows.rows, index, temperature, weight, reduction)
    num_data = checks.count("num_data", num_data)
    checks.flag("normalize", normalize)
    collectives.check_group(group)
    negatives = index.shape[1] - 1
    if negatives < 1:
        raise ValueError(f"index must hold the positive and at least one negative a row, got shape {tuple(index.shape)}")
    index, offset = _admitted(query, rows, index, None, None)
    bank, impl = rows.rows, gather.choose(query, rows.rows, impl)
    if normalize:
        query, bank = normalized(query), normalized(bank)
    scaled = gather.scaled(query, inverse("temperature", temperature, query))
    if normalizer is None:
        log_z = math.log(num_data) + _log_mean_exp(scaled.detach(), bank.detach(), index, offset, impl, group)
    else:
        log_z = _log_normalizer(normalizer, scaled)
    noise = negatives / num_data
    shift = torch.where(log_z == -torch.inf, 0.0, log_z) + math.log(noise + _CRD_EPS)  # nothing written: nothing is counted
    losses = gather.row_noise_contrast(scaled, bank, index, shift, offset, impl)
    losses = losses + negatives * math.log1p(_CRD_EPS / noise)
    counted = None if offset is None else offset[:, 0] != -torch.inf
    return reduce_rows(losses, counted=counted, weight=weight, reduction=reduction), log_z.exp()


def _unpacked(bank, **given) -> bank_protocol.BankRows:
    rows = bank_protocol.unpack(bank, **given)
    if rows.rows is None:
        raise TypeError("bank must be a Tensor or a kdfast bank, got None")
    return rows


def _checked(query: Tensor, bank: Tensor, index: Tensor, temperature, weight, reduction: str) -> Tensor:
    index = gather.checked(query, bank, index)
    checks.choice("reduction", reduction, REDUCTIONS)
    return index


def _admitted(query: Tensor, bank: bank_protocol.BankRows, index: Tensor, query_labels, own_index) -> tuple[Tensor, Tensor | None]:
    """(index, what is added to the scores [N, K]): the bank's bias, and -inf where a sampled row is left out.

    What is left out is not read, for it may hold anything: an admitted row stands in for it, where the query has one.
    """
    size = len(bank.rows)
    admitted = None
    if bank.valid is not None:
        admitted = index < checks.prefix("bank_valid", bank.valid, size, query.device)
    if query_labels is not None:
        query_labels = checks.integral("query_labels", query_labels, shape=(len(query),), device=query.device)
        if bank.labels is None:
            raise ValueError("query_labels need bank_labels, or a bank that keeps labels")
        bank_labels = checks.integral("bank_labels", bank.labels, shape=(size,), device=query.device)
        other = bank_labels[index] != query_labels[:, None]
        admitted = other if admitted is None else admitted & other
    own = own_columns(own_index, query, size)
    if own is not None:
        other = index != own[:, None]
        admitted = other if admitted is None else admitted & other
    offset = None
    if bank.bias is not None:
        checks.floating("bank_bias", bank.bias)
        checks.alike("bank_bias", bank.bias, "query", query, dtype=False)
        checks.exact_shape("bank_bias", bank.bias, (size,))
        offset = bank.bias.detach().to(dtypes.accumulator(query.dtype))[index]
    if admitted is not None:
        zero = torch.zeros((), dtype=dtypes.accumulator(query.dtype), device=query.device)
        offset = torch.where(admitted, zero if offset is None else offset, -torch.inf)
    if offset is not None and index.shape[1] > 0:
        there = offset != -torch.inf
        index = torch.where(there, index, index.gather(1, there.to(torch.uint8).argmax(dim=1, keepdim=True)))
    return index, offset


def _log_mean_exp(query: Tensor, bank: Tensor, index: Tensor, offset: Tensor | None, impl: str, group) -> Tensor:
    """log of the mean of exp(z) over all sampled rows of all ranks, 0-d."""
    total = torch.logsumexp(gather.row_log_sum_exp(query, bank, index, offset, impl), dim=0)
    if group is None:
        return total - math.log(max(1, index.numel()))
    totals, _ = collectives.all_gather_rows_no_grad(total[None], group)
    count = collectives.all_reduce_sum(torch.full_like(total, index.numel()), group)
    return torch.logsumexp(totals, dim=0) - count.log()


def _log_normalizer(normalizer: float | Tensor, like: Tensor) -> Tensor:
    checks.positive_number("normalizer", normalizer)
    if isinstance(normalizer, Tensor):
        checks.exact_shape("normalizer", normalizer, ())
        return normalizer.detach().to(like).log()
    return torch.full((), math.log(normalizer), dtype=like.dtype, device=like.device)
