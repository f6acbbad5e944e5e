"""The examples run, and show what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch
from ranks import needs_gloo, on_two_ranks

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


def ddp_example(rank: int):
    example = load("distil_with_ddp")
    d, losses = example.train(torch.device("cpu"))
    return losses, example.equal_on_all_ranks(d), torch.initial_seed()


@needs_gloo
def test_ddp_keeps_student_projectors_and_bank_equal():
    for rank, (losses, equal, seed) in enumerate(on_two_ranks(ddp_example)):
        assert equal and losses[-1] < 0.8 * losses[0]
        assert seed == 1 + rank  # the ranks did start with different random states


@pytest.mark.parametrize("library", ["lightning", "accelerate"])
def test_the_student_learns_under(library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    before, after = load(f"distil_with_{library}").main()
    assert after > 0.75 and after > before + 0.3
