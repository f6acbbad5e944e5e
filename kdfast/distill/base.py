"""What every distillation loss shares: the calling convention, banks, `build`. (Pairing of inputs: pairs.py.)

`loss(student, teacher, *, index=None, labels=None, **extra)` -> 0-d loss; `loss.last` = its weighted terms, detached.
`student` and `teacher` are tensors, lists (layers, several teachers) or dicts (several values, or several views).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .._core import checks
from .._core.dtypes import wide
from .._ops.similarity.unit_length import unit_length


class DistillLoss(nn.Module):
    """A loss of student and teacher values that may own a projector and a bank.

    A bank object (kdfast.bank) is pushed exactly once a forward, after scoring, when gradients are enabled, the loss is
    in training mode and `push` is True (a bank that several losses score has one owner: the others get push=False).
    A bank Tensor stays as it is and is not saved in state_dict.
    """

    def __init__(self, bank=None, push: bool = True) -> None:
        super().__init__()
        if isinstance(bank, Tensor):
            checks.rows("bank", bank, ndim=2)
            self.register_buffer("bank", bank, persistent=False)
        elif bank is None or hasattr(bank, "as_rows"):
            self.bank = bank
        else:
            raise TypeError(f"bank must be a Tensor [M, D] or a kdfast bank, got {type(bank).__name__}")
        checks.flag("push", push)
        self.push = push
        self.last: dict[str, Tensor] = {}

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        return ["bank"] if isinstance(self.bank, Tensor) else []

    @torch.no_grad()
    def build(self, student, teacher) -> "DistillLoss":
        """Give every lazy width its value from example features, equal on all ranks; the random state is kept."""
        devices = {x.device for x in self.parameters() if x.device.type == "cuda"}
        with torch.random.fork_rng(devices=[device.index for device in devices]):
            self.materialize(student, teacher)
        broadcast_from_first_rank(self)
        return self

    def materialize(self, student, teacher) -> None:
        """Fill in lazy widths. Losses without any have nothing to do."""

    def _update_bank(self, keys: Tensor, index: Tensor | None = None, labels: Tensor | None = None, bank=None) -> None:
        """Push `keys` once to `bank` (`self.bank`), under the conditions that the class states. Call it after scoring."""
        bank = self.bank if bank is None else bank
        if self.push and self.training and torch.is_grad_enabled() and hasattr(bank, "as_rows"):
            keys, labels = keys.detach(), query_labels(bank, labels)
            if hasattr(bank, "update"):
                bank.update(own_rows(bank, index), keys, labels)
            else:
                bank.push(keys, labels)

    def _report(self, **terms: Tensor) -> Tensor:
        """The sum of the terms, which become `.last`."""
        self.__dict__["last"] = detached(terms)  # a module's own assignment first looks for parameters and submodules
        return total(terms.values())


def total(terms: Iterable[Tensor]) -> Tensor:
    """Their sum, which begins with the first: with a 0 it would be an operation more, and one of its gradient."""
    terms = iter(terms)
    return sum(terms, start=next(terms, 0))


def is_one(factor) -> bool:
    """Whether it is the number 1, by which nothing is multiplied or divided: that would be an operation, and one of its gradient."""
    return not isinstance(factor, Tensor) and factor == 1


def times(factor, x: Tensor) -> Tensor:
    return x if is_one(factor) else factor * x


def detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms without graph; a single one is copied, as their `total` is that very tensor, which `loss /= 2` changes in place."""
    if len(terms) == 1:
        return {name: value.detach().clone() for name, value in terms.items()}
    return {name: value.detach() for name, value in terms.items()}


def mean_of(values: list[Tensor]) -> Tensor:
    """The mean of 0-d tensors, a single one as it is."""
    return values[0] if len(values) == 1 else torch.stack(values).mean()


def bank_rows(bank) -> Tensor:
    """The bank's rows [M, D]."""
    return bank if isinstance(bank, Tensor) else bank.as_rows().rows


def own_rows(bank, index: Tensor | None) -> Tensor | None:
    """`index` where the bank keeps one row a sample, so that the sample's own row is no negative."""
    if not hasattr(bank, "update"):
        return None
    if index is None:
        raise ValueError("index must be given with an IndexedBank: it says which rows belong to the batch")
    return index.to(bank_rows(bank).device)


def query_labels(bank, labels: Tensor | None) -> Tensor | None:
    """`labels` where the bank keeps labels, so that rows of the same class are no negatives."""
    if getattr(bank, "labels", None) is None:
        return None
    if labels is None:
        raise ValueError("labels must be given with a bank that keeps labels")
    return labels.to(bank_rows(bank).device)


def check_queue(name: str, bank, width: int | None = None) -> None:
    """`bank` is a QueueBank (of that width)."""
    if not hasattr(bank, "push"):
        raise TypeError(f"{name} must be a QueueBank, got {type(bank).__name__}")
    if width is not None and bank_rows(bank).shape[1] != width:
        raise ValueError(f"{name} must have width {width}, got rows {tuple(bank_rows(bank).shape)}")


def first(value):
    """Element 0 of a tuple, anything else unchanged."""
    return value[0] if isinstance(value, tuple) and value else value


def views(name: str, given, wanted: tuple[str, ...]) -> list:
    """The wanted values of a dict, by name or by number; a single one may stand alone."""
    if not isinstance(given, Mapping):
        if len(wanted) == 1 and given is not None:
            return [given]
        raise ValueError(f"{name} must be a dict of the views {', '.join(wanted)}, got {type(given).__name__}")
    for keys in (wanted, range(len(wanted))):
        if all(key in given for key in keys):
            return [given[key] for key in keys]
    raise ValueError(f"{name} must have the views {', '.join(wanted)} (or 0, 1, ... in that order), it has {', '.join(map(str, given))}")


def vectors(x, name: str) -> Tensor:
    """[N, C]: a map [N, C, H, W] averaged, a tuple's element 0, a matrix as it is."""
    x = checks.floating(name, first(x))
    x = x.mean((2, 3)) if x.dim() == 4 else x
    if x.dim() != 2:
        raise ValueError(f"{name} must be [N, C] or [N, C, H, W], got shape {tuple(x.shape)}")
    return x


def unit(x: Tensor) -> Tensor:
    """l2-normalised along the last dimension, in float32 (float64 for float64)."""
    return unit_length(wide(x))


def like_bank(x: Tensor, rows: Tensor) -> Tensor:
    """`x` in the bank's dtype; under autocast the op converts both."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(rows.dtype)


def same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}: "
            "give projector= (or student_dim= and teacher_dim=)"
        )


@torch.no_grad()
def broadcast_from_first_rank(module: nn.Module) -> None:
    """Parameters and buffers as rank 0 has them, on every rank of the default group."""
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)
