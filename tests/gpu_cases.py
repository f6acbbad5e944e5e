"""What the tests that need a GPU share."""

from collections.abc import Callable

import pytest
import torch

from kdfast import functional, ops

LARGE = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 60 << 30, reason="it takes 60 GB"
)


def same_when_replayed(run: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    """`run` captured in a graph gives the bits it gives outside. A host synchronisation, or an allocation outside the graph's pool, would
    end the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            want = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for x in got:
        x.zero_()
    graph.replay()
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def check_large_cost(impl: str, n: int = 40_000, m: int = 60_000, device: str = "cuda") -> None:
    """A cost of 2.4e9 numbers: its last row's potential is that row's."""
    cost = torch.rand(n, m, dtype=torch.bfloat16, device=device)
    solved = ops.sinkhorn(cost, epsilon=0.5, max_iters=2, impl=impl)
    want = -0.5 * (torch.logsumexp((solved.g - cost[-1].float()) / 0.5, 0) - torch.tensor(float(m)).log())
    torch.testing.assert_close(solved.f[-1], want, rtol=1e-2, atol=1e-3)


def check_large_codes(impl: str, n: int = 40_000, m: int = 60_000, device: str = "cuda") -> None:
    """Codes of 2.4e9 scores: rows differ by what their scores do, and sum to 1."""
    scores = torch.rand(n, m, dtype=torch.bfloat16, device=device)
    codes = functional.sinkhorn_assign(scores, epsilon=0.5, impl=impl)
    offsets = [codes[i].log() - scores[i].float() / 0.5 for i in (0, -1)]
    assert float((offsets[1] - offsets[0]).std()) < 1e-4
    torch.testing.assert_close(codes[-1].sum(), torch.ones((), device=device), rtol=1e-4, atol=0)
