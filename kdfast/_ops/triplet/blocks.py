"""Sums over the pairs or triplets of each anchor, block by block, with gradients of first and second order in linear memory.

A block function maps a block of anchors (and a range of their positives) to differentiable sums per anchor and
to counts. `row_sums` adds it up over all blocks. Nothing of a block outlives it: the backward pass, and the
backward of the backward, evaluate the block again and pull their cotangents through it. That is exact for
mined losses because a mining is piecewise constant: the block function picks its triplets under no_grad.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..._core.dtypes import full_precision
from ..._core.recording import recorded

#: Elements of the largest temporary of a block: a few MB on a CPU, enough work to fill a GPU elsewhere.
CPU_BUDGET, DEVICE_BUDGET = 2**18, 2**24


class Block(NamedTuple):
    """Anchors start ... stop - 1 and, of each, the positives number first ... last - 1."""

    start: int
    stop: int
    first: int
    last: int


class Spec(NamedTuple):
    """What is summed. The tensors of a call are: `rows`, `shared`, then constants a row, then shared constants."""

    fn: Callable
    settings: NamedTuple
    blocks: tuple[Block, ...]
    rows: int
    shared: int
    fixed_rows: int


def budget(device: torch.device, shared: int = 0) -> int:
    """Every block forms norms and gradients of all `shared` elements anew, so its temporaries are no less than an eighth of them."""
    return max(CPU_BUDGET if device.type == "cpu" else DEVICE_BUDGET, shared // 8)


def plan(n: int, positives: int, width: int, unit: int, limit: int) -> tuple[Block, ...]:
    """Blocks whose temporaries, `width` elements an anchor and `unit` elements a (anchor, positive), stay within `limit`."""
    step = min(positives, max(1, limit // max(unit, 1)))
    tall = max(1, limit // max(width, step * unit, 1))
    heights, ranges = range(0, max(n, 1), tall), range(0, max(positives, 1), step)
    return tuple(Block(i, min(i + tall, n), k, min(k + step, positives)) for i in heights for k in ranges)


def whole(n: int, positives: int, width: int, limit: int) -> tuple[Block, ...]:
    """Blocks of whole anchors, for functions that need all of an anchor's positives at once."""
    return tuple(Block(b.start, b.stop, 0, positives) for b in plan(n, 1, width + positives, 1, limit))


def row_sums(
    fn: Callable,
    settings: NamedTuple,
    blocks: tuple[Block, ...],
    rows: tuple[Tensor, ...],
    shared: tuple[Tensor, ...],
    fixed_rows: tuple[Tensor, ...],
    fixed: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """Sums [N, C], differentiable in `rows` [N, ...] and `shared` (any shapes), and int64 counts [N, K].

    fn(settings, block, rows, shared, fixed_rows, fixed) -> (sums [R, C], counts [R, K]) for one block.
    """
    spec = Spec(fn, settings, blocks, len(rows), len(shared), len(fixed_rows))
    return call(_RowSums, spec, *distinct(*rows, *shared, *fixed_rows, *fixed))


def distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, views in place of repeated ones: in batch both sides are one tensor, which Dynamo refuses to see twice."""
    out: list[Tensor | None] = []
    for t in tensors:
        out.append(t.view_as(t) if t is not None and any(t is other for other in out) else t)
    return out


def call(function: type[torch.autograd.Function], *args):
    """function.apply, or its forward where nothing is recorded: Dynamo cannot call a forward of variable arity there."""
    return (function.apply if recorded(*(t for t in args if isinstance(t, Tensor))) else function.forward)(*args)


def _evaluate(spec: Spec, block: Block, moving: tuple[Tensor, ...], constant: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """`moving` = rows (already cut to the block) and shared; `constant` = fixed_rows (whole) and fixed."""
    cut = tuple(t[block.start : block.stop] for t in constant[: spec.fixed_rows])
    return spec.fn(spec.settings, block, moving[: spec.rows], moving[spec.rows :], cut, constant[spec.fixed_rows :])


def _cut(spec: Spec, block: Block, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t[block.start : block.stop] if i < spec.rows else t for i, t in enumerate(tensors[: spec.rows + spec.shared]))


class _Total:
    """Adds the parts of successive blocks: pieces of rows, further positives of the same rows added, or whole tensors."""

    def __init__(self, by_row: bool):
        self.by_row, self.pieces, self.start = by_row, [], -1

    def add(self, block: Block, part: Tensor) -> None:
        if not self.pieces or (self.by_row and block.start != self.start):
            self.pieces.append(part.clone(memory_format=torch.contiguous_format))  # it may be a view of an input
        else:
            self.pieces[-1].add_(part)
        self.start = block.start

    def tensor(self) -> Tensor:
        return torch.cat(self.pieces) if self.by_row else self.pieces[0]


class _RowSums(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(spec, *tensors):
        constant = tensors[spec.rows + spec.shared :]
        totals = _Total(True), _Total(True)
        with full_precision(tensors[0]):
            for block in spec.blocks:
                for total, part in zip(totals, _evaluate(spec, block, _cut(spec, block, tensors), constant), strict=True):
                    total.add(block, part)
        return tuple(total.tensor() for total in totals)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.spec = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, _):
        tensors = ctx.saved_tensors
        grads = [None] * len(tensors)
        if grad is not None:
            moving = ctx.spec.rows + ctx.spec.shared
            wanted = tuple(i for i in range(moving) if ctx.needs_input_grad[1 + i])
            for i, g in zip(wanted, call(_RowGradients, ctx.spec, wanted, grad.contiguous(), *tensors), strict=True):
                grads[i] = g
        return None, *grads


def _pullback(spec: Spec, block: Block, wanted: tuple[int, ...], cut: tuple[Tensor, ...], constant: tuple[Tensor, ...]) -> Callable:
    """(grad [R, C], *the wanted of cut) -> the gradients of the wanted, as a function that can be differentiated itself."""

    def sums(*moving):
        full = list(cut)
        for i, t in zip(wanted, moving, strict=True):
            full[i] = t
        return _evaluate(spec, block, tuple(full), constant)[0]

    def pull(grad, *moving):
        return torch.func.vjp(sums, *moving)[1](grad)

    return pull


class _RowGradients(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(spec, wanted, grad, *tensors):
        constant = tensors[spec.rows + spec.shared :]
        totals = [_Total(i < spec.rows) for i in wanted]
        with full_precision(tensors[0]):
            for block in spec.blocks:
                cut = _cut(spec, block, tensors)
                parts = _pullback(spec, block, wanted, cut, constant)(grad[block.start : block.stop], *(cut[i] for i in wanted))
                for total, part in zip(totals, parts, strict=True):
                    total.add(block, part)
        return tuple(total.tensor() for total in totals)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.spec, ctx.wanted = inputs[:2]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx, *bars):
        spec, wanted = ctx.spec, ctx.wanted
        grad, *tensors = ctx.saved_tensors
        to_grad, to_wanted = second_order(spec, wanted, bars, grad, tuple(tensors))
        grads = [None] * len(tensors)
        for i, total in zip(wanted, to_wanted, strict=True):
            grads[i] = total
        return None, None, to_grad, *grads


def second_order(
    spec: Spec, wanted: tuple[int, ...], bars: tuple[Tensor, ...], grad: Tensor, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradients, in `grad` and in the `wanted` of `tensors`, of <bars, the gradients in the wanted> that grad [N, C] pulls back to."""
    constant = tensors[spec.rows + spec.shared :]
    totals = [_Total(True), *(_Total(i < spec.rows) for i in wanted)]
    with full_precision(tensors[0]):
        for block in spec.blocks:
            cut = _cut(spec, block, tensors)
            pull = _pullback(spec, block, wanted, cut, constant)
            bar = tuple(bars[k][block.start : block.stop] if i < spec.rows else bars[k] for k, i in enumerate(wanted))
            parts = torch.func.vjp(pull, grad[block.start : block.stop], *(cut[i] for i in wanted))[1](bar)
            for total, part in zip(totals, parts, strict=True):
                total.add(block, part)
    to_grad, *to_wanted = (total.tensor() for total in totals)
    return to_grad, tuple(to_wanted)
