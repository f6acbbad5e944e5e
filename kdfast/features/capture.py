"""Intermediate values of a model, by module path, through forward hooks."""

import difflib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class capture:
    """Record what modules of `model` take and give: `with kdfast.capture(model, ["layer4", "fc:in"]) as feats:`.

    A key is a module path (as in `named_modules`): the module's output; or "path:in": its first input. After a
    forward `feats[key]` is that value, element 0 where it is a tuple. The value is the model's own, with its graph,
    not a copy: an in-place module right after it changes it. A module that runs several times leaves its last value.

    `model` may be wrapped by DistributedDataParallel, torch.compile or AveragedModel; hooks go on the original
    modules and are removed when the block ends. Copies of a hooked model record nothing. Capture the original module
    before compiling, or before the compiled module first runs: a hook added later never fires.

    Raises:
        ValueError: a key that names no module.
        RuntimeError: a key without a value after a forward of `model`, or when read.
    """

    def __init__(self, model: nn.Module, keys: Iterable[str]) -> None:
        self.values = _Values()
        self.keys = tuple(dict.fromkeys(keys))
        modules = dict(unwrap(model).named_modules(remove_duplicate=False))
        places = []
        for key in self.keys:
            path, colon, side = key.partition(":")
            if path not in modules or (colon and side != "in"):
                near = difflib.get_close_matches(path, modules, n=3)
                raise ValueError(
                    f'{key!r} names no module of {type(unwrap(model)).__name__}: give "path" or "path:in"'
                    + (f"; near it: {', '.join(map(repr, near))}" if near else "")
                )
            places.append((modules[path], key, bool(colon)))
        self._handles = [
            module.register_forward_hook(_Hook(_record_input if takes_input else _record_output, self, module, key), with_kwargs=True)
            for module, key, takes_input in places
        ]
        # The outermost wrapper is hooked too: its Python runs even when a compiled graph skips the inner hooks.
        self._handles.insert(0, model.register_forward_pre_hook(_Hook(_begin, self, model), with_kwargs=True, prepend=True))
        self._handles.append(model.register_forward_hook(_Hook(_check, self, model), with_kwargs=True))

    def __enter__(self) -> "dict[str, Tensor]":
        return self.values

    def __exit__(self, *exception) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off; values already recorded stay."""
        for handle in self._handles:
            handle.remove()

    def take(self) -> "dict[str, Tensor]":
        """The recorded values, which are forgotten here."""
        taken = _Values(self.values)
        self.values.clear()
        return taken


def unwrap(model: nn.Module) -> nn.Module:
    """The original module inside DistributedDataParallel, torch.compile and AveragedModel, nested in any order."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)):
            model = model.module
        else:
            return model


class _Values(dict):
    def __missing__(self, key):
        raise RuntimeError(_absent([key]))


def _absent(keys: list) -> str:
    return (
        f"no value was captured for {', '.join(map(repr, keys))}: no forward has run, the forward does not call that module, "
        "or the model was compiled and run before the hook was added (capture the original module first)"
    )


class _Hook:
    """`action(tap, key, inputs, output)` when `module` itself runs. A copy of the module, or a pickle of it, holds an inert hook."""

    def __init__(self, action=None, tap=None, module=None, key=None) -> None:
        self.action, self.tap, self.module, self.key = action, tap, module, key

    def __call__(self, module, args, kwargs, output=None) -> None:
        if module is self.module:
            self.action(self.tap, self.key, args or tuple(kwargs.values()), output)

    def __reduce__(self):
        return _Hook, ()


def _begin(tap, key, inputs, output) -> None:
    tap.values.clear()


def _record_output(tap, key, inputs, output) -> None:
    tap.values[key] = output[0] if isinstance(output, (tuple, list)) else output


def _record_input(tap, key, inputs, output) -> None:
    tap.values[key] = inputs[0][0] if isinstance(inputs[0], (tuple, list)) else inputs[0]


def _check(tap, key, inputs, output) -> None:
    absent = [key for key in tap.keys if key not in tap.values]
    if absent:
        raise RuntimeError(_absent(absent))


# A spec says where a value is found: None (the model's output), a key of `capture`, a list or a mapping of specs.


def spec_keys(spec) -> list[str]:
    """The keys that `spec` asks `capture` for."""
    if spec is None:
        return []
    if isinstance(spec, str):
        return [spec]
    if isinstance(spec, (list, Mapping)):
        return [key for part in (spec.values() if isinstance(spec, Mapping) else spec) for key in spec_keys(part)]
    raise TypeError(f"at must be None, a module path, a list or a dict of these, got {type(spec).__name__}")


def read_spec(spec, output, values: Mapping):
    """The value of `spec`: a tensor, or a list or dict of what its parts give."""
    if spec is None:
        return main_output(output)
    if isinstance(spec, str):
        return values[spec]
    if isinstance(spec, Mapping):
        return {name: read_spec(part, output, values) for name, part in spec.items()}
    return [read_spec(part, output, values) for part in spec]


def main_output(output) -> Tensor:
    """The tensor a model's output stands for: itself, `logits` of a dict or ModelOutput, element 0 of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        if "logits" not in output:
            raise ValueError(
                f'a model output that is a dict needs "logits" (or name a module with `at`), it has {", ".join(map(str, output))}'
            )
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)) and output:
        return main_output(output[0])
    raise TypeError(f"a model must return a Tensor, a tuple or a dict with logits, got {type(output).__name__}")
