"""What the tests of optimal transport share."""

import torch

F64 = torch.float64


def weights(*shape, dtype=F64):
    """Random positive weights of mass 1."""
    w = torch.rand(*shape, dtype=dtype) + 0.2
    return w / w.sum(-1, keepdim=True)


def close(ours, theirs, rtol=1e-8, atol=1e-10):
    """assert_close with the tolerance of float64 arithmetic."""
    torch.testing.assert_close(ours, torch.as_tensor(theirs, dtype=ours.dtype), rtol=rtol, atol=atol)
