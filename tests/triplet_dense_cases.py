"""Problems for the kernels of losses over all negatives, and their comparison with the portable formula in float64."""

import torch
from similarity_kernel_cases import ULP, assert_accurate

from kdfast._core import extension
from kdfast.functional import triplet_loss

_C, _ = extension.load("_C")


def case(n, m, width, classes, *, metric="euclidean", valid=0) -> dict:
    """Rows of small integers: their distances are exact, so that every implementation counts the same triplets. m None: in batch."""
    a = {"x": torch.randint(-2, 3, (n, width)).float(), "labels": torch.randint(0, classes, (n,)), "metric": metric}
    if m is not None:
        own = torch.where(torch.rand(n) < 0.5, torch.randint(0, m, (n,)), -1)
        a |= {"ref": torch.randint(-2, 3, (m, width)).float(), "ref_labels": torch.randint(0, classes, (m,)), "own_index": own}
        a |= {"ref_valid": m - valid}
    return a


def loss_of(a: dict, impl: str, dtype=torch.float32, **how) -> tuple[torch.Tensor, ...]:
    """The loss and its gradients in x and ref, or in each layer where these are lists."""
    leaves = {name: _leaves(a[name], dtype) for name in ("x", "ref") if name in a}
    rest = {name: value for name, value in a.items() if name not in ("x", "labels", "ref")}
    if "sample_on" in a:
        rest["sample_on"] = tuple(t.to(dtype) for t in a["sample_on"]) if "ref" in a else a["sample_on"].to(dtype)
    normalize = how.pop("normalize", False)
    more = {"ref": leaves["ref"]} if "ref" in leaves else {}
    loss = triplet_loss(leaves["x"], a["labels"], **rest, **more, normalize=normalize, impl=impl, **how)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    flat = [t for rows in leaves.values() for t in (rows if isinstance(rows, list) else [rows])]
    return loss.detach(), *torch.autograd.grad(loss, flat, upstream)


def _leaves(rows, dtype):
    return [t.to(dtype).requires_grad_() for t in rows] if isinstance(rows, list) else rows.to(dtype).requires_grad_()


def check(a: dict, **how) -> None:
    got, naive, want = loss_of(a, "cpu", **how), loss_of(a, "torch", **how), loss_of(a, "torch", torch.float64, **how)
    extra = 8 * ULP if _C.isa_in_force() == "base" else 0.0  # a term of a sum is rounded twice there, once in PyTorch's products
    for g, n, w in zip(got, naive, want, strict=True):
        assert_accurate(g, w, n, extra)


def check_second_derivative(bank: bool, **how) -> None:
    a = case(12, 20 if bank else None, 5, 3)

    def twice(impl):
        x = a["x"].clone().requires_grad_()
        more = {k: a[k] for k in ("ref", "ref_labels", "own_index") if bank}
        loss = triplet_loss(x, a["labels"], **more, normalize=False, margin=1.3, impl=impl, **how)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return first, *torch.autograd.grad(first.square().sum(), x)

    for got, want in zip(twice("cpu"), twice("torch"), strict=True):
        torch.testing.assert_close(got, want)


def check_compiles(**how) -> None:
    """In batch, and against a bank that has a gradient, too."""
    for references in (None, 50):
        a = case(30, references, 4, 7)
        rest = {name: value for name, value in a.items() if name not in ("x", "ref")}
        leaves = [a[name].requires_grad_() for name in ("x", "ref") if name in a]

        def loss(x, *ref, rest=rest):
            more = {"ref": ref[0]} if ref else {}
            return triplet_loss(x, **rest, **more, normalize=False, impl="cpu", margin=1.3, **how)

        torch._dynamo.reset()
        want = torch.autograd.grad(loss(*leaves), leaves)
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
        torch.testing.assert_close(got, want)


def check_repeats(a: dict, **how) -> None:
    """The same bits again, and the right ones."""
    check(a, **how)
    assert all(torch.equal(x, y) for x, y in zip(loss_of(a, "cpu", **how), loss_of(a, "cpu", **how), strict=True))
