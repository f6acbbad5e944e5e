"""What only a GPU shows of the CUDA kernels: equal bits on every run, one launch a batch of problems, capture in a graph, Inductor."""

import functools

import pytest
import torch
from gpu_cases import LARGE, check_large_codes, check_large_cost, same_when_replayed

from kdfast import functional, ops
from kdfast._core import cuda_runtime

if cuda_runtime.missing() is not None:
    pytest.skip(cuda_runtime.missing(), allow_module_level=True)

WITH_CLUSTERS = cuda_runtime.has_clusters()


@functools.cache
def costs(*shape):
    """Random numbers, drawn once: not while a graph is captured."""
    return torch.rand(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))


def solved(impl, *shape, **options):
    result = ops.sinkhorn(costs(*shape), **{"epsilon": 0.1, "max_iters": 20, "impl": impl, **options})
    return result.f, result.g, result.value, result.transport_cost, result.error


def tiny(impl):
    return solved(impl, 5000, 4, 4)


def packed(impl):
    return solved(impl, 999, 30, 17)


def narrow(impl):
    result = ops.sinkhorn(costs(300, 100, 120).bfloat16(), epsilon=0.1, max_iters=20, impl=impl)
    return result.f, result.g, result.value, result.transport_cost, result.error


def square(impl):
    return solved(impl, 300, 128, 128, tol=1e-4)


def ragged(impl):
    sizes = torch.arange(1, 51, device="cuda")
    return solved(impl, 50, 100, 60, lengths=(2 * sizes, sizes.clamp_max(60)))


def clustered(impl):
    return solved(impl, 200, 256, 256) if WITH_CLUSTERS else solved(impl, 200, 128, 256)


def largest(impl):
    return solved(impl, 3, 1024 if WITH_CLUSTERS else 128, 250, rho=2.0)


def streamed(impl):
    wide = ops.sinkhorn(costs(2, 700, 20_000 if WITH_CLUSTERS else 5000), epsilon=0.1, max_iters=5, impl=impl)
    narrow = ops.sinkhorn(costs(40, 300, 600).bfloat16(), epsilon=0.1, max_iters=5, impl=impl)
    stopped = ops.sinkhorn(costs(4, 300, 1500), epsilon=0.2, max_iters=30, tol=1e-9, impl=impl)
    return stopped.f, stopped.error, wide.f, wide.g, wide.value, narrow.f, narrow.g, narrow.transport_cost


def normalized(impl):
    logits = costs(20_001, 4, 4).clone().requires_grad_()
    wide = costs(33, 30, 30)
    out = functional.sinkhorn_normalize(logits, impl=impl)
    return out.detach(), torch.autograd.grad(out[:, 0].sum(), logits)[0], functional.sinkhorn_normalize(wide, impl=impl)


def assigned(impl):
    few, many = costs(2, 3000, 1001), costs(1000, 65536 if WITH_CLUSTERS else 8192).bfloat16()
    return functional.sinkhorn_assign(few, impl=impl), functional.sinkhorn_assign(many, impl=impl)


CASES = pytest.mark.parametrize(
    "case", [tiny, packed, narrow, square, ragged, clustered, largest, streamed, normalized, assigned], ids=lambda case: case.__name__
)


@CASES
def test_the_same_bits_every_time(case):
    for first, second in zip(case("cuda"), case("cuda"), strict=True):
        assert torch.equal(first, second)


@CASES
def test_as_in_plain_pytorch(case):
    for got, want in zip(case("cuda"), case("torch"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@CASES
def test_capture_in_a_graph(case):
    same_when_replayed(lambda: case("cuda"))


@pytest.mark.parametrize(("shape", "kernel"), [((50, 64, 64), "on_chip_kernel"), ((3, 900, 700), "streamed_kernel")], ids=str)
@pytest.mark.parametrize("tol", [None, 1e-3])
def test_one_launch_a_batch(shape, kernel, tol):
    cost = costs(*shape)
    ops.sinkhorn(cost, epsilon=0.1, max_iters=30, tol=tol, impl="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.sinkhorn(cost, epsilon=0.1, max_iters=30, tol=tol, impl="cuda")
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if kernel in event.key) == 1


def test_problems_that_take_turns():
    """More of them than the GPU has blocks for at a time: each is solved as if it were alone."""
    cost = costs(3000, 40, 300).bfloat16()
    whole = ops.sinkhorn(cost, epsilon=0.1, max_iters=8, impl="cuda")
    few = ops.sinkhorn(cost[-20:], epsilon=0.1, max_iters=8, impl="cuda")
    torch.testing.assert_close(whole.f[-20:], few.f, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("anneal", [None, (0.4, 0.7)])
def test_each_large_problem_stops_by_itself(anneal):
    cost = costs(6, 700, 900) * torch.tensor([0.01, 1.0, 0.3, 1.0, 0.1, 1.0], device="cuda")[:, None, None]
    options = {"epsilon": 0.05, "max_iters": 200, "tol": 1e-4, "anneal": anneal}
    ours, want = (ops.sinkhorn(cost, **options, impl=impl) for impl in ("cuda", "torch"))
    assert ours.converged.all() and (ours.iterations - want.iterations).abs().max() <= 1
    torch.testing.assert_close(ours.value, want.value, rtol=1e-4, atol=1e-4)


def test_large_proximal_steps():
    ours, want = (ops.sinkhorn(costs(2, 400, 600), epsilon=0.5, max_iters=20, method="proximal", impl=impl) for impl in ("cuda", "torch"))
    torch.testing.assert_close(ours.f, want.f, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.transport_cost, want.transport_cost, rtol=1e-3, atol=1e-4)


def test_inductor():
    cost = costs(5, 40, 50)

    def value(c):
        return ops.sinkhorn(c, epsilon=0.1, max_iters=10, impl="cuda").value.sum()

    torch.testing.assert_close(torch.compile(value, fullgraph=True)(cost), value(cost))


def test_what_is_chosen():
    """Costs that are given; not points, nor proximal steps with a tolerance."""
    small, large = costs(2, 100, 100), costs(1, 2000, 300)
    assert ops.sinkhorn(small, tol=0.1).state.problem.impl == "cuda"
    assert ops.sinkhorn(large).state.problem.impl == "cuda"
    assert ops.sinkhorn(large, tol=0.1).state.problem.impl == "cuda"
    assert ops.sinkhorn(large, method="proximal").state.problem.impl == "cuda"
    assert ops.sinkhorn(large, tol=0.1, method="proximal").state.problem.impl != "cuda"
    assert ops.sinkhorn(x=costs(2, 50, 3), y=costs(2, 50, 3)).state.problem.impl != "cuda"


def test_on_a_stream_of_its_own():
    want = square("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = square("cuda")
    torch.cuda.current_stream().wait_stream(stream)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


@LARGE
@pytest.mark.skipif(not WITH_CLUSTERS, reason="a block reads 8192 columns")
@pytest.mark.parametrize("check", [check_large_cost, check_large_codes], ids=["cost", "codes"])
def test_beyond_two_to_the_31_elements(check):
    check("cuda")
