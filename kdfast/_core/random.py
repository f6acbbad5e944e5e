"""Counter-based random numbers: a draw depends on (seed, row, slot) alone, never on order, tiles or threads."""

import torch
from torch import Tensor

from . import checks


def check(name: str, generator) -> None:
    """`generator` is something that `seed` takes."""
    if isinstance(generator, Tensor):
        if checks.integral(name, generator).numel() != 1:
            raise ValueError(f"{name}, given as a seed tensor, must hold one integer, got shape {tuple(generator.shape)}")
    elif generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator, a seed tensor or None, got {type(generator).__name__}")


def seed(generator: torch.Generator | Tensor | None, device: torch.device) -> Tensor:
    """A 0-d int64 seed tensor on `device`.

    A torch.Generator (or None: PyTorch's global one) is consumed for one 63-bit draw, in eager code only; an
    integer tensor with one element is taken as the seed itself, which is the form for compiled code.
    """
    check("generator", generator)
    if isinstance(generator, Tensor):
        return generator.reshape(()).to(device=device, dtype=torch.int64)
    source = device if generator is None else generator.device
    return torch.randint(0, 2**63 - 1, (), generator=generator, dtype=torch.int64, device=source).to(device)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical shift: int64's own >> copies the sign


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014); int64 products wrap as uint64's do."""
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shifted(x, 31)


def _bits(seed: Tensor, row: Tensor, slot: Tensor) -> Tensor:
    """64 random bits keyed by (seed, row, slot), as int64."""
    key = _mix(seed + -0x61C8864680B583EB)  # 0x9E3779B97F4A7C15, the golden ratio
    return _mix(_mix(key + row.long()) + slot.long())


def uniform(seed: Tensor, row: Tensor, slot: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in (0, 1) keyed by (seed, row, slot), broadcast together; 23 bits (52 for float64)."""
    width = 52 if dtype == torch.float64 else 23  # one bit below the mantissa's, so that + 0.5 is exact and 1 is never reached
    return (_shifted(_bits(seed, row, slot), 64 - width).to(dtype) + 0.5) * 2.0**-width


def integers(seed: Tensor, row: Tensor, slot: Tensor, high: int | Tensor) -> Tensor:
    """Uniform int64 in [0, high), keyed and broadcast as `uniform`; high (>= 1) is far below 2^62, so the remainder's bias is nil."""
    return _shifted(_bits(seed, row, slot), 1) % high
