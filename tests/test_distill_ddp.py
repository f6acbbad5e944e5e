"""Every method under DistributedDataParallel on two processes with different samples: what it learns and keeps stays equal."""

import torch
from distill_cases import trainer
from ranks import needs_gloo, on_two_ranks
from torch.nn.parallel import DistributedDataParallel

from kdfast.study.recipes import RECIPES


def differing(rank: int) -> list[str]:
    """What is not the same on both ranks."""
    differing = []
    for name, recipe in RECIPES.items():
        run = trainer(recipe, seed=rank)
        method = run.distiller.losses["method"]
        run.distiller = DistributedDataParallel(run.distiller, find_unused_parameters=True)
        for _ in range(2):
            run.step()
        kept = {key: value for key, value in method.state_dict().items() if isinstance(value, torch.Tensor)}
        kept["student"] = torch.cat([p.flatten() for p in run.student.parameters()])
        for key, value in kept.items():
            first = value.detach().clone()
            torch.distributed.broadcast(first, 0)
            if not torch.equal(first, value):
                differing.append(f"{name}: {key}")
    return differing


@needs_gloo
def test_ranks_stay_equal():
    assert on_two_ranks(differing) == [[], []]
