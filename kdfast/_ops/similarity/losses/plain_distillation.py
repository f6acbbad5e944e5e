"""The short way of plain calls of distillation's losses (plain.py).

The Function is that of distillation.py with nothing but what a plain call has. The ops are the same; a second derivative is left to the
general Functions, or with a teacher's temperature that is learnt to their definition. A bank without gradient is held by reference there
and here.
"""

import torch
from torch import Tensor

from .. import cpu
from ..apply import PlainFunction
from ..autograd import _like, _unchanged, _versions
from ..plain import filled_rows, indexes_rows, number_of, plain, reducible, usual, whole_rows
from ..positives import dot
from . import distillation
from .plain_info_nce import through_inverse


def distillation_losses(
    student: Tensor,
    bank,
    teacher: Tensor,
    teacher_bank,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    kl: bool,
    own: bool,
    valid: int | None,
    own_index: Tensor | None,
    weight: Tensor | None,
    reduction: str,
) -> Tensor | None:
    """`distillation_rows` of student [N, Ds] and a bank [M, Ds] under teacher [N, Dt] and another [M, Dt] (None: the same).

    own: the teacher's rows are one more candidate of each row, on both sides. temperatures: numbers, 0-d or [N].
    valid: so many rows of banks without gradient exist. own_index: int64 [N], a row of the bank that is left out.
    """
    keys, valid = filled_rows(bank, valid)
    teacher_keys = None if teacher_bank is None else filled_rows(teacher_bank, None)[0]
    theirs = keys if teacher_keys is None else teacher_keys
    if not plain(student, keys, teacher, theirs):
        return None
    count = len(student)
    if len(teacher) != count or len(theirs) != len(keys) or keys.shape[1] != student.shape[1] or theirs.shape[1] != teacher.shape[1]:
        return None
    if own and teacher.shape != student.shape:
        return None
    if teacher.requires_grad or (teacher_keys is not None and teacher_keys.requires_grad):
        return None
    number, teacher_number = number_of(temperature), number_of(teacher_temperature)
    by_row, theirs_by_row = not usual(number), not (usual(teacher_number) or _sharp(teacher_number, student))
    if (by_row and not whole_rows(number, count)) or (theirs_by_row and not whole_rows(teacher_number, count)):
        return None
    learnt = None if number is temperature and not by_row else temperature
    if own and learnt is not None:
        return None
    teacher_learnt = teacher_temperature if isinstance(teacher_temperature, Tensor) and teacher_temperature.requires_grad else None
    if not reducible(reduction, weight, count):
        return None
    if valid is not None:
        if type(valid) is not int or not 0 < valid <= len(keys) or keys.requires_grad:
            return None
        keys, teacher_keys = keys[:valid], None if teacher_keys is None else teacher_keys[:valid]
        theirs = keys if teacher_keys is None else teacher_keys
    if not (own_index is None or indexes_rows(own_index, count, len(keys))):
        return None
    if not (student.is_contiguous() and keys.is_contiguous() and teacher.is_contiguous() and theirs.is_contiguous()):
        return None
    scales = 1.0 if by_row else 1.0 / number, 1.0 if theirs_by_row else 1.0 / teacher_number
    call = distillation.Call(kl, reduction, None, None, cpu.product_number(None, student), *scales)
    other = None if teacher_keys is keys else teacher_keys
    rest = (
        teacher_temperature.reciprocal() if theirs_by_row else None,
        None if own_index is None else own_index.unsqueeze(1).contiguous(),
        weight,
    )
    return DistillationLosses.run(call, student, keys, teacher, other, own, learnt, teacher_learnt, rest)


def _sharp(temperature, student: Tensor) -> bool:
    """Whether it is a number so small that products of floats are formed in full, as they are here without it (SEED's is 1e-4)."""
    return type(temperature) is float and 1e-5 <= temperature < 1e-3 and student.dtype == torch.float32


class DistillationLosses(PlainFunction):
    """The losses, reduced, of student [N, Ds] and keys [M, Ds] under teacher [N, Dt] and teacher_keys [M, Dt], None: keys.

    own: the teacher's rows are one more candidate of each row, on both sides; otherwise `temperature` may be a tensor, 0-d, which has the
    student's factor of the call, or [N]. teacher_temperature: a tensor of the same kinds that has a gradient, or None. rest: the teacher's
    scale [N] where the call has no number, columns left out [N, 1], weights [N].
    """

    @staticmethod
    def forward(ctx, call, student, keys, teacher, teacher_keys, own, temperature, teacher_temperature, rest):
        _, want_student, want_keys, _, _, _, want_scale, want_teacher, _ = ctx.needs_input_grad
        teacher_scale, key_index, weight = rest
        scale = None if temperature is None or temperature.dim() == 0 else temperature.reciprocal()
        start, theirs = _own_logits(call, student, teacher, teacher_scale) if own else (None, None)
        loss, difference, log_sums, kept_keys = torch.ops.kdfast.similarity_distillation(
            student, keys, teacher, keys if teacher_keys is None else teacher_keys, scale, teacher_scale, None, start, theirs,
            key_index, None, call.products, call.kl, call.reduced, want_keys, call.factor, call.teacher_factor, weight,
            call.reduction == "sum", want_teacher,
        )  # fmt: skip
        ctx.call, ctx.want_teacher, ctx.want = call, want_teacher, (want_student, want_keys, want_scale, own and want_student)
        bank = keys, teacher, teacher_keys, *rest
        ctx.held = None if want_keys else (*bank, _versions(bank))
        rows = student, difference, log_sums, kept_keys, teacher if own else None, temperature, teacher_temperature, scale
        ctx.save_for_backward(*rows, *(bank if want_keys else ()))
        return loss

    @staticmethod
    def backward(ctx, g):
        call, want = ctx.call, ctx.want
        g = g.contiguous()  # of a sum, expanded
        want_student, want_keys, want_scale, want_start = want
        student, difference, log_sums, kept_keys, own, temperature, teacher_temperature, scale, *bank = ctx.saved_tensors
        slope = None if own is None else log_sums[4]
        keys, teacher, teacher_keys, teacher_scale, key_index, weight, versions = (*bank, None) if want_keys else ctx.held
        if torch.is_grad_enabled() and ctx.want_teacher:
            _unchanged((keys, teacher, teacher_keys, teacher_scale, key_index, weight), versions, "similarity_distillation")
            leaves = student, keys, temperature, teacher_temperature
            wanted = want_student, want_keys, want_scale, True
            found = _by_definition(call, leaves, wanted, g, teacher, teacher_keys, own, key_index, weight)
            return None, found[0], found[1], None, None, None, found[2], found[3], None
        if torch.is_grad_enabled():
            start, theirs = (None, None) if own is None else _own_logits(call, student, own, teacher_scale)
            versions = versions if versions is None or own is None else versions + _versions((theirs,))
            scale = None if temperature is None else temperature.reciprocal().expand(len(student)).contiguous()
            fixed = keys, teacher, teacher_keys, teacher_scale, theirs, None, key_index, None, weight
            rows = student, scale, start, slope, difference, log_sums, kept_keys
            dstudent, dkeys, dscale, dstart = distillation.Gradients.apply(call, want, versions, g, *rows, *fixed)
            dstudent = dstudent if dstart is None else dstudent + _through_dot(dstart, call, own)
            return None, dstudent, dkeys, None, None, None, through_inverse(dscale, temperature) if want_scale else None, None, None
        dstudent = dkeys = dscale = dteacher = None
        found = torch.ops.kdfast.info_nce_grad_rows(g, None, difference, student, scale, want_student, want_scale, False, call.factor)
        if want_student:
            dstudent = _like(found[0], student)
        if want_scale:
            dscale = through_inverse(found[1], temperature)
        if want_start:
            dstudent += _through_dot(distillation.of_loss(call, g, student) * slope, call, own)
        if want_keys:
            both = student, keys, teacher, keys if teacher_keys is None else teacher_keys
            dkeys = distillation.of_keys(call, g, kept_keys, log_sums, *both, scale, teacher_scale, None, key_index, None)
        if ctx.want_teacher:
            moved = distillation.of_loss(call, g, student) * log_sums[6]  # t dloss/dt, of the scale t
            dteacher = (moved if teacher_temperature.dim() else moved.sum()) / -teacher_temperature
        return None, dstudent, dkeys, None, None, None, dscale, dteacher, None


def _by_definition(call: distillation.Call, leaves, wanted, g, teacher, teacher_keys, own, key_index, weight) -> list[Tensor | None]:
    """The gradients in student, keys, temperature and teacher_temperature, where they may be differentiated again."""
    # views: of a tensor given twice, or one made of another, each has its own part of the gradient
    leaves = [None if x is None else x.view_as(x) for x in leaves]
    student, keys, temperature, teacher_temperature = leaves
    scale = call.factor if temperature is None else temperature.reciprocal()
    teacher_scale = teacher_temperature.reciprocal()
    losses = distillation.distillation_rows(
        student, keys, teacher, teacher_keys, scale=scale, teacher_scale=teacher_scale,
        start=None if own is None else (scale * dot(student, teacher), teacher_scale * dot(teacher, teacher)),
        key_index=key_index, kl=call.kl, weight=weight, reduction=call.reduction,
    )  # fmt: skip
    found = iter(torch.autograd.grad(losses, [x for x, want in zip(leaves, wanted, strict=True) if want], g, create_graph=True))
    return [next(found) if want else None for want in wanted]


def _own_logits(call: distillation.Call, student: Tensor, teacher: Tensor, teacher_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logits [N] of the teacher's rows, the student's and the teacher's."""
    return call.factor * dot(student, teacher), (call.teacher_factor if teacher_scale is None else teacher_scale) * dot(teacher, teacher)


def _through_dot(dlogit: Tensor, call: distillation.Call, teacher: Tensor) -> Tensor:
    """The gradient of the student's rows in their own logits."""
    return ((dlogit * call.factor)[:, None] * teacher.to(dlogit.dtype)).to(teacher.dtype)
