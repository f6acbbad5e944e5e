"""Runs a case: correctness first, then time on one thread and on all, then memory."""

import os
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from . import measure, memory, registry
from .machine import Probe
from .measure import Timing
from .registry import Call, Case, Peer

BUDGET = {"quick": (1.0, 3), "default": (5.0, 5), "full": (20.0, 11)}  # least wall seconds and rounds of a comparison
_PROBE = object()


class Row(NamedTuple):
    """One line of the CSV. Times in seconds a call; `clock` is "cpu" (process-CPU, one thread) or "wall" (all threads)."""

    family: str
    case: str
    shape: str  # as "N=64 M=256 D=128"
    dtype: str
    peer: str
    threads: int
    clock: str
    median: float | None = None
    low: float | None = None  # 20th percentile
    high: float | None = None  # 80th percentile
    rounds: int | None = None
    per_kdfast: float | None = None  # median / kdfast's: how many times faster kdfast is
    per_bare_mm: float | None = None  # median / that of the case's first floor
    fraction_of_fma: float | None = None  # FLOP / median / fma_rate
    fma_rate: float | None = None  # FLOP/s of processor time, summed over the threads
    extra_bytes: int | None = None  # peak memory beyond inputs and results
    error: float | None = None  # max |x - ref| / max |ref|
    tolerance: float | None = None
    note: str = ""  # why something was not measured


class Checked(NamedTuple):
    """A peer after the correctness gate: `call` is None when it gets no time, and `note` says why."""

    peer: Peer
    call: Call | None
    error: float | None = None
    note: str = ""


def run(family: str, name: str, level: str) -> Iterator[list[Row]]:
    """Measure case `name` of a family; yields the rows of one shape and dtype at a time.

    Raises ValueError for an unknown family or level, and whatever kdfast itself raises.
    """
    if level not in registry.LEVELS:
        raise ValueError(f"level must be one of {', '.join(registry.LEVELS)}, got {level!r}")
    case = registry.cases_of(family)[name]
    comparisons = [(shape, dtype) for shape in case.shapes[level] for dtype in case.dtypes]
    with tqdm(comparisons, desc=f"{family} {name}", unit="comparison", leave=False) as bar:
        for shape, dtype in bar:
            bar.set_postfix_str(f"{_label(case, shape)} {_name(dtype)}")
            yield _compare(family, name, case, shape, dtype, level)


def _compare(family: str, name: str, case: Case, shape: tuple[int, ...], dtype: torch.dtype, level: str) -> list[Row]:
    inputs = case.inputs(shape, dtype)
    reference = case.reference(inputs)
    allowed = measure.tolerance(measure.error(case.peers[1].build(inputs)(), reference), dtype)
    rows: list[Row] = []
    for threads, clock in ((1, "cpu"), (_all_threads(), "wall")):
        with measure.threads(threads):
            peers = [
                _check(case, peer, inputs, reference, allowed, level) for peer in case.peers if peer.dtypes is None or dtype in peer.dtypes
            ]
            probe = Probe(dtype, threads)
            calls = {peer.peer.name: peer.call for peer in peers if peer.call is not None}
            seconds, rounds = BUDGET[level]
            timings = measure.interleave(
                calls | ({_PROBE: probe} if probe.missing is None else {}),
                clock=time.process_time if clock == "cpu" else time.perf_counter,
                seconds=seconds,
                rounds=rounds,
            )
        rate = statistics.median(probe.rates) if probe.rates else None
        ours = timings[case.peers[0].name].median if case.peers[0].name in timings else None
        floor = next((timings[p.peer.name].median for p in peers if p.peer.floor and p.call), None)
        for peer, call, error, note in peers:
            row = Row(family, name, _label(case, shape), _name(dtype), peer.name, threads, clock, error=error, note=note)
            row = row._replace(tolerance=None if peer.floor else max(allowed, peer.allowance))
            rows.append(row if call is None else _timed(row, timings[peer.name], ours, floor, case.flop and case.flop(shape), rate))
    extra = {row.peer: None for row in rows if row.median is not None}
    for peer in case.peers:
        if peer.name in extra and not peer.floor:
            which = family, name, peer.name
            extra[peer.name] = memory.peak_extra(_build, *which, shape, dtype, warm=(*which, _tiny(shape), dtype))
    return [row._replace(extra_bytes=extra.get(row.peer)) for row in rows]


def _check(case: Case, peer: Peer, inputs, reference: tuple[Tensor, ...], allowed: float, level: str) -> Checked:
    reason = peer.missing() or ("not under --quick" if level == "quick" and not peer.quick else None)
    if reason:
        return Checked(peer, None, note=reason)
    try:
        call = peer.build(inputs)
        result = call()
    except Exception as problem:  # a peer may fail in any way; kdfast must not
        if peer is case.peers[0]:
            raise
        return Checked(peer, None, note=f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}")
    if peer.floor:
        return Checked(peer, call, measure.error(result, peer.floor(inputs)))
    error, allowed = measure.error(result, reference), max(allowed, peer.allowance)
    if error <= allowed:
        return Checked(peer, call, error)
    return Checked(peer, None, error, f"wrong: error {error:.1e}, allowed {allowed:.1e}")


def _timed(row: Row, timing: Timing, ours: float | None, floor: float | None, flop: int | None, rate: float | None) -> Row:
    return row._replace(
        **timing._asdict(),
        per_kdfast=timing.median / ours if ours else None,
        per_bare_mm=timing.median / floor if floor else None,
        fraction_of_fma=flop / timing.median / rate if flop and rate else None,
        fma_rate=rate,
    )


def _build(family: str, name: str, peer: str, shape: tuple[int, ...], dtype: torch.dtype) -> Call:
    """The call of one peer, found by name: what the process that measures memory runs."""
    case = registry.cases_of(family)[name]
    return next(p for p in case.peers if p.name == peer).build(case.inputs(shape, dtype))


def _tiny(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(size, 64) for size in shape)


def _label(case: Case, shape: tuple[int, ...]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in zip(case.axes.split(), shape, strict=True))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _all_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
