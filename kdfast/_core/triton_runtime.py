"""Triton: whether it is here, whether its kernels run on a GPU or under its interpreter, and what a launch needs to know."""

import functools
import importlib.util
import os

import torch

#: kernels run on the CPU, one program after another, for tests. Triton reads it where kernels are defined: it is set before Python starts
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """Why Triton's kernels cannot run on this machine (None: they can)."""
    return _missing()


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no GPU is visible to PyTorch"
    if not INTERPRETED and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"it needs compute capability 8.0 or later, this GPU has {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    return None


def refuses_device(device_type: str) -> str | None:
    """Why kernels cannot serve tensors on `device_type` (None: they can)."""
    wanted = "cpu" if INTERPRETED else "cuda"
    return None if device_type == wanted else f"it runs on {wanted} tensors, these are on {device_type}"


@functools.cache
def architecture(device_index: int) -> int:
    """Of a GPU, compute capability as two digits; 90 under the interpreter."""
    if INTERPRETED:
        return 90
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


@functools.cache
def processors(device_index: int) -> int:
    """Streaming multiprocessors of a GPU."""
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device_index).multi_processor_count


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least `n` and `least`, the least side of a matrix product's operands."""
    return max(least, 1 << (n - 1).bit_length()) if n > 0 else least
