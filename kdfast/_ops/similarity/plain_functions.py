"""The Functions of plain calls (plain.py): those of info_nce.py and distillation.py with nothing but what a plain call has.

The ops are the same; a second derivative is left to the general Functions. A bank without gradient is held by reference there and here.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from . import cpu, distillation, info_nce
from .autograd import _versions

_NO_RULES = (None,) * 5  # query_labels, key_labels, key_index, limit, valid


class InfoNceMean(Function):
    """The mean InfoNCE loss of query and positive [N, D] against keys [M, D]."""

    @staticmethod
    def forward(ctx, call, query, keys, positive):
        _, want_query, want_keys, want_positive = ctx.needs_input_grad
        loss, *kept = torch.ops.kdfast.info_nce_mean(query, keys, positive, call.factor, call.pull, want_keys and call.pull, call.products)
        ctx.call, ctx.want = call, (want_query, want_keys, False, False, want_positive)
        ctx.held = None if want_keys else (keys, _versions((keys,)))
        ctx.save_for_backward(*kept, query, positive, *((keys,) if want_keys else ()))
        return loss

    @staticmethod
    def backward(ctx, g):
        call, want = ctx.call, ctx.want
        want_query, want_keys, _, _, want_positive = want
        if want_keys:
            statistics, pulls, dkeys, query, positive, keys = ctx.saved_tensors
            versions = None
        else:
            statistics, pulls, dkeys, query, positive = ctx.saved_tensors
            keys, versions = ctx.held
        if torch.is_grad_enabled():
            bank = keys, None, None, None, *_NO_RULES
            grads = info_nce.Gradients.apply(call, want, versions, g, statistics, pulls, dkeys, query, None, positive, *bank)
            return None, grads[0], grads[1], grads[4]
        found = iter(
            torch.ops.kdfast.info_nce_mean_grad(
                g, statistics, pulls, dkeys, query, keys, call.factor, want_query, want_keys, want_positive, call.products
            )
        )
        return (
            None,
            _like(next(found), query) if want_query else None,
            _like(next(found), keys) if want_keys else None,
            _like(next(found), positive) if want_positive else None,
        )


class DistillationMean(Function):
    """The mean of the losses of student [N, Ds] and keys [M, Ds] under teacher [N, Dt] and teacher_keys [M, Dt], None: keys."""

    @staticmethod
    def forward(ctx, call, student, keys, teacher, teacher_keys):
        _, want_student, want_keys, _, _ = ctx.needs_input_grad
        loss, difference, log_sums = torch.ops.kdfast.similarity_distillation(
            student, keys, teacher, keys if teacher_keys is None else teacher_keys, *(None,) * 7,
            call.products, call.kl, True, call.factor, call.teacher_factor,
        )  # fmt: skip
        ctx.call, ctx.want = call, (want_student, want_keys, False, False)
        bank = keys, teacher, teacher_keys
        ctx.held = None if want_keys else (*bank, _versions(bank))
        ctx.save_for_backward(student, difference, log_sums, *(bank if want_keys else ()))
        return loss

    @staticmethod
    def backward(ctx, g):
        call, want = ctx.call, ctx.want
        want_student, want_keys, _, _ = want
        student, difference, log_sums, *bank = ctx.saved_tensors
        keys, teacher, teacher_keys, versions = (*bank, None) if want_keys else ctx.held
        if torch.is_grad_enabled():
            fixed = keys, teacher, teacher_keys, *(None,) * 5
            grads = distillation.Gradients.apply(call, want, versions, g, student, None, None, None, difference, log_sums, *fixed)
            return None, *grads[:2], None, None
        dstudent = dkeys = None
        if want_student:
            (dstudent,) = torch.ops.kdfast.info_nce_grad_rows(g, None, difference, student, None, True, False, False, call.factor)
            dstudent = _like(dstudent, student)
        if want_keys:
            both = student, keys, teacher, keys if teacher_keys is None else teacher_keys
            factors = call.factor, call.teacher_factor
            dkeys = torch.ops.kdfast.similarity_distillation_grad_keys(g, log_sums, *both, *(None,) * 5, call.products, *factors)
            dkeys = _like(dkeys, keys)
        return None, dstudent, dkeys, None, None


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient of as many numbers as `x` has, in its shape and dtype."""
    grad = grad.view(x.shape) if grad.dim() > 2 else grad
    return grad if grad.dtype == x.dtype else grad.to(x.dtype)


def _info_nce_mean_fake(query, keys, positive, factor, pull, keep_keys, products):
    return info_nce.fake(query, keys, None, None, *_NO_RULES, positive, None, None, True, True, pull, products, None, keep_keys, factor)


def _info_nce_mean_grad_fake(g, statistics, pull, kept_keys, query, keys, factor, want_query, want_keys, want_positive, products):
    shapes = ((want_query, query.shape), (want_keys, keys.shape), (want_positive, (len(query), 1, query.shape[1])))
    return [statistics.new_empty(shape) for wanted, shape in shapes if wanted]


if cpu.missing() is None:
    torch.library.register_fake("kdfast::info_nce_mean", _info_nce_mean_fake)
    torch.library.register_fake("kdfast::info_nce_mean_grad", _info_nce_mean_grad_fake)
