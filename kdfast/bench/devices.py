"""Where cases are measured, the CPU or a GPU: the clocks of each, its memory, and how long a comparison may take."""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import measure
from .measure import Sampler


class Clock(NamedTuple):
    name: str
    sample: Sampler
    probed: bool = True  # beside the CPU's rate of multiply-adds


class Device(NamedTuple):
    """`turns`: (threads, clocks) pairs; calls are built and checked once for each, and timed by every clock of it."""

    name: str
    turns: Callable[[], tuple[tuple[int, tuple[Clock, ...]], ...]]
    budget: dict[str, tuple[float, int]]  # by level: least wall seconds and rounds of a comparison by one clock


def _cpu_turns() -> tuple[tuple[int, tuple[Clock, ...]], ...]:
    return (
        (1, (Clock("cpu", measure.by(time.process_time)),)),
        (_all_threads(), (Clock("wall", measure.by(time.perf_counter)),)),
    )


def _gpu_turns() -> tuple[tuple[int, tuple[Clock, ...]], ...]:
    """The GPU's own time, and that of the host, which for small calls is what issuing them takes."""
    host = measure.by(time.perf_counter, torch.cuda.synchronize)
    return ((1, (Clock("cuda", measure.by_events, probed=False), Clock("wall", host, probed=False))),)


CPU = Device("cpu", _cpu_turns, {"quick": (0.5, 3), "default": (5.0, 5), "full": (20.0, 11)})
CUDA = Device("cuda", _gpu_turns, {"quick": (0.0, 3), "default": (0.3, 7), "full": (2.0, 15)})
BY_NAME = {device.name: device for device in (CPU, CUDA)}


def _all_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def place(inputs: Any, device: str) -> Any:
    """A case's inputs, a tuple of tensors and numbers, with the tensors on `device`."""
    if device == "cpu":
        return inputs
    moved = [x.to(device) if isinstance(x, Tensor) else x for x in inputs]
    return inputs._make(moved) if hasattr(inputs, "_make") else type(inputs)(moved)


def peak_on_gpu(call: Callable[[], tuple[Tensor, ...]]) -> int:
    """Bytes that PyTorch's allocator hands out at the peak of `call`, beyond what it finds and what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    returned = sum(x.numel() * x.element_size() for x in result)
    return max(0, torch.cuda.max_memory_allocated() - before - returned)
