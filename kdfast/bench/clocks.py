"""What nvidia-smi tells of a GPU at work: its clock, power and temperature, for these set what a kernel can reach."""

import shutil
import statistics
import subprocess
import threading
import time
from typing import NamedTuple

EVERY = 0.2  # seconds between two questions
BUSY = 50  # percent of the time at work from which a sample counts
_QUESTION = ("nvidia-smi", "--query-gpu=utilization.gpu,clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader,nounits", "--id=0")


class State(NamedTuple):
    """Medians over the samples taken while the GPU was at work; None where there were none."""

    sm_mhz: float | None = None
    watts: float | None = None
    celsius: float | None = None


class Clocks:
    """Asks in a thread of its own, from `start` to `stop`; nothing where there is no nvidia-smi."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, list[float]]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        if shutil.which(_QUESTION[0]):
            self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def since(self, begin: float) -> State:
        """Of the samples after `begin`, in seconds of time.monotonic()."""
        busy = [values[1:] for at, values in self._samples if at >= begin and values[0] >= BUSY]
        return State(*(statistics.median(column) for column in zip(*busy, strict=True))) if busy else State()

    def _run(self) -> None:
        while not self._ended.wait(EVERY):
            try:
                told = subprocess.run(_QUESTION, capture_output=True, text=True, timeout=10).stdout
                self._samples.append((time.monotonic(), [float(value) for value in told.split(",")]))
            except (OSError, ValueError, subprocess.TimeoutExpired):  # a GPU that is lost has no answer, or one in words
                continue
