"""RGAL from end to end without data: images are synthesised from the teacher, and the student learns from them alone."""

import torch

from ..distill import RGAL, Distiller, ImageGenerator, RGALSynthesizer, Term
from .recipes import RECIPES
from .training import Data, accuracy

_SYNTHESIS_STEPS, _IMAGES, _ROUNDS = 40, 128, 8


def train(data: Data, seed: int, *, batch_size: int, steps: int) -> float:
    """Test accuracy of a student after `steps` batches of synthetic images."""
    torch.manual_seed(seed)
    student, teacher, recipe = data.student(), data.teachers["one"], RECIPES["RGAL"]
    generator = ImageGenerator(latent_dim=64, width=16, image_size=data.x.shape[-1], channels=data.x.shape[1])
    synthesizer = RGALSynthesizer(
        teacher,
        student,
        generator,
        num_classes=data.setting.num_classes,
        layers=recipe.at["layers"],
        steps=_SYNTHESIS_STEPS,
        batch_size=_IMAGES,
        lr=0.01,
    )
    d = Distiller(student, teacher, {"rgal": Term(RGAL(2), at=recipe.at)}).build(torch.rand_like(data.x[:2]))
    optimizer = torch.optim.Adam(d.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if step % -(-steps // _ROUNDS) == 0:
            synthesizer.step()
        index = torch.randint(len(synthesizer.pool), (batch_size,))
        loss, _ = d(synthesizer.pool.images[index], None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return accuracy(student, data)
