"""A two-second check of every op, in each implementation that is here, against its float64 reference.

Small ragged shapes: it finds a miscompiled kernel or a broken installation, not what the tests are for.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional, ops
from ._core import impls, triton_runtime

N, M, D = 13, 301, 40
TOLERANCE = 1e-5  # float32; a fault is larger by orders of magnitude
HALF_TOLERANCE = 2e-2  # of the kernels for 16-bit rows alone

#: what an implementation gave, and the reference
Pair = tuple[Tensor, Tensor]


class Outcome(NamedTuple):
    op: str
    impl: str
    error: float  # the largest max |x - ref| / max |ref| over values and gradients
    tolerance: float
    seconds: float
    problem: str | None  # the exception, where there was one

    @property
    def ok(self) -> bool:
        return self.problem is None and self.error <= self.tolerance


def run() -> list[Outcome]:
    """Check every op in every implementation available here. Nothing is raised: a failure is an Outcome that is not ok."""
    outcomes = []
    for op, row in impls.table().items():
        for impl in [name for name, reason in row.items() if reason is None and op in CHECKS]:
            start, error, problem = time.perf_counter(), math.inf, None
            try:
                error = max(_error(got, wanted) for got, wanted in CHECKS[op](impl))
            except Exception as raised:
                problem = f"{type(raised).__name__}: {raised}"
            tolerance = HALF_TOLERANCE if op in ("similarity_softmax", "info_nce") and impl == "cuda" else TOLERANCE
            outcomes.append(Outcome(op, impl, error, tolerance, time.perf_counter() - start, problem))
    return outcomes


def _error(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape:
        return math.inf
    got, wanted = got.detach().cpu().double(), wanted.detach().double()
    same = (got == wanted) | (got.isnan() & wanted.isnan())  # infinities included
    distance = torch.where(same, 0.0, (got - wanted).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    scale = wanted[wanted.isfinite()].abs().amax() if wanted.isfinite().any() else 1.0
    return float(distance.max() / (scale if scale else 1.0))


def _device(impl: str) -> str:
    return "cuda" if impl == "cuda" or (impl == "triton" and not triton_runtime.INTERPRETED) else "cpu"


def _rows(count: int, seed: int, width: int = D) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def _labels(count: int) -> Tensor:
    return torch.arange(count) * 7 % 11 % 4


def _gradients(value: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves)


def _agree(
    ours: Callable[..., Tensor], reference: Callable[..., Tensor], impl: str, *tensors: Tensor, half: bool = False
) -> Iterator[Pair]:
    """A scalar function and its gradients, in fp32 (`half`: bf16) on the implementation's device and in fp64."""
    tensors = [x.bfloat16() for x in tensors] if half else tensors
    here = [x.to(_device(impl)).requires_grad_() for x in tensors]
    there = [x.double().requires_grad_() for x in tensors]
    got, wanted = ours(*here), reference(*there)
    yield got, wanted
    yield from zip(_gradients(got, tuple(here)), _gradients(wanted, tuple(there)), strict=True)


def _similarity_softmax(impl: str) -> Iterator[Pair]:
    from ._ops.similarity import reference

    weight = _rows(N, 3)

    def loss(op, query, keys, **options):
        lse, pooled = op(query, keys, scale=14.0, exclude=(ops.KeyIndex(torch.arange(N).to(query.device)),), valid=M - 2, **options)
        return (lse.sum() + (pooled * weight.to(pooled)).sum()) / N

    return _agree(
        lambda q, k: loss(ops.similarity_softmax, q, k, impl=impl),
        lambda q, k: loss(reference.similarity_softmax, q, k),
        impl,
        _rows(N, 1),
        _rows(M, 2),
        half=impl == "cuda",
    )


def _info_nce(impl: str) -> Iterator[Pair]:
    def plain(query, positive, bank):
        logits = torch.cat([(query * positive).sum(-1, keepdim=True), query @ bank.T], 1) / 0.07
        return F.cross_entropy(logits, torch.zeros(N, dtype=torch.long))

    return _agree(
        functools.partial(functional.info_nce, impl=impl), plain, impl, _rows(N, 1), _rows(N, 2), _rows(M, 3), half=impl == "cuda"
    )


def _similarity_distillation(impl: str) -> Iterator[Pair]:
    teacher, teacher_bank = _rows(N, 3, D + 8), _rows(M, 4, D + 8)

    def plain(student, bank):
        target = (teacher.double() @ teacher_bank.double().T / 0.1).softmax(-1)
        return -(target * (student @ bank.T / 0.2).log_softmax(-1)).sum(-1).mean()

    def ours(student, bank):
        there = teacher.to(student.device), bank, teacher_bank.to(student.device)
        return functional.similarity_distillation(student, *there, student_temperature=0.2, teacher_temperature=0.1, impl=impl)

    return _agree(ours, plain, impl, _rows(N, 1), _rows(M, 2))


def _symmetric_lse(impl: str) -> Iterator[Pair]:
    from ._ops.similarity import symmetric

    labels = torch.arange(N), torch.arange(M)

    def loss(op, x, y, **options):
        rows, columns = op(x, y, 14.0, labels=tuple(side.to(x.device) for side in labels), **options)
        return rows.mean() + columns.mean()

    return _agree(
        lambda x, y: loss(symmetric.symmetric_lse, x, y, impl=impl),
        lambda x, y: loss(symmetric.reference, x, y),
        impl,
        _rows(N, 1),
        _rows(M, 2),
    )


def _sigmoid_pair_loss(impl: str) -> Iterator[Pair]:
    from ._ops.similarity.losses import sigmoid

    index = torch.arange(N)
    return _agree(
        lambda x, y: sigmoid.sigmoid_pair_loss(x, y, 10.0, -5.0, index.to(x.device), impl=impl).mean(),
        lambda x, y: sigmoid.reference(x, y, 10.0, -5.0, index).mean(),
        impl,
        _rows(N, 1),
        _rows(M, 2),
    )


def _matching_loss(impl: str) -> Iterator[Pair]:
    def plain(x, y):
        logits, own = 10.0 * x @ y.T, torch.arange(N)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    return _agree(lambda x, y: functional.clip_loss(x, y, 10.0, impl=impl), plain, impl, _rows(N, 1), _rows(N, 2))


def _sup_con(impl: str) -> Iterator[Pair]:
    own, labels = torch.eye(N, dtype=torch.bool), _labels(N)
    positive = (labels[:, None] == labels) & ~own

    def plain(x):
        log_p = (10.0 * x @ x.T).masked_fill(own, -torch.inf).log_softmax(-1)
        return -(log_p.masked_fill(~positive, 0).sum(-1) / positive.sum(-1).clamp(min=1))[positive.any(-1)].mean()

    return _agree(
        lambda x: functional.sup_con(x, labels.to(x.device), temperature=0.1, normalize=False, impl=impl), plain, impl, _rows(N, 1)
    )


def _gather_similarity(impl: str) -> Iterator[Pair]:
    from ._ops.gather import reference

    index = torch.randint(M, (N, 17), generator=torch.Generator().manual_seed(4))
    return _agree(
        lambda q, k: ops.gather_similarity(q, k, index.to(q.device), scale=3.0, impl=impl).square().mean(),
        lambda q, k: reference.gather_similarity(q, k, index, 3.0).square().mean(),
        impl,
        _rows(N, 1),
        _rows(M, 2),
    )


def _sinkhorn(impl: str) -> Iterator[Pair]:
    from ._ops.sinkhorn import reference

    a, b = (torch.full((size,), 1 / size) for size in (N, 29))
    return _agree(
        lambda cost: ops.sinkhorn(cost, epsilon=0.1, max_iters=50, grad="unrolled", impl=impl).value,
        lambda cost: reference.sinkhorn(cost, a.double(), b.double(), 0.1, 50).value,
        impl,
        reference.cost_matrix(_rows(N, 1), _rows(29, 2), "sqeuclidean"),
    )


def _sinkhorn_assign(impl: str) -> Iterator[Pair]:
    scores = _rows(N, 1) @ _rows(D, 2).T
    q = (scores.double() / 0.05).exp()
    for _ in range(3):
        q = q / q.sum(-2, keepdim=True)
        q = q / q.sum(-1, keepdim=True)
    yield functional.sinkhorn_assign(scores.to(_device(impl)), impl=impl), q


def _sinkhorn_normalize(impl: str) -> Iterator[Pair]:
    from ._ops.sinkhorn import normalize

    weight = _rows(19 * 4, 3, 4).reshape(19, 4, 4)
    return _agree(
        lambda x: (functional.sinkhorn_normalize(x, impl=impl) * weight.to(x)).mean(),
        lambda x: (normalize.plain(x, 20, 1e-6) * weight.to(x)).mean(),
        impl,
        _rows(19 * 4, 1, 4).reshape(19, 4, 4),
    )


def _knn(impl: str) -> Iterator[Pair]:
    from ._ops.knn import reference

    query, bank = _rows(N, 1), _rows(M, 2)
    got, wanted = ops.knn(query.to(_device(impl)), bank.to(_device(impl)), 5, impl=impl), reference.knn(query, bank, 5)
    yield from zip(got, wanted, strict=True)


def _row_extrema(impl: str) -> Iterator[Pair]:
    from ._ops.triplet import reference

    x, y, labels_x, labels_y = _rows(N, 1), _rows(M, 2), _labels(N), _labels(M)
    found = ops.row_extrema(*(t.to(_device(impl)) for t in (x, y, labels_x, labels_y)), impl=impl)
    d = reference.distances(x, y, normalize=False)
    positive, negative = reference.sides(labels_x, labels_y, None)
    for extreme, mask, farthest in zip(found, (positive, positive, negative, negative), (True, False, False, True), strict=True):
        yield extreme.index, reference.pick(d, mask, farthest=farthest).double().argmax(-1)
        yield extreme.value, (d * reference.pick(d, mask, farthest=farthest)).sum(-1)


def _labelled(name: str, wanted: Callable[..., Tensor], **options) -> Callable[[str], Iterator[Pair]]:
    """The check of a loss of embeddings and labels; `wanted(x, positive, negative)` is the sum of the reference's losses."""

    def check(impl: str) -> Iterator[Pair]:
        from ._ops.triplet import reference

        labels = _labels(N)
        sides = reference.sides(labels, labels, torch.arange(N))
        loss = getattr(functional, name)
        return _agree(
            lambda x: loss(x, labels.to(x.device), reduction="sum", impl=impl, **options) / N,
            lambda x: wanted(reference, x, *sides).sum() / N,
            impl,
            _rows(N, 1),
        )

    return check


def _triplets(reference, x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    d = reference.distances(x, x)
    return reference.triplet_loss([(d, None)], reference.batch_hard(d, positive, negative), margin=0.2, reduction="sum")


def _similarity(reference, x: Tensor) -> Tensor:
    return 1 - reference.distances(x, x, "cosine")


def _relation(name: str, **options) -> Callable[[str], Iterator[Pair]]:
    """The check of a function of two sets of rows, in the first; RKD's may differ in width."""

    def check(impl: str) -> Iterator[Pair]:
        from ._ops.triplet import reference

        x, y = _rows(N, 1), _rows(N, 2, D + 8 * name.startswith("rkd"))
        return _agree(
            lambda x: getattr(functional, name)(x, y.to(x.device), impl=impl, **options),
            lambda x: getattr(reference, name)(x, y.double(), **options),
            impl,
            x,
        )

    return check


def _mine_triplets(impl: str) -> Iterator[Pair]:
    from ._ops.triplet import reference

    x, labels = _rows(N, 1), _labels(N)
    triplets = functional.mine_triplets(x.to(_device(impl)), labels.to(_device(impl)), mining="batch_hard", impl=impl)
    d = reference.distances(x, x)
    mined = reference.batch_hard(d, *reference.sides(labels, labels, torch.arange(N)))  # [N, M, M]
    yield torch.stack(triplets.to_tuple(), 1), mined.nonzero()


CHECKS: dict[str, Callable[[str], Iterator[Pair]]] = {
    "similarity_softmax": _similarity_softmax,
    "symmetric_lse": _symmetric_lse,
    "sigmoid_pair_loss": _sigmoid_pair_loss,
    "matching_loss": _matching_loss,
    "sup_con": _sup_con,
    "info_nce": _info_nce,
    "similarity_distillation": _similarity_distillation,
    "gather_similarity": _gather_similarity,
    "sinkhorn": _sinkhorn,
    "sinkhorn_assign": _sinkhorn_assign,
    "sinkhorn_normalize": _sinkhorn_normalize,
    "knn": _knn,
    "row_extrema": _row_extrema,
    "mine_triplets": _mine_triplets,
    "triplet_loss": _labelled("triplet_loss", _triplets),
    "multi_similarity_loss": _labelled(
        "multi_similarity_loss", lambda r, x, positive, negative: r.multi_similarity_loss(_similarity(r, x), positive, negative)
    ),
    "margin_loss": _labelled(
        "margin_loss", lambda r, x, *sides: torch.stack(r.margin_loss(r.distances(x, x), *sides, torch.full((N,), 1.2).double()))
    ),
    "contrastive_loss": _labelled("contrastive_loss", lambda r, x, *sides: torch.stack(r.contrastive_loss(r.distances(x, x), *sides))),
    "angular_loss": _labelled("angular_loss", lambda r, x, *sides: r.angular_loss(_similarity(r, x), _similarity(r, x), *sides)),
    "mmd_rbf": _relation("mmd_rbf", sigmas=(0.5, 1.0)),
    "rkd_distance": _relation("rkd_distance"),
    "rkd_angle": _relation("rkd_angle"),
}
