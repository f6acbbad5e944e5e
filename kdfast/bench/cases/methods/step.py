"""A step of a method: value and the student's gradient, kdfast's beside the same loss in plain PyTorch."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import peers
from ...registry import Case, Peer


def unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)


def case(method: Callable, formula: Callable[..., Tensor], leaves: int = 1, **fields) -> Case:
    """`method(inputs)` gives the loss; both are called with the inputs, whose first `leaves` are the student's."""

    def fused(inputs) -> Callable[[], tuple[Tensor, ...]]:
        return partial(peers.step, method(inputs), *inputs, leaves=leaves)

    def reference(inputs) -> tuple[Tensor, ...]:
        wide = (x.double() if x.is_floating_point() else x for x in inputs)
        return peers.step(formula, *wide, leaves=leaves)

    return Case(reference=reference, peers=(Peer("kdfast", fused), peers.steps("plain", formula, leaves=leaves)), **fields)
