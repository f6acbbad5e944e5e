"""Every method under DistributedDataParallel on two processes with different samples: what it learns and keeps stays equal."""

import socket

import torch
from distill_cases import trainer
from torch.nn.parallel import DistributedDataParallel

from kdfast.study.recipes import RECIPES


def _worker(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results[rank] = _differing(rank)
    torch.distributed.destroy_process_group()


def _differing(rank: int) -> list[str]:
    """What is not the same on both ranks. A function of its own: modules that outlive their process group may hang when they are freed."""
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


def test_ranks_stay_equal():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        workers = [context.Process(target=_worker, args=(rank, port, results)) for rank in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
            assert worker.exitcode == 0
        assert dict(results) == {0: [], 1: []}
