"""Implementations of an op, by name, and the choice between them.

Each family registers, for each of its ops, the implementations it has, best first, with a function that
says why one cannot serve a call (None: it can). `choose` picks the first that can, or checks the one asked
for; `table` is what `kdfast doctor` prints.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch.autograd import forward_ad

NAMES = ("cpu", "cuda", "triton", "torch")
NOT_WRITTEN = "not written for this op"

#: KDFAST_IMPL, read once at import: the implementation used where a call names none and it can serve.
DEFAULT = os.environ.get("KDFAST_IMPL") or None
if DEFAULT is not None and DEFAULT not in NAMES:
    raise ValueError(f"KDFAST_IMPL must be one of {', '.join(NAMES)}, got {DEFAULT!r}")


@dataclass(frozen=True)
class Implementation:
    name: str
    #: reason, independent of any call, why it is missing on this machine (None: it is here)
    unavailable: Callable[[], str | None]
    #: reason why it cannot serve a call on this device type and dtype (None: it can)
    refuses: Callable[..., str | None]


_registry: dict[str, tuple[Implementation, ...]] = {}


def register(op: str, *implementations: Implementation) -> None:
    """Declare the implementations of `op` (best first). "torch" always exists and is added last."""
    portable = Implementation("torch", lambda: None, lambda **facts: None)
    _registry[op] = (*implementations, portable)


def choose(op: str, impl: str | None, **facts) -> str:
    """The implementation that serves this call of `op`; `facts` (device type, dtype, ...) go to `refuses`.

    Under forward-mode differentiation that is the portable one: kernels would lose the tangents without a word.

    Raises ValueError when `impl` names an unknown implementation or one that cannot serve the call, NotImplementedError when it names a
    kernel under forward-mode differentiation.
    """
    if impl is None and forward_mode():
        return "torch"
    if impl is None:
        found = _registry[op] if DEFAULT is None else sorted(_registry[op], key=lambda c: c.name != DEFAULT)
        for candidate in found:
            if candidate.unavailable() is None and candidate.refuses(**facts) is None:
                return candidate.name
    if impl not in NAMES:
        raise ValueError(f"impl must be None or one of {', '.join(map(repr, NAMES))}, got {impl!r}")
    for candidate in _registry[op]:
        if candidate.name == impl:
            reason = candidate.unavailable() or candidate.refuses(**facts)
            if reason is None:
                if impl != "torch" and forward_mode():
                    raise NotImplementedError(f"impl={impl!r} has no forward-mode derivatives of {op}: give impl=None or 'torch'")
                return impl
            raise ValueError(f"impl={impl!r} cannot serve {op}: {reason}")
    raise ValueError(f"impl={impl!r} cannot serve {op}: {NOT_WRITTEN}; it has {', '.join(c.name for c in _registry[op])}")


def forward_mode() -> bool:
    """Whether forward-mode derivatives (dual tensors, torch.func.jvp) are being computed."""
    return forward_ad._current_level >= 0


def table() -> dict[str, dict[str, str | None]]:
    """{op: {implementation: None if it is available here, else the reason}} over every registered op."""
    rows = {}
    for op, implementations in _registry.items():
        rows[op] = dict.fromkeys(NAMES, NOT_WRITTEN)
        rows[op].update({c.name: c.unavailable() for c in implementations})
    return rows
