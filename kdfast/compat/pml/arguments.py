"""What the losses and miners share of their arguments: distance objects, keywords of the base class, references, index tuples."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..._core import bank_protocol, checks
from ..._ops.triplet import distances

#: keywords of the library's base classes, and the values that change nothing
_BASE = {"embedding_regularizer": (None,), "embedding_reg_weight": (None, 1), "collect_stats": (None, False), "reducer": (None,)}


def refuse(owner: str, options: dict) -> None:
    """Keywords of the base class are taken where they change nothing."""
    for name, value in options.items():
        if name not in _BASE:
            raise TypeError(f"{owner} has no option {name!r}")
        if value not in _BASE[name]:
            raise ValueError(f"{name} is not supported by kdfast.compat.pml.{owner}, got {value!r}")


def metric_of(distance, default: str, allowed: tuple[str, ...] = distances.METRICS) -> tuple[str, bool]:
    """(kdfast's metric, whether rows are normalised) of a distance object of the library, told by its class and attributes."""
    if distance is None:
        return default, True
    kind, metric = type(distance).__name__, None
    if kind == "CosineSimilarity":
        metric = "cosine"
    elif kind == "LpDistance" and distance.p == 2:
        metric = {1: "euclidean", 2: "sqeuclidean"}.get(distance.power)
    if metric not in allowed:
        raise ValueError(
            f"distance must be None or one with the metric {' or '.join(allowed)} (LpDistance(p=2), CosineSimilarity), got {kind}"
        )
    return metric, bool(getattr(distance, "normalize_embeddings", True))


class Reference(NamedTuple):
    """What a batch is compared with. In batch `rows` is None."""

    rows: object = None  # Tensor [M, D] or a labelled bank
    labels: Tensor | None = None
    own: Tensor | None = None  # [N], each anchor's own row, -1: none

    @classmethod
    def given(cls, embeddings: Tensor, ref_emb: Tensor | None, ref_labels: Tensor | None) -> "Reference":
        if ref_emb is None and ref_labels is not None:
            raise ValueError("ref_labels needs ref_emb")
        if ref_emb is None or ref_emb is embeddings:
            return cls()
        if isinstance(ref_emb, Tensor) or not hasattr(ref_emb, "as_rows"):
            checks.rows("ref_emb", ref_emb, ndim=2)
            checks.same_width("ref_emb", ref_emb, "embeddings", embeddings)
            computed_alike = torch.float64 not in (embeddings.dtype, ref_emb.dtype)  # in float32, whatever they are
            checks.alike("ref_emb", ref_emb, "embeddings", embeddings, dtype=not computed_alike)
        return cls(ref_emb, ref_labels)

    @property
    def options(self) -> dict:
        """As keywords of kdfast.functional's metric losses."""
        return {"ref": self.rows, "ref_labels": self.labels, "own_index": self.own}

    def unpacked(self, embeddings: Tensor, labels: Tensor | None = None) -> "Rows":
        """The rows compared with; in batch the embeddings, each its own."""
        if self.rows is None:
            return Rows(embeddings, labels, torch.arange(len(embeddings), device=embeddings.device), None)
        rows, valid, own_labels, *_ = bank_protocol.unpack(self.rows)
        return Rows(rows, self.labels if own_labels is None else own_labels, self.own, valid)

    def labelled(self, embeddings: Tensor, labels: Tensor) -> "Rows":
        """As `unpacked`, with labels, checked."""
        ref = self.unpacked(embeddings, labels)
        if ref.labels is None:
            raise ValueError("ref_labels must be given with ref_emb")
        return ref._replace(labels=checks.integral("ref_labels", ref.labels, shape=(len(ref.rows),)).to(embeddings.device))


class Rows(NamedTuple):
    rows: Tensor  # [M, D]
    labels: Tensor | None  # [M]
    own: Tensor | None  # [N]
    valid: Tensor | None  # 0-d: how many of the rows exist


def checked_labels(embeddings: Tensor, labels) -> Tensor:
    """Labels [N] as int64 on the embeddings' device."""
    checks.rows("embeddings", embeddings, ndim=2)
    return checks.integral("labels", labels, shape=(len(embeddings),)).to(embeddings.device)


def checked_tuple(indices) -> tuple[Tensor, ...]:
    if not isinstance(indices, (tuple, list)) or len(indices) not in (3, 4):
        raise ValueError("indices_tuple must be (anchors, positives, negatives) or (anchors, positives, anchors, negatives)")
    indices = tuple(checks.integral("indices_tuple", index) for index in indices)
    lengths = [len(index) for index in indices]
    paired = len(set(lengths)) == 1 if len(indices) == 3 else lengths[0] == lengths[1] and lengths[2] == lengths[3]
    if not paired or any(index.dim() != 1 for index in indices):
        raise ValueError(f"indices_tuple must hold index vectors that pair up, got lengths {lengths}")
    return indices
