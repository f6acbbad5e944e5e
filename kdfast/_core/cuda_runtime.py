"""CUDA: whether the compiled kernels are here, and what their choice needs to know of a GPU."""

import functools

import torch

from . import extension

#: where the kernels' ops are, and the tensors they take; tests put the emulator's here (tests/cuda_emulation.py)
OPS, DEVICE = torch.ops.kdfast, "cuda"


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """Why the kernels cannot run on this machine (None: they can)."""
    return extension.missing_cuda()


def refuses_device(device_type: str) -> str | None:
    return None if device_type == DEVICE else f"it runs on {DEVICE} tensors, these are on {device_type}"


@torch.compiler.assume_constant_result
def has_clusters() -> bool:
    """Whether blocks of the GPU in use can share a problem: from compute capability 9.0 on."""
    return _has_clusters()


@functools.cache
def _has_clusters() -> bool:
    return torch.cuda.get_device_capability() >= (9, 0)


@torch.compiler.assume_constant_result
def has_cooperative_launches() -> bool:
    """Whether blocks of a launch can wait for one another on the GPU in use, as they can wherever its driver lets them."""
    return _has_cooperative_launches()


@functools.cache
def _has_cooperative_launches() -> bool:
    return extension.load("_C_cuda")[0].sinkhorn_streams()


@torch.compiler.assume_constant_result
def is_hopper() -> bool:
    """Whether the GPU in use has the instructions of sm_90a: compute capability 9.0, neither earlier nor later."""
    return _is_hopper()


@functools.cache
def _is_hopper() -> bool:
    return torch.cuda.get_device_capability() == (9, 0)
