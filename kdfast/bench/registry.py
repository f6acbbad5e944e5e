"""What a benchmark case is, and the cases of each family."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cases

LEVELS = ("quick", "default", "full")
DEVICES = ("cpu", "cuda")

#: runs the work once; returns what the correctness gate compares
Call = Callable[[], tuple[Tensor, ...]]


def always() -> None:
    return None


class Peer(NamedTuple):
    """One way to compute the case."""

    name: str
    build: Callable[[Any], Call]  # from the case's inputs
    missing: Callable[[], str | None] = always  # the reason it cannot run here
    dtypes: tuple[torch.dtype, ...] | None = None  # those it is measured in (None: all of the case's)
    floor: Callable[[Any], tuple[Tensor, ...]] | None = None  # bare arithmetic alone, and its float64 result: error shown, not gated
    quick: bool = True  # measured under --quick
    device: str | None = None  # the one of DEVICES it is measured on (None: each)
    allowance: float = 0.0  # error it may have in any case: adds up millions of terms one after another, or takes other steps


class Case(NamedTuple):
    """One thing measured. The first peer is kdfast, the second the naive formula that sets the tolerance."""

    shapes: dict[str, tuple[tuple[int, ...], ...]]  # by level; "cuda": on a GPU, the most telling first (absent: not measured there)
    axes: str  # names of a shape's entries
    dtypes: tuple[torch.dtype, ...]
    inputs: Callable[[tuple[int, ...], torch.dtype], Any]  # always the same for the same arguments
    reference: Callable[[Any], tuple[Tensor, ...]]  # in float64
    flop: Callable[[tuple[int, ...]], int] | None  # None: its time is not in multiply-adds
    peers: tuple[Peer, ...]


def octaves(base: tuple[int, ...], entries: tuple[int, ...], count: int = 3) -> tuple[tuple[int, ...], ...]:
    """Shapes: `base`, then with each of `entries` doubled, one at a time, `count` times."""
    grown = (
        tuple(size << step if at == entry else size for at, size in enumerate(base)) for entry in entries for step in range(1, count + 1)
    )
    return base, *grown


def shapes(case: Case, level: str, device: str) -> tuple[tuple[int, ...], ...]:
    """Those measured at `level` on `device`."""
    if device == "cpu":
        return case.shapes[level]
    return case.shapes["quick" if level == "quick" else "cuda"] if "cuda" in case.shapes else ()


def families() -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(cases.__path__)))


def cases_of(family: str) -> dict[str, Case]:
    """The cases of `family` by name. Raises ValueError for a name that is not one of `families()`."""
    if family not in families():
        raise ValueError(f"family must be one of {', '.join(families())}, got {family!r}")
    return importlib.import_module(f"{cases.__name__}.{family}").CASES
