"""impl="triton" of the streaming softmax where a tile of sums, or of exact products of float32, is too much for registers: slab by slab.

A slab's scores are made in one launch, by steps of the width, their probabilities stored, and multiplied by the rows they weigh in
another. The operators and their arguments are those of the package.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import slabs

LOG2E = 1.4426950408889634
TINY = torch.finfo(torch.float32).tiny


class Terms(NamedTuple):
    """What a logit has beside its score, whole or of a slab."""

    scale: Tensor  # [B, N]
    bias: Tensor | None  # [B, M], of batch stride 0 where the batch shares it, as what follows
    query_labels: Tensor | None  # [B, N]
    key_labels: Tensor | None  # [B, M]
    key_index: Tensor | None  # [B, N, E]
    limit: Tensor | None  # [B, N]
    valid: Tensor | None  # [B]

    @property
    def many(self) -> bool:
        return self.bias is not None or self.key_labels is not None

    def of(self, slab: slabs.Slab) -> "Terms":
        scale, query_labels, key_index, limit = slab.of_rows(self.scale, self.query_labels, self.key_index, self.limit)
        bias, key_labels = slab.of_columns(self.bias, self.key_labels)
        return Terms(scale, bias, query_labels, key_labels, key_index, limit, None if self.valid is None else self.valid[slab.entries])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.scale if x is None else x for x in self)  # what is not there is never read

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(0 if x is None else x.stride(0) for x in (self.bias, self.key_labels, self.valid))

    @property
    def constants(self) -> dict:
        return {
            "BIASED": self.bias is not None, "LABELLED": self.key_labels is not None, "LIMITED": self.limit is not None,
            "COUNTED": self.valid is not None, "INDICES": 0 if self.key_index is None else self.key_index.shape[2],
        }  # fmt: skip


def begun(scale: Tensor, start_logit: Tensor | None) -> slabs.Running:
    """Sums over nothing, or over the start candidate: its weight is 2^(start2 - top), where top is start2 rounded."""
    running = slabs.nothing_yet(scale[..., None])
    if start_logit is None:
        return running
    start = start_logit.double() * LOG2E
    top = start.float()
    rest = torch.where(top.isfinite(), start - top, start).exp2().float()
    total = torch.where(start_logit == -torch.inf, 0.0, rest)
    return running._replace(top=top, total=total, lse=start_logit.clone())


def forward(
    query, keys, scale, bias, start_logit, values, start_value, query_labels, key_labels, key_index, limit, valid, pooled, precision
) -> tuple[Tensor, Tensor, Tensor]:
    from .wide_kernels import wide_probabilities

    terms = Terms(scale, bias, query_labels, key_labels, key_index, limit, valid)
    values = keys if values is None else values
    running = begun(scale, start_logit)
    out = scale.new_zeros((*scale.shape, values.shape[2]) if pooled else (0,))
    if pooled and start_value is not None:
        out = running.total[..., None] * start_value
    most = slabs.WEIGHTS_PAIRS if pooled else slabs.STATISTICS_PAIRS
    for slab, part in slabs.parts(query, keys, precision, most, narrow=terms.many):
        part = part.of_probabilities()
        of_slab, top, total = terms.of(slab), part.of_rows(), part.of_rows()
        weights = part.weights() if pooled else top
        wide_probabilities[part.programs](
            part.x, part.y, *of_slab.tensors, top, total, weights, *part.sizes, *of_slab.strides, slab.columns.start, *part.leading,
            POOLED=pooled, **of_slab.constants, **part.options,
        )  # fmt: skip
        carry = torch.empty_like(top[0])
        running.add((slab.entries, slab.rows), top, total, carry)
        if pooled:
            (to,), (v,) = slab.of_rows(out), slab.of_columns(values)
            if slab.columns.start > 0 or start_logit is not None:
                to.mul_(carry[..., None])
            slabs.add_products(weights, v, to, part, transposed=False, factors=top, valid=of_slab.valid, first=slab.columns.start)
    if pooled:
        out.div_(running.total.clamp_min(TINY)[..., None])  # it is 0, as out is, or about 1 at least
    return running.lse, out, running.low


class Problem(NamedTuple):
    """What both sides' gradients are made of."""

    slope: Tensor  # [B, N]
    h: Tensor | None  # [B, N, Dv]
    lse: Tensor  # [B, N]
    low: Tensor  # [B, N]
    query: Tensor
    keys: Tensor
    values: Tensor
    terms: Terms
    precision: int

    def parts(self):
        return slabs.parts(self.query, self.keys, self.precision, slabs.WEIGHTS_PAIRS, narrow=self.terms.many or self.h is not None)

    def weights(
        self, slab: slabs.Slab, part: slabs.Part, sums: tuple[Tensor, Tensor, Tensor], *, by_scale=False, plain=False, of_bias=False
    ):
        """A slab's weights; `sums` = parts of mass, total and bias, as wide_kernels.wide_weights has them."""
        import triton.language as tl

        from .wide_kernels import wide_weights

        weights, of_slab = part.weights(), self.terms.of(slab)
        slope, lse, low, h = slab.of_rows(self.slope, self.lse, self.low, self.h)
        (values,) = slab.of_columns(self.values)
        width = values.shape[2]
        wide_weights[part.programs](
            slope, slope if h is None else h, lse, low, part.x, part.y, values, *of_slab.tensors, weights, *sums,
            *part.sizes, width, values.stride(0), *of_slab.strides, slab.columns.start, *part.leading,
            WITH_H=h is not None, EVEN_VALUES=width % part.tiles.depth == 0,
            DOT_VALUES=tl.bfloat16 if weights.dtype == torch.bfloat16 else tl.float32,
            BY_SCALE=by_scale, PLAIN=plain, WANT_BIAS=of_bias, **of_slab.constants, **part.options,
        )  # fmt: skip
        return weights


def problem(
    slope, h, lse, lse_low, query, keys, scale, bias, values, query_labels, key_labels, key_index, limit, valid, precision
) -> Problem:
    lse_low = torch.zeros_like(lse) if lse_low is None else lse_low
    terms = Terms(scale, bias, query_labels, key_labels, key_index, limit, valid)
    return Problem(slope, h, lse, lse_low, query, keys, keys if values is None else values, terms, precision)


def grad_rows(*args) -> tuple[Tensor, Tensor, Tensor]:
    p = problem(*args)
    out, mass, total = p.slope.new_zeros(p.query.shape), torch.zeros_like(p.slope), torch.zeros_like(p.slope)
    for slab, part in p.parts():
        more = part.of_rows(), part.of_rows()
        weights = p.weights(slab, part, (*more, p.slope))
        for sums, parts in zip((mass, total), more, strict=True):
            slab.of_rows(sums)[0].add_(parts.sum(0))
        (to,) = slab.of_rows(out)
        valid = None if p.terms.valid is None else p.terms.valid[slab.entries]
        slabs.add_products(weights, part.y, to, part, transposed=False, valid=valid, first=slab.columns.start)
    return out, mass, total


def grad_keys(*args) -> tuple[Tensor, Tensor, Tensor]:
    *args, want_keys, want_bias, want_values, precision = args
    p, separate = problem(*args, precision), args[8] is not None
    dkeys, dbias, dvalues = (
        p.slope.new_zeros(shape if want else (0,))
        for shape, want in ((p.keys.shape, want_keys), (p.keys.shape[:2], want_bias), (p.values.shape, want_values))
    )
    of_h = dvalues if separate else dkeys  # where sum_i p_ij h_i goes
    for slab, part in p.parts():
        if want_keys or want_bias:
            more = part.of_columns()
            weights = p.weights(slab, part, (p.slope, p.slope, more), by_scale=True, of_bias=True)
            if want_bias:
                slab.of_columns(dbias)[0].add_(more.sum(0))
            if want_keys:
                slabs.add_products(weights, part.x, *slab.of_columns(dkeys), part, transposed=True)
        if p.h is not None and of_h.numel():
            weights = p.weights(slab, part, (p.slope,) * 3, plain=True)
            slabs.add_products(weights, *slab.of_rows(p.h), *slab.of_columns(of_h), part, transposed=True)
    return dkeys, dbias, dvalues
