"""The sigmoid pair loss (SigLIP's): every query x key pair is its own binary problem, summed over the keys, in C++ or in tiles."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ...._core import checks, impls
from .. import cpu
from ..apply import through_function
from ..arguments import how_to_compute, row_parameter
from ..autograd import fold_batch
from ..passes import KERNELS
from ..tiles import Scores, contract, contract_tangent
from ..triton import pairs as triton_pairs

impls.register(
    "sigmoid_pair_loss",
    impls.Implementation("cpu", cpu.missing, cpu.refuses),
    impls.Implementation("triton", triton_pairs.missing, triton_pairs.refuses),
)


def sigmoid_pair_loss(
    query: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    shift: float | Tensor,
    positive_index: Tensor,
    *,
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """l_i = sum_j softplus(-y_ij (scale_i q_i.k_j + shift_i)), y_ij = 1 for j = positive_index_i and -1 otherwise: [*B, N].

    Args:
        query: [*B, N, D]. keys: [*B, M, D] or [M, D], of the same dtype (any under autocast: both are rounded to its dtype).
        scale, shift: floats, or tensors [], [N] or [*B, N].
        positive_index: integers [*B, N] in [-1, M); -1: no positive.
        precision, impl: as in `similarity_softmax`.

    Returns fp32 (fp64 for fp64 inputs). Gradients: query, keys, scale, shift, twice. Memory O((N + M) D).

    Raises: TypeError, ValueError, IndexError (on the CPU) naming the argument. Source: Zhai et al. 2023, section 3.2.
    """
    checks.rows("query", query)
    checks.rows("keys", keys)
    checks.same_width("keys", keys, "query", query)
    checks.alike("keys", keys, "query", query)
    batch, rows = query.shape[:-2], query.shape[:-1]
    if keys.dim() != 2 and keys.shape[:-2] != batch:
        raise ValueError(f"keys must be [M, D] or have the leading dimensions {tuple(batch)} of query, got shape {tuple(keys.shape)}")
    index = checks.integral("positive_index", positive_index, shape=rows, device=query.device)
    checks.index_range("positive_index", index, keys.shape[-2], lowest=-1)
    lead = (1, rows.numel()) if keys.dim() == 2 else (batch.numel(), rows[-1])
    scale, shift = (row_parameter(name, x, query).reshape(lead) for name, x in (("scale", scale), ("shift", shift)))
    compute = how_to_compute(query, precision)
    run = SigmoidPairs.apply if through_function((query, keys, scale, shift)) else _run_forward
    loss = run(
        impls.choose("sigmoid_pair_loss", impl, device_type=query.device.type, dtype=compute.dtype),
        compute,
        query.reshape(*lead, query.shape[-1]),
        keys.reshape(lead[0], *keys.shape[-2:]),
        scale,
        shift,
        index.reshape(lead),
    )
    return loss.reshape(rows)


def reference(query: Tensor, keys: Tensor, scale, shift, positive_index: Tensor) -> Tensor:
    """The definition, for any dtype; it writes the N x M scores. scale and shift: floats, 0-d or [*B, N]."""
    scale, shift = (torch.as_tensor(x, dtype=query.dtype).expand(query.shape[:-1])[..., None] for x in (scale, shift))
    positive = positive_index[..., None] == torch.arange(keys.shape[-2])
    logits = scale * (query @ keys.mT) + shift
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum(-1)


class _Pairs:
    """One problem's tiles of logits, signed so that softplus(logit) is a pair's loss."""

    def __init__(self, compute, query, keys, scale, shift, index):
        self.scores = Scores(query, keys, scale, compute)
        self.shift, self.index = shift, index

    def signed(self, b: slice, r: slice, c: slice, score: Tensor) -> tuple[Tensor, Tensor]:
        """Signed logits t [b, r, c], in place of the scores, and where the pair is a positive."""
        score += self.shift[b, r, None]
        positive = self.index[b, r, None] == torch.arange(c.start, c.stop, device=score.device)
        return torch.where(positive, -score, score), positive


def forward(query: Tensor, keys: Tensor, scale: Tensor, shift: Tensor, index: Tensor, compute: torch.dtype) -> Tensor:
    """query [B, N, D], keys [B, M, D], the rest [B, N] -> losses [B, N] in the dtype of `scale`."""
    pairs, loss = _Pairs(compute, query, keys, scale, shift, index), torch.zeros_like(scale)

    def add(b, r, c, score):
        t, _ = pairs.signed(b, r, c, score)
        loss[b, r] += (t.clamp(min=0) + torch.log1p(torch.exp(-t.abs()))).sum(-1)

    contract(pairs.scores, add, want_rows=False, want_columns=False)
    return loss


def gradients(
    g: Tensor,
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    shift: Tensor,
    index: Tensor,
    want_rows: bool,
    want_keys: bool,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_j C_ij k_j [B, N, D], dkeys [B, M, D] (empty where not wanted) and sum_j C_ij [B, N], C_ij = g_i dl_i / dz_ij."""
    pairs, dshift = _Pairs(compute, query, keys, scale, shift, index), torch.zeros_like(scale)

    def weigh(b, r, c, score):
        t, positive = pairs.signed(b, r, c, score)
        weight = torch.where(positive, -g[b, r, None], g[b, r, None]) * torch.sigmoid(t)
        dshift[b, r] += weight.sum(-1)
        return weight

    sums = contract(pairs.scores, weigh, want_rows=want_rows, want_columns=want_keys)
    empty = scale.new_empty(0)
    return sums.rows_a if want_rows else empty, sums.columns if want_keys else empty, dshift


def second_order(compute, want_keys, u, kappa, sigma, varsigma, g, query, keys, scale, shift, index):
    """Gradients of <(u, kappa, sigma, varsigma), first-order gradients>: (g, query, keys, scale, shift). None is a zero cotangent."""
    pairs = _Pairs(compute, query, keys, scale, shift, index)
    q = pairs.scores.rounded_query()
    u = torch.zeros_like(q) if u is None else u.to(scale.dtype)
    sigma, varsigma = (torch.zeros_like(scale) if x is None else x for x in (sigma, varsigma))
    dg, dshift = torch.zeros_like(scale), torch.zeros_like(scale)

    def weigh(b, r, c, score, rate):
        t, positive = pairs.signed(b, r, c, score)
        rate = rate + varsigma[b, r, None]
        slope = torch.sigmoid(t)
        curved = g[b, r, None] * slope * torch.sigmoid(-t) * rate
        slope = torch.where(positive, -slope, slope)
        dg[b, r] += (slope * rate).sum(-1)
        dshift[b, r] += curved.sum(-1)
        return curved, g[b, r, None] * slope

    direction = scale[..., None] * u + sigma[..., None] * q
    sums = contract_tangent(pairs.scores, weigh, direction, kappa, want_rows=True, want_columns=want_keys)
    dquery = scale[..., None] * sums.rows_a + sigma[..., None] * sums.rows_b
    return dg, dquery.to(query.dtype), sums.columns, (q * sums.rows_a + u * sums.rows_b).sum(-1), dshift


def _run_forward(impl, compute, *tensors) -> Tensor:
    if impl in KERNELS:
        number = cpu.product_number(compute.products, tensors[0], KERNELS[impl])
        return KERNELS[impl].ops.sigmoid_pairs(*(x.contiguous() for x in tensors), number)
    run = torch.ops.kdfast_torch.sigmoid_forward if torch.compiler.is_compiling() else forward
    return run(*tensors, compute.dtype)


def _run_gradients(impl, compute, want, *tensors) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(dquery, dkeys, dscale, dshift) in the accumulator's dtype; what is not wanted is empty or None."""
    want_query, want_keys, want_scale = want
    _, query, _, scale, *_ = tensors
    if impl in KERNELS:
        number, tensors = cpu.product_number(compute.products, query, KERNELS[impl]), [x.contiguous() for x in tensors]
    if impl == "triton":
        dquery, dkeys, dshift, dscale = KERNELS[impl].ops.sigmoid_gradients(*tensors, want_query, want_keys, number)
        return dquery, dkeys, dscale, dshift
    want_rows = want_query or want_scale
    if impl == "cpu":
        rows, dkeys, dshift = torch.ops.kdfast.sigmoid_gradients(*tensors, want_rows, want_keys, number)
    else:
        run = torch.ops.kdfast_torch.sigmoid_gradients if torch.compiler.is_compiling() else gradients
        rows, dkeys, dshift = run(*tensors, want_rows, want_keys, compute.dtype)
    dscale = (query.to(compute.dtype).to(scale.dtype) * rows).sum(-1) if want_rows else None
    return rows.mul_(scale[..., None]) if want_rows else rows, dkeys, dscale, dshift


def _run_second_order(impl, compute, want_keys, *tensors) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    if impl != "triton":
        return second_order(compute.dtype, want_keys, *tensors)
    query, keys = tensors[5:7]
    *directions, g = tensors[:5]
    given = (None if x is None else x.contiguous() for x in (g, *directions, *tensors[5:]))
    number = cpu.product_number(compute.products, query, KERNELS[impl])
    dg, dquery, dkeys, dscale, dshift = KERNELS[impl].ops.sigmoid_second(*given, want_keys, number)
    return dg, dquery.to(query.dtype), dkeys.to(keys.dtype) if want_keys else None, dscale, dshift


class SigmoidPairs(Function):
    """The losses [B, N]; the first backward is a pass over the tiles."""

    @staticmethod
    def forward(impl, compute, *tensors):
        return _run_forward(impl, compute, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.impl, ctx.compute, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, g):
        # as a Function where it may be differentiated again, or is under torch.func.vmap
        record = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        run = SigmoidGradients.apply if record and not torch.compiler.is_compiling() else SigmoidGradients.forward
        return None, None, *run(ctx.impl, ctx.compute, ctx.needs_input_grad[2:5], g.contiguous(), *ctx.saved_tensors), None

    @staticmethod
    def vmap(info, in_dims, *args):
        (loss,), _ = fold_batch(lambda *folded: (SigmoidPairs.apply(*folded),), info.batch_size, in_dims, args)
        return loss, 0


class SigmoidGradients(Function):
    """(dquery, dkeys, dscale, dshift); dquery and dscale come together, `want` = (query, keys, scale)."""

    @staticmethod
    def forward(impl, compute, want, g, query, keys, scale, shift, index):
        want_query, want_keys, _ = want
        dquery, dkeys, dscale, dshift = _run_gradients(impl, compute, want, g, query, keys, scale, shift, index)
        return dquery.to(query.dtype) if want_query else None, dkeys.to(keys.dtype) if want_keys else None, dscale, dshift

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.compute, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        grads = SigmoidSecondOrder.apply(ctx.impl, ctx.compute, ctx.needs_input_grad[5], *cotangents, *ctx.saved_tensors)
        return (None, None, None, *grads, None)

    @staticmethod
    def vmap(info, in_dims, *args):
        return fold_batch(SigmoidGradients.apply, info.batch_size, in_dims, args)


class SigmoidSecondOrder(Function):
    @staticmethod
    def forward(impl, compute, want_keys, *tensors):
        return _run_second_order(impl, compute, want_keys, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError("sigmoid_pair_loss has first and second derivatives only; a third was asked for")

    @staticmethod
    def vmap(info, in_dims, *args):
        return fold_batch(SigmoidSecondOrder.apply, info.batch_size, in_dims, args)


def _gradients_fake(g, query, keys, scale, shift, index, want_rows, want_keys, compute):
    rows = scale.new_empty(query.shape if want_rows else (0,))
    return rows, torch.empty_like(keys) if want_keys else scale.new_empty(0), torch.empty_like(scale)


def _kernel_gradients_fake(g, query, keys, scale, shift, index, want_rows, want_keys, products):
    return *(scale.new_empty(x.shape if want else (0,)) for x, want in ((query, want_rows), (keys, want_keys))), torch.empty_like(scale)


# Opaque to the compiler, as in portable.py.
torch.library.custom_op("kdfast_torch::sigmoid_forward", forward, mutates_args=()).register_fake(lambda *args: torch.empty_like(args[2]))
torch.library.custom_op("kdfast_torch::sigmoid_gradients", gradients, mutates_args=()).register_fake(_gradients_fake)
if cpu.missing() is None:
    torch.library.register_fake("kdfast::sigmoid_pairs", lambda *args: torch.empty_like(args[2]))
    torch.library.register_fake("kdfast::sigmoid_gradients", _kernel_gradients_fake)
