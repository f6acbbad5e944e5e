"""The second derivative of distillation's fused losses, of which only the student's softmax moves: the teacher's part is linear.

Along the direction (u, kappa, sigma) of (q, k^S, s), with e = s u + sigma q and the means K_i = sum_j p_ij kappa_j, row i's loss moves at

    e_i.(O^S_i - O^T_i) + s_i q_i.(K^S_i - K^T_i)

so that its derivatives are those of lse^S (second_order.py) less

    in q: sigma O^T + s K^T,   in s: u.O^T + q.K^T,   in k^S_j: sum_i p^T_ij e_i
"""

import torch
from torch import Tensor

from .. import cpu
from ..arguments import how_to_compute
from ..definition import differentiated_last
from ..passes import Want, run_forward, run_gradients
from ..positives import dot
from ..second_order import Tangent, second_order_of_lse


def served(call, student: Tensor, start_logit: Tensor | None, fixed) -> bool:
    """Whether it is here, and not the definition's alone: no starts, sides of one dtype, products in its precision."""
    if start_logit is not None or student.dtype != fixed.teacher.dtype:
        return False
    return cpu.product_number(how_to_compute(student, call.precision).products, student) == call.products


def gradients(*args) -> tuple[Tensor | None, ...]:
    """Gradients of <cotangents, first-order gradients> in (g, student, keys, scale), None where not needed.

    `args` = (call, fixed, needs, *cotangents of the gradients in (student, keys, scale), None: zero, share, difference, log_sums, student,
    keys, scale), with share the upstream of each loss and difference and log_sums as the forward pass left them.
    """
    return differentiated_last(_gradients, *args)


def _batch(*tensors: Tensor | None) -> list[Tensor | None]:
    """Of one."""
    return [None if x is None else x.unsqueeze(0) for x in tensors]


def _gradients(call, f, needs, of_student, of_keys, of_scale, share, difference, log_sums, student, keys, scale):
    need_g, need_student, need_keys, need_scale = needs
    factors = log_sums[5] if len(log_sums) > 5 else torch.ones_like(log_sums[0])
    h = share * factors
    s = torch.full_like(h, call.factor) if scale is None else scale
    t = torch.full_like(h, call.teacher_factor) if f.scale is None else f.scale
    compute = how_to_compute(student, call.precision)
    bias, key_index, along_student, along_keys, along_scale = _batch(f.bias, f.key_index, of_student, of_keys, of_scale)
    rules = None, None, key_index, None, None if f.valid is None else f.valid.reshape(1)
    side, teacher = _batch(student, keys, s), _batch(f.teacher, keys if f.keys is None else f.keys, t)

    lse, pooled, low = run_forward("cpu", compute, True, *side, bias, None, None, None, *rules)
    tangent = Tangent(along_student, along_keys, along_scale, None, None, None, None)
    problem = *side, bias, None, None, None, lse, low, pooled, *rules
    found = second_order_of_lse("cpu", compute, need_keys, False, tangent, *_batch(h), *problem)
    rate, dstudent, dscale = found.g[0], found.query[0], found.scale[0]

    wide = student.to(s.dtype)
    u = torch.zeros_like(wide) if of_student is None else of_student.to(s.dtype)
    e = s[:, None] * u if of_scale is None else s[:, None] * u + of_scale[:, None] * wide
    if need_g or need_scale or of_scale is not None:
        expected = pooled[0] - difference / torch.where(factors == 0, 1.0, factors)[:, None]  # O^T
        rate, dscale = rate - dot(e, expected), dscale - h * dot(u, expected)
        dstudent = dstudent if of_scale is None else dstudent - (h * of_scale)[:, None] * expected
    if of_keys is not None:
        mean = run_forward("cpu", compute, True, *teacher, bias, None, along_keys, None, *rules)[1][0]  # K^T
        of_mean = dot(wide, mean)
        rate, dscale, dstudent = rate - s * of_mean, dscale - h * of_mean, dstudent - (h * s)[:, None] * mean
    dkeys = None
    if need_keys:
        levels = _batch(log_sums[2], log_sums[3])
        sums = (torch.zeros_like(levels[0]), *_batch(h[:, None] * e), *teacher, bias, keys.unsqueeze(0), *levels, *rules)
        dkeys = (found.keys[0] - run_gradients("cpu", compute, Want(False, False, False, True), *sums).values[0]).to(keys.dtype)
    dg = rate * factors
    return (
        (dg.mean() if call.reduced else dg) if need_g else None,
        dstudent.to(student.dtype) if need_student else None,
        dkeys,
        dscale if need_scale else None,
    )
