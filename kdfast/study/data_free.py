"""RGAL from end to end without data: images are synthesised from the teacher, and the student learns from them alone."""

import torch

from ..distill import RGAL, Distiller, ImageGenerator, RGALSynthesizer, Term
from .recipes import RECIPES
from .training import Data

_SYNTHESIS_STEPS, _IMAGES, _ROUNDS = 40, 128, 8


class Trainer:
    """`step()` trains on a batch of synthetic images, of which it makes new ones `_ROUNDS` times in a run."""

    def __init__(self, data: Data, seed: int, *, batch_size: int, steps: int) -> None:
        torch.manual_seed(seed)
        teacher, recipe, images = data.teachers["one"], RECIPES["RGAL"], data.x
        self.student, self.batch_size = data.student(), batch_size
        self.synthesizer = RGALSynthesizer(
            teacher,
            self.student,
            ImageGenerator(latent_dim=64, width=16, image_size=images.shape[-1], channels=images.shape[1]),
            num_classes=data.setting.num_classes,
            layers=recipe.at["layers"],
            steps=_SYNTHESIS_STEPS,
            batch_size=_IMAGES,
            lr=0.01,
        )
        terms = {"rgal": Term(RGAL(2), at=recipe.at)}
        self.distiller = Distiller(self.student, teacher, terms).build(torch.rand_like(images[:2]))
        self.optimizer = torch.optim.Adam(self.distiller.parameters(), 0.01)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.done, self.between = 0, -(-steps // _ROUNDS)

    def step(self) -> None:
        if self.done % self.between == 0:
            self.synthesizer.step()
        self.done += 1
        pool = self.synthesizer.pool
        loss, _ = self.distiller(pool.images[torch.randint(len(pool), (self.batch_size,))], None)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
