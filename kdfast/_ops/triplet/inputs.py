"""Arguments of the triplet family, checked and brought into the form the implementations take."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..._core import checks
from ..._core.bank_protocol import BankRows
from . import classes, distances
from .classes import Anchors, References


class Names(NamedTuple):
    """What the caller calls its arguments."""

    rows: str = "embeddings"
    labels: str = "labels"
    ref: str = "ref"
    ref_labels: str = "ref_labels"
    ref_valid: str = "ref_valid"


class Batch(NamedTuple):
    layers: tuple[Tensor, ...]  # [N, D_l] each
    refs: tuple[Tensor, ...]  # [M, D_l] each; in batch the same tensors
    anchors: Anchors
    classes: References

    def ready(self, metric: str, normalize: bool) -> "Batch":
        """Rows in the accumulation dtype, of unit length where asked for."""
        layers = tuple(distances.prepare(x, metric, normalize) for x in self.layers)
        refs = tuple(
            ready if y is x else distances.prepare(y, metric, normalize) for ready, x, y in zip(layers, self.layers, self.refs, strict=True)
        )
        return self._replace(layers=layers, refs=refs)


def collect(
    embeddings,
    labels,
    *,
    ref=None,
    ref_labels=None,
    own_index=None,
    ref_valid=None,
    metric="euclidean",
    normalize=True,
    ready=True,
    names: Names = Names(),  # noqa: B008 (immutable)
) -> Batch:
    """`embeddings` [N, D] or a list of layers, against `ref` (tensor [M, D], a kdfast bank, or as many layers) or the batch itself.

    `ready` False: rows as given, for an implementation that reads them so.
    """
    checks.choice("metric", metric, distances.METRICS)
    checks.flag("normalize", normalize)
    layers = _layers(names.rows, embeddings)
    n = layers[0].shape[0]
    device = layers[0].device
    labels = checks.integral(names.labels, labels, shape=(n,), device=device)
    if ref is None:
        for argument, given in (("ref_labels", ref_labels), ("ref_valid", ref_valid)):
            if given is not None:
                raise ValueError(f"{argument} needs ref, got ref=None")
        if own_index is not None and own_index is not True:
            raise ValueError(f"own_index must be None or True without ref (each row is its own reference), got {_kind(own_index)}")
        refs, ref_labels, own_index, exists = layers, labels, True, None
    else:
        bank = _bank(ref, ref_labels, ref_valid, names)
        # tensors of their own, even where the caller gives the embeddings again: below, `is` tells that a batch is its own reference
        refs = tuple(y.view_as(y) for y in _layers(names.ref, bank.rows))
        if len(refs) != len(layers):
            raise ValueError(f"{names.ref} must have as many layers as {names.rows} ({len(layers)}), got {len(refs)}")
        for x, y in zip(layers, refs, strict=True):
            checks.alike(names.ref, y, names.rows, x)
            checks.same_width(names.ref, y, names.rows, x)
        m = refs[0].shape[0]
        if m == 0:
            raise ValueError(f"{names.ref} must have at least 1 row, got shape {tuple(refs[0].shape)}")
        if bank.labels is None:
            raise ValueError(f"{names.ref_labels} must be given with {names.ref}, got None")
        ref_labels = checks.integral(names.ref_labels, bank.labels, shape=(m,), device=device)
        exists = _exists(bank, m, device, names)
    anchors, references = classes.relate(labels, ref_labels, checks.own_rows(own_index, (n,), refs[0].shape[0], device), exists)
    if exists is not None:  # rows that do not exist may hold anything, and 0 x NaN is NaN
        refs = tuple(torch.where(exists[:, None], y, torch.zeros_like(y)) for y in refs)
    batch = Batch(layers, refs, anchors, references)
    return batch.ready(metric, normalize) if ready else batch


def _kind(x) -> str:
    return f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


def _layers(name: str, x) -> tuple[Tensor, ...]:
    layers = tuple(x) if isinstance(x, list | tuple) else (x,)
    if not layers:
        raise ValueError(f"{name} must be a tensor or a list of at least one, got an empty list")
    for layer in layers:
        checks.rows(name, layer, ndim=2)
        checks.alike(name, layer, f"{name}[0]", layers[0])
        if layer.shape[0] != layers[0].shape[0]:
            raise ValueError(f"{name} must have layers of one number of rows, got {[t.shape[0] for t in layers]}")
    return layers


def _bank(ref, ref_labels, ref_valid, names: Names) -> BankRows:
    """What a bank object supplies, or what is given beside a tensor or a list of layers."""
    if not hasattr(ref, "as_rows"):
        return BankRows(ref, ref_valid, ref_labels, None)
    own = ref.as_rows()
    for argument, given, supplied in ((names.ref_labels, ref_labels, own.labels), (names.ref_valid, ref_valid, own.valid)):
        if given is not None and supplied is not None:
            raise ValueError(f"{argument} must not be given with a bank that supplies its own")
    return own._replace(labels=ref_labels if own.labels is None else own.labels, valid=ref_valid if own.valid is None else own.valid)


def _exists(bank: BankRows, m: int, device: torch.device, names: Names) -> Tensor | None:
    """Which references exist [M]: those before `valid` whose bias is not -inf (rows of an IndexedBank not yet written). None: all."""
    exists = None if bank.bias is None else bank.bias != -torch.inf
    if bank.valid is None:
        return exists
    before = torch.arange(m, device=device) < checks.prefix(names.ref_valid, bank.valid, m, device)
    return before if exists is None else before & exists
