"""Two gloo processes for the tests of what ranks do together. A rank that fails or stays behind fails its test; it never holds it up."""

import gc
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")


def on_two_ranks(work: Callable[[int], object], *, seconds: float = 180) -> list:
    """What work(rank) returned on either rank: a function of its module, whose results torch.load reads as plain data."""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(_rank, (folder, work, seconds), WORLD, join=False, daemon=True, start_method="spawn")
        try:
            while not ranks.join(timeout=1):  # raises what a rank raised
                assert time.monotonic() < deadline, f"{work.__name__} took more than {seconds} s on two ranks"
        finally:
            for process in ranks.processes:
                process.kill()
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(WORLD)]


def _rank(rank: int, folder: str, work: Callable[[int], object], seconds: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=seconds / 2)
    )
    torch.save(work(rank), Path(folder, f"{rank}.pt"))
    gc.collect()  # modules that outlive their process group may hang when they are freed, and DistributedDataParallel is in cycles
    dist.barrier()  # nor may a rank leave while the other still waits for it
    dist.destroy_process_group()
