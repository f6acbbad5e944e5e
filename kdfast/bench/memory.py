"""Peak memory of a call, in a process of its own: PyTorch's tensors, C++ scratch and BLAS buffers alike.

On Linux the peak is VmHWM (reset before the call) less file-backed pages, against the anonymous pages held before it;
elsewhere it is the growth of getrusage's maximum. malloc is told to give every block back, so that the peak is of
memory in use, not of memory kept. The tensors the call returns are not counted.
"""

import contextlib
import ctypes
import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_extra(build: Callable[..., Callable[[], Any]], *args, warm: tuple | None = None) -> int:
    """Bytes that `build(*args)()` needs at its peak, beyond what it finds and what it returns.

    `build` is a module-level function (it is sent to a fresh process). `build(*warm)()` runs first, where given: a small
    call that loads the code, so that only memory which grows with the size is measured.
    """
    with fresh_process() as pool:
        return peak_in(pool, build, *args, warm=warm)


def peak_in(pool: ProcessPoolExecutor, build: Callable[..., Callable[[], Any]], *args, warm: tuple | None = None) -> int:
    """`peak_extra` in a process that may measure several calls and keep what they share."""
    return pool.submit(_measure, build, args, warm).result()


@contextlib.contextmanager
def fresh_process() -> Iterator[ProcessPoolExecutor]:
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["torch._dynamo", "kdfast.distill"])  # imported once, by the server
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        yield pool


def _measure(build: Callable[..., Callable[[], Any]], args: tuple, warm: tuple | None) -> int:
    _return_freed_memory()
    if warm is not None:
        build(*warm)()
    call = build(*args)
    before = _held()
    call()
    _reset_peak()
    result = call()  # buffers that the first call left behind count too: they were not there before
    return max(0, _peak() - before - _size(result))


def _held() -> int:
    return _status("RssAnon") if _STATUS.exists() else _rusage_peak()


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # not on Linux, or not allowed: then it is the peak since the process began
        _CLEAR.write_text("5")


def _peak() -> int:
    return _status("VmHWM") - _status("RssFile") - _status("RssShmem") if _STATUS.exists() else _rusage_peak()


def _status(field: str) -> int:
    return int(re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)[1]) * 1024


def _rusage_peak() -> int:
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _size(result: Any) -> int:
    tensors = result if isinstance(result, tuple) else (result,)
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _return_freed_memory() -> None:
    """glibc: blocks of 64 KiB and more come from mmap and go back when freed; a no-op elsewhere."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 64 * 1024)
        libc.mallopt(trim_threshold, 64 * 1024)
