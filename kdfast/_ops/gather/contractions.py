"""What the C++ and the Triton kernels share: their ops, with the same schemas in two namespaces, and the shapes of what these return."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses_dtypes(*dtypes: torch.dtype) -> str | None:
    """Why kernels do not take these dtypes of query and bank (None: they do)."""
    return next((f"it takes float32, bfloat16 or float16, not {dtype}" for dtype in dtypes if dtype not in DTYPES), None)


def scores(ops, query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """query [N, D] float32, bank [M, D], index [N, K] int64 -> z_nk = q_n . k_{index_nk}, [N, K] float32.

    An index outside the bank: RuntimeError in C++, NaN in Triton.
    """
    return ops.gather_similarity(query.contiguous(), rows(bank), index.contiguous())


def pool(ops, weights: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """weights [N, K] float32, bank [M, D], index [N, K] int64 -> o_n = sum_k w_nk k_{index_nk}, [N, D] float32."""
    return ops.gather_weighted_sum(weights.contiguous(), rows(bank), index.contiguous())


def rows(bank: Tensor) -> Tensor:
    return bank if bank.stride(1) == 1 else bank.contiguous()


def scores_fake(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    return query.new_empty(index.shape)


def pool_fake(weights: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    return weights.new_empty(index.shape[0], bank.shape[1])


def statistic_fake(
    query: Tensor, bank: Tensor, index: Tensor, offset: Tensor | None, shift: Tensor | None, pooled: bool
) -> tuple[Tensor, Tensor]:
    return query.new_empty(index.shape[0]), query.new_empty(index.shape[0] if pooled else 0, bank.shape[1])
