"""SwAV: views predict each other's codes over learned prototypes (Caron et al. 2020, 2006.09882)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .._core import checks, collectives
from .._core.dtypes import full_precision
from ..functional import sinkhorn_assign
from .base import DistillLoss, check_queue, mean_of, unit, vectors


class SwAV(DistillLoss):
    """Cross-entropy of each view's prototype scores to the codes of the other views.

    `loss(student)` with a dict of views of embeddings [N, dim], l2-normalised here, the large views first: the first
    `global_views` give codes, all views predict. Codes q come from `kdfast.functional.sinkhorn_assign` of z . c over the
    samples of all ranks, without gradient, with c the l2-normalised prototypes:
        loss = mean over code views i and views v != i of  -mean q_i . log softmax(z_v . c / temperature).
    With a teacher its embeddings of the same views give the codes.

    Args:
        num_prototypes: default 3000. dim: default 128.
        temperature: default 0.1. epsilon, iters: of the assignment, default 0.05 and 3.
        banks: None, or a list of QueueBanks(rows, dim), one a code view, whose rows join the assignment alone (3840 rows in the
            paper, by memory). Rows not yet written are stood in for by the batch's. Each takes its view's embeddings after.
        global_views: number of views that give codes, default 2.
        push: see DistillLoss; all queues.

    Raises:
        ValueError, TypeError: fewer than two views, embeddings of another width, banks that do not fit.
    """

    def __init__(
        self,
        num_prototypes: int = 3000,
        dim: int = 128,
        *,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iters: int = 3,
        banks: list | None = None,
        global_views: int = 2,
        push: bool = True,
    ) -> None:
        super().__init__(push=push)
        checks.positive_number("temperature", temperature)
        checks.scalar("temperature", temperature)
        checks.positive_number("epsilon", epsilon)
        self.temperature, self.epsilon, self.iters = temperature, epsilon, checks.count("iters", iters)
        self.global_views = checks.count("global_views", global_views)
        if banks is not None and not isinstance(banks, (list, tuple, nn.ModuleList)):
            raise TypeError(f"banks must be a list of QueueBanks or None, got {type(banks).__name__}")
        if banks is not None and len(banks) != global_views:
            raise ValueError(f"banks must hold a QueueBank for each of {global_views} code views, got {len(banks)}")
        for bank in banks or []:
            check_queue("banks", bank, dim)
        self.banks = nn.ModuleList(banks or [])
        weight = torch.empty(checks.count("num_prototypes", num_prototypes), checks.count("dim", dim))
        self.prototypes = nn.Parameter(weight.uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, student, teacher=None, *, index=None, labels=None) -> Tensor:
        seen = self._views("student", student)
        names = list(seen)[: self.global_views]
        coded = seen if teacher is None else self._views("teacher", teacher)
        absent = [name for name in names if name not in coded]
        if absent:
            raise ValueError(f"teacher must have the views {names}, it has {list(coded)}")
        prototypes = unit(self.prototypes)
        with full_precision(prototypes):
            logits = {name: (z @ prototypes.t() / self.temperature).log_softmax(1) for name, z in seen.items()}
            codes = {name: self._codes(coded[name].detach(), prototypes.detach(), i) for i, name in enumerate(names)}
        swapped = [-(codes[i] * logits[v]).sum(1).mean() for i in names for v in seen if v != i]
        loss = self._report(swav=mean_of(swapped))
        for bank, name in zip(self.banks, names, strict=False):
            self._update_bank(coded[name], bank=bank)
        return loss

    def _codes(self, z: Tensor, prototypes: Tensor, view: int) -> Tensor:
        """[N, num_prototypes], rows summing to 1."""
        rows = z
        if len(self.banks):
            bank = self.banks[view]
            slot = torch.arange(bank.capacity, device=z.device)
            stored = torch.where((slot < bank.fill)[:, None], bank.storage.to(z.dtype), z[slot % len(z)])
            rows = torch.cat([z, stored])
        scores = rows @ prototypes.to(rows.dtype).t()
        return sinkhorn_assign(scores, epsilon=self.epsilon, iters=self.iters, group=collectives.world())[: len(z)]

    def _views(self, name: str, given) -> dict:
        if not isinstance(given, Mapping) or len(given) < 2:
            raise ValueError(f"{name} must be a dict of at least two views")
        embeddings = {view: unit(vectors(z, name)) for view, z in given.items()}
        for z in embeddings.values():
            if z.shape[1] != self.prototypes.shape[1]:
                raise ValueError(f"{name} must have width dim ({self.prototypes.shape[1]}), got shape {tuple(z.shape)}")
        return embeddings
