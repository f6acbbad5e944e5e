"""Runs a case: correctness first, then time by each of the device's clocks, then memory."""

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from . import devices, measure, memory, registry
from .devices import Clock, Device
from .machine import Probe
from .measure import Timing
from .registry import Call, Case, Peer

_PROBE = object()


class Row(NamedTuple):
    """One line of the CSV. Times in seconds a call; `clock` is "cpu" (process-CPU, one thread), "wall" or "cuda" (the GPU's own)."""

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
    flop_rate: float | None = None  # FLOP / median
    fraction_of_fma: float | None = None  # FLOP / median / fma_rate
    fma_rate: float | None = None  # FLOP/s of processor time, summed over the threads
    extra_bytes: int | None = None  # peak memory beyond inputs and results
    error: float | None = None  # max |x - ref| / max |ref|
    tolerance: float | None = None
    sm_mhz: float | None = None  # of a GPU while it was measured: its clock, power and temperature
    watts: float | None = None
    celsius: float | None = None
    note: str = ""  # why something was not measured, or whose kernels were


class Checked(NamedTuple):
    """A peer after the correctness gate: `call` is None when it gets no time, and `note` says why."""

    peer: Peer
    call: Call | None
    error: float | None = None
    tolerance: float | None = None
    note: str = ""


def run(family: str, name: str, level: str) -> Iterator[list[Row]]:
    """Measure case `name` of a family on the CPU; yields the rows of one shape and dtype at a time.

    Raises ValueError for an unknown family or level, and whatever kdfast itself raises.
    """
    case = registry.cases_of(family)[name]
    with tqdm(comparisons(case, level, "cpu"), desc=f"{family} {name}", unit="comparison", leave=False) as bar:
        for shape, dtype in bar:
            bar.set_postfix_str(f"{label(case, shape)} {dtype_name(dtype)}")
            yield compare(family, name, shape, dtype, level)


def comparisons(case: Case, level: str, device: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of a case. Raises ValueError for an unknown level."""
    if level not in registry.LEVELS:
        raise ValueError(f"level must be one of {', '.join(registry.LEVELS)}, got {level!r}")
    return [(shape, dtype) for shape in registry.shapes(case, level, device) for dtype in case.dtypes]


def compare(
    family: str,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    level: str,
    device: Device = devices.CPU,
    own: bool = False,
    tell: Callable[[str], None] = lambda peer: None,
) -> list[Row]:
    """The rows of one shape and dtype. `own`: kdfast and the plain formula alone. `tell`: hears whose first call comes next."""
    case = registry.cases_of(family)[name]
    inputs = devices.place(case.inputs(shape, dtype), device.name)
    reference = case.reference(inputs)
    allowed = _allowed(case, inputs, reference, dtype)
    chosen = [peer for peer in case.peers[: 2 if own else None] if serves(peer, dtype, device.name)]
    about = Row(family, name, label(case, shape), dtype_name(dtype), "", 0, "")
    rows: list[Row] = []
    for threads, clocks in device.turns():
        with measure.threads(threads):
            peers = [_check(case, peer, inputs, reference, allowed, level, tell) for peer in chosen]
            for clock in clocks:
                rows += _timed_by(clock, threads, peers, about, case.flop and case.flop(shape), device.budget[level])
    measured = {row.peer for row in rows if row.median is not None}
    extra = {}
    for peer, call, *_ in peers:
        if peer.name in measured and not peer.floor:
            which = family, name, peer.name
            on_gpu = device.name == "cuda"
            extra[peer.name] = (
                devices.peak_on_gpu(call) if on_gpu else memory.peak_extra(_build, *which, shape, dtype, warm=(*which, _tiny(shape), dtype))
            )
    return [row._replace(extra_bytes=extra.get(row.peer)) for row in rows]


def serves(peer: Peer, dtype: torch.dtype, device: str) -> bool:
    return (peer.dtypes is None or dtype in peer.dtypes) and peer.device in (None, device)


def _allowed(case: Case, inputs, reference: tuple[Tensor, ...], dtype: torch.dtype) -> float:
    """The error a peer may have: set by that of the plain formula, where that fits into memory."""
    try:
        return measure.tolerance(measure.error(case.peers[1].build(inputs)(), reference), dtype)
    except torch.OutOfMemoryError:
        return measure.USUAL[dtype]


def _timed_by(clock: Clock, threads: int, peers: list[Checked], about: Row, flop: int | None, budget: tuple[float, int]) -> list[Row]:
    """A row for each of `peers`, by one clock."""
    probe = Probe(getattr(torch, about.dtype), threads) if clock.probed else None
    calls = {checked.peer.name: checked.call for checked in peers if checked.call is not None}
    seconds, rounds = budget
    probed = {_PROBE: probe} if probe is not None and probe.missing is None else {}
    timings = measure.interleave(calls | probed, sample=clock.sample, seconds=seconds, rounds=rounds)
    rate = statistics.median(probe.rates) if probed else None
    ours = timings.get(peers[0].peer.name)
    floor = next((timings[c.peer.name] for c in peers if c.peer.floor and c.call), None)
    rows = []
    for checked in peers:
        row = about._replace(peer=checked.peer.name, threads=threads, clock=clock.name, error=checked.error, note=checked.note)
        row = row._replace(tolerance=checked.tolerance)
        rows.append(row if checked.call is None else _timed(row, timings[row.peer], ours, floor, flop, rate))
    return rows


def missing(peer: Peer, level: str) -> str | None:
    """Why `peer` is not measured here (None: it is)."""
    return peer.missing() or ("not under --quick" if level == "quick" and not peer.quick else None)


def _check(
    case: Case, peer: Peer, inputs, reference: tuple[Tensor, ...], allowed: float, level: str, tell: Callable[[str], None]
) -> Checked:
    reason = missing(peer, level)
    if reason:
        return Checked(peer, None, note=reason)
    tell(peer.name)
    try:
        call = peer.build(inputs)
        result = call()
        if peer.floor:
            return Checked(peer, call, measure.error(result, peer.floor(inputs)))
    except Exception as problem:  # a peer may fail in any way; kdfast must not
        if peer is case.peers[0]:
            raise
        return Checked(peer, None, note=f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}")
    error, allowed = measure.error(result, reference), max(allowed, peer.allowance)
    if error <= allowed:
        return Checked(peer, call, error, allowed)
    return Checked(peer, None, error, allowed, f"wrong: error {error:.1e}, allowed {allowed:.1e}")


def _timed(row: Row, timing: Timing, ours: Timing | None, floor: Timing | None, flop: int | None, rate: float | None) -> Row:
    return row._replace(
        **timing._asdict(),
        per_kdfast=timing.median / ours.median if ours else None,
        per_bare_mm=timing.median / floor.median if floor else None,
        flop_rate=flop / timing.median if flop else None,
        fraction_of_fma=flop / timing.median / rate if flop and rate else None,
        fma_rate=rate,
    )


def _build(family: str, name: str, peer: str, shape: tuple[int, ...], dtype: torch.dtype) -> Call:
    """The call of one peer, found by name: what the process that measures memory runs."""
    case = registry.cases_of(family)[name]
    return next(p for p in case.peers if p.name == peer).build(case.inputs(shape, dtype))


def _tiny(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(size, 64) for size in shape)


def label(case: Case, shape: tuple[int, ...]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in zip(case.axes.split(), shape, strict=True))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
