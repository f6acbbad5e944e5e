"""impl="cpu": mining and the losses of chosen triplets in C++ (csrc/cpu/triplet).

Rows are read as they are given, in float32, bfloat16 or float16, and brought to unit length and moved by about the mean of
the references as they are packed: no prepared copy of either matrix exists. Candidates are compared by scores formed as in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import extension
from ..._core.centre import middle
from . import chosen, classes, distances, mining, portable, sampling
from .classes import Anchors, References
from .mining import Settings
from .portable import Mined, Problem, Rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: numbers in the gathered rows of all positives, at most: 32 MB
GATHERED = 2**23
#: kMostLayers of every_triplet.h
MOST_LAYERS = 16
_FLOAT_PRODUCTS = 0
#: where one of each kind is looked for, products may be bf16's: what they cannot tell apart is measured again (extrema_coarse.inl)
_COARSE_PRODUCTS = 2
#: which positive a negative must be farther than
_BEYOND = {"hardest_positive": 1, "easiest_positive": 2}
_CENTRE_ROWS = 1024
#: rows of what triplet_extrema returns, by the names of extrema.KINDS
_FOUND = {"hardest_positive": 0, "easiest_positive": 1, "hardest_negative": 2, "easiest_negative": 3}


def missing() -> str | None:
    """Why the kernels are not on this machine (None: they are)."""
    return extension.missing_cpu()


def refuses(
    *,
    device_type: str = "cpu",
    dtype: torch.dtype = torch.float32,
    others: tuple[torch.dtype, ...] = (),
    width: int = 1,
    mined: str = "batch_hard",
    bounded: bool = True,
    listed: bool = False,
    layers: int = 1,
    gathered: int = 0,
    **_facts,
) -> str | None:
    """Why they cannot serve a call on this device type, with these dtypes and this width and mining (None: they can).

    `bounded`: the caller says how many positives an anchor has at most. `listed`: triplets are wanted, not their loss.
    `layers`: in which each has one.
    `gathered`: numbers in the rows of all positives, where they are gathered.
    """
    if device_type != "cpu":
        return f"it runs on CPU tensors, these are on {device_type}"
    for given in (dtype, *others):
        if given not in DTYPES:
            return f"it takes float32, bfloat16 or float16, not {given}"
    if width == 0:
        return "it takes rows of at least one element"
    if mined in mining.PER_PAIR and torch.compiler.is_compiling() and not bounded:
        return f"compiled without max_positives it would reserve room for every reference as a positive of mining={mined!r}"
    if mined in mining.SETS and listed:
        return f"with mining={mined!r} it sums losses: no list of triplets"
    if mined in mining.SETS and layers > MOST_LAYERS:
        return f"with mining={mined!r} it takes at most {MOST_LAYERS} layers, not {layers}"
    if gathered > GATHERED:
        return f"it would gather the rows of all positives, {gathered} numbers, more than {GATHERED}"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "it does not run under the transforms of torch.func"
    return None


def extremes(
    x: Tensor,
    y: Tensor,
    anchors: Anchors,
    refs: References,
    metric: str,
    normalize: bool,
    *,
    beyond: str | None = None,
    farthest_negative: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Column [N] of each of extrema.KINDS (-1: none), and whether a distance compared was NaN [N].

    With `beyond`, a kind of positive, only negatives strictly farther than it compete for "hardest_negative".
    """
    index, unordered = torch.ops.kdfast.triplet_extrema(
        *_scan(x, y, anchors, refs, metric, normalize), _BEYOND.get(beyond, 0), farthest_negative, _COARSE_PRODUCTS
    )
    return {kind: index[at] for kind, at in _FOUND.items()}, unordered


def _scan(x: Tensor, y: Tensor, anchors: Anchors, refs: References, metric: str, normalize: bool) -> tuple:
    """What every scan is given: rows, their metric, who is whose positive."""
    normalize = normalize or metric == "cosine"
    in_batch = y is x
    x = x.detach().contiguous()
    y = x if in_batch else y.detach().contiguous()
    per_anchor = (anchors.label, anchors.own, anchors.first, anchors.skip, anchors.count, anchors.first.argsort(stable=True))
    rows = x, y, _centre(y, metric, normalize), normalize, chosen.METRICS[metric]
    return *rows, *(t.contiguous() for t in (*per_anchor, *refs))


def _centre(y: Tensor, metric: str, normalize: bool) -> Tensor | None:
    """About the mean of y [M, D], from a sample of its rows. None for the cosine, and of no rows."""
    if metric == "cosine" or y.shape[0] == 0:
        return None
    sample = y[:: max(1, y.shape[0] // _CENTRE_ROWS)].float()
    return middle(F.normalize(sample, dim=-1) if normalize else sample)


def _mined(s: Settings, p: Problem, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """positive, negative [N, P] int32 (-1: none), and which anchors [N] have triplets and among their distances a NaN."""
    if s.mining in mining.PER_PAIR:
        return _mined_pairs(s, p, seed)
    kind, farther = mining.PER_ANCHOR[s.mining]
    found, unordered = extremes(p.mine, p.mine_ref, p.anchors, p.classes, s.metric, s.normalize, beyond=kind if farther else None)
    positive, negative = found[kind], found["hardest_negative"]
    return positive.int()[:, None], negative.int()[:, None], unordered & (positive >= 0) & (negative >= 0)


def _mined_pairs(s: Settings, p: Problem, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scan = _scan(p.mine, p.mine_ref, p.anchors, p.classes, s.metric, s.normalize)
    if s.mining == "semi_hard_facenet":
        negative, unordered = torch.ops.kdfast.triplet_facenet(*scan, p.positives, _FLOAT_PRODUCTS)
    else:
        least, (low, high) = sampling.RANGES[s.mining]
        squares = (d * abs(d) for d in (low if least is None else least, low, high))
        fallback = s.fallback == "uniform"
        negative, unordered = torch.ops.kdfast.triplet_weighted(*scan, p.positives, seed, *squares, fallback, _FLOAT_PRODUCTS)
    column, exists = classes.positives(p.anchors, p.classes, 0, p.positives)
    return torch.where(exists, column, -1).int(), negative, unordered


def triplet_rows(s: Settings, p: Problem, seed: Tensor) -> Rows:
    """Losses per anchor of a problem whose rows are as given, for minings of one negative an anchor or a pair."""
    positive, negative, unordered = _mined(s, p, seed)
    valid = (positive >= 0) & (negative >= 0)
    pairs = zip(p.layers, p.refs, strict=True)
    loss = sum(chosen.losses(s, x, None if y is x else y, positive, negative) for x, y in pairs)  # [N, P]
    sums = loss.sum(1)
    return Rows(sums + distances.nan_where(unordered, sums.detach()), valid.sum(1), portable.nonzero(s, loss, valid).sum(1))


def mine(s: Settings, p: Problem, seed: Tensor) -> Mined:
    """The triplets themselves, at a static shape."""
    positive, negative, _ = _mined(s, p, seed)
    valid = (positive >= 0) & (negative >= 0)
    found = (*(torch.where(valid, t, -1).long() for t in (positive, negative)), valid)
    return Mined(*(t[:, 0] for t in found)) if s.mining in mining.PER_ANCHOR else Mined(*found)


def _extrema_fake(x, *args) -> tuple[Tensor, Tensor]:
    n = x.shape[0]
    return x.new_empty((4, n), dtype=torch.int64), x.new_empty((n,), dtype=torch.bool)


def _pairs_fake(x, *args) -> tuple[Tensor, Tensor]:
    n, each = x.shape[0], args[13]
    return x.new_empty((n, each), dtype=torch.int32), x.new_empty((n,), dtype=torch.bool)


if missing() is None:
    torch.library.register_fake("kdfast::triplet_extrema", _extrema_fake)
    torch.library.register_fake("kdfast::triplet_facenet", _pairs_fake)
    torch.library.register_fake("kdfast::triplet_weighted", _pairs_fake)
