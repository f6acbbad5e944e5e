"""What a call launches on an H200, of ours and of PyTorch's, and whether the host waits, without one: shapes on the meta device.

Python runs as it would there, with the tiles and the parts of a GPU of capability 9.0 and 132 multiprocessors; Triton's launches and
PyTorch's operations are counted, and nothing is computed. What reads a tensor's value raises: there is none.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable
from unittest import mock

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from kdfast._core import precision, triton_runtime
from kdfast._core.architectures import named

#: launch nothing: no memory is written
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view", "lift_fresh"}
#: on a GPU the host waits for their result, beside copies from it and to it
WAITING = {
    *("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "bincount", "_unique", "_unique2", "unique_dim"),
    *("unique_consecutive", "repeat_interleave", "histc", "allclose"),
}

#: on a GPU floats are added up in an order that varies from run to run
UNORDERED = {"scatter_add", "scatter_add_", "index_add", "index_add_", "scatter_reduce", "scatter_reduce_", "index_reduce", "put_"}


class Census(TorchDispatchMode):
    """Counts by name, while it is on: `ours`, `others`; `waits` are operations for which the host would wait, `unordered` of UNORDERED."""

    def __init__(self):
        super().__init__()
        self.ours, self.others, self.places = Counter(), Counter(), Counter()
        self.waits, self.unordered = [], []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.namespace.startswith("kdfast"):
            with self:
                return op.redispatch(DispatchKeySet(DispatchKey.CUDA), *args, **kwargs)
        name = op._schema.name.split("::")[1]
        out = op(*args, **kwargs)
        made, all_of_it = ([x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in (out, (out, args, kwargs)))
        masks = name in ("index", "index_put", "index_put_") and any(
            x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]) if x is not None
        )
        if name in WAITING or masks or (name in ("_to_copy", "copy_") and len({x.device for x in all_of_it}) > 1):
            self.waits.append(name)
        if name in UNORDERED and made[0].is_floating_point():
            self.unordered.append(name)
        if name not in FREE and not op.is_view and any(x.numel() for x in made):
            self.others[name] += 1
            self.places[_place(), name] += 1
        return out

    def launched(self, kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(0 < programs < 2**31 for programs in grid[:1]) and all(0 < programs < 2**16 for programs in grid[1:]), (kernel, grid)
        return lambda *args, **kwargs: self.ours.update([kernel.fn.__name__])

    @property
    def counts(self) -> tuple[int, int]:
        return self.ours.total(), self.others.total()


def _place() -> str:
    """The line of kdfast that an operation comes from."""
    lines = [f for f in traceback.extract_stack() if "/kdfast/" in f.filename and "/tests/" not in f.filename]
    return f"{lines[-1].filename.split('/kdfast/')[-1]}:{lines[-1].lineno}" if lines else "autograd"


@contextlib.contextmanager
def h200():
    """Tensors on the meta device are those of an H200, for kdfast."""
    autocast, enabled, dtype, resolve = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype, precision.resolve
    poisoned, torch.utils.deterministic.fill_uninitialized_memory = torch.utils.deterministic.fill_uninitialized_memory, False
    with contextlib.ExitStack() as stack:
        for owner, name, new in (
            (triton_runtime, "_missing", lambda: None),
            (triton_runtime, "refuses_device", lambda device: None if device == "meta" else "elsewhere"),
            (triton_runtime, "architecture", lambda index: named("sm_90")),
            (triton_runtime, "processors", lambda index: 132),
            (precision, "resolve", lambda name, device: resolve(name, "cuda")),
            (torch, "is_autocast_enabled", lambda device="cpu": enabled("cpu")),
            (torch, "get_autocast_dtype", lambda device: dtype("cpu")),
            (torch, "autocast", lambda device_type, **options: autocast("cpu", **options)),
            (torch.Tensor, "is_meta", False),
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        stack.callback(setattr, torch.utils.deterministic, "fill_uninitialized_memory", poisoned)  # poisoning launches
        yield


def census(loss: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> tuple[Census, Census]:
    """Of a loss and of its gradients in `leaves`, within `h200`."""
    forward, backward = Census(), Census()
    with mock.patch.object(JITFunction, "__getitem__", lambda kernel, grid: forward.launched(kernel, grid)), forward:
        value = loss()
    if leaves:
        ones = torch.ones_like(value)
        with mock.patch.object(JITFunction, "__getitem__", lambda kernel, grid: backward.launched(kernel, grid)), backward:
            torch.autograd.grad(value, leaves, ones)
    return forward, backward
