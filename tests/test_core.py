"""The shared ground: choice of implementation, random numbers, reductions."""

import os
import subprocess
import sys

import pytest
import torch

from kdfast._core import impls, precision, random, reduction
from kdfast._core.impls import Implementation


@pytest.fixture
def op():
    impls.register(
        "toy",
        Implementation("cuda", lambda: "no CUDA device", lambda **facts: None),
        Implementation("cpu", lambda: None, lambda dtype: "float64 is not served" if dtype == torch.float64 else None),
    )
    yield "toy"
    del impls._registry["toy"]


def test_the_best_implementation_that_can_serve_is_chosen(op):
    assert impls.choose(op, None, dtype=torch.float32) == "cpu"
    assert impls.choose(op, None, dtype=torch.float64) == "torch"
    assert impls.choose(op, "torch", dtype=torch.float32) == "torch"


@pytest.mark.parametrize(
    ("impl", "reason"),
    [("cuda", "no CUDA device"), ("cpu", "float64 is not served"), ("triton", "not written"), ("fpga", "must be None or one of")],
)
def test_an_implementation_that_cannot_serve_says_why(op, impl, reason):
    with pytest.raises(ValueError, match=reason):
        impls.choose(op, impl, dtype=torch.float64)


def test_the_table_gives_a_reason_for_each_missing_implementation(op):
    assert impls.table()[op] == {"cpu": None, "cuda": "no CUDA device", "triton": "not written for this op", "torch": None}


def test_the_environment_sets_the_default():
    code = (
        "import torch, kdfast.ops; from kdfast._core import impls; "
        "print(impls.choose('similarity_softmax', None, device_type='cpu', dtype=torch.float32))"
    )
    environment = {**os.environ, "KDFAST_IMPL": "torch"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "torch", done.stderr
    done = subprocess.run([sys.executable, "-c", code], env={**environment, "KDFAST_IMPL": "fpga"}, capture_output=True, text=True)
    assert "KDFAST_IMPL must be one of" in done.stderr


def test_uniform_numbers_are_uniform_and_depend_on_the_key_alone():
    seed, rows, slots = torch.tensor(5), torch.arange(400)[:, None], torch.arange(300)
    u = random.uniform(seed, rows, slots)
    assert u.min() > 0 and u.max() < 1
    counts = torch.histc(u, 50, 0, 1)
    chi_square = ((counts - u.numel() / 50) ** 2 / (u.numel() / 50)).sum()
    assert chi_square < 100  # 49 degrees of freedom: p about 2e-5
    assert torch.equal(random.uniform(seed, torch.tensor(17), torch.tensor(4)), u[17, 4])
    for shifted in (u[1:] - u[:-1], u[:, 1:] - u[:, :-1]):
        assert abs(shifted.var() / u.var() - 2) < 0.05  # neighbours are uncorrelated
    assert (random.uniform(torch.tensor(6), rows, slots) == u).float().mean() < 1e-3


def test_seeds_come_from_a_generator_or_are_given():
    a, b = (random.seed(torch.Generator().manual_seed(3), torch.device("cpu")) for _ in range(2))
    assert torch.equal(a, b) and a.dtype == torch.int64
    assert random.seed(torch.tensor([9]), torch.device("cpu")) == 9
    for wrong, error in ((torch.zeros(2, dtype=torch.int64), ValueError), (torch.zeros(1), TypeError), (7, TypeError)):
        with pytest.raises(error, match="generator"):
            random.seed(wrong, torch.device("cpu"))


def test_reduction():
    losses = torch.tensor([1.0, 2.0, torch.nan, 4.0], requires_grad=True)
    counted = torch.tensor([True, True, False, True])
    weight = torch.tensor([1.0, 2.0, 3.0, 1.0])
    assert reduction.reduce_rows(losses, counted=counted) == 7 / 3
    assert reduction.reduce_rows(losses, counted=counted, weight=weight) == 9 / 4
    assert reduction.reduce_rows(losses, counted=counted, reduction="sum") == 7
    assert torch.equal(reduction.reduce_rows(losses, counted=counted, reduction="none"), torch.tensor([1.0, 2.0, 0.0, 4.0]))
    nothing = reduction.reduce_rows(losses, counted=torch.zeros(4, dtype=torch.bool))
    assert nothing == 0 and torch.equal(torch.autograd.grad(nothing, losses)[0], torch.zeros(4))


def test_precision_follows_pytorch():
    assert precision.resolve(None, "cpu") == "ieee"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert (precision.resolve(None, "cuda"), precision.resolve(None, "cpu")) == ("tf32", "ieee")
        assert precision.resolve("bf16", "cuda") == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)
    with pytest.raises(ValueError, match="precision"):
        precision.resolve("fp8", "cpu")
