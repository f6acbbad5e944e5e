"""A loss under torch.func.vmap as that of several batches: the mapped dimension becomes their first, and no operation in between is mapped.

By the functions that PyTorch's own rules are made of: an autograd.Function with a rule takes longer than a small loss.
"""

import torch
from torch import Tensor

from .._core.reduction import NAMES as REDUCTIONS


def over_mapped(losses, reduction: str, query: Tensor, positive: Tensor, bank: Tensor | None, temperature: float | Tensor) -> Tensor | None:
    """losses(query, positive, bank, temperature), of rows, [*B, N] all of which count, reduced. None where the innermost transform
    maps none of the tensors, or the temperature.

    query and positive: [*B, N, D]. bank: [M, D], and then there is no *B, or None. temperature: a number or 0-d.
    """
    tensors = [query, positive] if bank is None else [query, positive, bank]
    if torch.compiler.is_compiling() or reduction not in REDUCTIONS or not all(isinstance(x, Tensor) for x in tensors):
        return None
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        return None
    if query.shape != positive.shape or query.dim() < 2 or query.numel() == 0 or (bank is not None and not query.dim() == bank.dim() == 2):
        return None
    functorch = torch._C._functorch
    innermost = torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter()
    if innermost.key() != functorch.TransformType.Vmap:
        return None
    level = innermost.level()
    inner = [functorch._unwrap_batched(x, level) for x in tensors]
    each_its_own = isinstance(temperature, Tensor) and functorch._unwrap_batched(temperature, level)[1] is not None
    if each_its_own or all(dim is None for _, dim in inner):
        return None
    with innermost.lower():
        size = next(x.shape[dim] for x, dim in inner if dim is not None)
        rows = [x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in inner[:2]]
        of_bank = [x if dim is None else x.movedim(dim, 0) for x, dim in inner[2:]]
        found = losses(*rows, *of_bank, temperature=temperature)
        found = found if reduction == "none" else getattr(found.flatten(1), reduction)(-1)
    return functorch._add_batch_dim(found, 0, level)
