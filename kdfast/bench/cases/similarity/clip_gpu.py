"""CLIP's loss by libraries with GPU kernels. Most compute a classifier's cross-entropy, of which CLIP's loss is two."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ... import peers
from ...registry import Call, Peer


def in_two_directions(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`cross_entropy` takes features [N, D], a classifier's rows [M, D] and classes [N]."""

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        own = torch.arange(len(image), device=image.device)
        return (cross_entropy(scale * image, text, own) + cross_entropy(scale * text, image, own)) / 2

    return loss


def cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy

    return in_two_directions(partial(linear_cross_entropy, filter_eps=None))  # no gradient left out


def liger():
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    criterion = LigerFusedLinearCrossEntropyLoss()
    return in_two_directions(lambda features, rows, own: criterion(rows, features, own))


def quack():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return in_two_directions(chunked_linear_cross_entropy)


def inf_cl():
    from inf_cl import cal_flash_loss

    return in_two_directions(lambda features, rows, own: cal_flash_loss(features, rows, own, head_dim=min(256, rows.shape[1])).mean())


def memeff(x) -> Call:
    """Its temperature is a number: the gradient of the scale is taken from that of the rows, <x, dL/dx> / scale."""
    from memeff import MemoryEfficientCLIPLoss

    scale = float(x.scale)
    criterion = MemoryEfficientCLIPLoss(temperature=1 / scale, normalized_inputs=True, stable=False)

    def call() -> tuple[Tensor, ...]:
        value, image, text = peers.step(criterion, x.image, x.text, leaves=2)
        return value, image, text, (x.image.float() * image.float()).sum() / scale

    return call


def library(package: str, module: str, loss: Callable) -> Peer:
    return peers.library(package, module, loss, leaves=3)._replace(device="cuda")


PEERS = (
    library("inf-cl", "inf_cl", inf_cl),
    library("liger-kernel", "liger_kernel", liger),
    library("cut-cross-entropy", "cut_cross_entropy", cut_cross_entropy),
    library("quack-kernels", "quack", quack),
    Peer("memeff", memeff, missing=peers.installed("memeff", "memeff"), device="cuda"),
)
