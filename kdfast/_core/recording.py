"""Whether a gradient may be asked for, seen through torch.func's transforms."""

import torch
from torch import Tensor


def recorded(*tensors: Tensor | None) -> bool:
    """Whether derivatives in any of `tensors` are recorded. Inside vmap a tensor does not say that it needs a gradient outside."""
    return torch.is_grad_enabled() and any(x is not None and _needs_grad(x) for x in tensors)


def _needs_grad(x: Tensor) -> bool:
    if x.requires_grad or torch.compiler.is_compiling():
        return x.requires_grad
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(x) and _needs_grad(functorch.get_unwrapped(x))
