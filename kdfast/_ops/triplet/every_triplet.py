"""impl="cpu" of the set minings where triplets are visited one by one: mined on other rows than their loss is taken on, with a loss in
several layers, or with `swap` (csrc/cpu/triplet/every_triplet.inl).

As in dense.py anchors and references are sorted by label, and the second derivative is that of the portable block functions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..._core import extension
from . import blocks, chosen, dense, distances, mining, portable
from .classes import Anchors
from .mining import Settings
from .portable import Problem, Rows


class Loss(NamedTuple):
    layers: int
    in_batch: bool
    rule: tuple  # the numbers the ops take
    settings: Settings
    positives: int  # of an anchor, at most
    ahead: tuple[bool, bool]  # whether the forward pass makes gradients of the sum of all rows, in x and in y


class Given(NamedTuple):
    x: tuple[Tensor, ...]  # [N, D_l] of each layer
    y: tuple[Tensor, ...]  # [M, D_l]; none in batch
    mine: tuple[Tensor | None, Tensor | None]  # [N, D], [M, D], the second not in batch; where layer 0 is mined on, neither
    order: dense.Sorted
    classes: tuple[Tensor, ...]  # Anchors and References


def triplet_rows(s: Settings, p: Problem, _seed: Tensor) -> Rows:
    """As portable.triplet_rows, for rows as given."""
    in_batch = p.refs[0] is p.layers[0]

    def ready(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = distances.prepare(x, s.metric, s.normalize)
        return distances.centred(x, x if in_batch else distances.prepare(y, s.metric, s.normalize), s.metric)

    xs, ys = zip(*(ready(x, y) for x, y in zip(p.layers, p.refs, strict=True)), strict=True)
    mine, mine_ref = ready(p.mine, p.mine_ref) if p.separate else (None, None)
    rule = (chosen.METRICS[s.metric], p.positives, mining.SETS.index(s.mining), float(s.sign), s.margin, s.epsilon, s.soft, s.swap)
    ahead = (_need_gradients(xs), not in_batch and _need_gradients(ys))
    loss = Loss(len(xs), in_batch, rule, s, p.positives, ahead)
    order = dense.by_label(p.anchors, p.classes, in_batch)
    tensors = (*xs, *(() if in_batch else ys), mine, None if in_batch else mine_ref, *order, *p.anchors, *p.classes)
    sums, counts = blocks.call(Sums, loss, *blocks.distinct(*tensors))[:2]
    return Rows(sums[:, 0], counts[:, 0], counts[:, 1])


def _need_gradients(layers: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in layers)


def _given(loss: Loss, tensors: tuple[Tensor | None, ...]) -> Given:
    n = loss.layers
    refs = 0 if loss.in_batch else n
    x, y, rest = tensors[:n], tensors[n : n + refs], tensors[n + refs :]
    sizes = len(dense.Sorted._fields)
    return Given(x, y, rest[:2], dense.Sorted(*rest[2 : 2 + sizes]), rest[2 + sizes :])


def _sides(given: Given) -> tuple:
    """What both ops take: rows and classes in the order of labels."""
    order, (mine, mine_ref) = given.order, given.mine
    x = [t.index_select(0, order.anchors) for t in given.x]
    y = [t.index_select(0, order.refs) for t in given.y]
    mine = None if mine is None else mine.index_select(0, order.anchors)
    mine_ref = None if mine_ref is None else mine_ref.index_select(0, order.refs)
    return x, y, mine, mine_ref, order.first, order.last, order.own, order.exist


class Sums(Function):
    """(sums [N, 1], counts [N, 2], and what the kernel keeps for the backward pass, of the sorted anchors and references)."""

    @staticmethod
    def forward(loss, *tensors):
        given = _given(loss, tensors)
        sums, counts, *kept = torch.ops.kdfast.every_triplet(*_sides(given), *loss.rule, *loss.ahead)
        return sums.index_select(0, given.order.place), counts.index_select(0, given.order.place), *kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.loss, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.inputs = len(tensors)
        ctx.save_for_backward(*tensors, *output[2:])

    @staticmethod
    def backward(ctx, grad, *_):
        loss, saved = ctx.loss, ctx.saved_tensors
        tensors, kept = saved[: ctx.inputs], saved[ctx.inputs :]
        moving = loss.layers * (1 if loss.in_batch else 2)
        grads = [None] * ctx.inputs
        if grad is not None:
            needed = ctx.needs_input_grad[1 : 1 + moving]
            want = any(needed[: loss.layers]), any(needed[loss.layers :])
            found = blocks.call(Gradients, loss, want, grad, *kept, *tensors)
            for i, need in enumerate(needed):
                grads[i] = found[i] if need else None
        return None, *grads


class Gradients(Function):
    """dx of each layer, then dy; what is not wanted, and dy in batch, is empty."""

    @staticmethod
    def forward(loss, want, grad, nearest, *rest):
        n = loss.layers
        dx, dy, given = rest[:n], rest[n : 2 * n], _given(loss, rest[2 * n :])
        order = given.order
        upstream = grad.index_select(0, order.anchors)
        found = torch.ops.kdfast.every_triplet_grad(upstream, nearest, list(dx), list(dy), *_sides(given), *loss.rule, *want)
        xs = tuple(t.index_select(0, order.place) if want[0] else t for t in found[:n])
        ys = tuple(t.index_select(0, order.ref_place) if want[1] else t for t in found[n:])
        return *xs, *ys

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.loss, ctx.want, grad, _, *rest = inputs
        ctx.save_for_backward(grad, *rest[2 * ctx.loss.layers :])

    @staticmethod
    def backward(ctx, *bars):
        loss, n = ctx.loss, ctx.loss.layers
        grad, *tensors = ctx.saved_tensors
        given = _given(loss, tuple(tensors))
        moving = *given.x, *(given.x if loss.in_batch else given.y)
        rows, columns = moving[0].shape[0], moving[n].shape[0]
        limit = blocks.budget(grad.device, sum(y.numel() for y in moving[n:]))
        cut = blocks.plan(rows, loss.positives, columns, max(columns, *(y.shape[1] for y in moving)), limit)
        anchors, refs = given.classes[: len(Anchors._fields)], given.classes[len(Anchors._fields) :]
        mine, mine_ref = given.mine
        if mine is None:
            block, fixed_rows, fixed = portable.every_triplet, anchors, refs
        else:
            block, fixed_rows, fixed = portable.cube, (mine, *anchors), (mine if loss.in_batch else mine_ref, *refs, None)
        spec = blocks.Spec(block, loss.settings, cut, n, n, len(fixed_rows))
        wanted = tuple(i for i in range(2 * n) if loss.in_batch or ctx.want[i // n])
        in_place = tuple(bars[i % n] if loss.in_batch else bars[i] for i in wanted)
        to_grad, parts = blocks.second_order(spec, wanted, in_place, grad, (*moving, *fixed_rows, *fixed))
        found = dict(zip(wanted, parts, strict=True))
        if loss.in_batch:
            found = {i: found[i] + found[n + i] for i in range(n)}
        inputs = (found.get(i) for i in range(n if loss.in_batch else 2 * n))
        before = 4 + 2 * n  # loss, want, grad, nearest and the gradients that were kept
        rest = len(tensors) - (n if loss.in_batch else 2 * n)
        return None, None, to_grad, *[None] * (before - 3), *inputs, *[None] * rest


def _gradients(x: list[Tensor], y: list[Tensor], want_x: bool, want_y: bool) -> list[Tensor]:
    dx = [torch.empty_like(t) if want_x else t.new_empty(0) for t in x]
    return dx + [torch.empty_like(t) if want_y else t.new_empty(0) for t in y or x]


def _every_triplet_fake(x, y, *rest) -> list[Tensor]:
    n = x[0].shape[0]
    counts = x[0].new_empty(n, 2, dtype=torch.int64)
    return [x[0].new_empty(n, 1), counts, x[0].new_empty(n), *_gradients(x, y, *rest[-2:])]


def _every_triplet_grad_fake(g, nearest, dx, dy, x, y, *rest) -> list[Tensor]:
    return _gradients(x, y, *rest[-2:])


_FAKES: dict[str, Callable] = {"every_triplet": _every_triplet_fake, "every_triplet_grad": _every_triplet_grad_fake}
if extension.missing_cpu() is None:
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"kdfast::{_name}", _fake)
