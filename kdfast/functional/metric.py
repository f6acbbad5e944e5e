"""Triplet mining and triplet losses, in batch or against a bank, without the distance matrix."""

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from .._core import checks, random
from .._core.dtypes import full_precision
from .._ops import triplet as op
from .._ops.triplet import classes, cpu, dense, distances, every_triplet, inputs, mining, portable, sampling
from .._ops.triplet.triton import mining as triton_mining

REDUCTIONS = ("mean_nonzero", "mean", "sum", "none")


@dataclass(frozen=True)
class Triplets:
    """Mined triplets at a static shape: [N] (one an anchor), [N, P] (one a positive pair) or [N, P, per_pair].

    Entries where `valid` is False hold -1 as positive and negative.
    """

    anchor: Tensor
    positive: Tensor
    negative: Tensor
    valid: Tensor

    def to_tuple(self) -> tuple[Tensor, Tensor, Tensor]:
        """(anchor, positive, negative) [T] of the valid ones; reads how many there are, which synchronises."""
        return self.anchor[self.valid], self.positive[self.valid], self.negative[self.valid]


def triplet_loss(
    embeddings: Tensor | list[Tensor],
    labels: Tensor,
    *,
    ref: Tensor | list[Tensor] | None = None,
    ref_labels: Tensor | None = None,
    ref_valid: int | Tensor | None = None,
    own_index: bool | Tensor | None = None,
    mining: str = "batch_hard",
    margin: float = 0.2,
    soft: bool = False,
    swap: bool = False,
    metric: str = "euclidean",
    normalize: bool = True,
    direction: str = "cluster",
    sample_on: Tensor | tuple[Tensor, Tensor] | None = None,
    fallback: str = "uniform",
    epsilon: float = 0.1,
    max_positives: int | None = None,
    reduction: str = "mean_nonzero",
    generator: torch.Generator | Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Triplet loss relu(d_ap - d_an + margin) over mined triplets (anchor, positive, negative).

    | mining | triplets |
    |---|---|
    | batch_hard | farthest positive and nearest negative of each anchor |
    | easy_positive | nearest positive and nearest negative |
    | easy_semihard, hard_semihard | nearest / farthest positive; nearest negative with d_an > d_ap, else none |
    | batch_all | every one |
    | semi_hard | every one with 0 < d_an - d_ap <= margin |
    | semi_hard_facenet | per (a, p) the nearest negative with d_an > d_ap, else the farthest |
    | distance_weighted | per (a, p) a negative drawn with log weight (2-D) ln d - (D-3)/2 ln(1 - d^2/4), d clamped >= 0.5, d < 1.4 |
    | focal | the same weights, not clamped, 0.5 < d < 1.0 |
    | multi_similarity | positives with d_ap + epsilon > min d_an, negatives with d_an - epsilon < max d_ap |

    Args:
        embeddings: [N, D], or a list of layers [N, D_l] (needs `sample_on`): one index set, a triplet's losses summed over the layers.
        labels: [N], any integer dtype.
        ref, ref_labels: references [M, D] (a list for layers, or a labelled kdfast bank) and labels [M]; default the batch itself. They
            may need gradient. `ref_valid`: only that many first rows exist.
        own_index: the anchor's own reference, excluded: True (row i is i) or integers [N], -1: none. In batch always the diagonal.
        margin: in units of `metric`, > 0 for semi_hard. `soft`: softplus(d_ap - d_an + margin) instead of the hinge.
        swap: the negative's distance is min(d_an, d_pn); mining is not affected.
        metric: "euclidean", "sqeuclidean" or "cosine" (1 - cos). `normalize`: unit rows first. Default True.
        direction: "cluster", or "confuse": the same triplets, relu(d_an - d_ap + margin).
        sample_on: [N, D'] to mine on instead, without gradient; with `ref` a pair ([N, D'], [M, D']). Not for batch_all.
        fallback: of distance_weighted and focal where an anchor has no negative in range: "uniform" over all its negatives, or "drop".
        max_positives: positives considered per anchor, in order of their index. Default all: their largest number is read on a CPU
            in eager code; on a GPU or compiled, where it cannot be for free, minings other than the per-anchor ones
            reserve room for M, which this argument saves.
        reduction: "mean_nonzero" (over losses > 0: every softplus is), "mean" (over mined triplets), "sum", "none": sums per anchor [N].
        generator: of distance_weighted and focal: torch.Generator, or an integer seed tensor (the form for compiled code).

    Returns: 0-d or [N]; float32, float64 for float64. Static shapes, no host synchronisation. An anchor without a
    positive or a negative contributes nothing; no triplet at all gives 0 with a graph. A NaN distance makes its anchor's
    loss NaN. At distance 0 the gradient is 0. Under autocast everything is formed in float32.

    Cost: O(N M D) time, memory of a block of anchors. Soft, swapped, `sample_on` or several layers visit every triplet of
    batch_all, semi_hard and multi_similarity (N P M); otherwise these cost N M (D + log P). impl="cpu" serves them with at most
    16 layers, and keeps about 20 bytes for each triplet of the minings with one negative an anchor or a pair.

    Raises: ValueError, TypeError, IndexError naming the argument. Sources: Hermans et al. 2017 (batch_hard, batch_all), Schroff et
    al. 2015 (FaceNet), Wu et al. 2017 (distance weighting), Wang et al. 2019 (multi-similarity), Balntas et al. 2016 (swap).
    """
    checks.choice("reduction", reduction, REDUCTIONS)
    impl, settings, problem, seed = _problem(
        "triplet_loss",
        impl,
        embeddings,
        labels,
        sources=dict(ref=ref, ref_labels=ref_labels, ref_valid=ref_valid, own_index=own_index, metric=metric, normalize=normalize),
        settings=dict(mining=mining, margin=margin, soft=soft, swap=swap, fallback=fallback, epsilon=epsilon),
        direction=direction,
        sample_on=sample_on,
        max_positives=max_positives,
        generator=generator,
    )
    problem = problem._replace(positives=min(problem.positives, problem.mine_ref.shape[0]))
    with full_precision(problem.mine):
        if problem.mine.shape[0] == 0:
            return portable.nothing((*problem.layers, *problem.refs), reduction)
        return portable.finish(_module(settings, problem).triplet_rows(settings, problem, seed), reduction)


def mine_triplets(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ref_valid: int | Tensor | None = None,
    own_index: bool | Tensor | None = None,
    mining: str = "batch_hard",
    margin: float = 0.2,
    metric: str = "euclidean",
    normalize: bool = True,
    fallback: str = "uniform",
    epsilon: float = 0.1,
    max_positives: int | None = None,
    per_pair: int | None = None,
    generator: torch.Generator | Tensor | None = None,
    impl: str | None = None,
) -> Triplets:
    """The triplets `triplet_loss` takes with the same arguments, as indices: anchor into embeddings, positive and negative into ref.

    Args:
        max_positives: P of the result's shape, for minings with a triplet per (anchor, positive). Default the largest number of
            positives: eager code only, and on a GPU reading it synchronises. Further positives, by index, are left out.
        per_pair: batch_all, semi_hard and multi_similarity take a set of negatives for each (a, p): this many are drawn from it,
            uniformly with replacement (`generator`). Required for them, ValueError for the others.
        The rest as in `triplet_loss`.

    Returns: Triplets, [N] for batch_hard, easy_positive, easy_semihard, hard_semihard; [N, P] for semi_hard_facenet,
    distance_weighted, focal (the same draws as triplet_loss for one seed); [N, P, per_pair] for the set minings.
    """
    checks.choice("mining", mining, op.mining.MININGS)
    draws = mining in op.mining.SETS
    if draws and per_pair is None:
        raise ValueError(f"per_pair must be given for mining={mining!r}, which takes a set of negatives for each pair, got None")
    if per_pair is not None:
        if not draws:
            raise ValueError(f"per_pair must be None for mining={mining!r}, which takes at most one negative a pair, got {per_pair}")
        checks.count("per_pair", per_pair)
    per_anchor = mining in op.mining.PER_ANCHOR
    if max_positives is None and not per_anchor and torch.compiler.is_compiling():
        raise ValueError(f"max_positives must be given for mining={mining!r} in compiled code: the result's shape depends on it")
    impl, settings, problem, seed = _problem(
        "mine_triplets",
        impl,
        embeddings,
        labels,
        sources=dict(ref=ref, ref_labels=ref_labels, ref_valid=ref_valid, own_index=own_index, metric=metric, normalize=normalize),
        settings=dict(mining=mining, margin=margin, fallback=fallback, epsilon=epsilon),
        max_positives=max_positives,
        generator=generator,
        seeded=draws,
    )
    if max_positives is None and not per_anchor:
        counts = problem.anchors.count
        problem = problem._replace(positives=max(1, int(counts.max())) if counts.numel() else 1)
    if problem.mine.shape[0] == 0:
        none = problem.anchors.row.new_empty((0,) if per_anchor else (0, problem.positives, *([per_pair] if draws else [])))
        return Triplets(none, none, none, none.bool())
    with full_precision(problem.mine):
        module = _module(settings, problem)
        m = portable.mine(settings, problem, seed, per_pair) if module is portable else module.mine(settings, problem, seed)
    anchor = problem.anchors.row.view(-1, *[1] * (m.valid.dim() - 1)).expand(m.valid.shape)
    return Triplets(anchor, m.positive, m.negative, m.valid)


def _module(s: mining.Settings, p: portable.Problem):
    """What serves a mining in an implementation."""
    if s.impl == "cpu" and s.mining in mining.SETS and (s.swap or p.separate):
        return every_triplet
    if s.impl != "torch" and s.mining in mining.SETS:
        return dense
    if s.impl == "triton" and s.mining in mining.PER_PAIR:
        return triton_mining
    return cpu if s.impl == "cpu" else portable


def _problem(
    name_of_op,
    impl,
    embeddings,
    labels,
    *,
    sources,
    settings,
    direction="cluster",
    sample_on=None,
    max_positives=None,
    generator=None,
    seeded=False,
) -> tuple[str, mining.Settings, portable.Problem, Tensor]:
    """The implementation that serves the call, arguments checked and arranged for it, and the seed of random minings."""
    name, margin = settings["mining"], settings["margin"]
    checks.choice("mining", name, mining.MININGS)
    checks.choice("direction", direction, ("cluster", "confuse"))
    checks.choice("fallback", settings["fallback"], ("uniform", "drop"))
    for argument in ("margin", "epsilon"):
        value = settings[argument]
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{argument} must be a float, got {type(value).__name__}")
        checks.nonnegative_number(argument, value)
    for argument in ("soft", "swap"):
        checks.flag(argument, settings.get(argument, False))
    random.check("generator", generator)
    if name == "semi_hard" and margin == 0:
        raise ValueError("margin must be > 0 for mining='semi_hard', whose negatives lie within it, got 0")
    if max_positives is not None:
        checks.count("max_positives", max_positives)
    batch = inputs.collect(embeddings, labels, ready=False, **sources)
    if len(batch.layers) > 1 and sample_on is None:
        raise ValueError(f"sample_on must be given with several layers, to mine one index set on, got {len(batch.layers)} layers and None")
    metric, normalize = sources["metric"], sources["normalize"]
    on = batch if sample_on is None else _mined_on(sample_on, name, batch, sources)
    rows = (*batch.layers, *batch.refs, *on.layers, *on.refs)
    bounded = max_positives is not None or name_of_op == "mine_triplets"
    facts = dict(others=tuple(t.dtype for t in rows), width=min(t.shape[1] for t in rows), mined=name, bounded=bounded)
    facts |= dict(
        soft=settings.get("soft", False),
        swap=settings.get("swap", False),
        separate=sample_on is not None,
        listed=name_of_op == "mine_triplets",
        layers=len(batch.layers),
    )
    positives = classes.largest(batch.anchors, batch.refs[0].shape[0])
    impl = op.choose(name_of_op, impl, batch.layers[0], **facts)
    by_kernels = impl == "cpu" or (impl == "triton" and name in mining.SETS)  # which take rows as given
    if not by_kernels or batch.layers[0].shape[0] == 0:
        batch = batch.ready(metric, normalize)
        on = batch if sample_on is None else on.ready(metric, normalize)
    mine, mine_ref = on.layers[0].detach(), on.refs[0].detach()
    if not by_kernels:
        mine, mine_ref = distances.centred(mine, mine_ref, metric)
    bound = mine_ref.shape[0]
    if name not in mining.PER_ANCHOR:
        bound = max_positives or positives
    random_mining = seeded or name in sampling.RANGES
    seed = random.seed(generator, mine.device) if random_mining else torch.zeros((), dtype=torch.int64, device=mine.device)
    chosen = mining.Settings(
        metric=metric, normalize=normalize, sign=1 if direction == "cluster" else -1, width=mine.shape[1], impl=impl, **settings
    )
    separate = sample_on is not None
    return impl, chosen, portable.Problem(batch.layers, batch.refs, mine, mine_ref, batch.anchors, batch.classes, bound, separate), seed


def _mined_on(sample_on, name: str, batch: inputs.Batch, sources: dict) -> inputs.Batch:
    """The batch with sample_on as its one layer."""
    if name == "batch_all":
        raise ValueError("sample_on must be None for mining='batch_all', which takes every triplet whatever the distances")
    paired = sources["ref"] is not None
    parts = tuple(sample_on) if isinstance(sample_on, list | tuple) else (sample_on,)
    if len(parts) != 1 + paired:
        raise ValueError(
            f"sample_on must be {'a pair (rows [N, D], references [M, D]) with ref' if paired else 'one tensor [N, D] without ref'}, "
            f"got {len(parts)}"
        )
    for part, like in zip(parts, (batch.layers[0], batch.refs[0]), strict=False):
        checks.rows("sample_on", part, ndim=2)
        checks.alike("sample_on", part, "embeddings", like, dtype=False)
        checks.exact_shape("sample_on", part, (like.shape[0], part.shape[1]))
    if paired:
        checks.same_width("sample_on[1]", parts[1], "sample_on[0]", parts[0])
        checks.alike("sample_on[1]", parts[1], "sample_on[0]", parts[0])
    return batch._replace(layers=parts[:1], refs=parts[1:]) if paired else batch._replace(layers=parts, refs=parts)
