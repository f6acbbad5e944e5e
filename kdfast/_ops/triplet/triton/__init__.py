"""impl="triton": the scan for extremes (extrema.py) in Triton, for the minings with one triplet an anchor and for row_extrema.

The kernel reads rows in three bfloat16 parts, whose products rank as exactly as float32's; distances reported, losses and gradients
are then those of the chosen rows, in PyTorch's operations, O(N D).
"""

import torch
from torch import Tensor

from ...._core import triton_runtime as runtime
from ..classes import Anchors, References
from ..extrema import KINDS, PER_ANCHOR, Extreme
from ..sampling import RANGES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PARTS = 3
#: numbers in the gathered rows of all positives, at most: 256 MB
GATHERED = 2**26
#: what the kernel looks for, in the order of extrema.KINDS
FLAGS = ("FAR_POSITIVE", "NEAR_POSITIVE", "NEAR_NEGATIVE", "FAR_NEGATIVE")


def missing() -> str | None:
    return runtime.missing()


def refuses(
    *,
    device_type: str = "cuda",
    dtype: torch.dtype = torch.float32,
    others=(),
    width: int = 1,
    mined: str = "batch_hard",
    bounded: bool = True,
    separate: bool = False,
    listed: bool = False,
    gathered: int = 0,
    soft: bool = False,
    swap: bool = False,
    **_facts,
) -> str | None:
    """Why the kernels cannot serve a call (None: they can).

    `bounded`: the caller says how many positives an anchor has at most. `separate`: mined on other rows than the
    embeddings. `listed`: triplets are wanted, not their loss. `soft`, `swap`: as triplet_loss has them.
    `gathered`: numbers in the rows of all positives, where they are gathered.
    """
    for given in (dtype, *others):
        if given not in DTYPES:
            return f"it takes float32, bfloat16 or float16, not {given}"
    if width == 0:
        return "it takes rows of at least one element"
    per_pair = mined == "semi_hard_facenet" or mined in RANGES
    if per_pair and not bounded:
        return f"without max_positives it would reserve room for every reference as a positive of mining={mined!r}"
    if not (per_pair or mined in PER_ANCHOR or not (soft or swap or separate or listed)):
        return f"with mining={mined!r} it sums plain hinges mined on the embeddings: no soft, swap, sample_on, and no list of triplets"
    if gathered > GATHERED:
        return f"it would gather the rows of all positives, {gathered} numbers, more than {GATHERED}"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "it does not run under the transforms of torch.func"
    return runtime.refuses_device(device_type)


def scan(
    x: Tensor, y: Tensor, anchors: Anchors, refs: References, metric: str, kinds: tuple[str, ...], beyond: Tensor | None = None
) -> tuple[Extreme, ...]:
    """As extrema.scan, of prepared float32 rows; values are the kernel's, squared where the metric is Euclidean."""
    mine = x.detach().contiguous()
    theirs = mine if y is x else y.detach().contiguous()
    rules = (None if t is None else t.contiguous() for t in (anchors.label, anchors.own, beyond, refs.label, refs.exists))
    value, index = torch.ops.kdfast_triton.triplet_extrema(mine, theirs, *rules, metric != "cosine", [kind in kinds for kind in KINDS])
    found = []
    for kind in kinds:
        at = list(KINDS).index(kind)
        v, i = value[at], index[at]
        found.append(Extreme(torch.where(torch.isposinf(v), torch.nan, v if KINDS[kind][1] else -v), i))
    return tuple(found)


def extrema(
    x: Tensor,
    y: Tensor,
    label: Tensor,
    own: Tensor,
    beyond: Tensor | None,
    key_label: Tensor,
    exists: Tensor,
    euclidean: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """value [4, N] as the kernel leaves it and column [4, N] int64 of the kinds of extrema.KINDS that are wanted (the others: -inf, -1)."""
    from . import kernels

    rows, columns, width = len(x), len(y), x.shape[1]
    t = runtime.score_tiles(width, _PARTS)
    row_tiles = -(-rows // t.rows)
    parts = runtime.splits(row_tiles, columns, t.columns, x.device)
    value = x.new_full((parts, 4, rows), -torch.inf)
    index = torch.full((parts, 4, rows), -1, dtype=torch.int32, device=x.device)
    if rows and columns:
        x_parts, x_square = parted(x, _PARTS, t.depth, euclidean)
        y_parts, y_square = (x_parts, x_square) if y is x else parted(y, _PARTS, t.depth, euclidean)
        kernels.extrema[(row_tiles, parts)](
            x_parts, y_parts, x_square, y_square, label, own, x_square if beyond is None else beyond, key_label, exists, value, index,
            rows, columns, x_parts.shape[2], runtime.share(columns, parts, t.columns), **dict(zip(FLAGS, wanted, strict=True)),
            BEYOND=beyond is not None, EUCLIDEAN=euclidean, **t.options(_PARTS),
        )  # fmt: skip
    best, part = value.max(0)  # the first among equals, whose columns are the lower ones
    return best, index.gather(0, part[None])[0].long()


def parted(x: Tensor, parts: int, depth: int, euclidean: bool) -> runtime.Split:
    """Rows in parts, and what each adds to its distances, [N]: |x|^2, or of the cosine its half of 1; inf or NaN where the row is."""
    found = runtime.split(x, parts, depth)
    return found if euclidean else found._replace(square=0.5 + 0 * found.square)


def _fake(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    return x.new_empty((4, len(x))), x.new_empty((4, len(x)), dtype=torch.int64)


runtime.register("triplet_extrema", extrema, _fake)
