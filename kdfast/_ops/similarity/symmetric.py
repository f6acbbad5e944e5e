"""Log-sum-exps of the rows and of the columns of one score matrix: each tile of scores serves both, forward and backward."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..._core import checks, dtypes, impls
from . import cpu
from .apply import through_function
from .arguments import how_to_compute
from .autograd import SecondOrder, fold_batch
from .passes import KERNELS
from .portable import _finite, _two_sum, above_nothing
from .second_order_pooled import Wanted
from .tiles import Scores, contract
from .triton import pairs as triton_pairs

impls.register(
    "symmetric_lse",
    impls.Implementation("cpu", cpu.missing, cpu.refuses),
    impls.Implementation("triton", triton_pairs.missing, triton_pairs.refuses),
)


def symmetric_lse(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor = 1.0,
    *,
    labels: tuple[Tensor, Tensor] | None = None,
    precision: str | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Of z_ij = scale x_i.y_j the row_lse_i = log sum_j exp(z_ij) and the column_lse_j = log sum_i exp(z_ij).

    Forward 2 D, backward 6 D floating-point operations a pair; no N x M tensor.

    Args:
        x: [*B, N, D]. y: [*B, M, D], of the same dtype (any under autocast: tiles are rounded to its dtype). N, M >= 1.
        scale: a float or a 0-d tensor; never cast by autocast.
        labels: integers ([*B, N] or [N], [*B, M] or [M]): pairs of equal labels are left out of both sums.
        precision, impl: as in `similarity_softmax`.

    Returns:
        row_lse [*B, N] and column_lse [*B, M], fp32 (fp64 for fp64 inputs); -inf where all pairs are left out.

    Gradients: x, y, scale, twice.

    Raises: TypeError, ValueError naming the argument. Source: the two softmaxes of Radford et al. 2021 (CLIP), figure 3.
    """
    checks.rows("x", x)
    checks.rows("y", y)
    batch = x.shape[:-2]
    if y.shape[:-2] != batch:
        raise ValueError(f"y must have the leading dimensions {tuple(batch)} of x, got shape {tuple(y.shape)}")
    checks.same_width("y", y, "x", x)
    checks.alike("y", y, "x", x)
    for name, side in (("x", x), ("y", y)):
        if side.shape[-2] == 0:
            raise ValueError(f"{name} must have at least 1 row, got shape {tuple(side.shape)}")
    checks.number("scale", scale)
    if isinstance(scale, Tensor) and scale.dim():
        raise ValueError(f"scale must be a float or a 0-d tensor, got shape {tuple(scale.shape)}")
    acc = dtypes.accumulator(x.dtype)
    if not isinstance(scale, Tensor):
        checks.in_range("scale", scale, acc)
    scale = scale.to(x.device, acc) if isinstance(scale, Tensor) else x.new_full((), scale, dtype=acc)  # no copy from the host
    if labels is not None and not (isinstance(labels, tuple) and len(labels) == 2):
        raise TypeError(f"labels must be a tuple (of x, of y), got {type(labels).__name__}")
    return lse_by_rows(x, y, scale.expand(x.shape[:-1]), labels=labels, precision=precision, impl=impl)


def lse_by_rows(
    x: Tensor, y: Tensor, scale: Tensor, *, labels: tuple[Tensor, Tensor] | None, precision: str | None, impl: str | None
) -> tuple[Tensor, Tensor]:
    """`symmetric_lse` of a scale [*B, N] in the accumulator's dtype, equal for all rows of an entry, whose gradient comes by rows.

    A loss takes off each row's the match's, before they are added up: the sums of both would round as all the logits together.
    """
    compute, batch = how_to_compute(x, precision), x.shape[:-2]
    impl = impls.choose("symmetric_lse", impl, device_type=x.device.type, dtype=compute.dtype)
    size, sides = batch.numel(), (x, y)
    x_labels, y_labels = (None, None) if labels is None else (_labels(*pair, size) for pair in zip(labels, ("x", "y"), sides, strict=True))
    x, y = (side.reshape(size, *side.shape[-2:]) for side in sides)
    scale = scale.reshape(size, x.shape[1])
    run = SymmetricLse.apply if through_function((x, y, scale)) else _run_forward
    rows, columns, _, _ = run(impl, compute, x, y, scale, x_labels, y_labels)
    return rows.reshape(*batch, -1), columns.reshape(*batch, -1)


def _labels(labels, name: str, side: Tensor, size: int) -> Tensor:  # [size, N or M]
    labels = checks.integral(f"labels of {name}", labels, device=side.device)
    if tuple(labels.shape) not in (tuple(side.shape[:-1]), tuple(side.shape[-2:-1])):
        raise ValueError(f"labels of {name} must have shape {tuple(side.shape[:-1])}, got {tuple(labels.shape)}")
    return labels.expand(side.shape[:-1]).reshape(size, -1)


def reference(x: Tensor, y: Tensor, scale=1.0, labels: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The definition, for any dtype; it writes the N x M scores. Differentiable by autograd where every row and column has a pair."""
    z = scale * (x @ y.mT)
    if labels is not None:
        z = z.masked_fill(labels[0][..., None] == labels[1][..., None, :], -torch.inf)
    return z.logsumexp(-1), z.logsumexp(-2)


# ---- impl="torch" ---------------------------------------------------------------------------------------------------------


def _leave_out(score: Tensor, x_labels: Tensor | None, y_labels: Tensor | None, b: slice, r: slice, c: slice) -> Tensor:
    return score if x_labels is None else score.masked_fill_(x_labels[b, r, None] == y_labels[b, None, c], -torch.inf)


def forward(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    scale: Tensor,  # [B, N], fp32 or, for fp64 inputs, fp64
    x_labels: Tensor | None,  # [B, N]
    y_labels: Tensor | None,  # [B, M]
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row_lse [B, N], column_lse [B, M] and the low digits of both, in the dtype of `scale`."""
    rows = _RunningSum(torch.full_like(scale, -torch.inf), torch.zeros_like(scale))
    columns = _RunningSum(scale.new_full(y.shape[:2], -torch.inf), scale.new_zeros(y.shape[:2]))

    def add(b, r, c, score):
        z = _leave_out(score, x_labels, y_labels, b, r, c)
        rows.add((b, r), z, -1)
        columns.add((b, c), z, -2)

    contract(Scores(x, y, scale, compute), add, want_rows=False, want_columns=False)
    (row_lse, row_low), (column_lse, column_low) = rows.log(), columns.log()
    return row_lse, column_lse, row_low, column_low


class _RunningSum(NamedTuple):
    """Sums of exponentials, total e^top."""

    top: Tensor
    total: Tensor

    def add(self, at: tuple[slice, slice], z: Tensor, dim: int) -> None:
        top = self.top[at]
        higher = torch.maximum(top, z.amax(dim))
        shift = _finite(higher)
        self.total[at] = self.total[at] * torch.exp(top - shift) + torch.exp(z - shift.unsqueeze(dim)).sum(dim)
        self.top[at] = higher

    def log(self) -> tuple[Tensor, Tensor]:
        return _two_sum(_finite(self.top), torch.log(self.total))


def gradients(
    row_g: Tensor,
    column_g: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    row_low: Tensor,
    column_low: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_labels: Tensor | None,
    y_labels: Tensor | None,
    want_x: bool,
    want_y: bool,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """sum_j W_ij y_j [B, N, D] and sum_i W_ij s_i x_i [B, M, D], W_ij = g_i exp(z_ij - row_lse_i) + g_j exp(z_ij - column_lse_j)."""
    (row_level, row_g), (column_level, column_g) = (
        (above_nothing(lse), g * torch.exp(-low)) for g, lse, low in ((row_g, row_lse, row_low), (column_g, column_lse, column_low))
    )

    def weigh(b, r, c, score):
        z = _leave_out(score, x_labels, y_labels, b, r, c)
        of_rows = torch.exp(z - row_level[b, r, None]).mul_(row_g[b, r, None])
        return z.sub_(column_level[b, None, c]).exp_().mul_(column_g[b, None, c]).add_(of_rows)

    sums = contract(Scores(x, y, scale, compute), weigh, want_rows=want_x, want_columns=want_y)
    empty = scale.new_empty(0)
    return sums.rows_a if want_x else empty, sums.columns if want_y else empty.clone()


# ---- the choice -----------------------------------------------------------------------------------------------------------


def _run_forward(impl, compute, x, y, scale, x_labels, y_labels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if impl in KERNELS:
        kernels = KERNELS[impl]
        return kernels.ops.symmetric_lse(*_dense(x, y, scale, x_labels, y_labels), cpu.product_number(compute.products, x, kernels))
    run = torch.ops.kdfast_torch.symmetric_forward if torch.compiler.is_compiling() else forward
    return run(x, y, scale, x_labels, y_labels, compute.dtype)


def _run_gradients(impl, compute, want, *tensors) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dy, dscale [B, N]) in the accumulator's dtype; what is not wanted is empty or None."""
    want_x, want_y, want_scale = want
    x, _, scale, *_ = tensors[6:]
    if impl == "triton":
        number = cpu.product_number(compute.products, x, KERNELS[impl])
        return KERNELS[impl].ops.symmetric_gradients(*_dense(*tensors), want_x, want_y, number)
    want_rows = want_x or want_scale
    if impl == "cpu":
        sums = torch.ops.kdfast.symmetric_gradients(*_dense(*tensors), want_rows, want_y, cpu.product_number(compute.products, x))
    else:
        run = torch.ops.kdfast_torch.symmetric_gradients if torch.compiler.is_compiling() else gradients
        sums = run(*tensors, want_rows, want_y, compute.dtype)
    x_sums, y_sums = sums
    dscale = (x.to(compute.dtype).to(scale.dtype) * x_sums).sum(-1) if want_scale else None
    return x_sums.mul_(scale[..., None]) if want_x else x_sums, y_sums, dscale


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


# ---- autograd ---------------------------------------------------------------------------------------------------------------


class SymmetricLse(Function):
    """(row_lse [B, N], column_lse [B, M], low digits of both) of x [B, N, D], y [B, M, D], scale [B, N] and labels [B, N], [B, M] or None.

    The scale, and a cotangent of its gradient, is equal for all rows of an entry.
    """

    @staticmethod
    def forward(impl, compute, *tensors):
        return _run_forward(impl, compute, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[2:])
        ctx.impl, ctx.compute, *tensors = inputs
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx, row_g, column_g, *_):
        record = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        run = SymmetricGradients.apply if record else SymmetricGradients.forward
        return (None, None, *run(ctx.impl, ctx.compute, ctx.needs_input_grad[2:5], row_g, column_g, *ctx.saved_tensors), None, None)

    @staticmethod
    def vmap(info, in_dims, *args):
        return fold_batch(SymmetricLse.apply, info.batch_size, in_dims, args)


class SymmetricGradients(Function):
    """(dx, dy, dscale), None where `want` = (x, y, scale) says so. The log-sum-exps come in as constants, as in autograd.py."""

    @staticmethod
    def forward(impl, compute, want, row_g, column_g, row_lse, column_lse, row_low, column_low, x, y, scale, x_labels, y_labels):
        want_x, want_y, want_scale = want
        tensors = (row_g, column_g, row_lse, column_lse, row_low, column_low, x, y, scale, x_labels, y_labels)
        dx, dy, dscale = _run_gradients(impl, compute, want, *tensors)
        return dx.to(x.dtype) if want_x else None, dy.to(y.dtype) if want_y else None, dscale if want_scale else None

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.compute, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, u, kappa, sigma):
        """Of the rows' softmax over the columns, and of the columns' over the rows."""
        row_g, column_g, row_lse, column_lse, row_low, column_low, x, y, scale, x_labels, y_labels = ctx.saved_tensors
        u, kappa, sigma = (torch.zeros_like(x) if u is None else u for u, x in ((u, x), (kappa, y), (sigma, scale)))
        want_x, want_y = ctx.needs_input_grad[9:11]

        def one_side(want_keys, u, kappa, g, query, keys, lse, lse_low, query_labels, key_labels):
            sigma_rows, scale_rows = (rows[:, :1].expand(query.shape[:2]).contiguous() for rows in (sigma, scale))
            grads = SecondOrder.apply(
                ctx.impl, ctx.compute, Wanted(False, want_keys, True, False, False), u, kappa, sigma_rows, *(None,) * 4,
                g, None, query, keys, scale_rows, *(None,) * 4, lse, lse_low, None, query_labels, key_labels, *(None,) * 3,
            )  # fmt: skip
            return grads[0], grads[2], grads[3], grads[4]

        drow_g, dx, dy, dscale = one_side(want_y, u, kappa, row_g, x, y, row_lse, row_low, x_labels, y_labels)
        dcolumn_g, more_dy, more_dx, more_dscale = one_side(want_x, kappa, u, column_g, y, x, column_lse, column_low, y_labels, x_labels)
        dx, dy = dx + more_dx if want_x else None, dy + more_dy if want_y else None
        dscale = dscale + more_dscale.sum(-1, keepdim=True) / scale.shape[1]  # of all rows together
        return None, None, None, drow_g, dcolumn_g, *(None,) * 4, dx, dy, dscale, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return fold_batch(SymmetricGradients.apply, info.batch_size, in_dims, args)


# ---- shapes for the compiler --------------------------------------------------------------------------------------------------


def _forward_fake(x, y, scale, *args):
    rows, columns = scale.new_empty(x.shape[:2]), scale.new_empty(y.shape[:2])
    return rows, columns, torch.empty_like(rows), torch.empty_like(columns)


def _gradients_fake(*args):
    *_, x, y, scale, _, _, want_x, want_y, _ = args
    return scale.new_empty(x.shape if want_x else (0,)), y.new_empty(y.shape) if want_y else scale.new_empty(0)


def _kernel_gradients_fake(*args):
    *_, x, y, scale, _, _, want_x, want_y, _ = args
    return tuple(scale.new_empty(side.shape if want else (0,)) for side, want in ((x, want_x), (y, want_y)))


# Opaque to the compiler, as in portable.py.
torch.library.custom_op("kdfast_torch::symmetric_forward", forward, mutates_args=()).register_fake(_forward_fake)
torch.library.custom_op("kdfast_torch::symmetric_gradients", gradients, mutates_args=()).register_fake(_gradients_fake)
if cpu.missing() is None:
    torch.library.register_fake("kdfast::symmetric_lse", _forward_fake)
    torch.library.register_fake("kdfast::symmetric_gradients", _kernel_gradients_fake)
