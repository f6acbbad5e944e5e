"""Contrastive losses between views, classes and modalities: compositions of InfoNCE, and the sigmoid loss."""

import torch
from torch import Tensor

from .._core import checks, collectives, dtypes
from .._core.reduction import NAMES as REDUCTIONS
from .._core.reduction import reduce_rows
from .._ops.similarity.losses import plain_matching
from .._ops.similarity.losses.matching import clip_rows, sigmoid_rows, view_rows
from .._ops.similarity.losses.sigmoid import sigmoid_pair_loss
from .._ops.similarity.losses.sup_con import sup_con_rows
from ._candidates import inverse, normalized
from .info_nce import Prepared, info_nce, prepared_loss


def nt_xent(
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    labels: Tensor | None = None,
    normalize: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
    group=None,
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """NT-Xent: each of 2N embeddings against the other 2N - 1, its positive the other view of its sample.

    Args:
        view1, view2: [N, D], floating.
        temperature: > 0; float, 0-d tensor (may need gradient) or [2N].
        labels: integers [N]; other samples of the same class are left out of the negatives.
        normalize: scale rows to unit length first. Default True.
        weight: [2N], view 1 first. reduction: "mean", "sum" or "none" ([2N], view 1 first).
        group, precision, impl: as in `info_nce`.

    Raises: ValueError, TypeError naming the argument. Source: Chen et al. 2020 (SimCLR), eq. 1.
    """
    _pair("view1", view1, "view2", view2)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.flag("normalize", normalize)
    collectives.check_group(group)
    features = torch.cat([view1, view2])
    features = normalized(features) if normalize else features
    n = view1.shape[0]
    if labels is not None:
        labels = checks.integral("labels", labels, shape=(n,), device=view1.device).repeat(2)
    of_rows = isinstance(temperature, Tensor) and temperature.dim() > 0  # then a pair's weights differ by side: rows beside a bank of them
    if group is None and n and not of_rows:
        options = dict(reduction=reduction, weight=weight, precision=precision, impl=impl)
        return view_rows(features, inverse("temperature", temperature, features), labels, **options)
    rows, row_labels, offset = features, labels, 0
    if group is not None:
        rows, offset = collectives.all_gather_rows(features, group)
        row_labels = None if labels is None else collectives.all_gather_rows(labels, group)[0]
    own = torch.arange(offset, offset + 2 * n, device=view1.device)
    partner = own.roll(n)
    p = Prepared(features, None, partner[:, None], rows, None, None, labels, row_labels, torch.stack([partner, own], dim=-1))
    return prepared_loss(p, temperature=temperature, weight=weight, reduction=reduction, precision=precision, impl=impl)


def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    bank=None,
    bank_labels: Tensor | None = None,
    bank_valid: int | Tensor | None = None,
    own_index: bool | Tensor | None = None,
    normalize: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
    group=None,
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """Supervised contrastive loss: every other row of a sample's class is a positive, averaged outside the logarithm.

    Args:
        features: [N, D], floating. labels: integers [N].
        temperature: > 0; float, 0-d tensor (may need gradient) or [N].
        bank, bank_labels, bank_valid, own_index: candidates as in `info_nce`; bank None: the batch itself, each row
            left out for itself.
        normalize: scale rows to unit length first. Default True.
        weight, reduction, group, precision, impl: as in `info_nce`. A row alone in its class is not counted.

    Raises: ValueError, TypeError naming the argument. Source: Khosla et al. 2020, eq. 2 (L_out).
    """
    checks.rows("features", features)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.flag("normalize", normalize)
    collectives.check_group(group)
    labels = checks.integral("labels", labels, shape=tuple(features.shape[:-1]), device=features.device)
    if bank is None:
        for name, value in (("bank_labels", bank_labels), ("bank_valid", bank_valid)):
            if value is not None:
                raise ValueError(f"{name} needs a bank: without one the candidates are the batch")
        features = normalized(features) if normalize else features
        if features.dim() == 2 and features.shape[0] and group is None and (own_index is None or own_index is True):
            scale, mean = inverse("temperature", temperature, features), reduction == "mean" and weight is None
            losses, counted = sup_con_rows(features, labels.contiguous(), scale, mean=mean, precision=precision, impl=impl)
            return losses if mean else reduce_rows(losses, counted=counted, weight=weight, reduction=reduction)
        normalize, bank, bank_labels, offset = False, features, labels, 0
        if group is not None:
            bank, offset = collectives.all_gather_rows(features, group)
            bank_labels = collectives.all_gather_rows(labels, group)[0]
        if bank.shape[-2] == 0:
            return reduce_rows(features.sum(-1), counted=features.sum(-1) > 0, reduction=reduction)
        if own_index is None or own_index is True:
            own_index = (torch.arange(features.shape[-2], device=features.device) + offset).expand(features.shape[:-1])
    return info_nce(
        features,
        bank=bank,
        query_labels=labels,
        bank_labels=bank_labels,
        bank_valid=bank_valid,
        own_index=own_index,
        same_class="positive",
        temperature=temperature,
        normalize=normalize,
        weight=weight,
        reduction=reduction,
        precision=precision,
        impl=impl,
    )


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
    group=None,
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """Symmetric cross-entropy over image x text scores: the mean of the image-to-text and text-to-image InfoNCE.

    Args:
        image, text: [N, D], floating; row i of one belongs to row i of the other.
        logit_scale: > 0, already exponentiated; float or 0-d tensor (may need gradient). Never cast by autocast.
        normalize: scale rows to unit length first. Default False.
        label_smoothing, weight [N], reduction ("none": [N]), group, precision, impl: as in `info_nce`.

    Raises: ValueError, TypeError naming the argument. Source: Radford et al. 2021 (CLIP), figure 3.
    """
    usual = group is precision is impl is None and normalize is False and type(label_smoothing) is float and 0 <= label_smoothing < 1
    if usual:
        loss = plain_matching.matching_loss(image, text, logit_scale, None, label_smoothing, weight, reduction)
        if loss is not None:
            return loss
    _pair("image", image, "text", text)
    checks.positive_number("logit_scale", logit_scale)
    checks.scalar("logit_scale", logit_scale)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.flag("normalize", normalize)
    collectives.check_group(group)
    if normalize:
        image, text = normalized(image), normalized(text)
    if group is not None:  # local images against all texts, local texts against all images: different pairs, so a pass for each
        options = dict(
            temperature=1.0 / logit_scale,
            label_smoothing=label_smoothing,
            weight=weight,
            reduction=reduction,
            group=group,
            precision=precision,
            impl=impl,
        )
        return (info_nce(image, text, **options) + info_nce(text, image, **options)) / 2
    checks.fraction("label_smoothing", label_smoothing)
    if image.shape[0] == 0:
        return reduce_rows((image + text).sum(-1), weight=weight, reduction=reduction)
    image, text = dtypes.autocast(image, text)
    options = dict(reduction=reduction, weight=weight, precision=precision, impl=impl)
    return clip_rows(image, text, logit_scale, smoothing=float(label_smoothing), **options)


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    normalize: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
    group=None,
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """Sigmoid loss: every image x text pair is its own binary problem; sum over pairs / N, scores streamed in tiles.

    l_i = sum_j softplus(-y_ij (logit_scale x_i.t_j + logit_bias)), y_ij = 1 for j = i and -1 otherwise.

    Args:
        image, text: [N, D], floating.
        logit_scale, logit_bias: float or 0-d tensor (may need gradient); the scale already exponentiated and > 0.
        normalize: scale rows to unit length first. Default False.
        weight [N], reduction ("mean": sum over pairs / N; "none": [N] sums over texts): as in `info_nce`.
        group: torch.distributed group over which the batch is spread: each rank scores its images against all texts.
        precision, impl: as in `info_nce`.

    Raises: ValueError, TypeError naming the argument. Source: Zhai et al. 2023 (SigLIP), section 3.2.
    """
    usual = group is precision is impl is None and normalize is False and logit_bias is not None
    if usual and (loss := plain_matching.matching_loss(image, text, logit_scale, logit_bias, 0.0, weight, reduction)) is not None:
        return loss
    _pair("image", image, "text", text)
    checks.positive_number("logit_scale", logit_scale)
    for name, x in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        checks.scalar(name, x)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.flag("normalize", normalize)
    collectives.check_group(group)
    if normalize:
        image, text = normalized(image), normalized(text)
    if group is None and image.shape[0]:
        image, text = dtypes.autocast(image, text)
        options = dict(reduction=reduction, weight=weight, precision=precision, impl=impl)
        return sigmoid_rows(image, text, logit_scale, logit_bias, **options)
    texts, offset = text, 0
    if group is not None:
        texts, offset = collectives.all_gather_rows(text, group)
    image, texts = dtypes.autocast(image, texts)
    index = torch.arange(offset, offset + image.shape[0], device=image.device)
    losses = sigmoid_pair_loss(image, texts, logit_scale, logit_bias, index, precision=precision, impl=impl)
    return reduce_rows(losses, weight=weight, reduction=reduction)


def _pair(name1: str, x: Tensor, name2: str, y: Tensor) -> None:
    checks.rows(name1, x, ndim=2)
    checks.rows(name2, y, ndim=2)
    checks.exact_shape(name2, y, tuple(x.shape))
    checks.alike(name2, y, name1, x)
