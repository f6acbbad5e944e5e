"""Loading the compiled modules, and the reason when one is not there. Nothing here raises."""

import functools
import importlib
import os
from pathlib import Path

import torch


@functools.cache
def load(name: str) -> tuple[object | None, str | None]:
    """(module, None) or (None, reason) for `name` in "_C" (schemas, CPU kernels), "_C_cuda" (CUDA kernels)."""
    if os.environ.get("KDFAST_NO_EXT") == "1":
        return None, "KDFAST_NO_EXT=1 turns compiled modules off"
    try:
        return importlib.import_module(f"kdfast.{name}"), None
    except ModuleNotFoundError as error:
        if error.name != f"kdfast.{name}":
            return None, f"kdfast.{name} failed to load: {error}"
        return None, f"kdfast.{name} was not built: {_build_failure(name)}"
    except (ImportError, OSError) as error:  # an undefined symbol, a missing libtorch
        return None, f"kdfast.{name} failed to load: {error}"


def _build_failure(name: str) -> str:
    """What setup.py wrote down when it could not build."""
    record = Path(__file__).parent.parent / f"_build_failure{name}.txt"
    return record.read_text().strip() if record.exists() else "not installed with a compiler (see README, Installation)"


@torch.compiler.assume_constant_result
def missing_cpu() -> str | None:
    return load("_C")[1]


@torch.compiler.assume_constant_result
def missing_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return missing_cpu() or load("_C_cuda")[1]  # _C has the schemas
