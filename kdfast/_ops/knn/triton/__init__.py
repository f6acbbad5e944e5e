"""impl="triton": the best score of each group of bank rows by products, the best groups by torch.topk, then every distance in them.

A group holds 32 rows, so the N x M scores leave as a thirty-second of them, and only of some queries at a time. As many groups are kept as
portable.py keeps rows: a neighbour is lost only where that many groups rank above its own by less than the products' rounding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...._core import triton_runtime as runtime
from ...._core.centre import middle
from .. import portable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP = 32  # bank rows; 16 under the interpreter
_MINIMA = 1 << 25  # numbers in the minima of a slab of queries, and in the distances of its groups
_CENTRE_ROWS = 1 << 12
_PARTS = {"ieee": 3, "tf32": 2, "bf16x3": 2, "bf16": 1}
_METRICS = {"cosine": 0, "euclidean": 1, "sqeuclidean": 2}
_LARGEST = torch.finfo(torch.float32).max


def missing() -> str | None:
    return runtime.missing()


def refuses(
    *, device_type: str = "cuda", dtype: torch.dtype = torch.float32, resident: bool = True, width: int = 1, **_facts
) -> str | None:
    """Why the kernels cannot serve a call (None: they can). `resident`: query and bank are tensors, not arrays read block by block."""
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 or float16, not {dtype}"
    if not resident:
        return "it reads tensors, not numpy arrays"
    if width == 0:
        return "it takes rows of at least one element"
    return runtime.refuses_device(device_type)


def blocks(n: int, m: int) -> int:
    """How often `step` is called."""
    return -(-n // _slab(m))


def _slab(m: int) -> int:
    """Queries at a time."""
    return min(8192, max(128, _MINIMA // -(-m // GROUP)))


def knn(p: portable.Problem, k: int, candidates: int, step: Callable[[], None], products: str) -> tuple[Tensor, Tensor]:
    """(distance [N, k], index [N, k]), ascending, ties to the lower index, missing (inf, -1)."""
    n, m, device = len(p.query), len(p.bank), p.query.device
    bank = p.bank.contiguous()
    cosine = p.metric == "cosine"
    centre = None if cosine else middle(bank[:_CENTRE_ROWS].float())
    parts = _PARTS[products] if bank.dtype == torch.float32 else 1 if cosine else min(2, _PARTS[products])
    depth = runtime.score_tiles(bank.shape[1], parts).depth
    keys, factor, offset = _prepared(bank, centre)
    keys = torch.ops.kdfast_triton.knn_parts(keys, parts, depth)
    key_labels, dropped = (None if x is None else x.contiguous() for x in (p.bank_labels, p.dropped(slice(0, m))))
    rules = (None if key_labels is None else key_labels.long(), dropped, p.same_class == "only")
    groups = -(-m // _group())
    kept = min(candidates, groups)
    out = torch.full((n, k), torch.inf, device=device), torch.full((n, k), -1, device=device)
    for start in range(0, n, _slab(m)):
        slab = slice(start, min(start + _slab(m), n))
        some = portable.queries(p, slab)
        rows = some.query.contiguous()
        labels, own = (None if x is None else x.long().contiguous() for x in (some.query_labels, some.own))
        prepared, bad, _ = _prepared(rows, centre)
        minima = torch.ops.kdfast_triton.knn_minima(
            torch.ops.kdfast_triton.knn_parts(prepared, parts, depth), keys, 0 * bad, factor, offset, labels, own, *rules
        )
        chosen = portable._first(minima, kept).sort(dim=1).values
        width = max(1, _MINIMA // (kept * _group()))
        for i in range(0, len(rows), width):
            at = slice(i, i + width)
            those = (None if x is None else x[at] for x in (labels, own))
            distance = torch.ops.kdfast_triton.knn_distances(rows[at], bank, chosen[at], _METRICS[p.metric], *those, *rules)
            found = _best(distance, chosen[at], k)
            for whole, part in zip(out, found, strict=True):
                whole[slab][at, : part.shape[1]] = part
        step()
    return out


def _group() -> int:
    return 16 if runtime.INTERPRETED else GROUP


def _prepared(x: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as products take them, factor and offset [M] of their scores as keys; NaN factors or the largest offset where not finite."""
    if centre is not None:
        x = x.float() - centre
        square = x.square().sum(1)
        return x, torch.full_like(square, -2.0) + 0 * square, square.nan_to_num(_LARGEST, _LARGEST)
    norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    if x.dtype == torch.float32:
        return F.normalize(x, dim=1), -1 - 0 * norm, torch.zeros_like(norm)
    power = torch.exp2(-norm.clamp_min(2.0**-126).log2().floor())  # exact, and neither products nor sums leave float32's range
    return (x.float() * power[:, None]).to(x.dtype), -1 / (norm * power).clamp_min(1e-12), torch.zeros_like(norm)


def _best(distance: Tensor, groups: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of the candidates [n, kept GROUP], by distance and index; a NaN or infinite distance after the others."""
    column = (groups[..., None] * _group() + torch.arange(_group(), device=groups.device)).flatten(1)
    some = ~(distance < 0)
    rank = torch.where(some, distance.nan_to_num(_LARGEST, _LARGEST), torch.inf)
    chosen = portable._first(rank, min(k, rank.shape[1]))
    return torch.where(some, distance, torch.inf).gather(1, chosen), torch.where(some, column, -1).gather(1, chosen)


def minima(
    query: Tensor,
    keys: Tensor,
    query_bad: Tensor,
    factor: Tensor,
    offset: Tensor,
    query_labels: Tensor | None,
    own: Tensor | None,
    key_labels: Tensor | None,
    dropped: Tensor | None,
    only: bool,
) -> Tensor:
    """query [P, N, D] and keys [P, M, D] in parts -> the least score of each group, [N, groups]."""
    from . import kernels

    parts, rows, width = query.shape
    columns = keys.shape[1]
    groups = -(-columns // _group())
    t = runtime.score_tiles(width, parts)
    row_tiles = -(-rows // t.rows)
    splits = runtime.splits(row_tiles, columns, t.columns, query.device)
    out = factor.new_empty(rows, groups)
    if rows:
        kernels.group_minima[(row_tiles, splits)](
            query, keys, query_bad, factor, offset, *_rules(query_labels, key_labels, own, dropped, factor), out,
            rows, columns, width, groups, runtime.share(columns, splits, t.columns),
            **_flags(query_labels, own, dropped, only), **t.options(parts),
        )  # fmt: skip
    return out


def distances(
    query: Tensor,
    bank: Tensor,
    chosen: Tensor,
    metric: int,
    query_labels: Tensor | None,
    own: Tensor | None,
    key_labels: Tensor | None,
    dropped: Tensor | None,
    only: bool,
) -> Tensor:
    """Distances of each query to the rows of its groups `chosen` [N, kept], [N, kept GROUP]; -1: not admitted."""
    from . import kernels

    (rows, width), (columns, _), kept = query.shape, bank.shape, chosen.shape[1]
    depth = min(128, runtime.power_of_two(width))
    norms = []
    for x in (query, bank) if metric == 0 else ():
        norm = x.new_empty(len(x), dtype=torch.float32)
        if len(x):
            kernels.row_norms[(-(-len(x) // 16),)](x, norm, len(x), width, ROWS=16, DEPTH=depth, num_warps=4)
        norms.append(norm)
    out = query.new_empty((rows, kept * _group()), dtype=torch.float32)
    if out.numel():
        kernels.group_distances[(rows * kept,)](
            query, bank, *(norms or (out, out)), chosen, *_rules(query_labels, key_labels, own, dropped, out), out,
            columns, width, kept, METRIC=metric, DEPTH=depth, num_warps=4, **_flags(query_labels, own, dropped, only),
        )  # fmt: skip
    return out


def _rules(query_labels, key_labels, own, dropped, unread: Tensor) -> tuple[Tensor, ...]:
    return tuple(unread if x is None else x for x in (query_labels, key_labels, own, dropped))


def _flags(query_labels, own, dropped, only: bool) -> dict:
    given = (("LABELLED", query_labels), ("OWNED", own), ("DROPPED", dropped))
    return {**{name: x is not None for name, x in given}, "ONLY": only, "GROUP": _group()}


def in_parts(x: Tensor, parts: int, depth: int) -> Tensor:
    """[parts, N, D'] of x [N, D] (triton_runtime.split)."""
    return runtime.split(x, parts, depth).parts


def _parts_fake(x: Tensor, parts: int, depth: int) -> Tensor:
    dtype = torch.bfloat16 if parts > 1 or x.dtype == torch.float32 else x.dtype
    return x.new_empty((parts, len(x), -(-x.shape[1] // depth) * depth), dtype=dtype)


def _minima_fake(query: Tensor, keys: Tensor, bad: Tensor, *args) -> Tensor:
    return bad.new_empty(query.shape[1], -(-keys.shape[1] // _group()))


def _distances_fake(query: Tensor, bank: Tensor, chosen: Tensor, *args) -> Tensor:
    return query.new_empty((len(query), chosen.shape[1] * _group()), dtype=torch.float32)


runtime.register("knn_parts", in_parts, _parts_fake)
runtime.register("knn_minima", minima, _minima_fake)
runtime.register("knn_distances", distances, _distances_fake)
