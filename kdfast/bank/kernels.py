"""The compiled side of a queue on the CPU: a push in one op, and a packed copy of the rows (docs/cpu-kernels.md)."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._core import extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_ROWS = 1 << 14  # of a packed copy: fewer are packed as fast as a copy of them is read


class Packed(NamedTuple):
    """A packed copy and the rows it is of, held so that no other tensor comes to lie at their address."""

    rows: Tensor
    panels: Tensor  # empty where the CPU has no use for a copy


def serve(*matrices: Tensor) -> bool:
    """Whether the kernels can read and write these."""
    return extension.missing_cpu() is None and all(x.device.type == "cpu" and x.dtype in DTYPES for x in matrices)


def worthwhile(storage: Tensor) -> bool:
    """Whether a step with a packed copy of these rows is faster than one that packs them: the copy's bytes are those of float32 rows."""
    return storage.dtype == torch.float32 and len(storage) >= _LEAST_ROWS


def push(
    storage: Tensor,
    pointer: Tensor,
    fill: Tensor,
    labels: Tensor | None,
    copy: Packed | None,
    keys: Tensor,
    key_labels: Tensor | None,
    where: Tensor | None,
    normalize: bool,
) -> None:
    """Scale, round and enqueue `keys` [n, D] in `storage` [M, D], and in its packed copy where that was in step."""
    key_labels, where = (None if x is None else x.contiguous() for x in (key_labels, where))
    compiling = torch.compiler.is_compiling()  # then writes are counted by the compiled code, and not as the copy's stamp foresees
    panels = None if compiling or copy is None or copy.rows is not storage else copy.panels
    torch.ops.kdfast.bank_push(storage, pointer, fill, labels, panels, keys.contiguous(), key_labels, where, normalize)
    if not compiling:
        written = [x for x in (storage, pointer, fill, labels) if x is not None and not x.is_inference()]
        torch.autograd.graph.increment_version(written)


def packed(storage: Tensor, copy: Packed | None) -> Packed | None:
    """A packed copy of `storage`: `copy`, where it still is that, else a new one. None where writes to `storage` could go unnoticed."""
    if storage.is_inference() or storage.is_shared() or not storage.is_contiguous():
        return None
    if copy is not None and copy.rows is storage and torch.ops.kdfast.bank_in_step(storage, copy.panels):
        return copy
    return Packed(storage, torch.ops.kdfast.bank_panels(storage))


def _panels_fake(storage: Tensor) -> Tensor:
    return storage.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int32)


if extension.missing_cpu() is None:
    torch.library.register_fake("kdfast::bank_push", lambda *args: None)
    torch.library.register_fake("kdfast::bank_panels", _panels_fake)
