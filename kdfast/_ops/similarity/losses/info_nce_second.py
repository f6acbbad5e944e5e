"""The second derivative of InfoNCE's fused losses, by one op. csrc/cpu/info_nce/info_nce_second.inl states the formulas."""

import torch
from torch import Tensor

from .. import cpu
from ..definition import differentiated_last


def served(call, cotangents: tuple, needs: list[bool], pulls: Tensor, weights: Tensor | None) -> bool:
    """Whether the op has it, and not the definition alone; arguments as of `gradients`.

    The slopes of positives with weights may cancel each other, and with them what tells the mean of the keys.
    """
    of_bias = needs[4] or cotangents[3] is not None
    return not (of_bias or call.spread or weights is not None or len(call.spec.rows) > 1 or pulls.numel() == 0)


def gradients(*args) -> tuple[Tensor | None, ...]:
    """Gradients of <cotangents, first-order gradients> in (g, query, keys, scale, bias, positive), None where not needed.

    `args` = (call, needs, *cotangents, g, statistics, pulls, query, scale, positive, keys, bias, columns, weights, row_weights,
    *rules), with cotangents of the gradients in (query, keys, scale, bias, positive), None: zero.
    """
    return differentiated_last(_gradients, *args)


def of_matches(*args) -> tuple[Tensor | None, ...]:
    """The same of the losses of matching.py that are softmaxes, in (g, x, y, scale): each side is InfoNCE's, its match a row of its bank.

    `args` = (call, needs, *cotangents, g, x, y, scale), with cotangents of the gradients in (x, y, scale).
    """
    return differentiated_last(_of_matches, *args)


def _gradients(call, needs, *tensors):
    of_query, of_keys, of_scale, _, of_positive, g, statistics, pulls, query, scale, positive, keys, bias, columns, _, _, *rules = tensors
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


def _of_matches(call, needs, of_x, of_y, of_scale, g, x, y, scale):
    need_g, need_x, need_y, need_scale = needs
    own = torch.arange(len(x))
    if y is None:
        half = len(x) // 2
        labels, match = own % half if call.labels is None else call.labels, own.roll(half)
    else:
        labels, match = own if call.labels is None else call.labels, own
    factor = call.factor if scale is None else scale.item()
    of_scale = None if of_scale is None else of_scale.expand(len(x))
    rules = labels, labels, None, None, None
    reduced = call.reduced, True, call.products, None, False, factor, 0.0, False, call.weight, call.reduction == "sum"

    def side(g, q, k, of_q, of_k, need_keys):
        """Gradients in g, q, k and scale."""
        positives, options = (None, match[:, None]), (call.products, factor)
        _, statistics, pulls, _ = torch.ops.kdfast.info_nce(q, k, None, None, *rules, *positives, None, call.include, *reduced)
        dg, dq, dk, dscale, _ = torch.ops.kdfast.info_nce_second(
            g, of_q, of_k, of_scale, None, statistics, pulls, q, k, None, None, *rules, *positives, call.include, need_g, need_keys,
            need_scale, False, *options,
        )  # fmt: skip
        return dg, dq, dk, dscale.sum()

    if y is None:
        dg, dq, dk, dscale = side(g, x, x, of_x, of_x, need_x)
        dx, dy = dq + dk if need_x else None, None
    elif call.rows_alone:
        dg, dx, dy, dscale = side(g, x, y, of_x, of_y, need_y)
    else:
        rows, columns = side(g / 2, x, y, of_x, of_y, need_y), side(g / 2, y, x, of_y, of_x, need_x)
        dg, dscale = (rows[0] + columns[0]) / 2, rows[3] + columns[3]
        dx, dy = rows[1] + columns[2] if need_x else None, rows[2] + columns[1] if need_y else None
    return (
        dg if need_g else None,
        dx.to(x.dtype) if need_x else None,
        dy.to(y.dtype) if need_y else None,
        dscale if need_scale else None,
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
