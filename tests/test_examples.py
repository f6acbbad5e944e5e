"""The examples run, and show what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_swapping_the_loss_keeps_the_training_curve():
    plain, ours = load("swap_one_loss").main()
    assert max(abs(a - b) for a, b in zip(plain, ours, strict=True)) < 1e-3
    assert plain[-1] < 0.7 * plain[0]


def test_the_distilled_student_beats_the_one_from_few_labels():
    _, from_labels, distilled = load("distil_with_a_method").main().values()
    assert distilled > from_labels + 0.05


def ddp_worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    example = load("distil_with_ddp")
    d, losses = example.train(torch.device("cpu"))
    torch.save((losses, example.equal_on_all_ranks(d), torch.initial_seed()), f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_ddp_keeps_student_projectors_and_bank_equal(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        losses, equal, seed = torch.load(tmp_path / f"{rank}.pt")
        assert equal and losses[-1] < 0.8 * losses[0]
        assert seed == 1 + rank  # the ranks did start with different random states


@pytest.mark.parametrize("library", ["lightning", "accelerate"])
def test_the_student_learns_under(library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    before, after = load(f"distil_with_{library}").main()
    assert after > 0.75 and after > before + 0.3
