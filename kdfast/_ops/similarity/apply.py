"""The streaming softmax of a checked problem: through its Function where something may be differentiated, else past it."""

import torch
from torch import Tensor
from torch.autograd import Function

from ..._core.recording import recorded
from .arguments import Spec, Tensors
from .autograd import Recalled, Similarity
from .passes import run_forward


class PlainFunction(Function):
    """A Function whose `run` is `apply` but for what transforms need, 1.5 us: for calls known to be outside them."""

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        cls.run = super(Function, cls).apply


def transformed() -> bool:
    """Whether code is being compiled, or runs under vmap or another transform of torch.func."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def through_function(tensors: tuple) -> bool:
    """Whether a call needs its Function: something may be differentiated, or runs under a transform. (Dynamo cannot trace it otherwise.)"""
    return recorded(*tensors) or torch._C._are_functorch_transforms_active()


def streaming_softmax(
    spec: Spec, folded: Tensors, *, pool: bool, need_pooled: bool, left: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """lse [B, N], pooled [B, N, Dv] (empty unless asked for, or needed for a gradient) and lse_low [B, N], what lse rounded off.

    `pool`: pooled is differentiable too. `left`: these outputs where an earlier pass has left them, outside transforms.
    """
    grad = recorded(*folded)
    if left is not None:
        return Recalled.apply(spec.impl, spec.compute, pool and grad, need_pooled or grad, *folded, left)
    if through_function(folded):
        return Similarity.apply(spec.impl, spec.compute, pool and grad, need_pooled or grad, *folded)
    return run_forward(spec.impl, spec.compute, need_pooled, *folded)
