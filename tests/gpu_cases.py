"""What the tests that need a GPU share."""

from collections.abc import Callable

import torch


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
