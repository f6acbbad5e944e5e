"""Autograd of the streaming softmax: the op, its first-order gradients and its second-order ones, a Function each.

Two modes. "lse": only lse is differentiable; pooled (over the keys, without the start's value) is the by-product that its
gradient needs, so the first backward never reads a bank that wants no gradient. "pool": both outputs are differentiable.
Every tensor argument has a leading batch dimension B, into which vmap folds. README.md derives the formulas.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from .first_order import first_order
from .passes import run_forward
from .second_order import Tangent, second_order_of_lse
from .second_order_pooled import Wanted, second_order_of_pooled


def _keep(ctx, rows: tuple, bank: tuple, hold: bool) -> None:
    """Save `rows`; the bank's side too, or, with `hold`, as plain references that in-place updates may outrun."""
    ctx.bank = bank if hold else None
    ctx.save_for_backward(*rows, *(() if hold else bank))


def _kept(ctx, rows: int) -> tuple[tuple, tuple]:
    saved = ctx.saved_tensors
    return saved[:rows], saved[rows:] if ctx.bank is None else ctx.bank


def _as_function() -> bool:
    """Whether what a backward does must be a Function: it may be differentiated again, or is under torch.func.vmap."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def _versions(tensors: tuple) -> tuple[int, ...]:
    return tuple([t._version for t in tensors if t is not None and not t.is_inference()])


def _unchanged(bank: tuple, versions: tuple[int, ...] | None, name: str) -> None:
    """Raises where a bank held by reference (versions: not None) is no longer what the forward of `name` saw."""
    if versions is not None and _versions(bank) != versions:
        raise RuntimeError(
            f"double backward through {name} needs the bank as the forward saw it, but it was updated in place since; "
            "push to the bank after the last backward, or give the loss a clone of it"
        )


def _like(grad: Tensor, x: Tensor | None) -> Tensor:
    """A gradient in the shape and dtype of `x`, which the batch may have shared; None: as it is."""
    if x is None:
        return grad
    if grad.shape != x.shape:
        grad = grad.view(x.shape) if grad.numel() == x.numel() else grad.sum(0)
    return grad if grad.dtype == x.dtype else grad.to(x.dtype)


class Similarity(Function):
    """(lse [B, N], pooled [B, N, Dv], lse_low [B, N]); pooled is differentiable only where `pool` is set, lse_low never."""

    @staticmethod
    def forward(impl, compute, pool, need_pooled, *tensors):
        return run_forward(impl, compute, need_pooled, *tensors)  # named in setup_context; here PyTorch binds each name anew every call

    @staticmethod
    def setup_context(ctx, inputs, output):
        impl, compute, pool, _, query, keys, scale, bias, start_logit, values, start_value, *rules = inputs
        lse, pooled, lse_low = output
        ctx.mark_non_differentiable(lse_low, *(() if pool else (pooled,)))
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.compute, ctx.pool = impl, compute, pool
        rows, bank = (query, scale, start_logit, start_value, lse, lse_low, pooled), (keys, bias, values, *rules)
        needs = ctx.needs_input_grad
        ctx.want = (needs[4], needs[6], needs[5], needs[7], needs[9])
        hold = not pool and not any(ctx.want[2:])
        ctx.versions = None
        if hold and torch.compiler.is_compiling():
            bank = (None,) * len(bank)  # compiled code has no double backward, and the first one does not read them
        elif hold:
            ctx.versions = _versions(bank)
        _keep(ctx, rows, bank, hold)

    @staticmethod
    def backward(ctx, g, h, _):
        if g is None and h is None:
            return (None,) * 16
        (query, scale, start_logit, start_value, lse, lse_low, pooled), (keys, bias, values, *rules) = _kept(ctx, 7)
        from_lse = g is not None
        g = g.contiguous() if from_lse else torch.zeros_like(lse)
        h = h.contiguous() if ctx.pool and h is not None else None
        *want, want_values = ctx.want
        run = Gradients.apply if _as_function() and not torch.compiler.is_compiling() else Gradients.forward
        dquery, dkeys, dscale, dbias, dstart_logit, dvalues, dstart_value = run(
            ctx.impl, ctx.compute, (*want, want_values and h is not None, from_lse), ctx.versions,
            g, h, query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, pooled, *rules,
        )  # fmt: skip
        return (None, None, None, None, dquery, dkeys, dscale, dbias, dstart_logit, dvalues, dstart_value, *(None,) * 5)

    @staticmethod
    def vmap(info, in_dims, *args):
        bank_side = (5, 7, 9, 12, 15)
        if all(in_dims[i] is None for i in bank_side):  # one pass over the bank serves every element of the batch
            return _fold_rows(Similarity.apply, info.batch_size, in_dims, args, bank_side)
        return fold_batch(Similarity.apply, info.batch_size, in_dims, args)


class Recalled(Function):
    """`Similarity` of outputs that a forward pass has left, which come last: all there is to do is differentiate. Outside transforms."""

    @staticmethod
    def forward(ctx, *inputs):
        output = tuple([x.detach() for x in inputs[-1]])
        Similarity.setup_context(ctx, inputs[:-1], output)
        return output

    @staticmethod
    def backward(ctx, *cotangents):
        return *Similarity.backward(ctx, *cotangents), None


class Gradients(Function):
    """The first-order gradients (dquery, dkeys, dscale, dbias, dstart_logit, dvalues, dstart_value), None where not wanted.

    lse and pooled come in as constants: the second derivative accounts for them in closed form.
    """

    @staticmethod
    def forward(impl, compute, want, versions, *tensors):
        return first_order(impl, compute, want, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        impl, compute, _, versions, g, h, query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, pooled, *rules = inputs
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.compute, ctx.versions = impl, compute, versions
        rows, bank = (g, h, query, scale, start_logit, start_value, lse, lse_low, pooled), (keys, bias, values, *rules)
        _keep(ctx, rows, bank, versions is not None)

    @staticmethod
    def backward(ctx, *cotangents):
        (g, h, query, scale, start_logit, start_value, lse, lse_low, pooled), bank = _kept(ctx, 9)
        _unchanged(bank, ctx.versions, "similarity_softmax")
        keys, bias, values, *rules = bank
        needs = ctx.needs_input_grad
        run = SecondOrder.apply if _as_function() else SecondOrder.forward
        grads = run(
            ctx.impl, ctx.compute, Wanted(needs[5], needs[7], needs[8], needs[9], needs[11]), *cotangents,
            g, h, query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, pooled, *rules,
        )  # fmt: skip
        return (*(None,) * 4, *grads, *(None,) * 8)

    @staticmethod
    def vmap(info, in_dims, *args):
        return fold_batch(Gradients.apply, info.batch_size, in_dims, args)


class SecondOrder(Function):
    """Gradients of <cotangents, first-order gradients> in (g, h, query, keys, scale, bias, start_logit, values, start_value)."""

    @staticmethod
    def forward(
        impl, compute, want, u, kappa, sigma, beta, omega, nu, nu_start,
        g, h, query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, pooled, *rules,
    ):  # fmt: skip
        tangent = Tangent(u, kappa, sigma, beta, omega, nu, nu_start)
        problem = (query, keys, scale, bias, start_logit, values, start_value, lse, lse_low)
        if h is None:
            out = second_order_of_lse(impl, compute, want.keys, want.bias, tangent, g, *problem, pooled, *rules)
        else:
            out = second_order_of_pooled(impl, compute, want, tangent, g, h, *problem, *rules)
        originals = (g, h, query, keys, scale, bias, start_logit, values, start_value)
        return tuple(None if x is None else x.to(original.dtype) for x, original in zip(out, originals, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError("similarity_softmax has first and second derivatives only; a third was asked for")

    @staticmethod
    def vmap(info, in_dims, *args):
        return fold_batch(SecondOrder.apply, info.batch_size, in_dims, args)


def fold_batch(apply, size, in_dims, args):
    """vmap by one call on [size * B, ...]. A bank shared by the whole batch (B = 1) stays a view with stride 0."""

    def fold(x, dim):
        if not isinstance(x, torch.Tensor):
            return x
        return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

    out = apply(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
    out = tuple(None if x is None else x.unflatten(0, (size, x.shape[0] // size)) for x in out)
    return out, tuple(None if x is None else 0 for x in out)


def _fold_rows(apply, size, in_dims, args, bank_side):
    """vmap by one call on rows [B, size * N, ...] against arguments, at the positions `bank_side`, that all elements share."""

    def fold(i, x, dim):
        if i in bank_side or not isinstance(x, torch.Tensor):
            return x
        return (x.unsqueeze(1).expand(-1, size, *x.shape[1:]) if dim is None else x.movedim(dim, 1)).flatten(1, 2)

    lse, pooled, lse_low = apply(*(fold(i, x, dim) for i, (x, dim) in enumerate(zip(args, in_dims, strict=True))))
    if pooled.dim() == 1:  # not asked for
        pooled = pooled.reshape(1, 0, 1)
    return tuple(x.unflatten(1, (size, x.shape[1] // size)) for x in (lse, pooled, lse_low)), (1, 1, 1)
