"""csrc/cuda built for the CPU: the kernels, their launches and their bindings by the host's compiler and the emulator of a device."""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

from kdfast._ops.similarity import cpu as similarity
from kdfast._ops.sinkhorn import cpu as sinkhorn

ROOT = Path(__file__).parent.parent
CUDA, EMULATOR = ROOT / "csrc/cuda", ROOT / "tests/cuda_emulator"
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
COMPILER = os.environ.get("CXX", "c++")


def missing() -> str | None:
    return None if shutil.which(COMPILER) else f"no compiler {COMPILER}"


def library() -> Path:
    """The shared library that registers torch.ops.kdfast_emulated, kept in build/ until a source or PyTorch changes."""
    sources = sorted([ROOT / "csrc/bind_tensors.h", *(path for folder in (CUDA, EMULATOR) for path in folder.rglob("*") if path.is_file())])
    key = hashlib.sha256("".join([torch.__version__, *FLAGS, *(s.read_text() for s in sources)]).encode()).hexdigest()[:16]
    folder = ROOT / "build/cuda_emulation" / key
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes wait for the first
        if not (folder / "kernels.so").exists():
            _build(folder, [s for s in sources if s.suffix in (".cu", ".cpp") and s.name != "module.cpp"])
    return folder / "kernels.so"


def _build(folder: Path, sources: list[Path]) -> None:
    torch_folder = Path(torch.__file__).parent
    includes = [f"-I{p}" for p in (CUDA, EMULATOR, torch_folder / "include")]
    objects = []
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        _run([COMPILER, *FLAGS, *includes, "-x", "c++", "-c", source, "-o", objects[-1]])
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    _run([COMPILER, "-shared", *objects, *libraries, "-o", folder / "partial.so"])
    (folder / "partial.so").rename(folder / "kernels.so")


def _run(command: list) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def load() -> object:
    """torch.ops.kdfast_emulated: the ops of csrc/cuda, with the schemas of torch.ops.kdfast, on CPU tensors."""
    path = library()
    if path not in torch.ops.loaded_libraries:
        for name in OPS:
            schema = str(getattr(torch.ops.kdfast, name).default._schema)
            _definitions.define(schema.removeprefix("kdfast::"))
        torch.ops.load_library(path)
        torch.library.register_fake("kdfast_emulated::similarity_softmax", similarity.forward_fake)
        torch.library.register_fake("kdfast_emulated::similarity_grad_keys", similarity.grad_keys_fake)
        torch.library.register_fake("kdfast_emulated::sinkhorn_assign", sinkhorn.assign_shapes)
        torch.library.register_fake("kdfast_emulated::sinkhorn_normalize", sinkhorn.normalize_shapes)
        torch.library.register_vmap(
            "kdfast_emulated::sinkhorn_normalize", functools.partial(sinkhorn.fold_normalize, torch.ops.kdfast_emulated.sinkhorn_normalize)
        )
        torch.ops.loaded_libraries.add(path)
    return torch.ops.kdfast_emulated


def meetings() -> int:
    """Barriers, shuffles and votes of emulated threads so far: what an iteration costs beside its arithmetic."""
    count = ctypes.CDLL(library()).emulated_meetings
    count.restype = ctypes.c_int64
    return count()


OPS = ("similarity_softmax", "similarity_grad_keys", "sinkhorn_solve", "sinkhorn_assign", "sinkhorn_normalize")
_definitions = torch.library.Library("kdfast_emulated", "DEF")
