"""The losses of image-text pairs, both towers and the learnable scale (and bias) with gradient: CLIP's and SigLIP's."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.functional import clip_loss, siglip_loss

from ... import peers
from ...registry import Case
from . import clip_gpu


class Inputs(NamedTuple):
    image: Tensor  # [N, D], unit rows
    text: Tensor  # [N, D], unit rows
    scale: Tensor  # []


class SigmoidInputs(NamedTuple):
    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor  # []


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    image, noise = (F.normalize(torch.randn(shape, generator=generator), dim=-1) for _ in range(2))
    return Inputs(image.to(dtype), F.normalize(image + noise, dim=-1).to(dtype), torch.tensor(1 / 0.07))


def sigmoid_inputs(shape: tuple[int, int], dtype: torch.dtype) -> SigmoidInputs:
    return SigmoidInputs(*inputs(shape, dtype)[:2], torch.tensor(10.0), torch.tensor(-10.0))  # as SigLIP starts


def clip_formula(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits, target = scale * image @ text.T, torch.arange(len(image), device=image.device)  # [N, N]
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def siglip_formula(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    sign = 2 * torch.eye(len(image), dtype=image.dtype, device=image.device) - 1
    return -F.logsigmoid(sign * (scale * image @ text.T + bias)).sum() / len(image)


def open_clip():
    from open_clip.loss import ClipLoss

    return ClipLoss()


def open_clip_sigmoid():
    from open_clip.loss import SigLipLoss

    return SigLipLoss()


CLIP = Case(
    shapes={
        "quick": ((64, 128), (256, 128)),
        "default": ((64, 128), (256, 128), (4096, 512)),
        "full": ((64, 128), (256, 128), (1024, 512), (4096, 512), (8192, 768)),
        "cuda": ((16384, 512), (4096, 512), (32768, 512)),
    },
    axes="N D",
    dtypes=(torch.float32, torch.bfloat16),
    inputs=inputs,
    reference=lambda x: peers.step(clip_formula, *(t.double() for t in x), leaves=3),
    flop=lambda shape: 8 * shape[0] ** 2 * shape[1],
    peers=(
        peers.steps("kdfast", clip_loss, leaves=3),
        peers.steps("eager", clip_formula, leaves=3),
        peers.compiled(clip_formula, leaves=3),
        peers.library("open_clip_torch", "open_clip", open_clip, leaves=3),
        *clip_gpu.PEERS,
        *peers.bare_mm(peers.gradient_products, lambda x: (x.image, x.text)),
    ),
)
SIGLIP = CLIP._replace(
    inputs=sigmoid_inputs,
    reference=lambda x: peers.step(siglip_formula, *(t.double() for t in x), leaves=4),
    flop=lambda shape: 6 * shape[0] ** 2 * shape[1],  # a pair's gradient follows from its own score: one product less than CLIP
    peers=(
        peers.steps("kdfast", siglip_loss, leaves=4),
        peers.steps("eager", siglip_formula, leaves=4),
        peers.compiled(siglip_formula, leaves=4),
        peers.library("open_clip_torch", "open_clip", open_clip_sigmoid, leaves=4),
        *peers.bare_mm(peers.gradient_products, lambda x: (x.image, x.text)),
    ),
)
