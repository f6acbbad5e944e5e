"""What a definition in PyTorch's operations lends: the second derivative to a fused loss, its derivatives to values found otherwise."""

import torch
from torch import Tensor
from torch.autograd import Function


def with_values(losses: Tensor, values: Tensor) -> Tensor:
    """`values`, which have no derivatives, with those of `losses`, which they differ from by rounding."""
    rounded_off = values - losses.detach()
    return losses + torch.where(torch.isfinite(rounded_off), rounded_off, 0.0)


class SecondOrder(Function):
    """Gradients of <cotangents, first-order gradients> in (g, *inputs), the first-order ones being those of <g, definition(*inputs)>.

    `want`: which of the inputs have a first-order gradient. Tensors: a cotangent of each input (None: zero), g, and the inputs.
    """

    @staticmethod
    def forward(ctx, definition, want, *tensors):
        cotangents, g, inputs = tensors[: len(want)], tensors[len(want)], tensors[len(want) + 1 :]
        inputs = [None if x is None else x.detach() for x in inputs]
        at = [i for i, wanted in enumerate(want) if wanted]
        leaves = [g.detach().requires_grad_(), *(inputs[i].requires_grad_() for i in at)]
        with torch.enable_grad():
            first = torch.autograd.grad(definition(*inputs), leaves[1:], leaves[0], create_graph=True)
        along = [(x, cotangents[i]) for x, i in zip(first, at, strict=True) if cotangents[i] is not None]
        dg, *found = torch.autograd.grad([x for x, _ in along], leaves, [u for _, u in along], allow_unused=True)
        second = dict(zip(at, found, strict=True))
        return dg, *(second.get(i) for i in range(len(want)))

    @staticmethod
    def backward(ctx, *cotangents):
        _refuse_a_third()


class Last(Function):
    """A second derivative that is found otherwise: function(*args)."""

    @staticmethod
    def forward(ctx, function, *args):
        return function(*args)

    @staticmethod
    def backward(ctx, *cotangents):
        _refuse_a_third()


def differentiated_last(function, *args):
    """function(*args), a second derivative, as a Function where a third could be asked for."""
    return Last.apply(function, *args) if torch.is_grad_enabled() else function(*args)


def _refuse_a_third():
    raise RuntimeError("this loss has first and second derivatives only; a third was asked for")
