"""A scalar loss whose kernel returns its value and its gradients from one pass; further derivatives are those of the definition."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function


class Fused(NamedTuple):
    #: (wanted, *tensors, *settings) -> (value, *gradients of those wanted, each in its tensor's shape, float32)
    kernel: Callable[..., tuple[Tensor, ...]]
    #: (*tensors, *settings) -> value: the same in PyTorch's operations, differentiable
    definition: Callable[..., Tensor]


def loss(fused: Fused, settings: tuple, *tensors: Tensor) -> Tensor:
    """The value, 0-d float32, with gradients for those of `tensors` that need them."""
    if torch._C._are_functorch_transforms_active():  # the Functions below do not nest: no torch.func.grad of torch.func.grad
        return fused.definition(*tensors, *settings)
    wanted = tuple(torch.is_grad_enabled() and t.requires_grad for t in tensors)
    if not any(wanted):  # Dynamo cannot trace the Function there
        return fused.kernel(wanted, *tensors, *settings)[0]
    return _Value.apply(fused, settings, wanted, *tensors)[0]


class _Value(Function):
    @staticmethod
    def forward(fused, settings, wanted, *tensors):
        return tuple(fused.kernel(wanted, *tensors, *settings))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.fused, ctx.settings, ctx.wanted, *tensors = inputs
        _, *gradients = output
        ctx.mark_non_differentiable(*gradients)
        ctx.save_for_backward(*gradients, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, g, *_):
        if g is None:
            return (None,) * (3 + len(ctx.wanted))
        count = sum(ctx.wanted)
        run = _Gradients.apply if torch.is_grad_enabled() else _Gradients.forward
        found = iter(run(ctx.fused, ctx.settings, ctx.wanted, g, *ctx.saved_tensors[:count], *ctx.saved_tensors[count:]))
        return None, None, None, *(next(found) if wanted else None for wanted in ctx.wanted)


class _Gradients(Function):
    """The upstream gradient times the gradients found, in the tensors' dtypes; its derivative is the definition's."""

    @staticmethod
    def forward(fused, settings, wanted, g, *rest):
        count = sum(wanted)
        likes = (t for t, w in zip(rest[count:], wanted, strict=True) if w)
        return tuple((g * gradient).to(like.dtype) for gradient, like in zip(rest[:count], likes, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.fused, ctx.settings, ctx.wanted, g, *rest = inputs
        ctx.save_for_backward(g, *rest[sum(ctx.wanted) :])

    @staticmethod
    def backward(ctx, *cotangents):
        g, *tensors = ctx.saved_tensors
        at = [i for i, wanted in enumerate(ctx.wanted) if wanted]

        def value(*moving):
            full = list(tensors)
            for i, t in zip(at, moving, strict=True):
                full[i] = t
            return ctx.fused.definition(*full, *ctx.settings)

        def gradients(g, *moving):
            return torch.func.vjp(value, *moving)[1](g)

        dg, *found = torch.func.vjp(gradients, g, *(tensors[i] for i in at))[1](cotangents)
        second = dict(zip(at, found, strict=True))
        return None, None, None, dg, *(None,) * len(at), *(second.get(i) for i in range(len(tensors)))
