"""MNIST-1D (Greydanus and Kobak 2020, 2011.14439): ten signals of 40 points, generated here from the published recipe.

The recipe's constants, our code and random numbers: other samples of the same distribution as the authors' file. A sample is
its class's template followed by a random number of zeros, stretched to 72 points, scaled and shifted round; smooth noise where it is
zero; noise everywhere; a random slope; 40 points of it.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .network import Network
from .subject import Subject

NEEDS: dict[str, str] = {}
SAMPLES, POINTS = 5000, 40
TAUGHT, LABELLED, TEST = 3500, 100, 1000
NOISE = 0.05  # standard deviation in a student's view, of signals of variance 1

_STROKES = (  # twelve heights of a pen that writes the digit from top to bottom
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
_PADDING, _SHIFTS = (36, 60), 48  # zeros after the template, both ends included; shifts are 0 ... 47
_SCALE, _SHEAR = 0.4, 0.75  # widths of the uniform ranges of the factor around 1 and of the slope around 0
_SMOOTH, _SMOOTH_SIGMA, _WHITE = 0.25, 2, 0.02  # standard deviations of both noises; the smooth one's filter
_TEMPLATE = 6.0  # templates of variance 1 are divided by this


def load() -> Subject:
    """5,000 samples, 1,000 of them for the test; students learn the teachers' 3,500, 100 of these with labels."""
    x, y = samples(SAMPLES, Generator().manual_seed(0))
    return Subject(
        x[:, None, None],
        y,
        classes=10,
        taught=TAUGHT,
        train=TAUGHT,
        labelled=LABELLED,
        validation=slice(TAUGHT, SAMPLES - TEST),
        test=slice(SAMPLES - TEST, None),
        augment=lambda x, generator: x + NOISE * torch.randn(x.shape, generator=generator),
        turn=turn,
        network=lambda width, classes, depth=1: Network(width, classes, kernel=(1, 5), pool=(1, 2), depth=depth),
        student=8,
        teacher=32,
        second=24,
    )


def turn(x: Tensor, times: int) -> Tensor:
    """As it is, backwards, upside down, both."""
    return (x.flip(-1) if times % 2 else x) * (-1 if times >= 2 else 1)


def templates() -> Tensor:
    """[10, 12]: variance 1, then a sixth of that height, from 0 to 0."""
    strokes = torch.tensor(_STROKES, dtype=torch.float64)
    return (strokes - strokes[:, :1]) / strokes.std(1, correction=0, keepdim=True) / _TEMPLATE


def samples(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """(signals [count, 40] of mean 0 and variance 1 together, classes [count]), as many of each class, shuffled."""
    y = torch.arange(10).repeat_interleave(count // 10)[torch.randperm(count // 10 * 10, generator=generator)]
    drawn = templates()[y]  # [N, 12]
    n, points = drawn.shape
    longest = points + _PADDING[1]

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, generator=generator, dtype=torch.float64)

    padded = points + uniform(_PADDING[0], _PADDING[1] + 1).floor()  # [N, 1] points of the template and its zeros
    where = torch.linspace(0, 1, longest, dtype=torch.float64) * (padded - 1)  # [N, 72], in points of the template
    signal = _interpolated(F.pad(drawn, (0, _PADDING[1])), where) * uniform(1 - _SCALE / 2, 1 + _SCALE / 2)
    inside = where < points
    shift = uniform(0, _SHIFTS).long()
    places = (torch.arange(longest) - shift) % longest
    signal, inside = signal.gather(1, places), inside.gather(1, places)
    noise = torch.randn(2, n, longest, generator=generator, dtype=torch.float64)
    signal = torch.where(inside, signal, _SMOOTH * _smoothed(noise[0])) + _WHITE * noise[1]
    signal = signal - uniform(-_SHEAR / 2, _SHEAR / 2) * torch.linspace(-0.5, 0.5, longest, dtype=torch.float64)
    signal = _interpolated(signal, torch.linspace(0, longest - 1, POINTS, dtype=torch.float64).expand(n, -1))
    return ((signal - signal.mean()) / signal.std(correction=0)).float(), y


def _interpolated(signal: Tensor, where: Tensor) -> Tensor:
    """Linearly between points: signals [N, L] at places [N, M] in [0, L - 1]."""
    left = where.floor().long().clamp(max=signal.shape[1] - 2)
    before, after = signal.gather(1, left), signal.gather(1, left + 1)
    return before + (where - left) * (after - before)


def _smoothed(noise: Tensor) -> Tensor:
    """A Gaussian filter cut at four standard deviations; the ends are mirrored."""
    reach = 4 * _SMOOTH_SIGMA
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / _SMOOTH_SIGMA) ** 2)
    mirrored = torch.cat([noise[:, :reach].flip(1), noise, noise[:, -reach:].flip(1)], 1)
    return F.conv1d(mirrored[:, None], (weights / weights.sum())[None, None])[:, 0]
