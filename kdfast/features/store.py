"""Features: the values of a model for every sample of a data set, in memory and as one safetensors file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._core import checks
from .._core.files import whole

_PREFIX = "tensors."  # apart from "index" and "labels" in the file


@dataclass(frozen=True)
class Features:
    """Rows of one or more named tensors, in the order of their dataset index.

    tensors: {name: [N, ...]}, one row a sample.
    index: [N] int64, ascending: the dataset index of each row.
    labels: [N] int64 or None.
    """

    tensors: dict[str, Tensor]
    index: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        checks.integral("index", self.index)
        if not self.tensors:
            raise ValueError("tensors must hold at least one tensor")
        for name, rows in (*self.tensors.items(), *((("labels", self.labels),) if self.labels is not None else ())):
            if len(rows) != len(self.index):
                raise ValueError(f"{name} must have one row an index ({len(self.index)}), got {len(rows)}")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def to(self, device) -> "Features":
        """The same on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return Features({name: rows.to(device) for name, rows in self.tensors.items()}, self.index.to(device), labels)

    def select(self, index: Tensor) -> dict[str, Tensor]:
        """{name: rows [n, ...]} of the samples with dataset index `index` [n], on the device of `index`.

        Features kept on another device than `index` are waited for. IndexError for an index that is not there (CPU).
        """
        wanted = checks.integral("index", index)
        place = wanted.to(self.index.device).contiguous()
        row = torch.searchsorted(self.index, place).clamp(max=max(len(self) - 1, 0))
        if row.device.type == "cpu":
            found = self.index[row] == place if len(self) else torch.zeros_like(place, dtype=torch.bool)
            if not bool(found.all()):
                raise IndexError(f"index holds samples that were not encoded, the first is {int(place[~found][0])} (of {len(self)} rows)")
        return {name: rows[row].to(wanted.device) for name, rows in self.tensors.items()}

    def save(self, path, metadata: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file, under a temporary name that is renamed when it is complete."""
        stored = {_PREFIX + name: rows.contiguous() for name, rows in self.tensors.items()}
        stored["index"] = self.index.contiguous()
        if self.labels is not None:
            stored["labels"] = self.labels.contiguous()
        with whole(path) as temporary:
            save_file(stored, temporary, metadata=dict(metadata or {}))

    @classmethod
    def load(cls, path, device="cpu") -> "Features":
        """Read what `save` wrote."""
        with safe_open(path, framework="pt", device=str(device)) as file:
            names = file.keys()
            tensors = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in names if name.startswith(_PREFIX)}
            if not tensors or "index" not in names:
                raise ValueError(f"{path} is not a file of features: it holds {', '.join(names) or 'nothing'}")
            return cls(tensors, file.get_tensor("index"), file.get_tensor("labels") if "labels" in names else None)


def read_metadata(path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def merge(parts: list[Features]) -> Features:
    """The rows of all parts in the order of their index; of a sample that comes twice the first row stays."""
    index = torch.cat([part.index for part in parts])
    ascending, order = torch.sort(index, stable=True)
    first = torch.ones_like(ascending, dtype=torch.bool)
    first[1:] = ascending[1:] != ascending[:-1]
    keep = order[first]
    labels = None if parts[0].labels is None else torch.cat([part.labels for part in parts])[keep]
    tensors = {name: torch.cat([part.tensors[name] for part in parts])[keep] for name in parts[0].tensors}
    return Features(tensors, index[keep], labels)


def describe(at) -> str:
    """`at` as text for the metadata."""
    return json.dumps(at, sort_keys=True)
