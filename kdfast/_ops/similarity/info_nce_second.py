"""The second derivative of InfoNCE's fused losses, by one op. csrc/cpu/similarity/info_nce_second.inl states the formulas."""

import torch
from torch import Tensor
from torch.autograd import Function

from . import cpu
from .definition import SecondOrder


def served(call, cotangents: tuple, needs: list[bool], pulls: Tensor, weights: Tensor | None) -> bool:
    """Whether the op has it, and not the definition alone; arguments as of `gradients`.

    The slopes of positives with weights may cancel each other, and with them what tells the mean of the keys.
    """
    of_bias = needs[4] or cotangents[3] is not None
    return not (of_bias or call.spread or weights is not None or len(call.spec.rows) > 1 or pulls.numel() == 0)


def gradients(*args) -> tuple[Tensor | None, ...]:
    """Gradients of <cotangents, first-order gradients> in (g, query, keys, scale, bias, positive), None where not needed.

    `args` = (call, needs, *cotangents, g, statistics, pulls, query, scale, positive, keys, bias, columns, weights, *rules), with cotangents
    of the gradients in (query, keys, scale, bias, positive), None: zero. A Function where a third derivative could be asked for.
    """
    return Second.apply(*args) if torch.is_grad_enabled() else _gradients(*args)


class Second(Function):
    @staticmethod
    def forward(ctx, *args):
        return _gradients(*args)

    backward = staticmethod(SecondOrder.backward)  # refuses


def _gradients(call, needs, *tensors):
    of_query, of_keys, of_scale, _, of_positive, g, statistics, pulls, query, scale, positive, keys, bias, columns, _, *rules = tensors
    need_g, need_query, need_keys, need_scale, _, need_positive = needs
    dg, dquery, dkeys, dscale, dpositive = torch.ops.kdfast.info_nce_second(
        g, of_query, of_keys, of_scale, of_positive, statistics, pulls, query, keys, scale, bias, *rules, positive, columns, call.include,
        need_g, need_keys, need_scale, need_positive, call.products, call.factor,
    )  # fmt: skip
    return (
        dg if need_g else None,
        dquery.to(query.dtype) if need_query else None,
        dkeys.to(keys.dtype) if need_keys else None,
        dscale if need_scale else None,
        None,
        dpositive.view(positive.shape).to(positive.dtype) if need_positive else None,
    )


def _fake(
    g, query_direction, keys_direction, scale_direction, positive_direction, statistics, pull, query, keys, scale, bias, query_labels,
    key_labels, key_index, limit, valid, positive, columns, include, want_g, want_keys, want_scale, want_positive, products, factor,
):  # fmt: skip
    rows, width = query.shape
    count = keys.shape[0] if positive is None else positive.numel() // width
    wanted = ((g.shape, want_g), (query.shape, True), (keys.shape, want_keys), ((rows,), want_scale), ((count, width), want_positive))
    return tuple([statistics.new_empty(shape if want else (0,)) for shape, want in wanted])


if cpu.missing() is None:
    torch.library.register_fake("kdfast::info_nce_second", _fake)
