"""Losses that compare whole score distributions over a bank: similarity distillation and the Wasserstein dependency."""

import contextlib
from numbers import Real

from torch import Tensor

from .._core import bank_protocol, checks, dtypes
from .._core.reduction import NAMES as REDUCTIONS
from .._core.reduction import reduce_rows
from .._ops.similarity.arguments import rounded
from .._ops.similarity.losses import plain_distillation, plain_wasserstein
from .._ops.similarity.losses.distillation import distillation_rows
from .._ops.similarity.losses.score_sums import score_sums
from .._ops.similarity.positives import dot, per_row
from ._candidates import inverse, normalized, own_columns


def similarity_distillation(
    student: Tensor,
    teacher: Tensor,
    student_bank,
    teacher_bank=None,
    *,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    own: bool = False,
    student_positive: Tensor | None = None,
    teacher_positive: Tensor | None = None,
    divergence: str = "ce",
    bank_valid: int | Tensor | None = None,
    own_index: bool | Tensor | None = None,
    normalize: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """Cross-entropy (or KL) between teacher's and student's softmax over the rows of a bank. No tau^2 factor.

    With p = softmax_j(t_i . k^T_j / teacher_temperature): l_i = lse_j(z^S_ij) - s_i . (sum_j p_ij k^S_j) / student_temperature,
    so that no probabilities are stored.

    Args:
        student: [N, D_s], gradient. teacher: [N, D_t], detached.
        student_bank, teacher_bank: [M, D_s] and [M, D_t], tensors or kdfast banks, row j of one belonging to row j of
            the other. teacher_bank None: one bank for both (D_s = D_t). Only the student's bank can have gradient.
        student_temperature, teacher_temperature: > 0; float, 0-d or [N]. Below 1e-3 the scores of float32 inputs are
            formed in full float32, outside autocast.
        own: the teacher's own key is one more candidate on both sides (SEED): student_positive and teacher_positive
            default to `teacher`. Giving either adds the candidate too.
        student_positive [N, D_s], teacher_positive [N, D_t]: that candidate's rows where the widths differ.
        divergence: "ce" or "kl" (the same gradient; KL subtracts the teacher's entropy).
        bank_valid, own_index, weight, reduction, precision, impl: as in `info_nce`.
        normalize: scale all rows to unit length first. Default False.

    Raises: ValueError, TypeError naming the argument. Source: Fang et al. 2021 (SEED), eq. 5; Koohpayegani et al. 2020 (CompRess).
    """
    usual = student_positive is teacher_positive is precision is impl is None and type(own) is bool and normalize is False
    if usual and divergence in ("ce", "kl"):
        sides, temperatures = (student, student_bank, teacher, teacher_bank), (student_temperature, teacher_temperature)
        options = divergence == "kl", own, bank_valid, own_index, weight, reduction
        if (loss := plain_distillation.distillation_losses(*sides, *temperatures, *options)) is not None:
            return loss
    checks.rows("student", student, ndim=2)
    checks.rows("teacher", teacher, ndim=2)
    rows = student.shape[0]
    if teacher.shape[0] != rows:
        raise ValueError(f"teacher must have a row for each of student's {rows}, got {teacher.shape[0]}")
    checks.choice("divergence", divergence, ("ce", "kl"))
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.flag("own", own)
    checks.flag("normalize", normalize)
    given = bank_protocol.unpack(student_bank, valid=bank_valid, name="student_bank")
    keys = _bank_rows("student_bank", given.rows, "student", student)
    shared = teacher_bank is None
    teacher_keys = keys if shared else bank_protocol.unpack(teacher_bank, name="teacher_bank").rows
    teacher_keys = _bank_rows("student_bank" if shared else "teacher_bank", teacher_keys, "teacher", teacher)
    if teacher_keys.shape[0] != keys.shape[0]:
        raise ValueError(f"teacher_bank must have a row for each of student_bank's {keys.shape[0]}, got {teacher_keys.shape[0]}")
    valid = None if given.valid is None else checks.prefix("bank_valid", given.valid, keys.shape[0], student.device)
    teacher = teacher.detach() if teacher.requires_grad else teacher
    if own or student_positive is not None or teacher_positive is not None:
        student_positive = _positive("student_positive", student_positive, teacher, student)
        teacher_positive = _positive("teacher_positive", teacher_positive, teacher, teacher).detach()
    if normalize:
        student, teacher, student_positive, teacher_positive = map(normalized, (student, teacher, student_positive, teacher_positive))
        keys, teacher_keys = normalized(keys), None if shared else normalized(teacher_keys)

    own_column = own_columns(own_index, student, keys.shape[0])
    sharp = any((type(t) is float or isinstance(t, Real)) and t < 1e-3 for t in (student_temperature, teacher_temperature))
    with dtypes.full_precision(student) if sharp else contextlib.nullcontext():
        precision = "ieee" if sharp and precision is None else precision
        student, keys, teacher, teacher_keys = rounded(precision, student, keys, teacher, None if shared else teacher_keys)
        student_positive, teacher_positive = rounded(precision, student_positive, teacher_positive)
        s, t = inverse("student_temperature", student_temperature, student), inverse("teacher_temperature", teacher_temperature, teacher)
        start = None
        if student_positive is not None:
            start = per_row(s) * dot(student, student_positive), per_row(t) * dot(teacher, teacher_positive)
        return distillation_rows(
            student,
            keys,
            teacher,
            teacher_keys,
            scale=s,
            teacher_scale=t,
            start=start,
            bias=given.bias,
            key_index=None if own_column is None else own_column[:, None],
            valid=valid,
            kl=divergence == "kl",
            weight=weight,
            reduction=reduction,
            precision=precision,
            impl=impl,
        )


def wasserstein_dependency(
    query: Tensor,
    positive: Tensor,
    bank,
    *,
    temperature: float | Tensor,
    query_labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    bank_valid: int | Tensor | None = None,
    own_index: bool | Tensor | None = None,
    normalize: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative Wasserstein dependency with the linear critic f = q.k / temperature: mean negative - positive score.

    Only the bank's sum is needed (per-class sums when classes are excluded): O((N + M) D).

    Args:
        query, positive: [N, D], floating. bank: [M, D] or a kdfast bank.
        temperature: > 0; float, 0-d or [N].
        query_labels [N], bank_labels [M]: bank rows of the query's class are left out.
        bank_valid, own_index, normalize, weight, reduction: as in `info_nce`. A row without a negative has loss
            0 - positive score.

    Raises: ValueError, TypeError naming the argument. Source: Ozair et al. 2019, eq. 4; Chen et al. 2021 (WCoRD), eq. 8.
    """
    if type(normalize) is bool:
        options = temperature, (query_labels, bank_labels), bank_valid, own_index, normalize, weight, reduction
        if (loss := plain_wasserstein.wasserstein_losses(query, positive, bank, *options)) is not None:
            return loss
    checks.rows("query", query, ndim=2)
    checks.exact_shape("positive", checks.floating("positive", positive), tuple(query.shape))
    checks.alike("positive", positive, "query", query)
    checks.flag("normalize", normalize)
    given = bank_protocol.unpack(bank, valid=bank_valid, labels=bank_labels)
    rows = _bank_rows("bank", given.rows, "query", query)
    if query_labels is not None:
        query_labels = checks.integral("query_labels", query_labels, shape=(len(query),), device=query.device)
        if given.labels is None:
            raise ValueError("bank_labels must be given with query_labels: without them no bank row has a class")
    elif bank_labels is not None:
        raise ValueError("query_labels must be given with bank_labels")
    labels = None if query_labels is None else checks.integral("bank_labels", given.labels, shape=(len(rows),), device=query.device)
    if normalize:
        query, positive, rows = normalized(query), normalized(positive), normalized(rows)
    own = own_columns(own_index, query, len(rows))
    valid = None if given.valid is None else checks.prefix("bank_valid", given.valid, len(rows), query.device)
    scale = inverse("temperature", temperature, query)
    if labels is own is valid is given.bias is None:  # every row has the whole bank's mean
        mean = rows.mean(0, dtype=dtypes.accumulator(rows.dtype))
        losses = per_row(scale) * dot(query, mean - positive)
        return reduce_rows(losses, weight=weight, reduction=reduction)
    sums = score_sums(
        query,
        rows,
        scale,
        valid=valid,
        bias=given.bias,
        query_labels=query_labels,
        bank_labels=labels,
        skip=None if own is None else own[:, None],
    )
    losses = sums.other / sums.other_count.clamp(min=1) - per_row(scale) * dot(query, positive)
    return reduce_rows(losses, weight=weight, reduction=reduction)


def _bank_rows(name: str, rows: Tensor, query_name: str, query: Tensor) -> Tensor:
    checks.rows(name, rows, ndim=2)
    checks.alike(name, rows, query_name, query)
    checks.same_width(name, rows, query_name, query)
    if rows.shape[0] == 0:
        raise ValueError(f"{name} must have at least one row, got shape {tuple(rows.shape)}")
    return rows


def _positive(name: str, given: Tensor | None, default: Tensor, like: Tensor) -> Tensor:
    rows = default if given is None else checks.floating(name, given)
    checks.alike(name, rows, "student", like, dtype=False)
    if rows.shape != like.shape:
        raise ValueError(
            f"{name} must have shape {tuple(like.shape)}, got {tuple(rows.shape)}" + (" (the teacher's)" if given is None else "")
        )
    return rows
