"""MSE and Cosine: student features beside the teacher's, sample by sample."""

import torch.nn.functional as F
from torch import Tensor

from .._core.dtypes import wide
from ..projectors import same_size
from .base import same_shape, vectors
from .pairs import PairLoss


class MSE(PairLoss):
    """The mean squared difference of features (FitNets, Romero et al. 2015; with an inverted Projector, Learning to Project).

    `loss(student, teacher)`: [N, D], [N, L, D] or maps [N, C, H, W] (the larger is average-pooled to the smaller), after
    the projector. Nothing is normalised: use Projector(norm=...) for that.

    Args:
        projector: a Projector, its kind, a list with one a layer, or None (widths must be equal).
        student_dim, teacher_dim: widths of a linear Projector to make; None with a kind reads them from the first batch.

    Raises:
        ValueError, TypeError: shapes that differ after projection.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = same_size(student, teacher)
        same_shape(student, teacher)
        return F.mse_loss(wide(student), wide(teacher))


class Cosine(PairLoss):
    """1 - cosine similarity of features, the mean over samples: both sides are normalised here.

    `loss(student, teacher)`: [N, D] or [N, L, D]; maps [N, C, H, W] are averaged to [N, C] after the projector.

    Args:
        projector, student_dim, teacher_dim: as for MSE.

    Raises:
        ValueError, TypeError: shapes that differ after projection.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = (wide(vectors(x, name) if x.dim() == 4 else x) for x, name in ((student, "student"), (teacher, "teacher")))
        same_shape(student, teacher)
        return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()
