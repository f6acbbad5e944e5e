"""kdfast: fused loss kernels for knowledge distillation and contrastive learning.

The public names load on first use: `import kdfast` costs what importing torch costs.
"""

import importlib

from ._version import __version__

#: public name -> the module that defines it
_HOME = {
    "QueueBank": "bank",
    "IndexedBank": "bank",
    "AliasSampler": "bank",
    "ClassSampler": "bank",
    "Projector": "projectors",
    "Features": "features",
    "capture": "features",
    "encode": "features",
    "Term": "distill",
    "Distiller": "distill",
}
_MODULES = ("bank", "compat", "distill", "eval", "functional", "losses", "ops")

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
