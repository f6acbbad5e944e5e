"""Triplet mining, metric-learning losses and relations, streamed: never N x M, never N^3."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..._core import dtypes, impls
from . import cpu, distances, extrema, inputs, relations_cpu, triton
from .triton import relations as relations_triton

__all__ = ["Extreme", "RowExtrema", "row_extrema"]

OPS = (
    "row_extrema",
    "triplet_loss",
    "mine_triplets",
    "multi_similarity_loss",
    "margin_loss",
    "contrastive_loss",
    "angular_loss",
)
_CPU, _TRITON = (impls.Implementation(name, m.missing, m.refuses) for name, m in (("cpu", cpu), ("triton", triton)))
for _op in OPS:
    impls.register(_op, _CPU, _TRITON)
_CPU, _TRITON = (impls.Implementation(name, m.missing, m.refuses) for name, m in (("cpu", relations_cpu), ("triton", relations_triton)))
for _op in ("mmd_rbf", "rkd_distance", "rkd_angle"):
    impls.register(_op, _CPU, _TRITON)


def choose(op: str, impl: str | None, x: Tensor, **facts) -> str:
    return impls.choose(op, impl, device_type=x.device.type, dtype=x.dtype, **facts)


class Extreme(NamedTuple):
    value: Tensor  # [N]
    index: Tensor  # [N] int64


class RowExtrema(NamedTuple):
    hardest_positive: Extreme
    easiest_positive: Extreme
    hardest_negative: Extreme
    easiest_negative: Extreme


def row_extrema(
    x: Tensor,
    y: Tensor,
    labels_x: Tensor,
    labels_y: Tensor,
    *,
    own_index: "Tensor | bool | None" = None,
    valid: "int | Tensor | None" = None,
    metric: str = "euclidean",
    normalize: bool = False,
    impl: str | None = None,
) -> RowExtrema:
    """Hardest and easiest positive and negative of each row of `x` among the rows of `y`, in one streaming pass.

    x [N, D], y [M, D] of one floating dtype; labels_x [N], labels_y [M] of any integer dtype: y_j is a positive of x_i
    where the labels agree, else a negative. `own_index`: True (row i's own column is i) or [N] (-1: none) is
    excluded first; `valid`: only the first `valid` rows of y exist. metric "euclidean" (default), "sqeuclidean", "cosine" (1 - cos);
    `normalize` brings rows to unit length first.

    Returns RowExtrema(hardest_positive, easiest_positive, hardest_negative, easiest_negative), each a pair (value [N], index [N]):
    hardest is the farthest positive and the nearest negative. The value is the exact distance of the chosen row,
    differentiable in x and y; ties go to the lower index. Where there is none, index is -1 and the value +inf for a
    nearest and -inf for a farthest. A row with a NaN distance gets it and its index.

    ValueError / TypeError / IndexError for wrong shapes, dtypes, devices, metric or impl, an own_index out of range, a y of 0 rows.
    """
    if y is None:
        raise TypeError("y must be a Tensor, got NoneType")
    b = inputs.collect(
        x,
        labels_x,
        ref=y,
        ref_labels=labels_y,
        own_index=own_index,
        ref_valid=valid,
        metric=metric,
        normalize=normalize,
        ready=False,
        names=inputs.Names("x", "labels_x", "y", "labels_y", "valid"),
    )
    in_batch, (x,), (y,) = x is y, b.layers, b.refs
    impl = choose("row_extrema", impl, x, others=(y.dtype,), width=x.shape[1])
    with dtypes.full_precision(x):
        if impl == "cpu":
            columns, _ = cpu.extremes(x, y, b.anchors, b.classes, metric, normalize, farthest_negative=True)
        else:
            columns = _scanned(b.ready(metric, normalize), metric, triton.scan if impl == "triton" else extrema.scan)
        if y.requires_grad:  # a row chosen often adds up gradients: they are rounded once they are added
            wide = dtypes.accumulator(x.dtype)
            x, y = x.to(wide), y.to(wide)
            y = x if in_batch else y
        x = distances.prepare(x, metric, normalize)
        return RowExtrema(*(_exact(x, y, columns[kind], metric, normalize, farthest) for kind, (_, farthest) in extrema.KINDS.items()))


@torch.no_grad()
def _scanned(b: inputs.Batch, metric: str, scan) -> dict[str, Tensor]:
    """Column [N] of each of extrema.KINDS (-1: none)."""
    rows = distances.centred(b.layers[0], b.refs[0], metric)
    found = scan(*rows, b.anchors, b.classes, metric, tuple(extrema.KINDS))
    return {kind: e.index for kind, e in zip(extrema.KINDS, found, strict=True)}


def _exact(x: Tensor, y: Tensor, index: Tensor, metric: str, normalize: bool, farthest: bool) -> Extreme:
    value = distances.between(x, distances.prepare(distances.gather(y, index.clamp_min(0)), metric, normalize), metric)
    return Extreme(torch.where(index >= 0, value, torch.full_like(value, -torch.inf if farthest else torch.inf)), index)
