"""impl="triton" of losses over all pairs of two sides: launches slab by slab, registration in torch.ops.kdfast_triton."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...._core import triton_runtime as runtime
from . import slabs
from .formats import missing, refuses

__all__ = ["missing", "refuses"]

LN2 = math.log(2)


class Sides(NamedTuple):
    """Gradients, grown slab by slab: what is not wanted is None."""

    x: Tensor | None  # [B, N, D]
    y: Tensor | None  # [B, M, D]
    slope: Tensor  # [B, N], sums of the rows' weights
    moment: Tensor  # [B, N], and of them times the scores

    @property
    def products(self) -> bool:
        return self.x is not None or self.y is not None

    def add(self, slab: slabs.Slab, part: slabs.Part, weights: Tensor, slope: Tensor, moment: Tensor, times: int) -> None:
        for total, more in ((self.slope, slope), (self.moment, moment)):
            slab.of_rows(total)[0].add_(more.sum(0), alpha=times)
        if self.x is not None:
            slabs.add_products(weights, part.y, *slab.of_rows(self.x), part, transposed=False)
        if self.y is not None:
            slabs.add_products(weights, part.x, *slab.of_columns(self.y), part, transposed=True)

    def found(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return tuple(self.slope.new_empty(0) if x is None else x for x in self)


def no_sums(x: Tensor, y: Tensor, want_x: bool, want_y: bool) -> Sides:
    sides = (torch.zeros_like(t, dtype=torch.float32) if want else None for t, want in ((x, want_x), (y, want_y)))
    slope = x.new_zeros(x.shape[:2], dtype=torch.float32)
    return Sides(*sides, slope, slope.clone())


def symmetric_lse(
    x: Tensor, y: Tensor, scale: Tensor, x_labels: Tensor | None, y_labels: Tensor | None, precision: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row_lse [B, N], column_lse [B, M] and what both rounded off, of x [B, N, D], y [B, M, D], scale [B, N] and labels [B, N], [B, M]."""
    rows, columns = slabs.nothing_yet(x), slabs.nothing_yet(y)
    for slab, part in slabs.parts(x, y, precision, slabs.STATISTICS_PAIRS):
        of_rows, of_columns = _statistics(slab, part, scale, (x_labels, y_labels), None, half=False)
        rows.add((slab.entries, slab.rows), *of_rows)
        columns.add((slab.entries, slab.columns), *of_columns)
    return rows.lse, columns.lse, rows.low, columns.low


def row_lse(x: Tensor, scale: Tensor, labels: Tensor, precision: int) -> tuple[Tensor, Tensor]:
    """row_lse [1, N] of x [1, N, D] against itself, and what it rounded off: the columns' is the same. All of a scale are one number."""
    rows = slabs.nothing_yet(x)
    for at, found in _half(x, scale, (labels, labels), None, precision):
        rows.add(at, *found)
    return rows.lse, rows.low


def _half(x, scale, labels, classes, precision) -> Iterator[tuple[tuple[slice, slice], list[Tensor]]]:
    """Entries and rows of x [1, N, D], and statistics of them against others of its rows: every two rows meet once."""
    for slab, part in slabs.parts(x, x, precision, slabs.HALF_PAIRS, narrow=classes is not None, half=True):
        sides = _statistics(slab, part, scale, labels, classes, half=True)
        yield from zip(((slab.entries, slab.rows), (slab.entries, slab.columns)), sides, strict=True)


def _statistics(slab, part, scale, labels, classes, *, half: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Of rows and of columns: largest logits and sums of exponentials; with `classes` also sums of a row's class, and numbers."""
    from .pairs_kernels import symmetric_statistics

    given = (*slab.of_rows(labels[0]), *slab.of_columns(labels[1]), classes)
    sides = [[new() for _ in range(2 if classes is None else 4)] for new in (part.of_rows, part.of_columns)]
    symmetric_statistics[part.programs](
        part.x, part.y, *slab.of_rows(scale), *(scale if x is None else x for x in given),
        *(x for side in sides for x in (side if len(side) == 4 else side + side)),
        *part.sizes, slab.rows.start, slab.columns.start, LABELLED=labels[0] is not None, CLASSES=classes is not None, HALF=half,
        **part.options,
    )  # fmt: skip
    return sides


def symmetric_gradients(
    row_g: Tensor,
    column_g: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    row_low: Tensor,
    column_low: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_labels: Tensor | None,
    y_labels: Tensor | None,
    want_x: bool,
    want_y: bool,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy (empty where not wanted) and dscale [B, N] in float32 of sum row_g row_lse + sum column_g column_lse."""
    row_side, column_side = (row_g, row_lse, row_low), (column_g, column_lse, column_low)
    dx, dy, _, dscale = pair_gradients(x, y, scale, x_labels, y_labels, None, None, row_side, column_side, want_x, want_y, precision)
    return dx, dy, dscale


def pair_gradients(
    x, y, scale, x_labels, y_labels, classes, share, row_side, column_side, want_x, want_y, precision, *, half: bool = False
) -> tuple[Tensor, ...]:
    """Sides.found; each side is (g, lse, low). `half`: x [1, N, D] is y and both sides are one, so that the weights of a slab are those of
    the one across the diagonal: x alone is wanted, and of slope and moment no more stands than their sums over all rows."""
    from .pairs_kernels import symmetric_weights

    sums = no_sums(x, y, want_x, want_y)
    narrow = classes is not None or runtime.architecture(x.device.index or 0).blackwell
    for slab, part in slabs.parts(x, y, precision, slabs.WEIGHTS_PAIRS, narrow=narrow, half=half):
        weights, slope, moment = part.weights() if sums.products else scale, part.of_rows(), part.of_rows()
        given = (*slab.of_rows(x_labels), *slab.of_columns(y_labels), classes, *slab.of_rows(share))
        symmetric_weights[part.programs](
            part.x, part.y, *slab.of_rows(scale), *(scale if x is None else x for x in given),
            *slab.of_rows(*row_side), *slab.of_columns(*column_side), weights, slope, moment,
            *part.sizes, slab.rows.start, slab.columns.start, *part.leading, LABELLED=x_labels is not None, CLASSES=classes is not None,
            WANTED=sums.products, **part.options,
        )  # fmt: skip
        across = half and not slab.on_diagonal
        (sums._replace(y=sums.x) if across else sums).add(slab, part, weights, slope, moment, 2 if across else 1)
    return sums.found()


def sigmoid_losses(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, positive: Tensor, precision: int) -> Tensor:
    """Losses [B, N] of x [B, N, D], y [B, M, D], scale, shift and positive [B, N]."""
    losses = torch.zeros_like(scale)
    for slab, part in slabs.parts(x, y, precision, slabs.STATISTICS_PAIRS):
        of_rows = part.of_rows()
        _sigmoid(slab, part, scale, shift, positive, None, of_rows, scale, scale, scale, wanted=False)
        slab.of_rows(losses)[0].add_(of_rows.sum(0))
    return losses


def _sigmoid(slab, part, scale, shift, positive, g, loss, weights, slope, moment, *, wanted: bool) -> None:
    from .pairs_kernels import sigmoid_pairs

    sigmoid_pairs[part.programs](
        part.x, part.y, *slab.of_rows(scale, shift, positive, scale if g is None else g), loss, weights, slope, moment,
        *part.sizes, slab.columns.start, *part.leading, GRADIENT=g is not None, WANTED=wanted, **part.options,
    )  # fmt: skip


def sigmoid_gradients(
    g: Tensor, x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, positive: Tensor, want_x: bool, want_y: bool, precision: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dy (empty where not wanted), dshift and dscale [B, N] in float32 of the losses' sum weighted by g [B, N]."""
    sums = no_sums(x, y, want_x, want_y)
    for slab, part in slabs.parts(x, y, precision, slabs.WEIGHTS_PAIRS):
        weights, slope, moment = part.weights() if sums.products else scale, part.of_rows(), part.of_rows()
        _sigmoid(slab, part, scale, shift, positive, g, slope, weights, slope, moment, wanted=sums.products)
        sums.add(slab, part, weights, slope, moment, 1)
    return sums.found()


def sup_con(x: Tensor, scale: Tensor, labels: Tensor, mean: bool, precision: int) -> tuple[Tensor, Tensor]:
    """Losses [N] or their mean, and [3, N]: lse, its low digits, 1 / others of the class (0: none), of x [N, D], scale [], labels [N]."""
    x, of_rows = x[None], scale.expand(1, len(x)).contiguous()
    rows, same, others = slabs.nothing_yet(x), torch.zeros_like(of_rows), torch.zeros_like(of_rows)
    for at, (*tops, differences, number) in _half(x, of_rows, (None, None), classes_of(labels), precision):
        rows.add(at, *tops, classes=(differences, number, same, others))
    inverse = torch.where(others > 0, 1 / others, 0.0)
    # both relative to the largest logit: lse less a mean logit would round as the logits do
    losses = torch.where(others > 0, rows.total.log() - LN2 * same * inverse, 0.0)[0]
    if mean:
        losses = losses.sum() / (others > 0).sum().clamp(min=1)
    return losses, torch.cat((rows.lse, rows.low, inverse))


def classes_of(labels: Tensor) -> Tensor:
    """A class by the place of its first label in order: 32 bits, for a tile's columns are in registers."""
    return torch.searchsorted(labels.sort().values, labels).to(torch.int32)


def sup_con_grad(
    g: Tensor, statistics: Tensor, x: Tensor, scale: Tensor, labels: Tensor, want_x: bool, want_scale: bool, precision: int
) -> tuple[Tensor, Tensor]:
    """The gradients in x and scale, [0] where not wanted; g is [N], or [] of the mean."""
    lse, low, share = statistics[:, None].unbind()
    counted = share > 0
    g = torch.where(counted, g / counted.sum().clamp(min=1) if g.dim() == 0 else g, 0.0)
    side, sides, of_rows = (g, lse, low), x[None], scale.expand(1, len(x)).contiguous()
    dx, _, _, moment = pair_gradients(
        sides, sides, of_rows, None, None, classes_of(labels), share, side, side, want_x, False, precision, half=True
    )
    of_scale = moment.sum() / 2  # a pair's weight is that of both of its rows
    return dx[0].to(x.dtype) if want_x else scale.new_empty(0), of_scale if want_scale else scale.new_empty(0)


# ---- shapes for the compiler --------------------------------------------------------------------------------------------------


def _symmetric_lse_fake(x, y, *_):
    sides = [t.new_empty(t.shape[:2], dtype=torch.float32) for t in (x, y)]
    return *sides, *map(torch.empty_like, sides)


def _sides_fake(x, y, scale, want_x, want_y):
    return *(scale.new_empty(t.shape if want else (0,)) for t, want in ((x, want_x), (y, want_y))), torch.empty_like(scale)


def _symmetric_gradients_fake(row_g, column_g, row_lse, column_lse, row_low, column_low, x, y, scale, _x, _y, want_x, want_y, _):
    return _sides_fake(x, y, scale, want_x, want_y)


def _sigmoid_gradients_fake(g, x, y, scale, shift, positive, want_x, want_y, _):
    return *_sides_fake(x, y, scale, want_x, want_y), torch.empty_like(scale)


def _sup_con_fake(x, scale, labels, mean, _):
    return scale.new_empty(() if mean else x.shape[:1]), scale.new_empty((3, len(x)))


def _sup_con_grad_fake(g, statistics, x, scale, labels, want_x, want_scale, _):
    return torch.empty_like(x) if want_x else scale.new_empty(0), scale.new_empty(() if want_scale else 0)


for _name, _function, _fake in (
    ("symmetric_lse", symmetric_lse, _symmetric_lse_fake),
    ("symmetric_gradients", symmetric_gradients, _symmetric_gradients_fake),
    ("sigmoid_pairs", sigmoid_losses, lambda x, y, scale, *_: torch.empty_like(scale)),
    ("sigmoid_gradients", sigmoid_gradients, _sigmoid_gradients_fake),
    ("sup_con", sup_con, _sup_con_fake),
    ("sup_con_grad", sup_con_grad, _sup_con_grad_fake),
):
    runtime.register(_name, _function, _fake)
runtime.register_vmap("sup_con", runtime.one_by_one)
