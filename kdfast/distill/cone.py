"""CoNe: contrast your neighbours, supervised (Zheng et al. 2023, 2308.10761)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .._core import checks
from .._core.dtypes import accumulator, wide
from .._core.reduction import reduce_rows
from .._ops import gather
from .base import DistillLoss, bank_rows, check_queue, like_bank, query_labels, same_shape, unit, vectors
from .pairs import pairs

_LEAST_MASS = 1e-8  # rows whose class has less among their neighbours are dropped


class CoNe(DistillLoss):
    """Each sample is drawn to its nearest queue rows of its class, and classified as its neighbours are.

    `loss(student, teacher, labels=y)` with dicts of "logits" [N, C] and "feat" [N, D], as from at={"logits": None, "feat":
    "head"}; the teacher is a moving average of the student (torch's AveragedModel), whose features k are the keys. q, k are
    l2-normalised here. With Q the queue of keys, y_j their labels, P [M, C] a queue of the teacher's class probabilities for them:
        neighbours = mean -log sum_{j in J, y_j = y} softmax_J(q . Q_j / temperature),  J the `neighbors` nearest rows of Q to q
                     (rows whose class has no mass above 1e-8 in J are dropped);
        consistency = mean KL(softmax(k . Q / key_temperature) P || softmax(student logits)).
    The task's cross-entropy comes besides. Then k with y, and softmax(teacher logits), are pushed.

    Args:
        bank: QueueBank(M, D, labels=True). probabilities: QueueBank(M, C, normalize=False), filled by this loss alone.
        neighbors: |J|, default 512. temperature: default 0.1. key_temperature: default 0.07.
        neighbor_weight, consistency_weight: default 0.7 and 0.4 (which is which is our reading); 0 leaves a term out.
        push: see DistillLoss; both queues.

    Raises:
        ValueError, TypeError: banks that do not fit, missing labels or values.
    """

    def __init__(
        self,
        bank,
        probabilities,
        *,
        neighbors: int = 512,
        temperature: float = 0.1,
        key_temperature: float = 0.07,
        neighbor_weight: float = 0.7,
        consistency_weight: float = 0.4,
        push: bool = True,
    ) -> None:
        check_queue("bank", bank)
        check_queue("probabilities", probabilities)
        if bank.labels is None or probabilities.labels is not None:
            raise ValueError("bank must be made with labels=True, probabilities with labels=False")
        if probabilities.normalize or probabilities.capacity != bank.capacity:
            raise ValueError("probabilities must be a QueueBank with normalize=False and bank's capacity")
        super().__init__(bank, push)
        checks.positive_number("temperature", temperature)
        checks.positive_number("key_temperature", key_temperature)
        self.probabilities, self.neighbors = probabilities, min(checks.count("neighbors", neighbors), bank.capacity)
        self.temperature, self.key_temperature = temperature, key_temperature
        self.neighbor_weight, self.consistency_weight = neighbor_weight, consistency_weight

    def forward(self, student, teacher, *, index=None, labels=None) -> Tensor:
        classes = query_labels(self.bank, labels)
        ((_, student, teacher),) = pairs(student, teacher, ("logits", "feat"))
        query, key = unit(vectors(student["feat"], "student")), unit(vectors(teacher["feat"], "teacher").detach())
        same_shape(query, key)
        logits, teacher_logits = (wide(x["logits"]) for x in (student, teacher))
        terms = {}
        if self.neighbor_weight:
            terms["neighbors"] = self.neighbor_weight * self._attracted(query, classes)
        if self.consistency_weight:
            target = self._voted(key).to(logits.dtype)
            terms["consistency"] = self.consistency_weight * F.kl_div(logits.log_softmax(1), target, reduction="batchmean")
        loss = self._report(**terms)
        self._update_bank(key, labels=labels)
        self._update_bank(teacher_logits.softmax(1), bank=self.probabilities)
        return loss

    def _attracted(self, query: Tensor, classes: Tensor) -> Tensor:
        rows = bank_rows(self.bank)
        query = query.to(rows.dtype)
        _, near = ops.knn(query.detach(), self.bank, self.neighbors)  # [N, J], -1 past the rows there are
        there = near >= 0
        near = near.clamp(min=0)
        same = there & (self.bank.labels[near] == classes[:, None])
        usable = same.any(1)
        there, same = (mask | ~usable[:, None] for mask in (there, same))  # a row without its class: anything finite, not counted
        zero = torch.zeros((), dtype=accumulator(rows.dtype), device=rows.device)
        scaled = gather.scaled(query, 1 / self.temperature)
        impl = gather.choose(query, rows, None)
        all_of, own = (gather.row_log_sum_exp(scaled, rows, near, torch.where(mask, zero, -torch.inf), impl) for mask in (there, same))
        losses = all_of - own
        return reduce_rows(losses, counted=usable & (losses.detach() <= -torch.log(zero + _LEAST_MASS)))

    @torch.no_grad()
    def _voted(self, key: Tensor) -> Tensor:
        """Class probabilities of the queue's rows, weighed by their similarity to each key: [N, C]; zeros while it is empty."""
        rows, fill = self.bank.as_rows()[:2]
        key, values = like_bank(key, rows), like_bank(self.probabilities.storage, rows)
        return ops.similarity_softmax(key, rows, scale=1 / self.key_temperature, values=values, valid=fill)[1]
