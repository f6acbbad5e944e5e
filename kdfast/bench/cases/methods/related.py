"""Methods of relations inside the batch: RGAL's student phase, RKD.

RGAL's negatives are drawn at random, so what is compared must not depend on them: features of different classes lie in
different blocks of coordinates, so that all negatives of an anchor are at one distance, and a row's gradient in the block of its
own class is the same whichever they are; that block is what is returned. The margin is wide enough for every triplet to count.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.distill import RGAL, RKD
from kdfast.projectors import Projector

from ... import peers
from ...registry import Call, Case, Peer
from ..triplet import drawn, relations
from .step import case

T, FEATURE, TRIPLET, MARGIN = 20.0, 0.1, 0.1, 3.0
DISTANCE, ANGLE = 25.0, 50.0


class Generated(NamedTuple):
    feature: Tensor  # [N, D], the student's; other classes' coordinates are 0
    logits: Tensor  # [N, C], the student's
    teacher_feature: Tensor  # [N, D]
    teacher_logits: Tensor  # [N, C], largest at the row's class
    map: Tensor  # [D, D], the projector's
    block: Tensor  # [N, D] bool, the coordinates of the row's class


def generated(shape: tuple[int, int, int], dtype: torch.dtype) -> Generated:
    n, classes, d = shape
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    block = labels[:, None] == torch.arange(d) // (d // classes)
    feature, teacher_feature = (torch.randn(n, d, generator=generator) for _ in range(2))
    logits, noise = (torch.randn(n, classes, generator=generator) for _ in range(2))
    teacher_logits = 8.0 * F.one_hot(labels, classes) + noise
    weight = torch.randn(d, d, generator=generator) / d**0.5
    floats = (x.to(dtype) for x in (feature * block, logits, teacher_feature, teacher_logits, weight))
    return Generated(*floats, block)


def rgal_formula(feature: Tensor, logits: Tensor, teacher_feature: Tensor, teacher_logits: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    log_s, log_t = ((x / T).log_softmax(-1) for x in (logits, teacher_logits))
    soft = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * T**2
    anchor, positive, negative = drawn.plain(logits.detach(), teacher_logits.argmax(1))
    x = F.normalize(feature, dim=-1)
    near, far = (F.pairwise_distance(x[anchor], x[other], eps=0) for other in (positive, negative))  # [P], from [P, D]
    hinge = (near - far + MARGIN).relu().mean()
    return soft + FEATURE * F.mse_loss(feature @ weight.T, teacher_feature) + TRIPLET * hinge


def rgal(x: Generated) -> Callable[..., Tensor]:
    width = x.feature.shape[1]
    with x.map.device, torch.no_grad():
        projector = Projector(width, width, bias=False)
        projector.maps[0].weight.copy_(x.map)
    loss = RGAL(T=T, feature_weight=FEATURE, triplet_weight=TRIPLET, margin=MARGIN, projector=projector)

    def value(feature: Tensor, logits: Tensor, teacher_feature: Tensor, teacher_logits: Tensor, *_: Tensor) -> Tensor:
        return loss({"logits": logits, "layers": [feature]}, {"logits": teacher_logits, "layers": [teacher_feature]})

    return value


def own_block(loss: Callable[..., Tensor], x: Generated) -> Call:
    def call() -> tuple[Tensor, ...]:
        value, feature, logits = peers.step(loss, *x, leaves=2)
        return value, feature * x.block, logits

    return call


def wide(x: Generated) -> Generated:
    return Generated(*(t.double() if t.is_floating_point() else t for t in x))


RGAL_STEP = Case(
    shapes={
        "quick": ((128, 4, 32),),
        **dict.fromkeys(("default", "cuda"), ((2048, 10, 160),)),
        "full": ((2048, 10, 160), (2048, 10, 640)),
    },
    axes="N C D",
    dtypes=(torch.float32,),
    inputs=generated,
    reference=lambda x: own_block(rgal_formula, wide(x))(),
    flop=None,
    peers=(Peer("kdfast", lambda x: own_block(rgal(x), x)), Peer("plain", partial(own_block, rgal_formula))),
)


def rkd_formula(student: Tensor, teacher: Tensor) -> Tensor:
    return DISTANCE * relations.distance_formula(student, teacher) + ANGLE * relations.angle_formula(student, teacher, by_parts=True)


RKD_STEP = case(
    lambda _: RKD(DISTANCE, ANGLE),
    rkd_formula,
    shapes={"quick": ((64, 128),), "default": ((1024, 128),), "full": ((1024, 128),), "cuda": ((1024, 128),)},
    axes="N D",
    dtypes=(torch.float32,),
    inputs=relations.pair,
    flop=None,
)
