"""WCL: weakly supervised contrastive learning; classes are components of a nearest-neighbour graph (Zheng et al. 2021, 2110.04770)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import ops
from .._core import checks, collectives
from ..functional import nt_xent, sup_con
from .base import DistillLoss, unit, vectors, views


class WCL(DistillLoss):
    """NT-Xent of two views, and SupCon of each view with classes found in the other. No teacher and no labels.

    `loss({"a": v_a, "b": v_b})`, each view a dict of "instance" and "graph", two heads' embeddings [N, D] (a tensor serves for both),
    l2-normalised here. Samples connected in the graph of nearest neighbours (cosine, of the "graph" embeddings of a view) are a class:
        loss = NT-Xent(instance_a, instance_b) + 1/2 [SupCon(graph_a; classes of b) + SupCon(graph_b; classes of a)].
    Under torch.distributed neighbours, classes and negatives are those of all ranks' samples; each rank has the mean over its own.

    Args:
        temperature: of both terms, > 0, default 0.1. graph_weight: default 1.

    Raises:
        ValueError, TypeError: missing views or values, temperature <= 0.
    """

    def __init__(self, temperature: float = 0.1, graph_weight: float = 1.0) -> None:
        super().__init__()
        checks.positive_number("temperature", temperature)
        checks.nonnegative_number("graph_weight", graph_weight)
        self.temperature, self.graph_weight = temperature, graph_weight

    def forward(self, student, teacher=None, *, index=None, labels=None) -> Tensor:
        heads = [_heads(view) for view in views("student", student, ("a", "b"))]
        group = collectives.world()
        options = {"temperature": self.temperature, "normalize": False, "group": group}
        instances, graphs = ([unit(vectors(head[part], "student")) for head in heads] for part in range(2))
        terms = {"instance": nt_xent(*instances, **options)}
        if self.graph_weight:
            classes = [_classes(graph, group) for graph in graphs]
            terms["graph"] = self.graph_weight / 2 * sum(sup_con(graphs[i], classes[1 - i], **options) for i in range(2))
        return self._report(**terms)


@torch.no_grad()
def components(embeddings: Tensor) -> Tensor:
    """[N] int64: the connected component of each row in the graph that joins every row with its nearest other (cosine).

    Following neighbours ends in a pair of mutual neighbours, the lower of which is the root; pointers are doubled log2 N times.
    """
    n = len(embeddings)
    own = torch.arange(n, device=embeddings.device)
    if n < 2:
        return own
    near = ops.knn(embeddings, embeddings, 1, own_index=True)[1][:, 0]
    parent = torch.where(near[near] == own, torch.minimum(own, near), near)
    for _ in range(n.bit_length() + 1):
        parent = parent[parent]
    return parent


def _classes(graph: Tensor, group) -> Tensor:
    """The components of this process's rows [N] in the graph of all ranks' rows."""
    if group is None:
        return components(graph)
    everyone, first = collectives.all_gather_rows_no_grad(graph, group)
    return components(everyone)[first : first + len(graph)]


def _heads(view) -> tuple:
    """(instance, graph) of a view."""
    if not isinstance(view, Mapping):
        return view, view
    if not {"instance", "graph"} <= view.keys():
        raise ValueError(f"student must have instance and graph in every view, it has {', '.join(map(str, view))}")
    return view["instance"], view["graph"]
