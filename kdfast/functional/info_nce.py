"""InfoNCE in all its forms: explicit or in-bank positives, in-batch or bank negatives, classes excluded or attracted."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .._core import bank_protocol, checks, collectives, dtypes
from .._core.reduction import NAMES as REDUCTIONS
from .._core.reduction import reduce_rows, row_weights
from .._ops.similarity.arguments import checked_problem, rounded
from .._ops.similarity.exclusions import Rules
from .._ops.similarity.losses import plain_info_nce
from .._ops.similarity.losses.info_nce import Positives, info_nce_rows
from .._ops.similarity.losses.matching import paired_rows
from .._ops.similarity.positives import per_row, positive_logits
from ._candidates import inverse, normalized, own_columns
from ._mapped import over_mapped


def info_nce(
    query: Tensor,
    positive: Tensor | None = None,
    bank=None,
    *,
    temperature: float | Tensor = 0.07,
    positive_weights: Tensor | None = None,
    targets: Tensor | None = None,
    query_labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    same_class: str = "exclude",
    bank_bias: Tensor | None = None,
    bank_valid: int | Tensor | None = None,
    own_index: bool | Tensor | None = None,
    false_negative_margin: float | None = None,
    include_positive: bool = True,
    normalize: bool = False,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    group=None,
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """InfoNCE: the cross-entropy of finding each query's positive among the rows of a bank.

    With scores z_ij = q_i . k_j / temperature + bias_j, the loss of row i is logsumexp(z+_i, z_i1, ..., z_iM) - z+_i
    over the admitted bank rows; the positive is in the denominator exactly once and nothing removes it. Forward and
    the query's gradient are one pass over a bank that needs no gradient; no N x M tensor is made, and such a bank may
    be updated in place between forward and backward (unless bank_bias needs a gradient, which reads the bank again).

    Args:
        query: [*B, N, D], floating.
        positive: [*B, N, D], or [*B, N, J, D] for J positives, each with its own denominator. Give this or `targets`
            (or neither with same_class="positive").
        bank: [M, D] shared, [*B, M, D], or a kdfast bank, which brings its own fill, labels and bias. None: the
            negatives are the `positive` rows of all other samples, with gradient.
        temperature: > 0; float, 0-d tensor (may need gradient) or one per row [*B, N].
        positive_weights: [J] or [*B, N, J], the weight of each positive. Default 1/J.
        targets: integers [*B, N]; the positive of row i is bank row targets[i] (-1: row without a positive).
        query_labels, bank_labels: integers [*B, N] and [M] or [*B, M].
        same_class: "exclude" drops bank rows of the query's class (false negatives); "positive" makes them the
            positives, averaged outside the logarithm in one denominator (SupCon, Khosla et al. 2020, L_out).
        bank_bias: [M] or [*B, M], added to the scores (logQ correction); -inf drops a row (a row of `targets`: their loss
            is inf).
        bank_valid: int or integer tensor, 0-d or [*B]: only the first bank_valid rows of the bank exist.
        own_index: True (row i is bank row i) or integers [*B, N] (-1: none): the sample's own row, left out.
        false_negative_margin: drop bank rows with q.k > max over positives of q.k+ plus this margin (similarity
            units, decided without gradient).
        include_positive: False leaves the positive out of the denominator (decoupled loss, Yeh et al. 2022).
        normalize: scale query, positive and bank rows to unit length first. Default False.
        label_smoothing: in [0, 1): this much of the target is spread evenly over the positive and the admitted rows.
        weight: [*B, N] >= 0, the weight of each row.
        reduction: "mean" (weighted, over rows that have a positive), "sum" or "none" ([*B, N]).
        group: torch.distributed group over which an in-batch form's batch is spread; the mean is over local rows and
            column gradients are summed over ranks. A bank is taken to be the same on every rank.
        precision: of float32 products: None follows PyTorch; "ieee", "tf32", "bf16x3" or "bf16". The C++ kernels take few
            rows, and up to 16 bank rows, in full float32 whatever the name.
        impl: None (the best available), "cpu", "cuda", "triton" or "torch".

    Returns:
        float32 (float64 for float64 inputs): a scalar, or [*B, N].

    Raises:
        ValueError, TypeError, IndexError: naming the argument that is wrong and what is needed.

    Source: van den Oord et al. 2018, eq. 4; He et al. 2020 (MoCo), eq. 1.
    """
    usual = positive_weights is false_negative_margin is group is precision is impl is None
    usual = usual and type(include_positive) is bool and type(normalize) is bool and type(label_smoothing) is float
    if usual and same_class in ("exclude", "positive"):
        labels, attract, skipped = (query_labels, bank_labels), same_class == "positive", (bank_valid, own_index)
        options = label_smoothing, labels, attract, include_positive, normalize, *skipped, bank_bias, weight, reduction
        loss = plain_info_nce.info_nce_loss(query, positive, bank, temperature, targets, *options)
        if loss is not None:
            return loss
        bare = query_labels is bank_labels is bank_bias is targets is bank_valid is own_index is weight is None
        if bare and include_positive and not attract and torch._C._are_functorch_transforms_active():
            losses = partial(info_nce, normalize=normalize, label_smoothing=label_smoothing, reduction="none")
            loss = over_mapped(losses, reduction, query, positive, bank, temperature)
            if loss is not None:
                return loss
    p = _prepare(query, positive, bank, targets, query_labels, bank_labels, bank_bias, bank_valid, own_index, normalize, group)
    _check_options(p, targets, positive_weights, same_class, false_negative_margin, include_positive, label_smoothing, reduction)
    paired = bank is group is positive_weights is false_negative_margin is None and (own_index is None or own_index is True)
    if paired and same_class == "exclude" and query.dim() == positive.dim() == 2 and len(query):
        scale = inverse("temperature", temperature, p.query)
        options = dict(reduction=reduction, weight=weight, precision=precision, impl=impl)
        loss = paired_rows(p.query, p.rows, scale, p.query_labels, smoothing=float(label_smoothing), include=include_positive, **options)
        if loss is not None:
            return loss
    return prepared_loss(
        p,
        temperature=temperature,
        positive_weights=positive_weights,
        same_class=same_class,
        false_negative_margin=false_negative_margin,
        include_positive=include_positive,
        label_smoothing=label_smoothing,
        weight=weight,
        reduction=reduction,
        precision=precision,
        impl=impl,
    )


class Prepared(NamedTuple):
    """The arguments after checks: every candidate explicit, every exclusion an index or a label."""

    query: Tensor  # [*B, N, D]
    positive: Tensor | None  # [*B, N, D] or [*B, N, J, D], given as rows
    columns: Tensor | None  # [*B, N, J] given as rows of the bank, -1 none
    rows: Tensor  # [M, D] or [*B, M, D]
    valid: int | Tensor | None
    bias: Tensor | None  # [M] or [*B, M]
    query_labels: Tensor | None  # [*B, N]
    row_labels: Tensor | None  # [M] or [*B, M]
    skip: Tensor | None  # [*B, N, E] columns left out by index, -1 none
    panels: Tensor | None = None  # the rows' packed copy


def _prepare(query, positive, bank, targets, query_labels, bank_labels, bank_bias, bank_valid, own_index, normalize, group) -> Prepared:
    checks.rows("query", query)
    checks.flag("normalize", normalize)
    collectives.check_group(group)
    given = bank_protocol.unpack(bank, valid=bank_valid, labels=bank_labels, bias=bank_bias)
    if positive is not None:
        checks.floating("positive", positive)
        if positive.dim() == query.dim():
            checks.exact_shape("positive", positive, query.shape)
        elif positive.dim() != query.dim() + 1 or positive.shape[:-2] != query.shape[:-1] or positive.shape[-1] != query.shape[-1]:
            raise ValueError(f"positive must be [*B, N, D] or [*B, N, J, D] for query {tuple(query.shape)}, got {tuple(positive.shape)}")
        checks.alike("positive", positive, "query", query)
    if query_labels is not None:
        query_labels = checks.integral("query_labels", query_labels, shape=tuple(query.shape[:-1]), device=query.device)
    query, positive = normalized(query) if normalize else query, normalized(positive) if normalize else positive
    if given.rows is None:
        return _in_batch(query, positive, given, targets, query_labels, own_index, group)

    rows = checks.rows("bank", given.rows)
    checks.alike("bank", rows, "query", query)
    checks.same_width("bank", rows, "query", query)
    if rows.shape[-2] == 0:
        raise ValueError("bank must have at least one row, got shape " + str(tuple(rows.shape)))
    if rows.dim() > 2 and rows.shape[:-2] != query.shape[:-2]:
        raise ValueError(
            f"bank must be [M, D] or [*B, M, D] with the leading dimensions of query {tuple(query.shape)}, got {tuple(rows.shape)}"
        )
    valid, bias, batch = given.valid, given.bias, tuple(query.shape[:-2])
    if valid is not None:
        valid = checks.prefix("bank_valid", valid, rows.shape[-2], query.device, batch)
    if bias is not None:
        checks.floating("bank_bias", bias)
        checks.exact_shape("bank_bias", bias, rows.shape[-2:-1] if bias.dim() == 1 else (*batch, rows.shape[-2]))
        checks.alike("bank_bias", bias, "query", query, dtype=False)
    if positive is not None and targets is not None:
        raise ValueError("positive and targets must not both be given: targets names the positive among the bank's rows")
    row_labels = given.labels if query_labels is not None else None
    if query_labels is not None and given.labels is None:
        raise ValueError("bank_labels must be given with query_labels: without them no bank row has a class")
    if query_labels is None and bank_labels is not None:
        raise ValueError("query_labels must be given with bank_labels")
    if row_labels is not None:
        shape = (rows.shape[-2],) if getattr(row_labels, "ndim", 1) == 1 else (*batch, rows.shape[-2])
        row_labels = checks.integral("bank_labels", row_labels, shape=shape, device=query.device)
    if targets is not None:
        targets = checks.integral("targets", targets, shape=tuple(query.shape[:-1]), device=query.device)
        checks.index_range("targets", targets, rows.shape[-2], lowest=-1)
    own = own_columns(own_index, query, rows.shape[-2])
    skip = [index for index in (targets, own) if index is not None]
    return Prepared(
        query,
        positive,
        None if targets is None else targets[..., None],
        normalized(rows) if normalize else rows,
        valid,
        bias,
        query_labels,
        row_labels,
        torch.stack(skip, dim=-1) if skip else None,
        None if normalize else given.panels,
    )


def _in_batch(query, positive, given, targets, query_labels, own_index, group) -> Prepared:
    """bank=None: the other samples' positives are the negatives; a sample's own rows are left out."""
    for name, value in (("targets", targets), ("bank_labels", given.labels), ("bank_bias", given.bias), ("bank_valid", given.valid)):
        if value is not None:
            raise ValueError(f"{name} needs a bank: without one the negatives are the rows of `positive`")
    if positive is None:
        raise ValueError("positive must be given when there is no bank")
    if group is not None and query.dim() != 2:
        raise ValueError(f"query must be [N, D] when group is given, got {tuple(query.shape)}")
    n, copies = query.shape[-2], _copies(query, positive)
    rows, offset = positive if positive.dim() == query.dim() else positive.flatten(-3, -2), 0  # [*B, N J, D]
    labels = query_labels
    if group is not None:
        rows, first_row = collectives.all_gather_rows(rows, group)
        offset = first_row // copies
        labels = None if labels is None else collectives.all_gather_rows(labels, group)[0]
    own = torch.arange(offset * copies, (offset + n) * copies, device=query.device).view(n, copies)
    skip = own = own if query.dim() == 2 else own.expand(*query.shape[:-1], copies)
    given_own = None if own_index is True else own_columns(own_index, query, rows.shape[-2] // copies)
    if given_own is not None:
        given_own = torch.where(given_own >= 0, given_own * copies, -1)
        extra = given_own[..., None] + torch.arange(copies, device=query.device) * (given_own >= 0)[..., None]
        skip = torch.cat([skip, extra], dim=-1)
    row_labels = None if labels is None else labels.repeat_interleave(copies, dim=-1)
    return Prepared(query, None, own, rows, None, None, query_labels, row_labels, skip)


def _copies(query: Tensor, positive: Tensor) -> int:
    """J of positive [*B, N, D] or [*B, N, J, D]."""
    return 1 if positive.dim() == query.dim() else positive.shape[-2]


def _check_options(p, targets, positive_weights, same_class, margin, include_positive, label_smoothing, reduction) -> None:
    checks.choice("same_class", same_class, ("exclude", "positive"))
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.fraction("label_smoothing", label_smoothing)
    if margin is not None:
        checks.scalar("false_negative_margin", margin)
    checks.flag("include_positive", include_positive)
    if label_smoothing and (margin is not None or not include_positive or same_class == "positive"):
        raise ValueError('label_smoothing cannot be combined with false_negative_margin, include_positive=False or same_class="positive"')
    if same_class == "positive":
        if p.query_labels is None:
            raise ValueError('query_labels must be given with same_class="positive"')
        for name, value in (("targets", targets), ("positive_weights", positive_weights), ("false_negative_margin", margin)):
            if value is not None:
                raise ValueError(f'{name} cannot be combined with same_class="positive": the labels name the positives')
    elif p.positive is None and p.columns is None:
        raise ValueError('positive or targets must be given (neither is needed only with same_class="positive")')
    if positive_weights is not None:
        checks.floating("positive_weights", positive_weights)
        checks.alike("positive_weights", positive_weights, "query", p.query, dtype=False)
        copies = p.columns.shape[-1] if p.positive is None else _copies(p.query, p.positive)
        if tuple(positive_weights.shape) not in ((copies,), (*p.query.shape[:-1], copies)):
            raise ValueError(f"positive_weights must be [{copies}] or {(*p.query.shape[:-1], copies)}, got {tuple(positive_weights.shape)}")


def prepared_loss(
    p: Prepared,
    *,
    temperature,
    positive_weights=None,
    same_class="exclude",
    false_negative_margin=None,
    include_positive=True,
    label_smoothing=0.0,
    weight=None,
    reduction="mean",
    precision=None,
    impl=None,
) -> Tensor:
    """`info_nce` of arguments that have been checked, but for temperature, weight and impl."""
    if p.rows.shape[-2] == 0:  # an empty batch is its own bank
        return reduce_rows(p.query.sum(-1), weight=weight, reduction=reduction)
    scale = inverse("temperature", temperature, p.query)
    weight = row_weights(weight, p.query.shape[:-1], dtypes.accumulator(p.query.dtype), p.query.device)
    options = dict(reduction=reduction, weight=weight)
    if same_class == "positive":
        return _attracted(p, scale, include_positive, precision, impl, **options)
    margin = false_negative_margin
    return _contrasted(p, scale, positive_weights, margin, include_positive, label_smoothing, precision, impl, **options)


def _exclusions(p: Prepared) -> Rules:
    return Rules(query_labels=p.query_labels, key_labels=p.row_labels, key_index=p.skip)


def _positive_logits(p: Prepared, scale) -> tuple[Tensor, Tensor]:
    """Inner products with the positives and their logits, both [*B, N, J]."""
    return positive_logits(p.query, p.rows, scale, p.bias, p.positive, p.columns)


def _contrasted(p: Prepared, scale, positive_weights, margin, include_positive, label_smoothing, precision, impl, **reduction):
    """loss_i = sum_j w_ij (logaddexp(lse_i, z_ij) - z_ij), lse_i over the negatives, j over the positives."""
    rules = _exclusions(p)
    if margin is not None:
        inner = _positive_logits(p, 1.0)[0].detach()
        rules = rules._replace(limit=(per_row(scale) * (inner.amax(-1) + margin)).detach())
    spec = checked_problem(p.query, p.rows, scale, None, p.bias, None, rules, p.valid, precision, impl, p.panels)
    weights = None
    if positive_weights is not None:
        copies = positive_weights.shape[-1]
        weights = positive_weights.to(dtypes.accumulator(p.query.dtype)).expand(*p.query.shape[:-1], copies)
    positives = Positives(p.positive, p.columns, weights, include_positive)
    return info_nce_rows(spec, positives, smoothing=float(label_smoothing), **reduction)


def _attracted(p: Prepared, scale, include_positive, precision, impl, **reduction):
    """loss_i = lse_i - mean of z over the rows of i's class (and the explicit positives): all in one denominator."""
    query, rows, positive = rounded(precision, p.query, p.rows, p.positive)
    skip = p.skip
    if p.columns is not None:  # a sample's own positives are of its class as others' are, and nothing removes them
        further = p.skip[..., p.columns.shape[-1] :]
        skip = torch.where((further[..., None] == p.columns[..., None, :]).any(-1), -1, further) if further.shape[-1] else None
    rules = Rules(query_labels=p.query_labels, key_labels=p.row_labels, key_index=skip)
    panels = p.panels if rows is p.rows else None
    spec = checked_problem(query, rows, scale, None, p.bias, None, rules, p.valid, precision, impl, panels)
    return info_nce_rows(spec, Positives(positive, None, None, include_positive), attract=True, **reduction)
