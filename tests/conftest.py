"""Every test runs with allocations NaN-poisoned: an output nobody wrote shows as NaN, not as old memory."""

import os

import pytest
import torch
from interpreted_kernels import pytest_sessionfinish, pytest_testnodedown  # noqa: F401  hooks of the session

from kdfast._core import extension

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else some versions of PyTorch warn of every product on a GPU


_C, _ = extension.load("_C")
if _C is not None:
    _C.poison_scratch(True)


@pytest.fixture(autouse=True)
def poisoned_allocations():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def gpu_in_order():
    """After a kernel's fault nothing else runs on a GPU in its process: under pytest-xdist another takes its place."""
    yield
    if torch.cuda.is_initialized() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=_C.isas_available() if _C is not None else [])
def isa(request):
    """Every instruction set of the compiled kernels that this machine can run."""
    before = _C.isa_in_force()
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa(before)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
