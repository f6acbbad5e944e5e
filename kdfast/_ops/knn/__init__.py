"""Exact nearest neighbours in a bank, streamed. Derivation: README.md; definition: reference.py."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..._core import bank_protocol, checks, impls
from ..._core import precision as precisions
from . import cpu, portable, triton

__all__ = ["knn"]

METRICS = ("cosine", "euclidean", "sqeuclidean")

impls.register("knn", *(impls.Implementation(name, m.missing, m.refuses) for name, m in (("cpu", cpu), ("triton", triton))))


@torch.no_grad()
def knn(
    query: Tensor,
    bank,
    k: int,
    *,
    metric: str = "cosine",
    own_index: bool | Tensor | None = None,
    query_labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    same_class: str = "exclude",
    bank_valid: int | Tensor | None = None,
    progress: bool | Callable[[int, int], None] | None = None,
    precision: str | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest bank rows of each query: (distance [N, k], index [N, k]), nearest first; no gradient.

    The N x M distances are never stored. Products rank candidates, more than k of them; their distances are then taken
    from the rows themselves in float32 (float64 for float64), so that equal rows are at distance 0 and ties go to the
    lower index. impl="cpu" searches a row once more, in float64, where rounding could have hidden a neighbour: it finds every one,
    whatever the precision. The others are exact unless many rows lie within the products' rounding of one another (README.md).
    Where fewer than k rows are admitted the rest is (inf, -1). A NaN distance comes after all others.

    Args:
        query: [N, D], a floating tensor, memory-mapped or not, or a numpy array.
        bank: [M, D], M >= 1, of the query's dtype and device: a tensor, a numpy array (np.memmap: read block by block,
            and copied to the query's device), or a kdfast bank, which brings its own fill, labels and empty rows.
        k: >= 1; may exceed M.
        metric: "cosine" (1 - cos; the cosine of a zero row is 0), "euclidean" or "sqeuclidean".
        own_index: True (query i is bank row i) or integers [N] (-1: none): each query's own row, left out by index, so
            that its duplicates remain.
        query_labels, bank_labels: integers [N] and [M], both or neither.
        same_class: with labels: "exclude" leaves out bank rows of the query's class, "only" all others.
        bank_valid: int or 0-d integer tensor: only the first bank_valid rows of the bank exist.
        progress: True shows a bar (tqdm); a callable gets (blocks done, blocks in all).
        precision: of float32 products that rank candidates: None follows PyTorch, as does impl="torch" throughout.
            Anything below "ieee" keeps at least max(4 k, 32) candidates.
        impl: None, "cpu", "triton" or "torch".

    Returns:
        distance in float32 (float64 for float64), index int64.

    Raises:
        TypeError, ValueError: wrong type, dtype, device, rank, width; a bank of no rows; k < 1; an unknown metric,
            same_class, precision or impl; labels of one side only.
        IndexError: own_index outside [-1, M), on the CPU.
    """
    rows = bank_protocol.unpack(None if isinstance(bank, np.ndarray) else bank, valid=bank_valid, labels=bank_labels)
    bank = bank if rows.rows is None else rows.rows
    device = _checked_sources(query, bank)
    n, m = len(query), len(bank)
    k = checks.count("k", k)
    checks.choice("metric", metric, METRICS)
    checks.choice("same_class", same_class, ("exclude", "only"))
    if query_labels is None and bank_labels is not None:
        raise ValueError("bank_labels need query_labels")
    if query_labels is not None:
        if rows.labels is None:
            raise ValueError("query_labels need bank_labels, or a bank that keeps labels")
        query_labels = checks.integral("query_labels", query_labels, shape=(n,), device=device).contiguous()
        bank_labels = checks.integral("bank_labels", rows.labels, shape=(m,), device=device)
    own = checks.own_rows(own_index, (n,), m, device)
    products = precisions.resolve(precision, device.type)
    whole_rows = isinstance(bank, Tensor) or (bank.flags.c_contiguous and bank.dtype.isnative)
    dtype = query.dtype if isinstance(query, Tensor) else _dtype("query", query)
    resident = isinstance(bank, Tensor) and isinstance(query, Tensor)
    facts = {"whole_rows": whole_rows, "resident": resident, "width": query.shape[1]}
    impl = impls.choose("knn", impl, device_type=device.type, dtype=dtype, **facts)
    problem = portable.Problem(
        query,
        bank,
        _reader(device),
        metric,
        None if own is None else own.contiguous(),
        query_labels,
        bank_labels if query_labels is not None else None,
        same_class,
        _dropped(rows, m, device),
    )
    candidates = k + 16 if products == "ieee" else max(4 * k, 32)
    compiled = {"cpu": cpu, "triton": triton}.get(impl)
    step, close = _progress(progress, (compiled or portable).blocks(n, m))
    try:
        if compiled is not None:
            return compiled.knn(problem, k, candidates, step, products)
        return portable.knn(problem, k, candidates, step)
    finally:
        close()


def _checked_sources(query, bank) -> torch.device:
    """The device to compute on, after checking that `query` and `bank` (tensors or arrays) belong together."""
    samples = {}
    for name, x in (("query", query), ("bank", bank)):
        if not isinstance(x, (Tensor, np.ndarray)):
            raise TypeError(f"{name} must be a Tensor, a numpy array{' or a kdfast bank' * (name == 'bank')}, got {type(x).__name__}")
        sample = x if isinstance(x, Tensor) else torch.empty((), dtype=_dtype(name, x)).expand(x.shape)
        samples[name] = checks.rows(name, sample, ndim=2)
    if len(bank) == 0:
        raise ValueError(f"bank must have at least 1 row, got shape {tuple(bank.shape)}")
    q, b = samples["query"], samples["bank"]
    if q.dtype != b.dtype:
        raise TypeError(f"bank must have the dtype of query ({q.dtype}), got {b.dtype}")
    checks.same_width("bank", b, "query", q)
    if isinstance(bank, Tensor) and isinstance(query, Tensor):
        checks.alike("bank", bank, "query", query)
    return next((x.device for x in (query, bank) if isinstance(x, Tensor)), torch.device("cpu"))


def _dtype(name: str, x: np.ndarray) -> torch.dtype:
    if x.dtype not in (np.float16, np.float32, np.float64):
        raise TypeError(f"{name} must be float16, float32 or float64, got {x.dtype}")
    return getattr(torch, x.dtype.name)


def _reader(device: torch.device) -> Callable[[object, "slice | Tensor"], Tensor]:
    def rows(source, selection) -> Tensor:
        if isinstance(source, Tensor):
            return source[selection]
        picked = selection if isinstance(selection, slice) else selection.cpu().numpy()
        return torch.from_numpy(np.array(source[picked])).to(device)  # a copy: a read-only map may not become a tensor

    return rows


def _dropped(rows: bank_protocol.BankRows, m: int, device: torch.device) -> Callable[[slice], Tensor | None]:
    """Which columns of a block no query may have: those past the prefix `valid`, and those whose bias is -inf."""
    valid, bias = rows.valid, rows.bias
    if valid is not None:
        valid = checks.prefix("bank_valid", valid, m, device)

    def columns(block: slice) -> Tensor | None:
        out = None if bias is None else bias[block] == -torch.inf
        if valid is None:
            return out
        past = torch.arange(block.start, block.stop, device=device) >= valid
        return past if out is None else out | past

    return columns


def _progress(progress, total: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """(called after each block, called at the end)."""
    if progress is None or progress is False:
        return lambda: None, lambda: None
    if progress is True:
        from tqdm.auto import tqdm

        bar = tqdm(total=total, desc="knn", unit="block")
        return bar.update, bar.close
    if not callable(progress):
        raise TypeError(f"progress must be None, a bool or a callable, got {type(progress).__name__}")
    done = iter(range(1, total + 1))
    return lambda: progress(next(done), total), lambda: None
