"""impl="triton" of similarity distillation's losses: tile sizes, launches, registration. distillation_kernels.py has the kernels.

The derivatives are those of streaming softmaxes (distillation.py), which the losses' digits could not come from.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...._core import triton_runtime as runtime
from ...._core.architectures import Architecture
from .formats import KERNELS, missing, refuses
from .slabs import format_of

__all__ = ["KERNELS", "constants", "losses", "missing", "refuses", "tiles"]

MAX_BYTES = 1024  # of a row's two sides that stay while the banks stream by


class Tiles(NamedTuple):
    """Of a launch: rows and columns of a tile of scores, depth of its products, warps, stages of the pipeline."""

    rows: int
    columns: int
    depth: int | None  # of a product of 16-bit numbers, of float32 half as many; None: whole rows
    warps: int
    stages: int


def tiles(row_bytes: int, exact: bool, many: bool, arch: Architecture) -> Tiles:
    """For rows of `row_bytes` in both sides together on a GPU of `arch`; `exact` products of float32; `many` terms of columns.

    A thread holds two tiles of scores, in 64 registers at most. From Hopper on, rows that stay are read from shared memory: up to 194 KB
    with two stages of the columns that stream by. Before it, and on GPUs with its matrix instructions, they would take registers as well:
    steps of products have 24 to 72 KB in three stages.
    """
    if runtime.INTERPRETED:
        return Tiles(32, 32, 32 if exact or row_bytes > MAX_BYTES else None, 4, 1)
    from_registers = not arch.from_shared
    narrow = many and arch.blackwell  # a column brings so much that registers would spill
    if exact or from_registers or row_bytes > (512 if narrow else MAX_BYTES):
        return Tiles(128, 32 if exact and narrow else 64, 32 if exact or from_registers or narrow else 64, 8, 3)
    return Tiles(128, 32 if narrow or row_bytes > 512 else 64, None, 8, 2)


def constants(
    student: Tensor, teacher: Tensor, precision: int, teacher_precision: int, many: bool, arch: Architecture
) -> tuple[dict, Tiles]:
    """How a launch multiplies the rows of both sides, and its tiles."""
    sides = (student, precision), (teacher, teacher_precision)
    exact = any(x.dtype == torch.float32 and number in (KERNELS.products["ieee"], KERNELS.products["bf16x3"]) for x, number in sides)
    t = tiles(sum(runtime.power_of_two(x.shape[1]) * x.itemsize for x, _ in sides), exact, many, arch)
    made = {"WHOLE": t.depth is None, "ROWS": t.rows, "COLUMNS": t.columns, **runtime.pipeline(t.warps, t.stages)}
    for prefix, (x, number) in zip(("", "TEACHER_"), sides, strict=True):
        format, width = format_of(x.dtype, number, arch), x.shape[1]
        step = runtime.power_of_two(width) if t.depth is None else t.depth * 2 // x.itemsize
        given = {"WIDTH": step, "EVEN": width % step == 0, "DOT": format.scores, "PRECISION": format.precision}
        made |= {prefix + name: value for name, value in given.items()}
    return made, t


def losses(
    student: Tensor,  # [N, Ds]
    keys: Tensor,  # [M, Ds]
    teacher: Tensor,  # [N, Dt]
    teacher_keys: Tensor | None,  # [M, Dt]; None: `keys`
    scale: Tensor,  # [N] float32
    teacher_scale: Tensor,  # [N]
    start_logit: Tensor | None,  # [N]
    teacher_start_logit: Tensor | None,  # [N]
    bias: Tensor | None,  # [M]
    key_index: Tensor | None,  # [N, E], -1 none
    valid: Tensor | None,  # []
    kl: bool,
    precision: int,
    teacher_precision: int,
) -> Tensor:
    """[N]; -inf for a row that admits nothing. What distillation_values.losses finds."""
    from . import distillation_kernels as kernels

    teacher_keys = keys if teacher_keys is None else teacher_keys
    student, keys, teacher, teacher_keys = (x.contiguous() for x in (student, keys, teacher, teacher_keys))
    rows, columns, out = len(student), len(keys), torch.empty_like(scale)
    if rows == 0:
        return out
    many = bias is not None or key_index is not None
    made, t = constants(student, teacher, precision, teacher_precision, many, runtime.architecture(student.device.index or 0))
    row_tiles = -(-rows // t.rows)
    parts = runtime.splits(row_tiles, columns, t.columns, student.device)
    part = scale.new_empty(parts, 5, rows) if parts > 1 else scale
    given = (start_logit, teacher_start_logit, bias, key_index, valid)
    terms = (scale if x is None else x.contiguous() for x in given)  # what is not there is never read
    kernels.distillation[(row_tiles * parts,)](
        student, keys, teacher, teacher_keys, scale.contiguous(), teacher_scale.contiguous(), *terms, out, part,
        rows, columns, student.shape[1], teacher.shape[1], runtime.share(columns, parts, t.columns),
        KL=kl, STARTED=start_logit is not None, BIASED=bias is not None, INDICES=0 if key_index is None else key_index.shape[1],
        COUNTED=valid is not None, SPLIT=parts > 1, INTERPRETED=runtime.INTERPRETED, **made,
    )  # fmt: skip
    if parts > 1:
        merged = 128  # rows a program
        kernels.merge_losses[(-(-rows // merged),)](part, out, rows, parts, KL=kl, ROWS=merged, num_warps=4)
    return out


runtime.register("similarity_distillation_losses", losses, lambda student, keys, teacher, teacher_keys, scale, *_: torch.empty_like(scale))


def _over_rows(op, info, in_dims: tuple, *args):
    """The vmap rule: entries that share the banks and what belongs to them are one call of all rows, others a call each."""
    bank = (1, 3, 8, 10)
    if any(in_dims[i] is not None for i in bank):
        return runtime.one_by_one(op, info, in_dims, *args)
    folded = [
        x
        if i in bank or not isinstance(x, Tensor)
        else (x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
        for i, (x, dim) in enumerate(zip(args, in_dims, strict=True))
    ]
    found = op(*folded)
    return found.view(info.batch_size, len(found) // info.batch_size), 0


runtime.register_vmap("similarity_distillation_losses", _over_rows)
