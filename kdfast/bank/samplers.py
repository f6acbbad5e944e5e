"""Samplers of negatives: K bank rows for each sample, drawn with replacement, its own row (or class) never among them.

A draw depends on the seed, the sample's row and the slot alone: not on the batch, the rank or the device. A sampler is
a module: it moves with `.to(device)`, and its Generator's state is in `state_dict`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core import checks, extension, random

_HEAVY = 1 / 16  # a row at least this likely gets a table of its own, from which it is missing
_RESOLUTION = 24  # bits: what is left after the redraws is below what one uniform number resolves
_UNIFORM = 23  # bits of a random integer that become a uniform number, exact in float32; the others choose a column
_DRAWS = 1 << 14  # drawn at a time on the CPU, where the hash's intermediates then stay in L2


class _Sampler(nn.Module):
    """Keeps K and the generator; a subclass has `_size` rows and `_draw(rows, seed)`, and the same as a CPU kernel."""

    def __init__(self, k: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.k = checks.count("k", k)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        self.generator = generator

    def draw(self, rows: Tensor, generator: torch.Generator | Tensor | None = None, *, positive: bool = False) -> Tensor:
        """K bank rows for each sample, [N, K] int64 on the device of `rows`.

        rows: [N] integers: the samples' own bank rows. A row that occurs twice draws the same negatives.
        generator: a torch.Generator, consumed for one number, or a 0-d integer seed tensor (compiled code); None: the
            sampler's own, or PyTorch's global one.
        positive: put the sample's own row first: [N, 1 + K], the `index` of `sampled_nce`.

        Raises:
            ValueError, TypeError: `rows` or `generator` of the wrong kind.
            IndexError: a row out of range, on the CPU.
        """
        checks.integral("rows", rows)
        if rows.dim() != 1:
            raise ValueError(f"rows must have shape [N], got {tuple(rows.shape)}")
        checks.index_range("rows", rows, self._size)
        home = self._device
        own = rows.to(home).long()[:, None]
        seed = random.seed(self.generator if generator is None else generator, home)
        if _reading_is_free(own) and extension.missing_cpu() is None:
            return self._draw_fused(own[:, 0].contiguous(), seed, positive).to(rows.device)
        parts = own.split(max(1, _DRAWS // self.k)) if _reading_is_free(own) else (own,)
        index = torch.cat([self._draw(part, seed) for part in parts])
        if positive:
            index = torch.cat([own, index], dim=1)
        return index.to(rows.device)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The tables: they never change."""
        return [name for name, _ in self.named_buffers()]

    def get_extra_state(self):
        return None if self.generator is None else self.generator.get_state()

    def set_extra_state(self, state) -> None:
        if state is not None:
            self.generator = self.generator or torch.Generator()
            self.generator.set_state(state)


class AliasSampler(_Sampler):
    """Rows in proportion to weights, by Walker's alias method (Walker 1977): O(1) a draw.

    A sample's own row is drawn again, as often as leaves it with probability below 2^-24 (once or twice for most
    weights); what is left then goes to the heaviest other row.

    Args:
        weights: [M], M >= 2, >= 0, finite, at least two of them > 0; need not sum to 1.
        k: K, the number of rows drawn for each sample.
        generator: torch.Generator of the draws, kept and saved; None: PyTorch's global one.

    Raises:
        ValueError, TypeError: naming the argument that is wrong and what is needed. (Reads `weights` on the host.)
    """

    def __init__(self, weights: Tensor, k: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(k, generator)
        checks.floating("weights", weights, ndim=1)
        chances = weights.detach().double()
        if not bool((chances.isfinite() & (chances >= 0)).all()):
            raise ValueError("weights must be finite and >= 0")
        if int((chances > 0).sum()) < 2:
            raise ValueError(
                f"weights must hold at least two values > 0, got {int((chances > 0).sum())}: a sample's own row is never drawn"
            )
        chances = chances / chances.max()  # their sum may overflow
        chances = chances / chances.sum()
        heaviest = chances.topk(2).indices
        heavy = (chances >= _HEAVY).nonzero()[:, 0]
        light = float(torch.where(chances < _HEAVY, chances, 0.0).max())
        self.tries = math.ceil(_RESOLUTION / -math.log2(light)) if light > 0 else 1
        tables = [_alias_table(chances)] + [_alias_table(chances.index_fill(0, row, 0.0)) for row in heavy]
        self.register_buffer("keep", torch.stack([t[0] for t in tables]), persistent=False)  # [1 + heavy, M]
        self.register_buffer("alias", torch.stack([t[1] for t in tables]), persistent=False)  # [1 + heavy, M]
        self.register_buffer("heavy", heavy, persistent=False)
        self.register_buffer("heaviest", heaviest, persistent=False)

    @property
    def _size(self) -> int:
        return self.alias.shape[1]

    @property
    def _device(self) -> torch.device:
        return self.alias.device

    def _draw(self, own: Tensor, seed: Tensor) -> Tensor:
        slots = torch.arange(self.k, device=own.device)
        index = self._attempt(own, slots, seed)
        for attempt in range(1, self.tries):
            if _reading_is_free(own):
                n, slot = (index == own).nonzero(as_tuple=True)
                index[n, slot] = self._attempt(own[n], attempt * self.k + slot[:, None], seed)[:, 0]
            else:
                index = torch.where(index == own, self._attempt(own, attempt * self.k + slots, seed), index)
        other = torch.where(own == self.heaviest[0], self.heaviest[1], self.heaviest[0])
        return torch.where(index == own, other, index)

    def _draw_fused(self, own: Tensor, seed: Tensor, positive: bool) -> Tensor:
        return torch.ops.kdfast.draw_alias(
            own, seed, self.keep.float(), self.alias, self.heavy, self.heaviest, self.tries, self.k, positive
        )

    def _attempt(self, own: Tensor, slot: Tensor, seed: Tensor) -> Tensor:
        """A row of the bank for each slot [N or 1, K] of the rows `own` [N, 1]; it may be `own`."""
        table = ((own == self.heavy) * torch.arange(1, len(self.heavy) + 1, device=own.device)).sum(dim=1, keepdim=True)  # [N, 1]
        number = random.integers(seed, own, slot, 1 << 62)
        column = (number >> _UNIFORM) % self._size
        uniform = ((number & ((1 << _UNIFORM) - 1)).float() + 0.5) * 2.0**-_UNIFORM
        cell = table * self._size + column
        return torch.where(uniform < self.keep.take(cell), column, self.alias.take(cell))


class ClassSampler(_Sampler):
    """Rows of other classes than the sample's, all equally likely: CRD's negatives, drawn here with replacement.

    Args:
        labels: [M] integers, the class of each bank row; at least two classes.
        k: K, the number of rows drawn for each sample.
        generator: as in AliasSampler.

    Raises:
        ValueError, TypeError: naming the argument that is wrong and what is needed. (Reads `labels` on the host.)
    """

    def __init__(self, labels: Tensor, k: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(k, generator)
        labels = checks.integral("labels", labels).contiguous()
        if labels.dim() != 1:
            raise ValueError(f"labels must have shape [M], got {tuple(labels.shape)}")
        ascending, by_class = torch.sort(labels, stable=True)
        first = torch.searchsorted(ascending, labels)
        count = torch.searchsorted(ascending, labels, right=True) - first
        if len(labels) == 0 or int(count[0]) == len(labels):
            raise ValueError("labels must hold at least two classes: negatives are rows of another class")
        self.register_buffer("by_class", by_class, persistent=False)  # the rows, class after class
        self.register_buffer("first", first, persistent=False)  # [M]: where the row's class begins in it
        self.register_buffer("count", count, persistent=False)  # [M]: how many rows the class has

    @property
    def _size(self) -> int:
        return len(self.by_class)

    @property
    def _device(self) -> torch.device:
        return self.by_class.device

    def _draw(self, own: Tensor, seed: Tensor) -> Tensor:
        first, count = self.first[own], self.count[own]  # [N, 1]
        place = random.integers(seed, own, torch.arange(self.k, device=own.device), self._size - count)
        return self.by_class[torch.where(place >= first, place + count, place)]  # past the sample's own class

    def _draw_fused(self, own: Tensor, seed: Tensor, positive: bool) -> Tensor:
        return torch.ops.kdfast.draw_class(own, seed, self.by_class, self.first, self.count, self.k, positive)


def _reading_is_free(x: Tensor) -> bool:
    """Whether a size that depends on the numbers costs nothing: on the CPU, in eager code."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _alias_table(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(keep [M] float32, alias [M]): row = column if u < keep[column] else alias[column], for a uniform column and u.

    In units of the mean weight, light rows (w < 1) lack 1 - w and heavy rows have w - 1 to spare. Serve the lacks in
    order from the heavy rows in order. A light row is served by the heavy row whose spare covers where the lacks before
    it end; a heavy row that runs dry within a lack is short of the overdraft, for which the next heavy row stands in.
    Both are searches in cumulative sums (as in Huebschle-Schneider and Sanders 2019, section 4.2).
    """
    w = weights.double() * (len(weights) / weights.double().sum())
    heavy = w >= 1
    heavy[w.argmax()] = True  # rounding may leave none
    lights, heavies = (~heavy).nonzero()[:, 0], heavy.nonzero()[:, 0]
    lack, spare = (1 - w[lights]).cumsum(0), (w[heavies] - 1).cumsum(0)
    keep, alias = torch.ones_like(w), torch.arange(len(w), device=w.device)
    if len(lights):
        before = F.pad(lack[:-1], (1, 0))
        server = torch.searchsorted(spare, before, right=True).clamp(max=len(heavies) - 1)
        keep[lights], alias[lights] = w[lights], heavies[server]
        dry = torch.searchsorted(lack, spare, right=True)  # the first lack that ends past the heavy row's spare
        runs = (dry < len(lights)) & (torch.arange(len(heavies), device=w.device) < len(heavies) - 1)
        dry = dry.clamp(max=len(lights) - 1)
        runs &= before[dry] < spare  # a spare used up where that lack begins is no part of it
        overdraft = torch.where(runs, lack[dry] - spare, 0.0)
        keep[heavies] = (1 - overdraft).clamp(0, 1)
        alias[heavies] = torch.where(runs, heavies.roll(-1), heavies)
    return keep.float(), alias


def _drawn_fake(own: Tensor, *args) -> Tensor:
    k, positive = args[-2:]
    return own.new_empty((len(own), k + positive))


if extension.missing_cpu() is None:
    for _op in ("draw_alias", "draw_class"):
        torch.library.register_fake(f"kdfast::{_op}", _drawn_fake)
