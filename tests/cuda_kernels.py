"""The CUDA kernels for the tests that import `cuda`: on a GPU the built module, elsewhere the same sources emulated on the CPU."""

import cuda_emulation
import pytest
import torch

from kdfast._core import cuda_runtime
from kdfast._ops.similarity import cpu
from kdfast._ops.similarity import cuda as similarity

EMULATED = cuda_runtime.missing() is not None
DEVICE = "cpu" if EMULATED else "cuda"


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    """impl="cuda" serves tensors on DEVICE."""
    if not EMULATED:
        return
    if cuda_emulation.missing() is not None:
        pytest.skip(f"{cuda_runtime.missing()}, and {cuda_emulation.missing()}")
    monkeypatch.setattr(cuda_runtime, "OPS", cuda_emulation.load())
    monkeypatch.setattr(cuda_runtime, "DEVICE", "cpu")
    monkeypatch.setattr(cuda_runtime, "missing", lambda: None)
    monkeypatch.setattr(cuda_runtime, "has_clusters", lambda: True)
    monkeypatch.setattr(cuda_runtime, "has_cooperative_launches", lambda: True)
    monkeypatch.setattr(cuda_runtime, "is_hopper", lambda: True)
    monkeypatch.setattr(similarity, "GRADIENTS", cpu)


def moved(x):
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x
