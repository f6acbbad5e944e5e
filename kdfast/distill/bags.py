"""Bags of related samples for BINGO: who belongs together, a data set that draws pairs, and their mixture."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from .. import ops
from .._core import checks, random
from .base import first, unit

_KMEANS_ITERATIONS = 50  # Lloyd's steps at most; it stops when no assignment changes


def make_bags(
    features: Tensor | np.ndarray,
    method: str = "knn",
    k: int = 5,
    labels: Tensor | None = None,
    *,
    num_clusters: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool | Callable[[int, int], None] | None = None,
) -> Tensor:
    """The other members of each sample's bag, as row indices [N, k], padded with -1; a sample is never in its own row.

    Args:
        features: [N, D], the frozen teacher's backbone features; compared by cosine. For "knn" they may be a numpy array, or a
            memory map (`np.load(path, mmap_mode="r")`), which is read block by block.
        method: "knn": the k nearest samples, nearest first; "kmeans": k random others of the same cluster (spherical
            k-means on the features); "label": k random others of the same label.
        k: members a row holds, >= 1.
        labels: [N] integers, for "label" alone.
        num_clusters: for "kmeans"; default N / (k + 1), rounded up.
        generator: torch.Generator on the CPU for "kmeans" and "label".
        progress: for "knn", as in `kdfast.ops.knn`: True shows a bar.

    Raises:
        ValueError, TypeError: an unknown method, labels missing or not wanted, wrong shapes.

    Source: Xu et al. 2022 (BINGO, 2107.01691), section 3.1.
    """
    checks.choice("method", method, ("knn", "kmeans", "label"))
    if method != "knn" or not isinstance(features, np.ndarray):
        checks.rows("features", features, ndim=2)
    checks.count("k", k)
    if (labels is not None) != (method == "label"):
        raise ValueError(f'labels must {"" if method == "label" else "not "}be given for method="{method}"')
    if method == "knn":
        return ops.knn(features, features, k, own_index=True, progress=progress)[1]
    if method == "kmeans":
        clusters = -(-len(features) // (k + 1)) if num_clusters is None else checks.count("num_clusters", num_clusters)
        labels = _kmeans(features, clusters, generator)
    return _random_others(checks.integral("labels", labels, shape=(len(features),)), k, generator)


def _kmeans(features: Tensor, clusters: int, generator) -> Tensor:
    """The cluster of each row: Lloyd's iteration on the unit sphere from random rows."""
    x = unit(features)
    centres = x[torch.randperm(len(x), generator=generator)[:clusters].to(x.device)]
    assigned = None
    for _ in range(_KMEANS_ITERATIONS):
        nearest = ops.knn(x, centres, 1)[1][:, 0]
        if assigned is not None and torch.equal(nearest, assigned):
            break
        assigned = nearest
        sums = torch.zeros_like(centres).index_add_(0, assigned, x)
        members = torch.bincount(assigned, minlength=len(centres))
        centres = torch.where(members[:, None] > 0, unit(sums), centres)  # a centre that lost all its rows stays
    return assigned


def _random_others(labels: Tensor, k: int, generator) -> Tensor:
    """k random others of each row's label, without repetition, -1 where there are fewer: [N, k].

    In a random order grouped by label, a row takes the k rows after it, round its group.
    """
    n = len(labels)
    shuffled = torch.randperm(n, generator=generator).to(labels.device)
    order = shuffled[torch.argsort(labels[shuffled], stable=True)]
    _, group, size = torch.unique_consecutive(labels[order], return_inverse=True, return_counts=True)
    start = torch.cumsum(size, 0) - size
    place = torch.arange(n, device=labels.device) - start[group]  # within its group
    step = torch.arange(1, k + 1, device=labels.device)
    member = order[start[group][:, None] + (place[:, None] + step) % size[group][:, None]]
    bags = torch.empty_like(member)
    bags[order] = torch.where(step < size[group][:, None], member, -1)
    return bags


class BagDataset(Dataset):
    """Two views of a sample and two of a random member of its bag: (x_a1, x_a2, x_p1, x_p2, index).

    Args:
        dataset: a map-style data set; of items that are tuples, element 0 is the input.
        bags: [N, K] from `make_bags`; a sample whose bag is empty is its own member.
        transform: a random augmentation, applied anew for each view; None leaves the input as it is.
        generator: draws the members. Worker processes of a DataLoader use their own random state instead, which the
            loader seeds anew each epoch: a copied generator would repeat itself.

    Raises:
        ValueError, TypeError: bags that do not fit the data set.
    """

    def __init__(self, dataset, bags: Tensor, transform: Callable | None = None, generator: torch.Generator | None = None) -> None:
        self.dataset, self.transform, self.generator = dataset, transform, generator
        self.bags = checks.integral("bags", bags)
        if bags.dim() != 2 or len(bags) != len(dataset):
            raise ValueError(f"bags must be [{len(dataset)}, K] for this data set, got {tuple(bags.shape)}")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple:
        members = self.bags[index][self.bags[index] >= 0].tolist() or [index]
        generator = self.generator if get_worker_info() is None else None
        member = members[int(torch.randint(len(members), (), generator=generator))]
        anchor, positive = (self.dataset[i] for i in (index, member))
        views = [
            x if self.transform is None else self.transform(x) for x in (first(anchor), first(anchor), first(positive), first(positive))
        ]
        return (*views, index)


def cutmix(x_a: Tensor, x_p: Tensor, beta: float = 2.0, generator: torch.Generator | None = None) -> tuple[Tensor, float]:
    """A random box of `x_p` pasted into `x_a`, both [N, C, H, W], one box a batch; and the share of `x_a` that is left.

    The box has H sqrt(1 - l) x W sqrt(1 - l) pixels, l from Beta(beta, beta), round a uniform centre, and is cut at the
    border; the share returned counts its pixels. Raises ValueError for shapes that differ.

    Source: Yun et al. 2019 (CutMix), section 3; BINGO's released code mixes an anchor with its bag member so.
    """
    checks.floating("x_a", x_a, ndim=4)
    checks.exact_shape("x_p", checks.floating("x_p", x_p), tuple(x_a.shape))
    checks.alike("x_p", x_p, "x_a", x_a, dtype=False)
    checks.finite_number("beta", beta)
    checks.positive_number("beta", beta)
    draw = np.random.default_rng(int(random.seed(generator, torch.device("cpu"))))
    side = (1 - draw.beta(beta, beta)) ** 0.5
    boxes = []
    for size in x_a.shape[2:]:
        centre, half = int(draw.integers(size)), int(size * side) // 2
        boxes.append(slice(max(0, centre - half), min(size, centre + half)))
    mixed = x_a.clone()
    mixed[:, :, boxes[0], boxes[1]] = x_p[:, :, boxes[0], boxes[1]]
    pasted = (boxes[0].stop - boxes[0].start) * (boxes[1].stop - boxes[1].start)
    return mixed, 1 - pasted / (x_a.shape[2] * x_a.shape[3])
