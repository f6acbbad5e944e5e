"""The Functions of plain calls (plain.py): those of info_nce.py and distillation.py with nothing but what a plain call has.

The ops are the same; a second derivative is left to the general Functions. A bank without gradient is held by reference there and here.
"""

import torch
from torch import Tensor

from . import cpu, distillation, info_nce
from .apply import PlainFunction
from .autograd import _versions
from .info_nce import _like
from .positives import dot


class InfoNceMean(PlainFunction):
    """The mean InfoNCE loss of query and positive [N, D] against keys [M, D]; `temperature`, a tensor or None, has the call's factor.

    columns: int64 [N, 1], the positives among the keys, where they are given no other way. Labels: int64 [N] and [M], or None.
    """

    @staticmethod
    def forward(ctx, call, query, keys, positive, temperature, columns, query_labels, key_labels):
        _, want_query, want_keys, want_positive, want_scale, *_ = ctx.needs_input_grad
        bank = keys, columns, query_labels, key_labels
        options = call.factor, call.pull, want_keys and call.pull, call.products, call.smoothing, call.attract
        loss, *kept = torch.ops.kdfast.info_nce_mean(query, keys, positive, *bank[1:], *options)
        ctx.call, ctx.want = call, (want_query, want_keys, want_scale, False, want_positive)
        rules = query_labels, key_labels, columns  # which are an index to leave out too
        ctx.held = None if want_keys else (*bank, _versions((keys, columns, *rules)))
        ctx.save_for_backward(*kept, query, positive, temperature, *(bank if want_keys else ()))
        return loss

    @staticmethod
    def backward(ctx, g):
        call, want = ctx.call, ctx.want
        want_query, want_keys, want_scale, _, want_positive = want
        statistics, pulls, dkeys, query, positive, temperature, *bank = ctx.saved_tensors
        keys, columns, *labels, versions = (*bank, None) if want_keys else ctx.held
        if torch.is_grad_enabled():
            scale = None if temperature is None else _rows_of(temperature, query)
            bank = keys, None, columns, None, *labels, columns, None, None  # bias, columns, weights, and the rules
            grads = info_nce.Gradients.apply(call, want, versions, g, statistics, pulls, dkeys, query, scale, positive, *bank)
            dtemperature = _through_inverse(grads[2], temperature) if want_scale else None
            return None, grads[0], grads[1], grads[4], dtemperature, None, None, None
        found = torch.ops.kdfast.info_nce_mean_grad(
            g, statistics, pulls, dkeys, query, keys, columns, *labels, call.factor, want_query, want_keys, want_scale, want_positive,
            call.products, call.spread, call.attract,
        )  # fmt: skip
        found = iter(found)
        dquery, dkeys, dscale, dpositive = (
            next(found) if wanted else None for wanted in (want_query, want_keys, want_scale, want_positive)
        )
        return (
            None,
            _like(dquery, query) if want_query else None,
            _like(dkeys, keys) if want_keys else None,
            _like(dpositive, positive) if want_positive else None,
            _through_inverse(dscale, temperature) if want_scale else None,
            None,
            None,
            None,
        )


class DistillationLosses(PlainFunction):
    """The losses [N], or their mean, of student [N, Ds] and keys [M, Ds] under teacher [N, Dt] and teacher_keys [M, Dt], None: keys.

    own: the teacher's rows are one more candidate of each row, on both sides; otherwise `temperature`, a tensor or None, has the student's
    factor of the call.
    """

    @staticmethod
    def forward(ctx, call, student, keys, teacher, teacher_keys, own, temperature):
        _, want_student, want_keys, _, _, _, want_scale = ctx.needs_input_grad
        start, theirs = _own_logits(call, student, teacher) if own else (None, None)
        loss, difference, log_sums, kept_keys = torch.ops.kdfast.similarity_distillation(
            student, keys, teacher, keys if teacher_keys is None else teacher_keys, None, None, None, start, theirs, None, None,
            call.products, call.kl, call.mean, want_keys, call.factor, call.teacher_factor,
        )  # fmt: skip
        ctx.call, ctx.want = call, (want_student, want_keys, want_scale, own and want_student)
        bank = keys, teacher, teacher_keys
        ctx.held = None if want_keys else (*bank, _versions(bank))
        rows = student, difference, log_sums, kept_keys, teacher if own else None, temperature
        ctx.save_for_backward(*rows, *(bank if want_keys else ()))
        return loss

    @staticmethod
    def backward(ctx, g):
        call, want = ctx.call, ctx.want
        want_student, want_keys, want_scale, want_start = want
        student, difference, log_sums, kept_keys, own, temperature, *bank = ctx.saved_tensors
        slope = None if own is None else log_sums[4]
        keys, teacher, teacher_keys, versions = (*bank, None) if want_keys else ctx.held
        if torch.is_grad_enabled():
            start, theirs = (None, None) if own is None else _own_logits(call, student, own)
            versions = versions if versions is None or own is None else versions + _versions((theirs,))
            scale = None if temperature is None else _rows_of(temperature, student)
            fixed = keys, teacher, teacher_keys, None, theirs, None, None, None
            rows = student, scale, start, slope, difference, log_sums, kept_keys
            dstudent, dkeys, dscale, dstart = distillation.Gradients.apply(call, want, versions, g, *rows, *fixed)
            dstudent = dstudent if dstart is None else dstudent + _through_dot(dstart, call, own)
            return None, dstudent, dkeys, None, None, None, _through_inverse(dscale, temperature) if want_scale else None
        dstudent = dkeys = dscale = None
        g = g.contiguous()  # of a sum, expanded
        found = torch.ops.kdfast.info_nce_grad_rows(g, None, difference, student, None, want_student, want_scale, False, call.factor)
        if want_student:
            dstudent = _like(found[0], student)
        if want_scale:
            dscale = _through_inverse(found[-1], temperature)
        if want_start:
            dstudent += _through_dot((g / len(student) if call.mean else g) * slope, call, own)
        if want_keys and kept_keys.numel() > 0:
            dkeys = distillation.of_kept_keys(g, kept_keys, student, keys)
        elif want_keys:
            both = student, keys, teacher, keys if teacher_keys is None else teacher_keys
            factors = call.factor, call.teacher_factor
            dkeys = torch.ops.kdfast.similarity_distillation_grad_keys(g, log_sums, *both, *(None,) * 5, call.products, *factors)
            dkeys = _like(dkeys, keys)
        return None, dstudent, dkeys, None, None, None, dscale


class WassersteinMean(PlainFunction):
    """The mean over rows of factor query_i.(mean of keys - positive_i), whose gradient is the queries' alone."""

    @staticmethod
    def forward(ctx, query, positive, keys, factor):
        pull = keys.mean(0, dtype=torch.float32) - positive
        pull *= factor / len(query)
        ctx.dtype = query.dtype
        ctx.save_for_backward(pull)
        return (query * pull).sum()

    @staticmethod
    def backward(ctx, g):
        (pull,) = ctx.saved_tensors
        return (pull * g).to(ctx.dtype), None, None, None


def _own_logits(call: distillation.Call, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The logits [N] of the teacher's rows, the student's and the teacher's."""
    return call.factor * dot(student, teacher), call.teacher_factor * dot(teacher, teacher)


def _through_dot(dlogit: Tensor, call: distillation.Call, teacher: Tensor) -> Tensor:
    """The gradient of the student's rows in their own logits."""
    return ((dlogit * call.factor)[:, None] * teacher.to(dlogit.dtype)).to(teacher.dtype)


def _rows_of(temperature: Tensor, x: Tensor) -> Tensor:
    """The scale [N] that a temperature gives every row of x."""
    return temperature.reciprocal().expand(len(x)).contiguous()


def _through_inverse(dscale: Tensor, temperature: Tensor) -> Tensor:
    """The gradient of a temperature whose inverse scales every row."""
    inverse = temperature.reciprocal()
    return -dscale.sum() * (inverse * inverse)


def _info_nce_mean_fake(query, keys, positive, columns, query_labels, key_labels, factor, pull, keep_keys, products, smoothing, attract):
    rules = query_labels, key_labels, columns, None, None  # key_index, limit, valid
    options = True, True, pull, products, None, keep_keys, factor, smoothing, attract
    return info_nce.fake(query, keys, None, None, *rules, positive, columns, None, *options)


def _info_nce_mean_grad_fake(
    g, statistics, pull, kept_keys, query, keys, columns, query_labels, key_labels, factor, want_query, want_keys, want_scale,
    want_positive, products, spread, attract,
):  # fmt: skip
    count, width = query.shape
    shapes = ((want_query, query.shape), (want_keys, keys.shape), (want_scale, (count,)), (want_positive, (count, 1, width)))
    return [statistics.new_empty(shape) for wanted, shape in shapes if wanted]


if cpu.missing() is None:
    torch.library.register_fake("kdfast::info_nce_mean", _info_nce_mean_fake)
    torch.library.register_fake("kdfast::info_nce_mean_grad", _info_nce_mean_grad_fake)
