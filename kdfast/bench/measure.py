"""Time, measured so that a noisy machine cannot favour anyone; and the gate that a wrong answer does not pass.

Calls take turns, one sample each, round after round: whatever slows the machine meets all of them. Each round has an order of its own,
so that nobody always follows whoever leaves cold caches or threads at work behind. A sample repeats a
short call until it lasts `SAMPLE` seconds, on a GPU too where the host's clock is read; a GPU's own clock takes one call at a time.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

SAMPLE = 5e-3  # seconds
FLUSHED = 2**31  # bytes written before a call is timed by a GPU's clock: what its caches hold, and half a millisecond to issue the call in
#: the error allowed where the plain formula, which sets it elsewhere, does not fit into memory
USUAL = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

#: seconds a call, given it and how often to repeat it
Sampler = Callable[[Callable[[], Any], int], float]


class Timing(NamedTuple):
    """Seconds a call: median, 20th and 80th percentile over `rounds` samples."""

    median: float
    low: float
    high: float
    rounds: int


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by(clock: Callable[[], float], finish: Callable[[], None] = lambda: None) -> Sampler:
    """Seconds of the host's `clock`; `finish` waits for what a call has left to do."""

    def sample(call: Callable[[], Any], repeats: int) -> float:
        finish()
        start = clock()
        for _ in range(repeats):
            call()
        finish()
        return (clock() - start) / repeats

    return sample


def by_events(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the GPU's clock for one call, of inputs that its caches no longer hold. The host issues the call while the caches are
    flushed, which takes longer than issuing some tens of kernels: what is measured is the GPU's work."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(FLUSHED, dtype=torch.int8, device="cuda").zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleave(
    calls: dict[str, Callable[[], Any]], *, sample: Sampler | None = None, seconds: float = 5.0, rounds: int = 5
) -> dict[str, Timing]:
    """Time each of `calls` in turn for at least `rounds` rounds, and on until `seconds` of wall time have passed. `sample` is `by` the
    wall clock where none is given."""
    sample = sample or by(time.perf_counter)
    repeats = {name: _repeats(call, sample) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffled = list(calls), random.Random(0)
    deadline, done = time.perf_counter() + seconds, 0
    while calls and (done < rounds or time.perf_counter() < deadline):
        shuffled.shuffle(order)
        for name in order:
            samples[name].append(sample(calls[name], repeats[name]))
        done += 1
    return {name: summary(times) for name, times in samples.items()}


def _repeats(call: Callable[[], Any], sample: Sampler) -> int:
    sample(call, 1)  # the first call warms caches and allocates
    return max(1, math.ceil(SAMPLE / max(sample(call, 1), 1e-9)))


def summary(samples: list[float]) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), fifths[0], fifths[-1], len(samples))


def error(result: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> float:
    """The largest max |x - ref| / max |ref| over the outputs; inf for a wrong shape, count or a non-finite value."""
    if len(result) != len(reference):
        return math.inf
    worst = 0.0
    for got, wanted in zip(result, reference, strict=True):
        if got.shape != wanted.shape or not got.isfinite().all():
            return math.inf
        scale = wanted.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        worst = max(worst, float((got.double() - wanted).abs().max() / scale))
    return worst


def tolerance(naive_error: float, dtype: torch.dtype) -> float:
    """Twice the error of the naive formula in the same dtype, and 4 units in the last place."""
    return 2 * naive_error + 4 * torch.finfo(dtype).eps
