"""The losses of similarity distillation by themselves, in tiles of PyTorch's operations on any device; derivatives come from elsewhere.

With w the weights e^(z - m) of each side relative to its running maximum m, and l their sums,

    cross-entropy = log l^S - E / l^T              E = sum_j w^T_j (z^S_j - m^S)
    KL            = log l^S - log l^T - E / l^T    E = sum_j w^T_j ((z^S_j - m^S) - (z^T_j - m^T))

whose terms round as the differences in them do, where lse^S - sum_j p^T_j z^S_j rounds as the logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..portable import _finite, grown
from ..tiles import Scores, no_autocast


class _Side(NamedTuple):
    """One side's running softmax of a block of rows, [r] each: `rest` belongs to the total, as `grown` has it."""

    top: Tensor
    total: Tensor
    rest: Tensor

    @staticmethod
    def begin(start: Tensor | None, like: Tensor) -> "_Side":
        nothing = torch.zeros_like(like)
        if start is None:
            return _Side(torch.full_like(like, -torch.inf), nothing, nothing)
        return _Side(start, torch.where(start == -torch.inf, 0.0, torch.ones_like(start)), nothing)

    def raised(self, z: Tensor) -> tuple["_Side", Tensor, Tensor]:
        """The side with a tile z [r, c] too, the tile relative to its new maximum, and what that adds to exponents before it."""
        top = torch.maximum(self.top, z.amax(-1))
        shift = _finite(top)
        step = torch.where(self.total == 0, 0.0, self.top - shift)
        z = z - shift[:, None]
        rescale = torch.exp(step)
        return _Side(top, *grown(self.total * rescale, self.rest * rescale, torch.exp(z).sum(-1))), z, step


@no_autocast
def losses(
    student: Tensor,  # [N, Ds]
    keys: Tensor,  # [M, Ds]
    teacher: Tensor,  # [N, Dt]
    teacher_keys: Tensor,  # [M, Dt]
    scale: Tensor,  # [N], fp32 or, where the other inputs are, fp64
    teacher_scale: Tensor,  # [N]
    start_logit: Tensor | None,  # [N]
    teacher_start_logit: Tensor | None,  # [N]
    bias: Tensor | None,  # [M]
    key_index: Tensor | None,  # [N, E], -1 none
    valid: Tensor | None,  # []
    kl: bool,
    compute: torch.dtype,
    teacher_compute: torch.dtype,
) -> Tensor:
    """[N]; -inf for a row that admits nothing."""
    valid = None if valid is None else valid.reshape(1)
    ours = Scores(student[None], keys[None], scale[None], compute, valid)
    theirs = Scores(teacher[None], teacher_keys[None], teacher_scale[None], teacher_compute, valid)
    one = slice(0, 1)
    _, row_blocks, column_blocks = ours.blocks()
    found = []
    for r in row_blocks:
        queries = [side.query_tile(one, r)[0] for side in (ours, theirs)]
        starts = (None if x is None else x[r] for x in (start_logit, teacher_start_logit))
        s, t = (_Side.begin(start, scale[r]) for start in starts)
        excess = rest = torch.zeros_like(scale[r])
        if start_logit is not None:
            excess = torch.where((s.total == 0) & (t.total != 0), -torch.inf, excess)
        for c in column_blocks:
            column = torch.arange(c.start, c.stop, device=student.device)
            dropped = None if valid is None else (column >= valid)[None]
            for index in () if key_index is None else key_index[r].unbind(-1):
                at = index[:, None] == column
                dropped = at if dropped is None else dropped | at
            z, u = (q @ side.column_tile(side.keys, one, c)[0].mT for q, side in zip(queries, (ours, theirs), strict=True))  # [r, c]
            if bias is not None:
                z, u = z + bias[c], u + bias[c]
            if dropped is not None:
                z, u = (torch.where(dropped, -torch.inf, x) for x in (z, u))
            before = t.total
            s, z, step = s.raised(z)
            t, u, teacher_step = t.raised(u)
            weight = torch.exp(u)
            more = weight * torch.where(weight == 0, 0.0, z - u if kl else z)
            moved = excess + (step - teacher_step if kl else step) * before
            rescale = torch.exp(teacher_step)
            excess, rest = grown(moved * rescale, rest * rescale, more.sum(-1))
        nothing = t.total == 0
        mean = excess / torch.where(nothing, 1.0, t.total)
        level = torch.where(nothing, 0.0, torch.log(t.total)) if kl else 0.0
        found.append(torch.log(s.total) - level - mean)
    return torch.cat(found) if found else torch.zeros_like(scale)


# Opaque to the compiler, which would otherwise unroll the loops over tiles.
torch.library.custom_op("kdfast_torch::similarity_distillation_losses", losses, mutates_args=()).register_fake(
    lambda student, keys, teacher, teacher_keys, scale, *_: torch.empty_like(scale)
)
