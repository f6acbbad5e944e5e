"""Cross-entropy, or KL, between two softmaxes over a bank: a student's under a teacher's, each of its own queries, keys and scale.

With p^S, p^T the softmaxes of z^S_ij = s_i q_i.k^S_j + b_j and z^T_ij = t_i u_i.k^T_j + b_j, and start candidates j = 0:

    loss_i = sum_j p^T_ij (lse^S_i - z^S_ij)      KL: sum_j p^T_ij ((lse^S_i - z^S_ij) - (lse^T_i - z^T_ij))
    dq_i = g_i s_i (O^S_i - O^T_i)                ds_i = g_i q_i.(O^S_i - O^T_i)        O_i = sum_(j > 0) p_ij k^S_j
    dk_j = sum_i g_i s_i (p^S_ij - p^T_ij) q_i    dz^S_i0 = g_i (p^S_i0 - p^T_i0)

impl="cpu" takes the losses and O^S - O^T from one pass over both banks, so that a student's bank without gradient is read once, and with
the mean over few pairs dk_j. Anything else, and what has a gradient besides, is composed of the streaming softmaxes of the two sides for
its derivatives, while the values, which that would leave with the rounding errors of the logits, are distillation_values.py's or
Triton's.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ...._core import dtypes, extension, impls
from ...._core.recording import recorded
from ...._core.reduction import reduce_rows, row_weights
from .. import cpu
from ..apply import streaming_softmax
from ..arguments import Compute, how_to_compute, key_bias, prefix_length, problem, row_parameter
from ..autograd import _keep, _kept, _like, _unchanged, _versions
from ..definition import SecondOrder, with_values
from ..exclusions import Rules
from ..portable import start_weight
from ..positives import dot
from ..triton import distillation as triton_distillation
from . import distillation_second, distillation_values


def _of_both_sides(refuses: Callable[..., str | None]) -> Callable[..., str | None]:
    def both(*, teacher_dtype: torch.dtype | None = None, **facts) -> str | None:
        return refuses(**facts) or (None if teacher_dtype is None else refuses(**(facts | {"dtype": teacher_dtype})))

    return both


impls.register(  # Triton serves the values of the composition, and its streaming softmaxes
    "similarity_distillation",
    *(impls.Implementation(name, m.missing, _of_both_sides(m.refuses)) for name, m in (("cpu", cpu), ("triton", triton_distillation))),
)


class Fixed(NamedTuple):
    """What is not differentiated by the fused pass."""

    teacher: Tensor  # [N, Dt]
    keys: Tensor | None  # [M, Dt], the teacher's; None where there is one bank: torch.compile takes no tensor twice
    scale: Tensor | None  # [N]; None: the call's number
    start_logit: Tensor | None  # [N]
    bias: Tensor | None  # [M], of both sides
    key_index: Tensor | None  # [N, E], -1 none
    valid: Tensor | None  # []
    weight: Tensor | None  # [N], of the losses


class Call(NamedTuple):
    """What a call is told beside its tensors."""

    kl: bool
    reduction: str  # as reduce_rows has it, over the rows that admit something
    precision: str | None
    impl: str | None
    products: int  # the kernel's number for how both sides' products are formed
    factor: float = 1.0  # the scale of every row, where there is no tensor of them
    teacher_factor: float = 1.0

    @property
    def reduced(self) -> bool:
        return self.reduction != "none"


def distillation_rows(
    student: Tensor,
    keys: Tensor,
    teacher: Tensor,
    teacher_keys: Tensor | None,
    *,
    scale: float | Tensor,
    teacher_scale: float | Tensor,
    start: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    key_index: Tensor | None = None,
    valid: int | Tensor | None = None,
    kl: bool = False,
    weight: Tensor | None = None,
    reduction: str = "none",
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """The losses [N], weighted and reduced over the rows that admit something.

    student [N, Ds], keys [M, Ds], teacher [N, Dt], teacher_keys [M, Dt] or None for `keys`; the sides may differ in dtype. `start` = logits
    [N] of one more candidate, student's and teacher's. key_index [N, E]: columns left out, -1 none. The teacher's rows and keys get
    no gradient; all else does, twice.
    """
    teacher_keys = None if teacher_keys is keys else teacher_keys
    teacher, teacher_keys = (t.detach() if t is not None and t.requires_grad else t for t in (teacher, teacher_keys))
    ours, theirs = how_to_compute(student, precision), how_to_compute(teacher, precision)
    chosen = impls.choose("similarity_distillation", impl, device_type=student.device.type, dtype=ours.dtype, teacher_dtype=theirs.dtype)
    logit, teacher_logit = (None, None) if start is None else start
    fixed = Fixed(
        teacher,
        teacher_keys,
        row_parameter("teacher_scale", teacher_scale, teacher),
        teacher_logit,
        None if bias is None else key_bias(bias, student, keys),
        key_index,
        None if valid is None else prefix_length(valid, student, keys, []),
        row_weights(weight, student.shape[:1], dtypes.accumulator(torch.promote_types(ours.dtype, theirs.dtype)), student.device),
    )
    products = min(cpu.product_number(ours.products, student), cpu.product_number(theirs.products, teacher))  # the finer
    call = Call(kl, reduction, precision, impl, products)
    inputs = (student, keys, row_parameter("scale", scale, student), logit, *fixed)
    transforms = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    if chosen == "cpu" and not transforms and not recorded(fixed.scale, teacher_logit, bias):
        return Distillation.apply(call, *inputs)
    losses, lse = _composed(call, *inputs)
    return _reduced(call, fixed, with_values(losses, _values(call, chosen == "triton", ours, theirs, *inputs)), lse.detach())


def _reduced(call: Call, fixed: Fixed, losses: Tensor, lse: Tensor) -> Tensor:
    excluded = any(x is not None for x in (fixed.bias, fixed.key_index, fixed.valid))
    return reduce_rows(losses, counted=lse != -torch.inf if excluded else None, weight=fixed.weight, reduction=call.reduction)


def _values(call: Call, kernel: bool, ours: Compute, theirs: Compute, *inputs) -> Tensor:
    """The losses by themselves, with the digits that the composition's have not: of Triton's kernel, or distillation_values.py's."""
    student, keys, scale, start_logit, *fixed = (x.detach() if isinstance(x, Tensor) else x for x in inputs)
    f, acc = Fixed(*fixed), torch.float64 if torch.float64 in (ours.dtype, theirs.dtype) else torch.float32
    scales = student.new_full((len(student),), call.factor, dtype=acc) if scale is None else scale
    teacher_scales = scales.new_full(scales.shape, call.teacher_factor) if f.scale is None else f.scale
    vectors = [None if x is None else x.to(acc) for x in (scales, teacher_scales, start_logit, f.start_logit, f.bias)]
    if kernel:
        products = (cpu.product_number(side.products, x, triton_distillation.KERNELS) for side, x in ((ours, student), (theirs, f.teacher)))
        run = torch.ops.kdfast_triton.similarity_distillation_losses
        return run(student, keys, f.teacher, f.keys, *vectors, f.key_index, f.valid, call.kl, *products)
    run = torch.ops.kdfast_torch.similarity_distillation_losses if torch.compiler.is_compiling() else distillation_values.losses
    matrices = student, keys, f.teacher, keys if f.keys is None else f.keys
    return run(*matrices, *vectors, f.key_index, f.valid, call.kl, ours.dtype, theirs.dtype)


def _composed(call: Call, student, keys, scale, start_logit, *fixed, constants: bool = True) -> tuple[Tensor, Tensor]:
    """(losses, lse) by streaming softmaxes: any device, dtype and transform, and derivatives in the teacher's scale and the bias too.

    constants: terms without a derivative in the student's side are wanted.
    """
    f = Fixed(*fixed)
    learnt = recorded(f.scale, f.start_logit, f.bias)
    scale = call.factor if scale is None else scale
    f = f._replace(scale=call.teacher_factor) if f.scale is None else f
    if learnt:  # the teacher's gradient reads the banks, into which a push may have come by then
        keys, own_keys, valid = (None if x is None else x.clone() for x in (keys, f.keys, f.valid))
        f = f._replace(keys=own_keys, valid=valid)
    wide, one_bank = torch.promote_types(student.dtype, f.teacher.dtype), f.keys is None
    if learnt:  # whose gradient is what two sums leave of each other, one of them of the student's rows times the upstream
        wide = dtypes.accumulator(wide)
    operands = (student, keys, f.teacher, keys.detach() if one_bank else f.keys)
    if not torch.is_autocast_enabled(student.device.type):
        operands = (x.to(wide) for x in operands)
    query, values, teacher, teacher_keys = operands
    if how_to_compute(query, call.precision).dtype in (torch.float32, torch.float64):
        values, start_logit = _centred(query, values, scale, start_logit, f.valid)
    rules = Rules(key_index=f.key_index)

    def softmax(query, keys, scale, values, start_logit, *, pool):
        start = None if start_logit is None else (start_logit, None)
        spec, tensors = problem(query, keys, scale, values, f.bias, start, rules, f.valid, call.precision, call.impl)
        lse, pooled, low = streaming_softmax(spec, tensors.folded(spec), pool=pool, need_pooled=pool)
        return lse[0], low[0], pooled[0] if pool else None

    lse, _, _ = softmax(query, values, scale, None, start_logit, pool=False)
    teacher_lse, teacher_low, expected = softmax(teacher, teacher_keys, f.scale, values, f.start_logit, pool=True)
    losses = lse - scale * dot(query.to(expected.dtype), expected)
    p_start = None if f.start_logit is None else start_weight(f.start_logit, teacher_lse, teacher_low)
    if p_start is not None:
        losses = losses - p_start * start_logit
    if not constants:
        return losses, lse
    if call.kl:
        if one_bank and not learnt:
            own = expected.detach()
        else:
            own = softmax(teacher, teacher_keys, f.scale, None, f.start_logit, pool=True)[-1]
        losses = losses + f.scale * dot(teacher.to(own.dtype), own) - teacher_lse
        if p_start is not None:
            losses = losses + p_start * f.start_logit
    elif f.bias is not None:  # KL's two terms sum_j p^T_ij b_j cancel
        finite = torch.where(f.bias == -torch.inf, 0.0, f.bias)[:, None].to(wide)
        losses = losses - softmax(teacher, teacher_keys, f.scale, finite, f.start_logit, pool=True)[-1][:, 0]
    return losses, lse


def _centred(query: Tensor, keys: Tensor, scale, start_logit: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Keys less their mean, and the start's logit less what that takes off a row's others: of keys nearly alike, O^S - O^T is then no
    difference of what these have in common. The mean has so few bits that keys less it are rarely rounded."""
    if valid is None:
        mean = keys.detach().sum(0) / max(1, len(keys))
    else:  # keys past it may be anything
        counted = torch.arange(len(keys), device=keys.device) < valid
        mean = torch.where(counted[:, None], keys.detach(), 0.0).sum(0) / valid.clamp(1, max(1, len(keys)))
    mean = mean.bfloat16().to(keys.dtype)
    if start_logit is not None:
        start_logit = start_logit - scale * dot(query, mean)
    return keys - mean, start_logit


class Distillation(Function):
    """The losses, reduced, by the fused pass. Of its log_sums [5 or more, N], lse of student and teacher, each with its low digits, and
    slopes, the sixth are the losses' factors and the seventh the slopes of the teacher's scale (plain_distillation.py)."""

    @staticmethod
    def forward(ctx, call, student, keys, scale, start_logit, *fixed):
        inputs = _for_kernel(student, keys, scale, *fixed)
        f = Fixed(*fixed)
        *starts, weight = (None if x is None else x.contiguous() for x in (start_logit, f.start_logit, f.weight))
        ctx.call, ctx.want = call, ctx.needs_input_grad[1:5]
        losses, difference, log_sums, kept_keys = torch.ops.kdfast.similarity_distillation(
            *inputs[:7], *starts, *inputs[7:], call.products, call.kl, call.reduced, ctx.want[1], call.factor, call.teacher_factor,
            weight, call.reduction == "sum",
        )  # fmt: skip
        slope = None if start_logit is None else log_sums[4]
        rows, bank, hold = (student, scale, start_logit, slope, difference, log_sums, kept_keys), (keys, *fixed), not ctx.want[1]
        ctx.versions = None
        if hold and torch.compiler.is_compiling():
            bank = (None,) * len(bank)  # compiled code has no double backward, and the first one does not read them
        elif hold:
            ctx.versions = _versions(bank)
        _keep(ctx, rows, bank, hold)
        return losses

    @staticmethod
    def backward(ctx, g):
        rows, bank = _kept(ctx, 7)
        record = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        run = Gradients.apply if record else _gradients
        return (None, *run(ctx.call, ctx.want, ctx.versions, g.contiguous(), *rows, *bank), *(None,) * len(Fixed._fields))


def _gradients(call, want, versions, g, student, scale, start_logit, slope, difference, log_sums, kept_keys, keys, *fixed):
    """The gradients of <g, losses> in (student, keys, scale, start_logit), None where not wanted."""
    want_student, want_keys, want_scale, want_start = want
    dkeys = dstart = None
    if want_start:
        dstart = of_loss(call, g, student) * slope
    if want_keys:
        dkeys = of_keys(call, g, kept_keys, log_sums, *_for_kernel(student, keys, scale, *fixed))
    rows = g, None, difference, student, scale
    dstudent, dscale, _ = torch.ops.kdfast.info_nce_grad_rows(*rows, want_student, want_scale, False, call.factor)
    return dstudent.to(student.dtype) if want_student else None, dkeys, dscale if want_scale else None, dstart


def of_loss(call: Call, g: Tensor, student: Tensor) -> Tensor:
    """The upstream of each loss, [] or [N], but for the factors that the forward pass knows of."""
    return g / student.shape[0] if call.reduced else g


def of_keys(call: Call, g: Tensor, kept: Tensor, log_sums: Tensor, student: Tensor, keys: Tensor, *rest: Tensor | None) -> Tensor:
    """The keys' gradient. kept: where the forward pass has left it, that for an upstream of 1 of every loss or, of losses that are not
    reduced, the table that it is made of; else empty. rest: as of `_for_kernel`."""
    if kept.numel() > 0 and call.reduced:
        return _like(kept * of_loss(call, g, student), keys)
    table = kept if kept.numel() > 0 else None
    run = torch.ops.kdfast.similarity_distillation_grad_keys
    return _like(run(g, log_sums, student, keys, *rest, call.products, call.factor, call.teacher_factor, table), keys)


class Gradients(Function):
    """`_gradients`, and their derivative: distillation_second.py's, or that of the definition, taken twice."""

    @staticmethod
    def forward(ctx, call, want, versions, g, student, scale, start_logit, slope, difference, log_sums, kept_keys, keys, *fixed):
        ctx.call, ctx.want, ctx.versions = call, want, versions
        _keep(ctx, (g, student, scale, start_logit, difference, log_sums), (keys, *fixed), versions is not None)
        ctx.set_materialize_grads(False)
        return _gradients(call, want, versions, g, student, scale, start_logit, slope, difference, log_sums, kept_keys, keys, *fixed)

    @staticmethod
    def backward(ctx, *cotangents):
        (g, student, scale, start_logit, difference, log_sums), bank = _kept(ctx, 6)
        _unchanged(bank, ctx.versions, "similarity_distillation")
        keys, *fixed = bank
        needs, call, f = ctx.needs_input_grad, ctx.call, Fixed(*fixed)

        def definition(*inputs):
            return _reduced(call, f, *_composed(call, *inputs, *fixed, constants=False))

        if distillation_second.served(call, student, start_logit, f):
            needed, share = (needs[3], needs[4], needs[11], needs[5]), of_loss(call, g, student)
            found = *cotangents[:3], share, difference, log_sums, student, keys, scale
            (dg, dstudent, dkeys, dscale), dstart = distillation_second.gradients(call, f, needed, *found), None
        else:
            dg, dstudent, dkeys, dscale, dstart = SecondOrder.apply(definition, ctx.want, *cotangents, g, student, keys, scale, start_logit)
        return None, None, None, dg, dstudent, dscale, dstart, *(None,) * 4, dkeys, *(None,) * len(Fixed._fields)


def _for_kernel(student, keys, scale, *fixed):
    """(student, keys, teacher, teacher_keys, scale, teacher_scale, bias, key_index, valid), contiguous."""
    f, keys = Fixed(*fixed), keys.contiguous()
    valid = None if f.valid is None else f.valid.reshape(1)
    tensors = (student, keys, f.teacher, keys if f.keys is None else f.keys, scale, f.scale, f.bias, f.key_index, valid)
    return tuple([None if x is None else x.contiguous() for x in tensors])


def _fake(
    student, keys, teacher, teacher_keys, scale, teacher_scale, bias, start_logit, teacher_start_logit, key_index, valid, products,
    kl=False, mean=False, keep_keys=False, factor=1.0, teacher_factor=1.0, row_weights=None, sum=False, want_teacher=False,
):  # fmt: skip
    count, width = student.shape
    table = not mean and valid is None and products != cpu.KERNELS.products["bf16"]
    kept = (mean or table) and keep_keys and extension.load("_C")[0].few_distilled_pairs(count, *keys.shape, teacher.shape[1])
    factored = want_teacher or sum or any(x is not None for x in (row_weights, bias, key_index, valid))
    of_keys = (0,) if not kept else (count, len(keys)) if table else keys.shape
    shapes = () if mean else (count,), (count, width), (5 + factored + want_teacher, count), of_keys
    return tuple(student.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _grad_keys_fake(g, log_sums, student, keys, *_):
    return log_sums.new_empty(keys.shape)


if cpu.missing() is None:
    torch.library.register_fake("kdfast::similarity_distillation", _fake)
    torch.library.register_fake("kdfast::similarity_distillation_grad_keys", _grad_keys_fake)
