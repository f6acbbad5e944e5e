"""The short way of plain calls of the Wasserstein dependency (plain.py), whose rows need the mean of what they admit of the bank alone."""

import torch
from torch import Tensor

from ..apply import PlainFunction
from ..plain import filled_rows, number_of, plain, reducible, usual, whole_index
from ..unit_length import unit_length

_FEW = 65536  # pairs of which a table is made, as of scores that are kept


def wasserstein_losses(
    query: Tensor,
    positive: Tensor,
    bank,
    temperature: float | Tensor,
    labels: tuple[Tensor | None, Tensor | None],
    valid: int | None,
    own_index: Tensor | None,
    normalize: bool,
    weight: Tensor | None,
    reduction: str,
) -> Tensor | None:
    """query_i.(mean of the bank's rows - positive_i) / temperature, reduced, of query and positive [N, D] and a bank [M, D].

    temperature: a number or 0-d. valid: so many rows of the bank exist. own_index: int64 [N], a row of the bank that is left out.
    labels: int64 [N] and [M], of few pairs; rows of the bank of a query's class are left out.
    """
    keys, valid = filled_rows(bank, valid)
    if not (plain(query, positive, keys) and positive.shape == query.shape and keys.shape[1] == query.shape[1]):
        return None
    number = number_of(temperature)
    if not usual(number) or not reducible(reduction, weight, len(query)):
        return None
    query_labels, key_labels = labels
    if query_labels is not None or key_labels is not None:
        few = len(query) * len(keys) <= _FEW and torch.get_float32_matmul_precision() == "highest"
        if not (few and keys is bank and whole_index(query_labels, len(query)) and whole_index(key_labels, len(keys))):
            return None
    if valid is not None:
        if type(valid) is not int or not 0 < valid <= len(keys):
            return None
        keys, key_labels = keys[:valid], None if key_labels is None else key_labels[:valid]
    if own_index is not None:
        if not whole_index(own_index, len(query)):
            return None
        first, last = own_index.aminmax()
        if first.item() < 0 or last.item() >= len(keys):
            return None
    if normalize:
        query, positive, keys = unit_length(query), unit_length(positive), unit_length(keys)
    mean = _mean(keys, own_index, query_labels, key_labels)
    share = 1 / len(query) if reduction == "mean" else 1.0
    if weight is not None:  # a copy: they may change before the backward
        total = weight.sum().item() if reduction == "mean" else 1.0
        share = weight.unsqueeze(1) / (total if total > 0 else 1.0)
    learnt = None if number is temperature else temperature
    return WassersteinLosses.run(query, positive, mean, learnt, 1.0 / number, share, reduction != "none")


def _mean(keys: Tensor, own_index: Tensor | None, query_labels: Tensor | None, key_labels: Tensor | None) -> Tensor:
    """The mean [D] of the keys, or [N, D] of all but each row's own and its class; float32."""
    if query_labels is not None:
        admitted = query_labels.unsqueeze(1) != key_labels
        if own_index is not None:
            admitted.scatter_(1, own_index.unsqueeze(1), False)
        return (admitted.float() @ keys.float()) / admitted.sum(1, keepdim=True).clamp_(min=1)
    if own_index is None:
        return keys.mean(0, dtype=torch.float32)
    others = keys.sum(0, dtype=torch.float32) - keys.index_select(0, own_index)
    return others.div_(max(1, len(keys) - 1))


class WassersteinLosses(PlainFunction):
    """factor share_i query_i.(mean - positive_i) [N], or their sum. A `temperature`, 0-d, has the factor; share: a number or [N, 1]."""

    @staticmethod
    def forward(ctx, query, positive, mean, temperature, factor, share, total):
        pull = mean - positive
        pull *= factor * share
        products = query * pull
        ctx.factor, ctx.share, ctx.total = factor, share, total
        ctx.save_for_backward(query, positive, mean, temperature, pull)
        return products.sum() if total else products.sum(-1)

    @staticmethod
    def backward(ctx, g):
        query, positive, mean, temperature, pull = ctx.saved_tensors
        want_query, want_positive, want_mean, want_temperature, _, _, _ = ctx.needs_input_grad
        factor, slope = ctx.factor, g if ctx.total else g.unsqueeze(1)
        if torch.is_grad_enabled():
            factor = factor if temperature is None else temperature.reciprocal()
            pull = (mean - positive) * (factor * ctx.share)
        dquery = (pull * slope).to(query.dtype) if want_query else None
        dpositive = dmean = None
        if want_positive or want_mean:
            dmean = query * (slope * (ctx.share * factor))
            dpositive = (-dmean).to(positive.dtype) if want_positive else None
            dmean = dmean if mean.dim() == 2 else dmean.sum(0)
        return dquery, dpositive, dmean, -(slope * query * pull).sum() / temperature if want_temperature else None, None, None, None
