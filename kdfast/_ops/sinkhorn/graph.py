"""What the differentiable pieces share: when a graph is made at all, signatures at hand, and gradients that refuse to be used."""

import functools
import inspect
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from kdfast._core import checks

_ONCE = "of this family only `value` with grad='envelope' can be differentiated twice"


def followed(*tensors: Tensor | None) -> bool:
    """Whether gradients may be asked of any of `tensors`. Inside a torch.func transform, whose wrappers do not say, yes."""
    if not torch.is_grad_enabled():
        return False
    present = [t for t in tensors if t is not None]
    return any(t.requires_grad for t in present) or not (torch.compiler.is_compiling() or all(map(checks.readable, present)))


def applied(function: type[Function], *arguments):
    """function.apply(*arguments), or its forward alone where nobody can ask for gradients: apply takes 50 microseconds to look around."""
    follows = followed(*(t for t in arguments if isinstance(t, Tensor)))
    return function.apply(*arguments) if follows else function.forward(*arguments)


class _Given(NamedTuple):
    """Bound arguments that are all there."""

    args: tuple
    kwargs: dict

    def apply_defaults(self) -> None:
        pass


class _Positional(inspect.Signature):
    """A signature to which arguments are bound in their order, every one given."""

    def bind(self, *args, **named):
        return super().bind(*args, **named) if named or len(args) != len(self.parameters) else _Given(args, {})


def signed(function: type[Function]) -> type[Function]:
    """`function` with the signature of its forward at hand, which apply otherwise works out, and binds by name, at every call."""
    known = inspect.signature(function.forward)
    function.forward.__signature__ = _Positional(tuple(known.parameters.values()), return_annotation=known.return_annotation)
    return function


def once(backward):
    """A `backward` whose gradients cannot be differentiated: with create_graph, doing so raises RuntimeError.

    Not autograd's once_differentiable, which raises on the way to the upstream gradients alone: the way to the saved
    tensors would be missing from second derivatives without a word.
    """

    @functools.wraps(backward)
    def first_order(ctx, *upstream):
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        sources = (*upstream, *ctx.saved_tensors)
        kept = tuple(t for t in gradients if t is not None)
        refused = iter(refuse(kept, (_ONCE,) * len(kept), sources))
        return tuple(None if t is None else next(refused) for t in gradients)

    return first_order


def given(gradient: Tensor, source: Tensor | None) -> Tensor | None:
    """`gradient`, None where there is no `source` of it."""
    return None if source is None else gradient


@signed
class Refusal(Function):
    """The values of tensors whose use in a graph is an error, told by a message for each."""

    generate_vmap_rule = True

    @staticmethod
    def forward(messages, *values_and_sources):
        return tuple(values.clone() for values in values_and_sources[: len(messages)])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.messages = inputs[0]

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(next(message for message, gradient in zip(ctx.messages, gradients, strict=True) if gradient is not None))


def refuse(values: tuple[Tensor, ...], messages: tuple[str, ...], sources: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """`values` without gradient; backward through one raises RuntimeError(its message). (Compiled code cannot raise: a constant.)"""
    values = tuple(v.detach() for v in values)
    sources = tuple(s for s in sources if s is not None)
    if torch.compiler.is_compiling() or not followed(*sources):
        return values
    return Refusal.apply(messages, *values, *sources)
