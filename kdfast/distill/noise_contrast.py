"""CRD's noise-contrastive loss against sampled bank rows, with its normaliser fixed by the first training batch."""

import torch
from torch import Tensor, nn

from .._core import checks, collectives
from ..functional import sampled_nce
from .base import bank_rows


class NoiseContrast(nn.Module):
    """`kdfast.functional.sampled_nce` with num_data = the bank's rows; Z comes from the first training batch of all ranks.

    `normalizer` is a 0-d buffer, 0 until then, so that a resumed run goes on with its own Z.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        checks.positive_number("temperature", temperature)
        self.temperature = temperature
        self.known = False  # whether `normalizer` holds Z: reading the buffer would synchronise
        self.register_buffer("normalizer", torch.zeros(()))

    def forward(self, query: Tensor, bank, index: Tensor, reduction: str = "mean") -> tuple[Tensor, Tensor]:
        """(loss, the normaliser used) of queries [N, D] whose own row is index[:, 0] and whose noise is index[:, 1:]."""
        losses, normalizer = sampled_nce(
            query,
            bank,
            index,
            temperature=self.temperature,
            num_data=len(bank_rows(bank)),
            normalizer=self.normalizer if self.known else None,
            reduction=reduction,
            group=collectives.world(),
        )
        if self.training and not self.known:
            self.normalizer.copy_(normalizer.detach())
            self.known = True
        return losses, normalizer

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.known = bool(self.normalizer > 0)
