"""FacultyOT: class distributions of teachers with other classes, compared by optimal transport (our reading of Faculty Distillation)."""

import torch
from torch import Tensor

from .. import ops
from .._core import checks
from .._core.dtypes import wide
from .base import DistillLoss, mean_of
from .pairs import pairs


class FacultyOT(DistillLoss):
    """Entropic transport between the teacher's and the student's softened class probabilities, the mean over samples.

    `loss(student, teacher)` with logits [N, C_s] and [N, C_t]; lists of teachers and dicts of views give the mean over pairs:
        loss = mean of OT(softmax(teacher / T), softmax(student / T); cost), the dual value at `epsilon`;
    its gradient reaches the student through the marginal. No code of the authors was read: relationship matching as we read it.

    Args:
        cost: [C_t, C_s], what moving mass from a teacher's class to a student's costs (1 - cosine of the classes' text
            embeddings, say), or a list with one a teacher. None: 1 between different classes, for equal label sets.
        T: default 4. epsilon, iters: of the Sinkhorn iterations, default 0.05 and 50.

    Raises:
        ValueError, TypeError: a cost that does not fit the logits.
    """

    def __init__(self, cost=None, *, T: float = 4.0, epsilon: float = 0.05, iters: int = 50) -> None:
        super().__init__()
        checks.positive_number("T", T)
        checks.scalar("T", T)
        checks.positive_number("epsilon", epsilon)
        self.T, self.epsilon, self.iters = T, epsilon, checks.count("iters", iters)
        given = [] if cost is None else cost if isinstance(cost, list) else [cost]
        self.num_costs = len(given)
        for i, one in enumerate(given):
            self.register_buffer(f"cost{i}", checks.floating("cost", one, ndim=2))

    def forward(self, student, teacher, *, index=None, labels=None) -> Tensor:
        values = [self._transport(slot, s, t.detach()) for slot, s, t in pairs(student, teacher)]
        return self._report(transport=mean_of(values))

    def _transport(self, slot: int, student: Tensor, teacher: Tensor) -> Tensor:
        b, a = ((wide(x) / self.T).flatten(0, -2).softmax(1) for x in (student, teacher))
        cost = self._cost(slot, a).to(b.dtype)
        if tuple(cost.shape) != (a.shape[1], b.shape[1]):
            raise ValueError(f"cost must be [{a.shape[1]}, {b.shape[1]}] for these logits, got {tuple(cost.shape)}")
        return ops.sinkhorn(cost, a=a.to(b.dtype), b=b, epsilon=self.epsilon, max_iters=self.iters).value.mean()

    def _cost(self, slot: int, teacher: Tensor) -> Tensor:
        if self.num_costs == 0:
            return 1 - torch.eye(teacher.shape[1], dtype=teacher.dtype, device=teacher.device)
        if self.num_costs > 1 and slot >= self.num_costs:
            raise ValueError(f"cost must be a list of one a teacher, got {self.num_costs} for teacher {slot}")
        return getattr(self, f"cost{slot if self.num_costs > 1 else 0}")
