"""Which bank rows a query does not meet: the rules a caller may combine, as NamedTuples that compiled code accepts."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..._core import checks


class SameLabel(NamedTuple):
    """Drop key j for query i when their labels are equal. query_labels [*B, N], key_labels [M] or [*B, M], integers."""

    query_labels: Tensor
    key_labels: Tensor


class KeyIndex(NamedTuple):
    """Drop the keys index_i for query i. index [*B, N] or, for several a query, [*B, N, E]; integers in [-1, M), -1 drops none."""

    index: Tensor


class Harder(NamedTuple):
    """Drop key j for query i when scale q_i.k_j > than_i + margin, before bias; no gradient. than [*B, N], margin a float or 0-d."""

    than: Tensor
    margin: "float | Tensor" = 0.0


class Rules(NamedTuple):
    """The exclusions as optional tensors, the form the kernels take. Leading dims as the caller gave them."""

    query_labels: Tensor | None = None  # [*B, N] int64
    key_labels: Tensor | None = None  # [M] or [*B, M] int64
    key_index: Tensor | None = None  # [*B, N, E] int64, -1 none
    limit: Tensor | None = None  # [*B, N], key j is dropped when scale q_i.k_j > limit_i


def flatten(exclude, query: Tensor, keys: Tensor, dtype: torch.dtype) -> Rules:
    """Check `exclude` against query [*B, N, D] and keys [*B, M, D] or [M, D]; `dtype` is that of the limit."""
    if not isinstance(exclude, tuple) or isinstance(exclude, (SameLabel, KeyIndex, Harder)):
        raise TypeError(f"exclude must be a tuple of SameLabel, KeyIndex and Harder, got {type(exclude).__name__}")
    rows, count = query.shape[:-1], keys.shape[-2]
    rules = Rules()
    for rule in exclude:
        if isinstance(rule, SameLabel):
            _once(rules.query_labels, "SameLabel")
            columns = (count,) if getattr(rule.key_labels, "ndim", 1) == 1 else (*query.shape[:-2], count)
            rules = rules._replace(
                query_labels=checks.integral("exclude: SameLabel.query_labels", rule.query_labels, shape=rows, device=query.device),
                key_labels=checks.integral("exclude: SameLabel.key_labels", rule.key_labels, shape=columns, device=query.device),
            )
        elif isinstance(rule, KeyIndex):
            _once(rules.key_index, "KeyIndex")
            index = checks.integral("exclude: KeyIndex.index", rule.index, device=query.device)
            if index.shape[: len(rows)] != rows or index.dim() > len(rows) + 1:
                wanted = ", ".join(map(str, rows))
                raise ValueError(f"exclude: KeyIndex.index must have shape ({wanted}) or ({wanted}, E), got {tuple(index.shape)}")
            if index.dim() == len(rows):
                index = index[..., None]
            checks.index_range("exclude: KeyIndex.index", index, count, lowest=-1)
            rules = rules._replace(key_index=index)
        elif isinstance(rule, Harder):
            _once(rules.limit, "Harder")
            than = checks.floating("exclude: Harder.than", rule.than)
            checks.exact_shape("exclude: Harder.than", than, rows)
            checks.alike("exclude: Harder.than", than, "query", query, dtype=False)
            checks.scalar("exclude: Harder.margin", rule.margin)
            margin = rule.margin.detach() if isinstance(rule.margin, Tensor) else rule.margin
            rules = rules._replace(limit=than.detach().to(dtype) + margin)
        else:
            raise TypeError(f"exclude must hold SameLabel, KeyIndex or Harder, got {type(rule).__name__}")
    return rules


def _once(seen: Tensor | None, name: str) -> None:
    if seen is not None:
        raise ValueError(f"exclude must hold at most one {name}, got two")
