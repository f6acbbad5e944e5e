"""CrossBatchMemory (Wang et al. 2020): a loss, and optionally a miner, against the embeddings of earlier batches."""

import torch
from torch import Tensor, nn

from ..._core import checks, dtypes
from ...bank import QueueBank
from .._memory import push_located
from .arguments import Reference, checked_labels
from .criteria import PairLoss
from .miners import Miner


class CrossBatchMemory(nn.Module):
    """`loss(embeddings, labels, enqueue_mask=None)`: the batch is pushed first, then scored against the memory, own rows left out.

    Args:
        loss: a loss of kdfast.compat.pml. embedding_size: D. memory_size: rows kept, default 1024. miner: one of kdfast.compat.pml.

    With `enqueue_mask` [N] bool only those rows are pushed (keys of a second encoder, say), and the others are scored.

    Differs: own rows are left out before mining (the original mines with them in, then drops what it chose: every easiest
    positive); memory, labels, pointer and fill are in state_dict (there the pointer is not); a batch may exceed the memory; under
    torch.distributed every rank's embeddings are pushed on every rank, so that the memories stay equal (there they diverge).
    `indices_tuple` is refused: the original would read a batch's indices as rows of the memory.
    """

    def __init__(self, loss, embedding_size: int, memory_size: int = 1024, miner=None):
        super().__init__()
        if not isinstance(loss, PairLoss):
            raise ValueError(f"loss must be a loss of kdfast.compat.pml, got {type(loss).__name__}")
        if miner is not None and not isinstance(miner, Miner):
            raise ValueError(f"miner must be a miner of kdfast.compat.pml or None, got {type(miner).__name__}")
        self.loss, self.miner = loss, miner
        checks.count("embedding_size", embedding_size)
        checks.count("memory_size", memory_size)
        self.embedding_size, self.memory_size = embedding_size, memory_size
        self.reset_queue()

    def reset_queue(self) -> None:
        """Forget everything."""
        self.memory = QueueBank(self.memory_size, self.embedding_size, labels=True, normalize=False, gather=None)

    @property
    def embedding_memory(self) -> Tensor:
        return self.memory.storage

    @property
    def label_memory(self) -> Tensor:
        return self.memory.labels

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        return [f"memory.{name}" for name, _ in self.memory.named_buffers()]

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple=None, enqueue_mask: Tensor | None = None) -> Tensor:
        if indices_tuple is not None:
            raise ValueError("indices_tuple must be None: pairs against the memory come from the miner, or are all pairs")
        labels = checked_labels(embeddings, labels)
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(f"embeddings must have width embedding_size ({self.embedding_size}), got shape {tuple(embeddings.shape)}")
        embeddings = embeddings.to(dtypes.accumulator(embeddings.dtype))
        self.memory.to(embeddings.device, embeddings.dtype)
        if enqueue_mask is None:
            own = push_located(self.memory, embeddings, labels)
        else:
            if not isinstance(enqueue_mask, Tensor) or enqueue_mask.dtype != torch.bool:
                kind = enqueue_mask.dtype if isinstance(enqueue_mask, Tensor) else type(enqueue_mask).__name__
                raise TypeError(f"enqueue_mask must be a tensor of bools, got {kind}")
            checks.exact_shape("enqueue_mask", enqueue_mask, (len(embeddings),))
            own = None
            push_located(self.memory, embeddings[enqueue_mask], labels[enqueue_mask])
            embeddings, labels = embeddings[~enqueue_mask], labels[~enqueue_mask]
        reference = Reference(self.memory, None, own)
        mined = None if self.miner is None else self.miner.against(reference, embeddings, labels)
        return self.loss.against(reference, embeddings, labels, mined)
