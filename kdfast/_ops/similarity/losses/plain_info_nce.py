"""The short way of a plain call of InfoNCE (plain.py): its recognition, and `InfoNceRows` with nothing but what such a call has."""

import functools

import torch
from torch import Tensor

from .. import cpu
from ..apply import PlainFunction
from ..arguments import Compute, Spec
from ..autograd import _versions
from ..plain import PRODUCTS, indexes_rows, number_of, plain, reducible, rows_of, usual, whole_index, whole_rows
from ..unit_length import unit_length
from . import info_nce
from .plain_matching import batched_loss, paired_loss


def info_nce_loss(
    query: Tensor,
    positive: Tensor | None,
    bank,
    temperature: float | Tensor,
    targets: Tensor | None,
    smoothing: float,
    labels: tuple[Tensor | None, Tensor | None],
    attract: bool,
    include: bool,
    normalize: bool,
    valid: int | None,
    own: Tensor | bool | None,
    bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
) -> Tensor | None:
    """InfoNCE of query and positive [N, D] against the rows [M, D] of a bank; None: against each other's positives. All by name as there.

    Within a batch [*B, N, D] too, each entry by itself (`batched_loss`).

    targets: int64 [N], the positives' rows of the bank, in place of positive. temperature: a number, 0-d or [N].
    labels: int64 [N] and [M], None within a batch. Rows of the bank are left out for their class or, with `attract`, attract it, beside
    the positive or without one.
    valid: so many rows of a bank without gradient exist. own: int64 [N], a row of the bank that is left out; within a batch, True.
    bias: [M], of the scores of a bank, without gradient.
    """
    keys = positive if bank is None else rows_of(bank)
    query_labels, key_labels = labels
    if isinstance(query, Tensor) and query.dim() > 2:
        within = bank is targets is key_labels is valid is bias is weight is None and (own is None or own is True)
        options = temperature, query_labels, smoothing, normalize, reduction
        return batched_loss(query, positive, *options) if within and include and not attract else None
    if positive is None:
        whole = (attract or targets is not None) and plain(query, keys)
    else:
        matrices = (query, positive) if bank is None else (query, positive, keys)
        whole = targets is None and plain(*matrices) and positive.shape == query.shape
    if not (whole and keys.shape[1] == query.shape[1] and 0 <= smoothing < 1):
        return None
    count = query.shape[0]
    if not reducible(reduction, weight, count):
        return None
    if targets is not None and (attract or own is not None or not whole_index(targets, count)):
        return None
    if query_labels is None:
        labelled = key_labels is None and not attract
    elif bank is None:
        labelled, key_labels = key_labels is None and whole_index(query_labels, count), query_labels
    else:
        labelled = keys is bank and whole_index(query_labels, count) and whole_index(key_labels, len(keys))
    if not labelled or (smoothing and (attract or not include or (bank is None and query_labels is not None))):
        return None
    if bank is None:
        if valid is not None or bias is not None or not (own is None or own is True):
            return None
        own = None
    elif own is not None and not indexes_rows(own, count, len(keys)):
        return None
    elif bias is not None:
        if keys is not bank or valid is not None or not whole_rows(bias, len(keys)) or bias.requires_grad:
            return None
    elif valid is not None:
        if keys is not bank or type(valid) is not int or not 0 < valid <= len(keys) or keys.requires_grad:
            return None
        keys, key_labels = keys[:valid], None if key_labels is None else key_labels[:valid]
        own = None if own is None else torch.where(own < valid, own, -1)
    number = number_of(temperature)
    by_row = not usual(number)
    if by_row and not (whole_rows(number, count) and (attract or bank is not None)):
        return None
    if normalize:
        query, positive = unit_length(query), None if positive is None else unit_length(positive)
        keys = positive if bank is None else unit_length(keys)
    if bank is None and not attract:
        return paired_loss(query, positive, number, temperature, query_labels, smoothing, include, weight, reduction)
    learnt = None if number is temperature and not by_row else temperature
    pull = torch.is_grad_enabled() and (query.requires_grad or (learnt is not None and learnt.requires_grad))
    call = _call(count, query.dtype, include, reduction, pull, 1.0 if by_row else 1.0 / number, smoothing, attract)
    if targets is None:  # within a batch a sample's own positive is of its class as others' are
        beside = None if bank is None else positive
        return InfoNceLoss.run(call, query, keys, beside, learnt, (bias, None, None, weight, query_labels, key_labels, own, None, None))
    rest = bias, targets, None, weight, query_labels, key_labels, targets, None, None
    try:
        return InfoNceLoss.run(call, query, keys, None, learnt, rest)
    except RuntimeError:  # the op has looked at the targets, where they may point
        return None


@functools.lru_cache
def _call(count: int, dtype: torch.dtype, include: bool, reduction: str, pull: bool, factor: float, smoothing: float, attract: bool):
    products = PRODUCTS[dtype]
    spec = Spec("cpu", Compute(dtype, products), torch.Size((count,)), (1, count))
    return info_nce.Call(spec, include, reduction, pull, cpu.KERNELS.products[products], factor, smoothing, attract)


_NAMED = 2, 7  # of the bank's side, rows of it that are named


class InfoNceLoss(PlainFunction):
    """InfoNCE of query and positive [N, D] against keys [M, D]. A scalar `temperature` has the call's factor; [N]: it has not.

    `rest`: a bias, and as of `InfoNceRows`, but for rows of the bank that are named, [N]. A bank without gradient is held by reference
    there and here.
    """

    @staticmethod
    def forward(ctx, call, query, keys, positive, temperature, rest):
        _, want_query, want_keys, want_positive, want_scale, _ = ctx.needs_input_grad
        bias, columns, _, row_weights, *rules = rest
        scale = None if temperature is None or temperature.dim() == 0 else temperature.reciprocal()
        losses, *kept = torch.ops.kdfast.info_nce(
            query, keys, scale, bias, *rules, positive, columns, None, call.include, call.reduced, call.pull, call.products, None,
            want_keys and call.pull, call.factor, call.smoothing, call.attract, row_weights, call.reduction == "sum",
            want_scale,
        )  # fmt: skip
        ctx.call, ctx.want = call, (want_query, want_keys, want_scale, False, want_positive)
        bank = keys, *rest
        ctx.held = None if want_keys else (bank, _versions(bank))
        ctx.left = call.reduced and scale is None and not want_scale and not want_positive and (not want_keys or kept[2].numel() > 0)
        ctx.save_for_backward(*kept, query, positive, temperature, scale, *(bank if want_keys else ()))
        return losses

    @staticmethod
    def backward(ctx, g):
        call, want = ctx.call, ctx.want
        statistics, pulls, dkeys, query, positive, temperature, scale, *bank = ctx.saved_tensors
        again = torch.is_grad_enabled()
        if ctx.left and not again:  # products of what is kept: no op is needed
            dtype = query.dtype
            of_query, of_keys = _shares(pulls.shape[0], call.factor)
            dquery = pulls * (g * of_query)
            dkeys = dkeys * (g * of_keys) if want[1] else None
            if dtype is not torch.float32:
                dquery, dkeys = dquery.to(dtype), None if dkeys is None else dkeys.to(dtype)
            return None, dquery, dkeys, None, None, None
        kept, versions = (statistics, pulls, dkeys), None
        if ctx.held is not None:
            bank, versions = ctx.held
        if again:
            bank = [x.unsqueeze(1) if i in _NAMED and x is not None else x for i, x in enumerate(bank)]
            scale = None if temperature is None else temperature.reciprocal().expand(len(query)).contiguous()
            dquery, dkeys, dscale, _, dpositive = info_nce.Gradients.apply(call, want, versions, g, *kept, query, scale, positive, *bank)
        else:
            dquery, dkeys, dscale, _, dpositive = info_nce._gradients(call, want, versions, g, *kept, query, scale, positive, *bank)
        return None, dquery, dkeys, dpositive, None if dscale is None else through_inverse(dscale, temperature), None


@functools.lru_cache
def _shares(count: int, factor: float) -> tuple[Tensor, Tensor]:
    """What a mean's upstream is multiplied by, for what pulls the queries and for the keys, as the ops do it.

    Tensors: a product with a number takes half as long again.
    """
    share = torch.ones((), dtype=torch.float32, device="cpu") / count
    return share * torch.tensor(factor, dtype=torch.float32, device="cpu"), share


def through_inverse(dscale: Tensor, temperature: Tensor) -> Tensor:
    """The gradient of a temperature, 0-d or [N], whose inverse scales the rows."""
    inverse = temperature.reciprocal()
    return -(dscale if temperature.dim() else dscale.sum()) * (inverse * inverse)
