"""impl="triton" of the second derivative of the sigmoid pair loss, slab by slab, for rows of any width."""

import torch
from torch import Tensor

from ...._core import triton_runtime as runtime
from . import slabs
from .tangent import no_sums, tangent


def sigmoid_second(
    g: Tensor,
    query_direction: Tensor | None,
    keys_direction: Tensor | None,
    scale_direction: Tensor | None,
    shift_direction: Tensor | None,
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    shift: Tensor,
    positive: Tensor,
    want_keys: bool,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of <directions, gradients of <g, losses>> in (g, query, keys, scale, shift) in float32; the keys' [0] unless wanted."""
    from .sigmoid_second_kernels import sigmoid_second as launch

    along = tangent(query, keys, scale, query_direction, keys_direction, scale_direction, precision)
    of_shift = torch.zeros_like(shift) if shift_direction is None else shift_direction
    dg, dshift, sums = torch.zeros_like(g), torch.zeros_like(g), no_sums(along, want_keys, True)
    for slab, part in along.parts(slabs.WEIGHTS_PAIRS):
        a, b, of_rates, of_weights = part.weights(), part.weights(), part.of_rows(), part.of_rows()
        operands = along.operands(slab, part)
        launch[part.programs](
            *operands, *slab.of_rows(scale, shift, of_shift, positive, g), a, b, of_rates, of_weights,
            *part.sizes, operands[3].stride(0), slab.columns.start, *part.leading, **along.constants(part),
        )  # fmt: skip
        for total, more in ((dg, of_rates), (dshift, of_weights)):
            slab.of_rows(total)[0].add_(more.sum(0))
        sums.add(slab, part, a, b)
    dquery, dscale = sums.of_rows(True)
    return dg, dquery, g.new_empty(0) if sums.keys is None else sums.keys, dscale, dshift


def _fake(g, of_query, of_keys, of_scale, of_shift, query, keys, scale, shift, positive, want_keys, _) -> tuple[Tensor, ...]:
    dkeys = g.new_empty(keys.shape if want_keys else (0,))
    return torch.empty_like(g), g.new_empty(query.shape), dkeys, torch.empty_like(g), torch.empty_like(g)


runtime.register("sigmoid_second", sigmoid_second, _fake)
