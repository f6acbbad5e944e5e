"""From losses per row to the value returned."""

import torch
from torch import Tensor

from . import checks

NAMES = ("mean", "sum", "none")


def row_weights(weight: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """`weight`, after its checks, for losses of this shape, dtype and device; it has no gradient."""
    if weight is None:
        return None
    checks.real("weight", weight, shape=tuple(shape), device=device)
    return weight.detach().to(dtype)


def reduce_rows(losses: Tensor, *, counted: Tensor | None = None, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Reduce `losses` [*B, N]: "mean" = sum w l / sum w over counted rows, "sum", "none" (w l, 0 where not counted).

    `counted` [*B, N] bool: rows that count (default all). Rows that do not contribute exactly 0, whatever they
    hold; nothing counted, as in an empty batch, gives exactly 0 with a graph. `weight` [*B, N] >= 0, no gradient.
    """
    checks.choice("reduction", reduction, NAMES)
    if counted is not None:
        losses = torch.where(counted, losses, torch.zeros_like(losses))
    if weight is not None:
        weight = row_weights(weight, losses.shape, losses.dtype, losses.device)
        losses = losses * weight
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if weight is None and counted is None:
        return losses.mean() if losses.numel() else losses.sum()
    total = torch.ones_like(losses) if weight is None else weight
    total = (total if counted is None else torch.where(counted, total, torch.zeros_like(total))).sum()
    return losses.sum() / torch.where(total > 0, total, torch.ones_like(total))
