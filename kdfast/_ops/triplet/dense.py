"""Losses over all negatives by kernels: anchors and references sorted by label, then the passes of csrc/cpu/triplet/dense*.inl (impl="cpu")
or of triton/dense.py (impl="triton"), ops of the same names.

The first gradient is a Function of its own: its backward, the second derivative, is that of the portable block functions.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..._core import extension
from . import blocks, chosen, distances, mining, pairs, portable
from .classes import Anchors, References
from .inputs import Batch
from .mining import Settings
from .portable import Problem, Rows

#: with more positives an anchor the passes for the value and for the gradient would do the same work twice (dense_sorted.inl)
_FEW_POSITIVES = 16


class Sorted(NamedTuple):
    """Anchors and references by label. What belongs to an anchor is in the order of the sorted anchors."""

    anchors: Tensor  # [N] their order
    place: Tensor  # [N] where an anchor is in it
    refs: Tensor | None  # [M] likewise; None in batch
    ref_place: Tensor | None  # [M]
    first: Tensor  # [N] the anchor's class is the references first ... last - 1
    last: Tensor  # [N]
    own: Tensor  # [N] its own reference, -1: none
    exist: Tensor  # [] references that exist, which come first


def by_label(anchors: Anchors, refs: References, in_batch: bool) -> Sorted:
    size = refs.order.numel()
    ref_place = _inverse(refs.order)
    order = refs.order if in_batch else anchors.first.argsort(stable=True)
    of_refs = (None, None) if in_batch else (refs.order, ref_place)
    own = torch.where(anchors.own >= 0, ref_place[anchors.own.clamp_min(0)], -1)
    last = anchors.first + anchors.count + (anchors.skip < size).long()
    return Sorted(order, _inverse(order), *of_refs, anchors.first[order], last[order], own[order], refs.exists.sum())


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


class Loss(NamedTuple):
    """One of the losses, to `rows`. Its ops: name and name_grad of torch.ops.kdfast or torch.ops.kdfast_triton."""

    impl: str
    name: str
    rule: tuple  # the numbers its ops take
    block: Callable  # the same sums as a block function of `portable` or `pairs`, with its settings
    settings: NamedTuple
    positives: int  # of an anchor, at most
    ahead: tuple[bool, ...] = ()  # given to the op `name` after the rule: whether it makes gradients of the sum of all rows, in x and in y


def rows(loss: Loss, x: Tensor, y: Tensor, levels: Tensor | None, anchors: Anchors, refs: References) -> tuple[Tensor, Tensor]:
    """Sums [N, C], differentiable in x [N, D], y [M, D] (x itself in batch) and levels [N, 2], and counts [N, K]."""
    fixed = blocks.distinct(*by_label(anchors, refs, x is y), *anchors, *refs)
    return blocks.call(Sums, loss, x, None if x is y else y, levels, *fixed)[:2]


def _op(loss: Loss, suffix: str = "") -> Callable:
    return getattr(torch.ops.kdfast if loss.impl == "cpu" else torch.ops.kdfast_triton, loss.name + suffix)


def multi_similarity_rows(impl: str, b: Batch, settings: pairs.MultiSimilarity) -> Tensor:
    """[N] losses, as pairs.multi_similarity_rows."""
    (x,), (y,) = b.layers, b.refs
    epsilon = math.inf if settings.epsilon is None else settings.epsilon
    rule = (settings.alpha, settings.beta, settings.base, epsilon)
    loss = Loss(impl, "multi_similarity", rule, pairs.multi_similarity, settings, y.shape[0])
    return rows(loss, x, y, None, b.anchors, b.classes)[0][:, 0]


def pair_hinges(impl: str, b: Batch, settings: pairs.Hinges, levels: Tensor) -> tuple[Tensor, Tensor]:
    """As pairs.pair_hinges."""
    (x,), (y,) = b.layers, b.refs
    loss = Loss(impl, "pair_hinges", (chosen.METRICS[settings.metric],), pairs.hinges, settings, y.shape[0])
    return rows(loss, *distances.centred(x, y, settings.metric), levels, b.anchors, b.classes)


def triplet_rows(s: Settings, p: Problem, _seed: Tensor) -> Rows:
    """Losses of a set mining, mined on the embeddings themselves."""
    in_batch = p.refs[0] is p.layers[0]
    x = distances.prepare(p.layers[0], s.metric, s.normalize)
    y = x if in_batch else distances.prepare(p.refs[0], s.metric, s.normalize)
    rule = (chosen.METRICS[s.metric], p.positives, mining.SETS.index(s.mining), float(s.sign), s.margin, s.epsilon)
    ahead = ()
    if s.impl == "cpu":
        rule = (*rule, s.soft)
        at_once = s.soft or p.positives > _FEW_POSITIVES
        ahead = (_needs_gradient(x), not in_batch and _needs_gradient(y)) if at_once else (False, False)
    loss = Loss(s.impl, "triplet_hinges", rule, portable.every_triplet if s.soft else portable.separable, s, p.positives, ahead)
    sums, counts = rows(loss, *distances.centred(x, y, s.metric), None, p.anchors, p.classes)
    return Rows(sums[:, 0], counts[:, 0], counts[:, 1])


def _needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _sides(x: Tensor, y: Tensor | None, levels: Tensor | None, order: Sorted) -> tuple:
    """What every op takes first: rows and classes in order of labels, and levels where there are some."""
    x, y = x.index_select(0, order.anchors), None if y is None else y.index_select(0, order.refs)
    classes = x, y, order.first, order.last, order.own, order.exist
    return classes if levels is None else (*classes, levels.index_select(0, order.anchors))


class Sums(Function):
    """(sums [N, C], counts [N, K], and what the kernels keep for the backward pass, of the sorted anchors and references)."""

    @staticmethod
    def forward(loss, x, y, levels, *fixed):
        order = Sorted(*fixed[: len(Sorted._fields)])
        sums, counts, *kept = _op(loss)(*_sides(x, y, levels, order), *loss.rule, *loss.ahead)
        return sums.index_select(0, order.place), counts.index_select(0, order.place), *kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.loss, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.inputs = len(tensors)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx, grad, *_):
        tensors, (counts, *kept) = ctx.saved_tensors[: ctx.inputs], ctx.saved_tensors[ctx.inputs :]
        want_x, want_y, want_levels = ctx.needs_input_grad[1:4]
        dx = dy = dlevels = None
        if grad is not None:
            if want_x or want_y:
                dx, dy = blocks.call(Gradients, ctx.loss, (want_x, want_y), grad, len(kept), *kept, *tensors)
            if want_levels:  # relu(d_ap - level), relu(level - d_an): see pairs.hinges
                dlevels = torch.stack([-grad[:, 0] * counts[:, 2], grad[:, 1] * counts[:, 3]], -1)
        return None, dx if want_x else None, dy if want_y else None, dlevels, *[None] * (ctx.inputs - 3)


class Gradients(Function):
    """(dx, dy); what is not wanted, and dy in batch, is empty."""

    @staticmethod
    def forward(loss, want, grad, kept, *tensors):
        kept, (x, y, levels, *fixed) = tensors[:kept], tensors[kept:]
        order = Sorted(*fixed[: len(Sorted._fields)])
        upstream = grad.index_select(0, order.anchors)
        dx, dy = _op(loss, "_grad")(upstream, *kept, *_sides(x, y, levels, order), *loss.rule, *want)
        return dx.index_select(0, order.place) if want[0] else dx, dy.index_select(0, order.ref_place) if want[1] else dy

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.loss, ctx.want, grad, ctx.kept, *tensors = inputs
        ctx.save_for_backward(grad, *tensors[ctx.kept :])

    @staticmethod
    def backward(ctx, x_bar, y_bar):
        grad, x, y, levels, *fixed = ctx.saved_tensors
        in_batch, loss = y is None, ctx.loss
        moving = (x, *([] if levels is None else [levels]), x if in_batch else y)
        n, m = x.shape[0], moving[-1].shape[0]
        limit = blocks.budget(x.device, moving[-1].numel())
        by_triplet = loss.block is portable.every_triplet
        cut = blocks.plan(n, loss.positives, m, max(m, x.shape[1]), limit) if by_triplet else blocks.whole(n, loss.positives, m, limit)
        spec = blocks.Spec(loss.block, loss.settings, cut, len(moving) - 1, 1, len(Anchors._fields))
        wanted = (True, True) if in_batch else ctx.want
        bars = {i: bar for i, bar, want in zip((0, len(moving) - 1), (x_bar, x_bar if in_batch else y_bar), wanted, strict=True) if want}
        tensors = *moving, *fixed[len(Sorted._fields) :]
        to_grad, parts = blocks.second_order(spec, tuple(bars), tuple(bars.values()), grad, tensors)
        grads = dict(zip(bars, parts, strict=True))
        dx, dy = grads.get(0), grads.get(len(moving) - 1)
        if in_batch:
            dx, dy = dx + dy, None
        return None, None, to_grad, None, *[None] * ctx.kept, dx, dy, None, *[None] * len(fixed)


def _statistics(x: Tensor, y: Tensor | None, sums: int, counts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, counts and the marks of tiles (dense.h)."""
    (n, _), m = x.shape, (x if y is None else y).shape[0]
    tiles = x.new_empty((n + 15) // 16, (m + 255) // 256, dtype=torch.uint8)
    return x.new_empty(n, sums), x.new_empty(n, counts, dtype=torch.int64), tiles


def _triplet_hinges_fake(x, y, *rest):
    sums, counts, tiles = _statistics(x, y, 1, 2)
    return sums, counts, x.new_empty(x.shape[0]), tiles, *_gradients(x, y, *rest[-2:])


def _multi_similarity_fake(x, y, *rest):
    sums, counts, tiles = _statistics(x, y, 1, 0)
    return (
        sums,
        counts,
        x.new_empty(x.shape[0]),
        x.new_empty(x.shape[0], dtype=torch.float64),
        x.new_empty(x.shape[0], dtype=torch.float64),
        tiles,
    )


def _gradients(x: Tensor, y: Tensor | None, want_x: bool, want_y: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if want_x else x.new_empty(0), torch.empty_like(y) if want_y else x.new_empty(0)


def gradients_fake(kept: int) -> Callable:
    """Of an op that is given an upstream gradient, what was kept, x, y, ..., want_x, want_y."""
    return lambda grad, *rest: _gradients(rest[kept], rest[kept + 1], *rest[-2:])


if extension.missing_cpu() is None:
    for _name, _fake, _kept in (
        ("triplet_hinges", _triplet_hinges_fake, 4),
        ("pair_hinges", lambda x, y, *rest: _statistics(x, y, 2, 4), 1),
        ("multi_similarity", _multi_similarity_fake, 4),
    ):
        torch.library.register_fake(f"kdfast::{_name}", _fake)
        torch.library.register_fake(f"kdfast::{_name}_grad", gradients_fake(_kept))
