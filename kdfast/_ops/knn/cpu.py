"""impl="cpu": candidates by rank from streamed products and their distances, in C++ (csrc/cpu/knn/knn.inl).

A row that was not kept ranked no better than the list's threshold. Where the k-th distance does not beat that by more than rounding can
account for, the query is searched again, with better products and at last in float64: every neighbour is found, whatever the precision.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import extension
from ..._core.centre import middle
from . import portable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_QUERY_SLAB, _BANK_BLOCK = 1 << 16, 1 << 14  # lists of 60 MB at small k; 8 MB of rows of width 128 at a time
_CENTRE_ROWS = 1 << 12
_SPARE = 64  # candidates a list takes beyond those kept, before it is cut
_PRODUCTS = {"ieee": 0, "tf32": 0, "bf16x3": 1, "bf16": 2}
#: of q.k relative to ||q|| ||k||, beyond the rounding of float32 sums: both factors rounded to 8 bits; three products of four, of 16 bits
_PRODUCT_ERROR = {"ieee": 0.0, "tf32": 0.0, "bf16x3": 2.0**-16, "bf16": 2.0**-8 + 2.0**-16}
_LARGEST = torch.finfo(torch.float32).max
_METRICS = {"cosine": 0, "euclidean": 1, "sqeuclidean": 2}


def missing() -> str | None:
    """Why the kernels are not on this machine (None: they are)."""
    return extension.missing_cpu()


def refuses(*, device_type: str = "cpu", dtype: torch.dtype = torch.float32, whole_rows: bool = True, **_facts) -> str | None:
    """Why they cannot serve a call on this device type and dtype, with an array of such a layout (None: they can)."""
    if torch.compiler.is_compiling():
        return "whether it searches a query again depends on the data, which torch.compile cannot follow"
    if not whole_rows:
        return "it reads numpy arrays in C order and native byte order"
    if device_type != "cpu":
        return f"it runs on CPU tensors, these are on {device_type}"
    return None if dtype in DTYPES else f"it takes float32, bfloat16 or float16, not {dtype}"


def blocks(n: int, m: int) -> int:
    """How often `step` is called."""
    return -(-n // _QUERY_SLAB) * -(-m // _BANK_BLOCK)


def knn(p: portable.Problem, k: int, candidates: int, step: Callable[[], None], products: str) -> tuple[Tensor, Tensor]:
    """(distance [N, k], index [N, k]), ascending, ties to the lower index, missing (inf, -1)."""
    n = len(p.query)
    p = p._replace(bank=_tensor(p.bank))
    out = torch.full((n, k), torch.inf, device="cpu"), torch.full((n, k), -1, device="cpu")
    for start in range(0, n, _QUERY_SLAB):
        slab = slice(start, min(start + _QUERY_SLAB, n))
        for whole, part in zip(out, _slab(portable.queries(p, slab), k, candidates, step, products), strict=True):
            whole[slab, : part.shape[1]] = part
    return out


def _tensor(bank) -> Tensor:
    """The bank as a contiguous tensor, an array on disk as a view of it: the kernels only read."""
    if isinstance(bank, Tensor):
        return bank.contiguous()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(bank)


def _slab(p: portable.Problem, k: int, candidates: int, step: Callable[[], None], products: str) -> tuple[Tensor, Tensor]:
    n, m = len(p.query), len(p.bank)
    k, kept = min(k, m), min(candidates, m)
    rows = p.rows(p.query, slice(0, n)).contiguous()
    centre = None if p.metric == "cosine" else middle(p.rows(p.bank, slice(0, _CENTRE_ROWS)).float())
    query = F.normalize(rows.float(), dim=1) if centre is None else rows.float() - centre
    rank = query.new_empty(n, kept + max(kept, _SPARE))
    index = torch.empty_like(rank, dtype=torch.int64)
    width, unit = query.shape[1], 2.0**-24
    errors = (_PRODUCT_ERROR[products] + (width + 32) * unit, (width / 8 + 32) * unit)  # a chain of D products; norms by vectors
    lists = (
        k, kept, rank, index, index.new_zeros(n), index.new_zeros(n), rank.new_full((n,), torch.inf),
        _METRICS[p.metric], query.square().sum(dim=1), *errors,
    )  # fmt: skip
    for start in range(0, m, _BANK_BLOCK):
        columns = slice(start, min(start + _BANK_BLOCK, m))
        keys = p.rows(p.bank, columns)
        if centre is None:
            norm = torch.linalg.vector_norm(keys, dim=1, dtype=torch.float32)
            factor, offset = -norm.clamp_(min=1e-12).reciprocal_(), norm.new_zeros(len(keys))
        else:
            keys = keys.float() - centre
            factor, offset = keys.new_full((len(keys),), -2.0), keys.square().sum(dim=1).nan_to_num_(_LARGEST, _LARGEST)
        dropped = p.dropped(columns)
        if dropped is not None:
            offset = torch.where(dropped, torch.inf, offset)
        key_labels = None if p.bank_labels is None else p.bank_labels[columns].long().contiguous()
        torch.ops.kdfast.knn_scan(
            query, keys.contiguous(), factor, offset, p.query_labels, key_labels, p.same_class == "only", p.own, start,
            _PRODUCTS[products], *lists,
        )  # fmt: skip
        step()
    distance, index, doubtful = torch.ops.kdfast.knn_refine(rows, p.bank, *lists)
    again = doubtful.nonzero()[:, 0]
    if len(again) == 0:
        return distance, index
    some = portable.queries(p, again)
    if products == "ieee":
        some = some._replace(rows=lambda source, selection: p.rows(source, selection).double())
        exact, where = portable.knn(some, k, k + 8, lambda: None)
    else:
        exact, where = _slab(some, k, 2 * candidates, lambda: None, "ieee")
    distance[again], index[again] = exact.float(), where
    return distance, index


def _refine_fake(query: Tensor, bank: Tensor, k: int, *args) -> tuple[Tensor, Tensor, Tensor]:
    shape = (len(query), k)
    return (
        query.new_empty(shape, dtype=torch.float32),
        query.new_empty(shape, dtype=torch.int64),
        query.new_empty(shape[:1], dtype=torch.bool),
    )


if missing() is None:
    torch.library.register_fake("kdfast::knn_scan", lambda *args: None)
    torch.library.register_fake("kdfast::knn_refine", _refine_fake)
