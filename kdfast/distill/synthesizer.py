"""RGALSynthesizer: images that a teacher recognises and a student does not yet, made without data (2412.11380)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core import checks
from ..features.capture import capture, main_output, unwrap
from ..functional import triplet_loss
from .base import vectors
from .image_generator import ImageGenerator, ImagePool

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class RGALSynthesizer(nn.Module):
    """The generator's phase of RGAL: `synthesizer.step()` makes a batch of images and adds it to `synthesizer.pool`.

    A step starts anew with the generator and the latent vectors, minimises over both (Adam, betas 0.5 and 0.999), and keeps the
    images of the lowest loss. With t, s the logits of teacher and student, y random classes:
    - bn: sum over the teacher's BatchNorm layers of |batch variance (biased) - running variance|_2 + |batch mean - running mean|_2;
    - oh: cross-entropy(t, y);
    - adv: minus the mean of KL(softmax(t) || softmax(s)) over samples whose argmax t is argmax s;
    - triplet: relu(+-(d_ap - d_an) + 0.2) on the averaged, l2-normalised features of `layers`, classes argmax t, one negative a
      positive pair drawn by focal sampling (0.5 < d < 1.0) among the normalised teacher logits. "confuse" drives samples of a
      class apart and classes together (the paper); "cluster" the reverse, which the released code does in both phases.

    Draws take PyTorch's global random state. `state_dict()` has the generator and the pool. In a multi-process run each
    process makes its own images.

    Args:
        teacher, student: models; neither is trained or registered here. Both run in eval mode during a step.
        generator: latent [N, latent_dim] -> images; default ImageGenerator(). Modules with reset_parameters are drawn anew.
        num_classes: classes of y.
        layers: module paths of the features of the triplet term, in the student, or in the teacher with triplet_on="teacher".
        bn, oh, adv, triplet: weights; 0 leaves a term out.
        direction: "confuse" or "cluster".
        steps, batch_size, lr: of one step(); published 400, 256, 1e-3.
        pool: an ImagePool, by default a new one.
        latent_dim: width of the latent vectors; None reads `generator.latent_dim`.
        transform: a differentiable map of images to what the models take (normalisation, augmentation).

    Raises:
        ValueError, TypeError: unknown options, a layer that does not exist.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        generator: nn.Module | None = None,
        *,
        num_classes: int,
        layers: list[str],
        bn: float = 1.0,
        oh: float = 1.0,
        adv: float = 1.0,
        triplet: float = 0.1,
        triplet_on: str = "student",
        direction: str = "confuse",
        steps: int = 400,
        batch_size: int = 256,
        lr: float = 1e-3,
        pool: ImagePool | None = None,
        latent_dim: int | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        checks.choice("triplet_on", triplet_on, ("student", "teacher"))
        checks.choice("direction", direction, ("confuse", "cluster"))
        checks.positive_number("lr", lr)
        self.weights = {"bn": bn, "oh": oh, "adv": adv, "triplet": triplet}
        for name, weight in self.weights.items():
            checks.nonnegative_number(name, weight)
        self.generator = ImageGenerator() if generator is None else generator
        self.models = (teacher, student)  # a tuple: not submodules
        self.pool = ImagePool() if pool is None else pool
        self.num_classes, self.steps, self.batch_size = (
            checks.count(name, value) for name, value in (("num_classes", num_classes), ("steps", steps), ("batch_size", batch_size))
        )
        self.layers, self.triplet_on, self.direction, self.lr, self.transform = list(layers), triplet_on, direction, lr, transform
        self.latent_dim = self.generator.latent_dim if latent_dim is None else latent_dim
        self.norms = {name: module for name, module in unwrap(teacher).named_modules() if isinstance(module, _BATCH_NORMS)}
        self.last: dict[str, Tensor] = {}
        if triplet and not layers:
            raise ValueError("layers must name at least one module for the triplet term")
        with _Taps(self):
            pass  # a layer that does not exist is named now rather than in the first step

    def step(self) -> dict[str, Tensor]:
        """Make one batch and add it to the pool; the weighted terms of its loss, detached."""
        device = next(self.generator.parameters()).device
        for module in self.generator.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        latent = torch.randn(self.batch_size, self.latent_dim, device=device, requires_grad=True)
        labels = torch.randint(self.num_classes, (self.batch_size,), device=device)
        learned = [*self.generator.parameters(), latent]
        optimizer = torch.optim.Adam(learned, lr=self.lr, betas=(0.5, 0.999))
        modes = [(module, module.training) for model in self.models for module in model.modules()]
        self.generator.train()
        lowest, kept = torch.full((), torch.inf, device=device), None
        try:
            for model in self.models:
                model.eval()
            with _Taps(self) as taps:
                for _ in range(self.steps):
                    images = self.generator(latent)
                    terms = self._terms(images, labels, taps)
                    loss = sum(terms.values())
                    better = loss.detach() < lowest
                    lowest = torch.where(better, loss.detach(), lowest)
                    new = [images.detach(), *(value.detach() for value in terms.values())]
                    kept = new if kept is None else [torch.where(better, a, b) for a, b in zip(new, kept, strict=True)]
                    # only the generator learns: backward() would leave gradients in the student
                    for parameter, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
                        parameter.grad = gradient
                    optimizer.step()
        finally:
            for module, training in modes:
                module.training = training
        self.last = dict(zip(terms, kept[1:], strict=True))
        self.pool.add(kept[0], labels)
        return self.last

    def _terms(self, images: Tensor, labels: Tensor, taps: "_Taps") -> dict[str, Tensor]:
        inputs = images if self.transform is None else self.transform(images)
        teacher, student = (main_output(model(inputs)) for model in self.models)  # [N, C]
        seen, features = taps.take()
        terms = {}
        if self.norms and self.weights["bn"]:
            terms["bn"] = sum(_statistics_distance(norm, x) for norm, x in zip(self.norms.values(), seen, strict=True))
        terms["oh"] = F.cross_entropy(teacher, labels)
        if self.weights["adv"]:
            agree = (teacher.argmax(1) == student.argmax(1)).to(teacher.dtype)
            divergence = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True).sum(1)
            terms["adv"] = -(agree * divergence).sum() / agree.sum().clamp(min=1)
        if self.weights["triplet"]:
            terms["triplet"] = triplet_loss(
                [vectors(x, "layers") for x in features],
                teacher.argmax(1),
                sample_on=teacher.detach(),
                mining="focal",
                direction=self.direction,
                reduction="mean",
            )
        return {name: self.weights[name] * value for name, value in terms.items()}

    def get_extra_state(self) -> dict[str, Tensor]:
        return self.pool.state_dict()

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self.pool.load_state_dict(state)


class _Taps:
    """Hooks on the teacher's BatchNorm inputs and on the layers of the triplet term, while the block lasts."""

    def __init__(self, owner: RGALSynthesizer) -> None:
        teacher, student = owner.models
        inputs, on_teacher = [f"{name}:in" for name in owner.norms], owner.triplet_on == "teacher"
        self.teacher = capture(teacher, [*inputs, *(owner.layers if on_teacher else [])])
        self.student = capture(student, [] if on_teacher else owner.layers)
        self.inputs, self.layers, self.holder = inputs, owner.layers, self.teacher if on_teacher else self.student

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """(inputs of the BatchNorm layers, features of the layers) of the last forward."""
        return [self.teacher.values[key] for key in self.inputs], [self.holder.values[key] for key in self.layers]

    def __enter__(self) -> "_Taps":
        return self

    def __exit__(self, *exception) -> None:
        self.teacher.remove()
        self.student.remove()


def _statistics_distance(norm: nn.Module, x: Tensor) -> Tensor:
    """How far the batch's channel statistics are from the running ones."""
    variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    return (variance - norm.running_var).norm() + (mean - norm.running_mean).norm()
