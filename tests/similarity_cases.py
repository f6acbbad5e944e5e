"""What the similarity tests share: implementations to run, problems, and the bar an answer is held to."""

import pytest
import torch

from kdfast._core import impls
from kdfast._ops.similarity import Harder, KeyIndex, SameLabel

#: every implementation that is here on this machine
IMPLS = [name for name, reason in impls.table()["similarity_softmax"].items() if reason is None and name in ("cpu", "torch")]

# 1: a single row or column; 3, 63, 65: around vector and panel widths; 257: one past a kernel's column block;
# 300 x 1100: several tiles of the portable passes both ways
SIZES = [(1, 1, 1), (3, 65, 7), (65, 63, 33), (7, 257, 64), (300, 1100, 16)]


def serve_or_skip(impl: str, dtype: torch.dtype) -> None:
    try:
        impls.choose("similarity_softmax", impl, device_type="cpu", dtype=dtype)
    except ValueError as error:
        pytest.skip(str(error))


def normal(*shape, dtype=torch.float32, requires_grad=False):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)


def everything(n, m, d, *, dtype, dv=None, batch=()):
    """Keyword arguments with every feature in use: scale and bias per row and column, start, all exclusions, valid."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return dict(
        scale=0.2 + torch.rand(*batch, n, dtype=wide),
        bias=normal(m, dtype=wide),
        start=(normal(*batch, n, dtype=wide), normal(*batch, n, d if dv is None else dv, dtype=dtype)),
        exclude=(
            SameLabel(torch.randint(0, 4, (*batch, n)), torch.randint(0, 4, (m,), dtype=torch.int32)),
            KeyIndex(torch.randint(-1, m, (*batch, n))),
            Harder(normal(*batch, n, dtype=wide), 0.25),
        ),
        valid=max(1, m - 2),
    )


def cast(x, dtype):
    """`x`, a tensor or a nest of them, with floating tensors detached and in `dtype`."""
    if isinstance(x, torch.Tensor):
        return x.detach().to(dtype) if x.is_floating_point() else x
    if isinstance(x, dict):
        return {key: cast(item, dtype) for key, item in x.items()}
    if isinstance(x, tuple):
        items = [cast(item, dtype) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else tuple(items)
    return x


def assert_as_good_as(ours, naive, truth, factor=2):
    """The project's bar: error <= `factor` x the naive formula's in the same dtype, plus 4 ulp of the largest true entry.

    In float64 the truth carries rounding errors of its own, which the naive formula shares: 32 ulp there.
    """
    ulps = 32 if ours.dtype == torch.float64 else 4
    truth = truth.double()
    finite = torch.isfinite(truth)
    assert torch.equal(ours.double()[~finite].nan_to_num(nan=7.0), truth[~finite].nan_to_num(nan=7.0))
    if not finite.any():
        return
    error, allowed = ((x.double() - truth)[finite].abs().max() for x in (ours, naive))
    allowed = factor * allowed + ulps * torch.finfo(ours.dtype).eps * truth[finite].abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def assert_directions_together(output, shapes):
    """is_grads_batched gives second derivatives along many directions as one by one; `output` is of a tensor of each shape."""
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    first = torch.autograd.grad(output(*leaves).sum(), leaves, create_graph=True)
    directions = [torch.randn(3, *shape) for shape in shapes]
    together = torch.autograd.grad(first, leaves, directions, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        alone = torch.autograd.grad(first, leaves, [x[i] for x in directions], retain_graph=True)
        assert all(torch.equal(x[i], y) for x, y in zip(together, alone, strict=True))
