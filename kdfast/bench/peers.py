"""What cases share: a step of a loss, torch.compile, whether a library is there, and the bare matrix products."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .registry import Call, Peer


def step(loss: Callable[..., Tensor], *tensors: Tensor, leaves: int = 1) -> tuple[Tensor, ...]:
    """The value of `loss(*tensors)` and its gradients by the first `leaves` of them."""
    wanted = [t.detach().requires_grad_() for t in tensors[:leaves]]
    value = loss(*wanted, *tensors[leaves:])
    return value.detach(), *torch.autograd.grad(value, wanted)


def in_chunks(loss: Callable[..., Tensor], rows: tuple[Tensor, ...], *shared: Tensor, size: int = 256) -> tuple[Tensor, Tensor]:
    """`step(loss, *rows, *shared)` for a mean over rows, `size` rows at a time: less memory."""
    parts = [step(loss, *chunk, *shared) for chunk in zip(*(t.split(size) for t in rows), strict=True)]
    count = len(rows[0])
    return sum(value * len(gradient) for value, gradient in parts) / count, torch.cat([g * len(g) for _, g in parts]) / count


def steps(name: str, loss: Callable[..., Tensor], **options) -> Peer:
    """A `step` of `loss` on the inputs; `options` are those of `step`."""
    return Peer(name, lambda inputs: partial(step, loss, *inputs, **options))


def library(package: str, module: str, loss: Callable[[], Callable[..., Tensor]], **options) -> Peer:
    """The same for a loss that `loss()` imports: only when its turn comes."""
    return Peer(package, lambda inputs: partial(step, loss(), *inputs, **options), missing=installed(module, package))


def compiled(loss: Callable[..., Tensor], **options) -> Peer:
    def build(inputs) -> Call:
        torch._dynamo.reset()
        return partial(step, torch.compile(loss, dynamic=False), *inputs, **options)

    return Peer("torch.compile", build, missing=no_compiler, quick=False)


def installed(module: str, package: str) -> Callable[[], str | None]:
    """`Peer.missing` of a library: imported only when its call is built."""
    return lambda: None if importlib.util.find_spec(module) else f"not installed: pip install {package}"


def no_compiler() -> str | None:
    names = [os.environ.get("CXX") or "g++", "c++", "clang++"]
    return None if any(map(shutil.which, names)) else f"torch.compile needs a C++ compiler ({', '.join(names)}: none found)"


Products = Callable[..., tuple[Tensor, ...]]  # (mm, *tensors) -> results, mm(a, b) being the only arithmetic


def attention_products(mm: Callable, query: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    """q k^T and (q k^T) k: a softmax's scores and what it pools."""
    return (mm(mm(query, keys.mT), keys),)


def gradient_products(mm: Callable, query: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    """The scores, and from them the gradients of both sides."""
    scores = mm(query, keys.mT)
    return mm(scores, keys), mm(scores.mT, query)


def bare_mm(products: Products, operands: Callable[..., tuple[Tensor, ...]]) -> tuple[Peer, Peer]:
    """Matrix products of `operands(inputs)` with nothing between, into buffers that stay, in both of PyTorch's fp32 modes."""

    def exact(inputs) -> tuple[Tensor, ...]:
        return products(torch.matmul, *(x.double() for x in operands(inputs)))

    return (
        Peer("bare mm", partial(_bare_mm, "highest", products, operands), floor=exact),
        Peer("bare mm, medium", partial(_bare_mm, "medium", products, operands), dtypes=(torch.float32,), floor=exact),
    )


def _bare_mm(precision: str, products: Products, operands: Callable[..., tuple[Tensor, ...]], inputs) -> Call:
    tensors, buffers = operands(inputs), []

    def mm_into(out: Iterator[Tensor], a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b, out=next(out))

    def allocating(a: Tensor, b: Tensor) -> Tensor:
        buffers.append(torch.matmul(a, b))
        return buffers[-1]

    products(allocating, *tensors)

    return lambda: in_precision(precision, products, partial(mm_into, iter(buffers)), *tensors)


def in_precision(precision: str, call: Callable[..., tuple[Tensor, ...]], *args) -> tuple[Tensor, ...]:
    """`call(*args)` with PyTorch's float32 products in mode `precision`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return call(*args)
    finally:
        torch.set_float32_matmul_precision(before)
