"""Text: docstrings of Python's standard library (kdfast.demo.corpus), to be told apart by module. Every machine with Python has them."""

import re
from collections import Counter

import torch
from torch import Tensor

from ..demo import corpus
from .network import Network, Words
from .subject import Subject

NEEDS: dict[str, str] = {}
CLASSES, TAUGHT, LABELLED, VALIDATION = 10, 1600, 200, 400
VOCABULARY, LONGEST = 2000, 32  # words: known, of a text
DROPPED = 0.1  # of the words of a student's view
_NONE, _UNKNOWN = 0, 1  # numbers of no word and of words that are not in the vocabulary


def load() -> Subject:
    """The texts of the ten modules that have most, in the order of their hashes; other Pythons give other texts.

    Students learn the teachers' 1,600, 200 of these with labels; 400 are for validation, the rest for the test.
    Raises RuntimeError when the standard library's sources are not installed.
    """
    found = corpus.load()
    modules = sorted(name for name, _ in Counter(found.modules).most_common(CLASSES))
    pairs = [(text, modules.index(module)) for text, module in zip(found.texts, found.modules, strict=True) if module in modules]
    split = [words(text) for text, _ in pairs]
    known = Counter(word for text in split[:TAUGHT] for word in text)
    number = {word: i for i, (word, _) in enumerate(sorted(known.items(), key=lambda item: (-item[1], item[0]))[:VOCABULARY], 2)}
    x = torch.zeros(len(split), LONGEST, dtype=torch.int64)
    for row, text in zip(x, split, strict=True):
        row[: min(len(text), LONGEST)] = torch.tensor([number.get(word, _UNKNOWN) for word in text[:LONGEST]])
    return Subject(
        x,
        torch.tensor([label for _, label in pairs]),
        classes=CLASSES,
        taught=TAUGHT,
        train=TAUGHT,
        labelled=LABELLED,
        validation=slice(TAUGHT, TAUGHT + VALIDATION),
        test=slice(TAUGHT + VALIDATION, None),
        augment=lambda x, generator: x.masked_fill(torch.rand(x.shape, generator=generator) < DROPPED, _NONE),
        turn=turn,
        network=network,
        student=8,
        teacher=48,
        second=32,
    )


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def turn(x: Tensor, times: int) -> Tensor:
    """As it is, backwards, its halves exchanged, both."""
    x = x.flip(1) if times % 2 else x
    return x.roll(LONGEST // 2, 1) if times >= 2 else x


def network(width: int, classes: int, depth: int = 1) -> Network:
    """Word vectors of `width` numbers, and convolutions over three words."""
    front = Words(VOCABULARY + 2, width)
    return Network(width, classes, kernel=(1, 3), pool=(1, 2), depth=depth, front=front, channels=width)
