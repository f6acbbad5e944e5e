"""Autograd of the streaming softmax: the op, its first-order gradients and its second-order ones, a Function each.

Two modes. "lse": only lse is differentiable; pooled (over the keys, without the start's value) is the by-product that its
gradient needs, so the first backward never reads a bank that wants no gradient. "pool": both outputs are differentiable.
Every tensor argument has a leading batch dimension B, into which vmap folds. README.md derives the formulas.
"""

import torch
from torch.autograd import Function

from . import cpu, portable
from .second_order import Tangent, second_order


def run_forward(impl, compute, need_pooled, query, keys, scale, bias, start_logit, values, start_value, *rules):
    """The named implementation's forward; `rules` = (query_labels, key_labels, key_index, limit, valid)."""
    if impl == "cpu":
        query, keys, scale, bias, *rules = _for_kernel(query, keys, scale, bias, *rules)
        start_logit, start_value = (None if x is None else x.contiguous() for x in (start_logit, start_value))
        values = None if values is None else _dense(values)
        return cpu.forward(
            query, keys, scale, bias, start_logit, start_value, *rules, need_pooled, values=values, products=compute.products
        )
    run = torch.ops.kdfast_torch.similarity_forward if torch.compiler.is_compiling() else portable.forward
    return run(query, keys, scale, bias, start_logit, start_value, *rules, need_pooled, values, compute.dtype)


def _for_kernel(query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid):
    """As the compiled kernels want it: contiguous tensors (the bank's side may have batch stride 0)."""
    query_labels, key_index, limit = (None if x is None else x.contiguous() for x in (query_labels, key_index, limit))
    bias, key_labels, valid = (None if x is None else _dense(x) for x in (bias, key_labels, valid))
    return query.contiguous(), _dense(keys), scale.contiguous(), bias, query_labels, key_labels, key_index, limit, valid


def _dense(x):
    """`x`, contiguous but for a batch dimension of stride 0, which stays."""
    one = x[:1] if x.shape[0] > 1 and x.stride(0) == 0 else x
    return one.contiguous().expand(x.shape)


def first_order(impl, compute, want, g, h, query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, pooled, *rules):
    """(dquery, dkeys, dscale, dbias, dstart_logit, dvalues, dstart_value); `want` = (query, scale, keys, bias, values), None if not."""
    want_query, want_scale, want_keys, want_bias, want_values = want
    rows = dkeys = dbias = dvalues = None
    closed = portable.pooled_is_over_keys(h, values, start_value)
    wanted = [(want_query or want_scale) and not closed, want_keys, want_bias, want_values]
    if impl == "cpu" and closed:
        if want_keys or want_bias:
            problem = _for_kernel(query, keys, scale, bias, *rules)
            g, lse, lse_low = (x.contiguous() for x in (g, lse, lse_low))
            dkeys, dbias = cpu.grad_keys(g, lse, lse_low, *problem, want_keys, want_bias, products=compute.products)
            dkeys = dkeys.to(keys.dtype)
    elif any(wanted):
        run = torch.ops.kdfast_torch.similarity_gradients if torch.compiler.is_compiling() else portable.gradients
        problem = (query, keys, scale, bias, start_logit, values, start_value)
        rows, dkeys, dbias, dvalues = run(g, h, *problem, lse, lse_low, pooled, *rules, wanted, compute.dtype)
    dquery = dscale = None
    if want_query:
        factor = scale * g if closed else scale
        dquery = (factor[..., None] * (pooled if closed else rows)).to(query.dtype)
    if want_scale:
        dscale = (query.to(compute.dtype).to(scale.dtype) * (pooled if closed else rows)).sum(-1)
        dscale = g * dscale if closed else dscale
    dstart_logit = dstart_value = None
    if start_logit is not None:
        p_start, slope = portable.start_terms(g, h, start_logit, start_value, lse, lse_low, pooled)
        dstart_logit = p_start * slope
        if h is not None and start_value is not None:
            dstart_value = (p_start[..., None] * h).to(start_value.dtype)
    return (
        dquery,
        dkeys if want_keys else None,
        dscale,
        dbias if want_bias else None,
        dstart_logit,
        dvalues if want_values else None,
        dstart_value,
    )


def _keep(ctx, rows: tuple, bank: tuple, hold: bool) -> None:
    """Save `rows`; the bank's side too, or, with `hold`, as plain references that in-place updates may outrun."""
    ctx.bank = bank if hold else None
    ctx.save_for_backward(*rows, *(() if hold else bank))


def _kept(ctx, rows: int) -> tuple[tuple, tuple]:
    saved = ctx.saved_tensors
    return saved[:rows], saved[rows:] if ctx.bank is None else ctx.bank


def _versions(tensors: tuple) -> tuple[int | None, ...]:
    return tuple(None if t is None or t.is_inference() else t._version for t in tensors)


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
        g = torch.zeros_like(lse) if g is None else g.contiguous()
        h = h.contiguous() if ctx.pool and h is not None else None
        *want, want_values = ctx.want
        record = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        dquery, dkeys, dscale, dbias, dstart_logit, dvalues, dstart_value = (Gradients.apply if record else Gradients.forward)(
            ctx.impl, ctx.compute, (*want, want_values and h is not None), ctx.versions,
            g, h, query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, pooled, *rules,
        )  # fmt: skip
        return (None, None, None, None, dquery, dkeys, dscale, dbias, dstart_logit, dvalues, dstart_value, *(None,) * 5)

    @staticmethod
    def vmap(info, in_dims, *args):
        bank_side = (5, 7, 9, 12, 15)
        if all(in_dims[i] is None for i in bank_side):  # one pass over the bank serves every element of the batch
            return _fold_rows(Similarity.apply, info.batch_size, in_dims, args, bank_side)
        return fold_batch(Similarity.apply, info.batch_size, in_dims, args)


class Gradients(Function):
    """The first-order gradients (dquery, dkeys, dscale, dbias, dstart_logit, dvalues, dstart_value), None where not wanted.

    lse and pooled come in as constants: the second derivative accounts for them in closed form.
    """

    @staticmethod
    def forward(impl, compute, want, versions, *tensors):
        return first_order(impl, compute, want, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, compute, _, versions, g, h, query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, pooled, *rules = inputs
        ctx.set_materialize_grads(False)
        ctx.compute, ctx.versions = compute, versions
        rows, bank = (g, h, query, scale, start_logit, start_value, lse, lse_low, pooled), (keys, bias, values, *rules)
        _keep(ctx, rows, bank, versions is not None)

    @staticmethod
    def backward(ctx, *cotangents):
        (g, h, query, scale, start_logit, start_value, lse, lse_low, pooled), bank = _kept(ctx, 9)
        if ctx.versions is not None and _versions(bank) != ctx.versions:
            raise RuntimeError(
                "double backward through similarity_softmax needs the bank as the forward saw it, but it was updated in place since; "
                "push to the bank after the last backward, or give the loss a clone of it"
            )
        keys, bias, values, *rules = bank
        needs = ctx.needs_input_grad
        grads = SecondOrder.apply(
            ctx.compute, (needs[7], needs[9], needs[11]), *cotangents,
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
        compute, want, u, kappa, sigma, beta, omega, nu, nu_start,
        g, h, query, keys, scale, bias, start_logit, values, start_value, lse, lse_low, pooled, *rules,
    ):  # fmt: skip
        logits = portable.make_logits(query, keys, scale, bias, *rules, compute.dtype)
        want_keys, want_bias, want_values = want
        out = second_order(
            logits, Tangent(u, kappa, sigma, beta, omega, nu, nu_start), g, h, start_logit, start_value, values, lse, lse_low, pooled,
            want_keys=want_keys, want_bias=want_bias, want_values=want_values and h is not None,
        )  # fmt: skip
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
