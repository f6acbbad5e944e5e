"""The Triton kernels of the streaming softmax against the float64 formula and through the public functions: on a GPU, or where
there is none under Triton's interpreter, in a process that has TRITON_INTERPRET=1 from its start (make test)."""

import math

import pytest
import torch
from similarity_kernel_cases import CHOSEN, NOTHING, NOTHING_SHAPE, assert_accurate, candidates, case, chosen_options, softmax

from kdfast import functional, ops
from kdfast._core import triton_runtime
from kdfast._ops.similarity import cpu, reference, triton

if triton_runtime.missing() is not None:
    pytest.skip(f"{triton_runtime.missing()}, and TRITON_INTERPRET is not 1", allow_module_level=True)
from kdfast._ops.similarity.triton import kernels as triton_kernels
from kdfast._ops.similarity.triton import pairs_kernels as triton_pairs_kernels
from kdfast._ops.similarity.triton import wide_kernels as triton_wide_kernels

# of float32, whose exact products take another path (test_triton_wide.py); the interpreter multiplies exactly
PRODUCTS = "tf32" if triton_runtime.INTERPRETED else None
DEVICE = "cpu" if triton_runtime.INTERPRETED else "cuda"


def moved(x):
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def kernel(name):
    """One of the three ops, from CPU tensors to CPU tensors."""

    def call(*args, **options):
        options = {"products": PRODUCTS, **{k: moved(v) for k, v in options.items()}}
        out = getattr(cpu, name)(*map(moved, args), **options, kernels=triton.KERNELS)
        return tuple(x.cpu() for x in out)

    return call


forward, grad_rows, grad_keys = map(kernel, ("forward", "grad_rows", "grad_keys"))


def weights(a, dtype=torch.float64):
    """lse and p of the bank's columns."""
    lse, p = softmax(candidates(a, dtype))
    return lse, p if a["start_logit"] is None else p[..., 1:]


def check(a, *, value_width=None, seed=1):
    """Forward and both gradients, with and without an upstream gradient on pooled, and with values of their own."""
    torch.manual_seed(seed)
    (batch, rows), dtype = a["scale"].shape, a["query"].dtype
    values = None if value_width is None else torch.randn(batch, a["keys"].shape[1], value_width).to(a["keys"].dtype)
    if values is not None and a["start_value"] is not None:
        a = {**a, "start_value": torch.randn(batch, rows, value_width).to(a["keys"].dtype)}
    lse, pooled, low = forward(**a, pooled=True, values=values)
    want, p = weights(a)
    naive, naive_p = weights(a, dtype)
    over = (a["keys"] if values is None else values).double()

    def pool(p, dtype):
        out = p.to(dtype) @ over.to(dtype)
        if a["start_value"] is not None:
            out = out + (1 - p.sum(-1, keepdim=True)).to(dtype) * a["start_value"].to(dtype)
        return out

    assert_accurate(lse, want, naive)
    assert_accurate(pooled, pool(p, torch.float64), pool(naive_p, dtype), extra=1e-6)
    g, h = torch.randn(batch, rows), torch.randn(batch, rows, over.shape[-1])
    rest = {k: v for k, v in a.items() if k not in ("start_logit", "start_value")}
    for upstream in (None, h):

        def sums(p, dtype, upstream=upstream):
            inner = g.to(dtype)[..., None] + (0 if upstream is None else upstream.to(dtype) @ over.to(dtype).mT)
            dz = p.to(dtype) * inner
            keys = (dz * a["scale"].to(dtype)[..., None]).mT @ a["query"].to(dtype)
            of_values = p.mT.to(dtype) @ h.to(dtype)
            if upstream is not None and values is None:
                keys = keys + of_values
            return dz @ a["keys"].to(dtype), p.sum(-1).to(dtype), dz.sum(-1), keys, dz.sum(1), of_values

        options = {"h": upstream, "values": values}
        with_values = values is not None and upstream is not None
        got = (
            *grad_rows(g, lse, low, **rest, **options),
            *grad_keys(g, lse, low, **rest, want_keys=True, want_bias=True, want_values=with_values, **options),
        )
        for ours, exact, plain in zip(got[: 5 + with_values], sums(p, torch.float64), sums(naive_p, dtype), strict=False):
            assert_accurate(ours, exact, plain, extra=2e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 33, 65, 3), (1, 3, 31, 17), (2, 5, 257, 65), (1, 64, 128, 16)])
def test_ragged_sizes(shape):
    check(case(*shape))


@CHOSEN
def test_exclusions(chosen):
    shape = (2, 40, 70, 9)
    check(case(*shape, **chosen_options(chosen, shape)))


@pytest.mark.parametrize("width", [1, 40])
def test_values_other_than_the_keys(width):
    shape = (2, 9, 140, 20)
    check(case(*shape, **chosen_options("start", shape)), value_width=width)


def test_a_shared_bank_is_the_expanded_bank():
    a = case(3, 20, 130, 20, shared=True)
    b = {**a, "keys": a["keys"].contiguous()}
    for x, y in zip(*(forward(**c, pooled=True) for c in (a, b)), strict=True):
        assert torch.equal(x, y)


@NOTHING
def test_nothing_admitted(nothing):
    a = case(*NOTHING_SHAPE, **nothing)
    lse, pooled, low = forward(**a, pooled=True)
    assert (lse == -math.inf).all() and (pooled == 0).all() and (low == 0).all()
    rest = {k: v for k, v in a.items() if k not in ("start_logit", "start_value")}
    g = torch.randn(2, 7)
    for x in grad_rows(g, lse, low, **rest):
        assert (x == 0).all()
    for x in grad_keys(g, lse, low, **rest, want_keys=True, want_bias=True):
        assert (x == 0).all()


def test_rows_beyond_valid_are_not_read():
    a = case(1, 9, 100, 8, valid=torch.tensor([37]))
    want = forward(**a, pooled=True)
    a["keys"][:, 37:] = math.nan
    for got, expected in zip(forward(**a, pooled=True), want, strict=True):
        assert torch.equal(got, expected)
    rest = {k: v for k, v in a.items() if k not in ("start_logit", "start_value")}
    dkeys, dbias, _ = grad_keys(torch.ones(1, 9), want[0], want[2], **rest, want_keys=True, want_bias=True)
    assert dkeys.isfinite().all() and (dkeys[:, 37:] == 0).all() and (dbias[:, 37:] == 0).all()


def test_negative_zero_and_extreme_scales():
    a = case(1, 12, 70, 9)
    a["scale"] = torch.linspace(-1e4, 1e4, 12)[None].clone()
    a["scale"][0, 5] = 0
    check(a)


def test_nan_and_infinity_reach_their_rows():
    a = case(1, 6, 70, 9)
    a["query"][0, 2, 3] = math.nan
    lse, pooled, _ = forward(**a, pooled=True)
    assert lse[0, 2].isnan() and pooled[0, 2].isnan().all()
    assert lse[0, [0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    """The interpreter multiplies in float32: what it shows is that loads, masks and conversions are right."""
    check(case(2, 33, 100, 24, dtype))


def loss(impl, q, k, bank, tau, **options):
    return functional.info_nce(q, k, bank, temperature=tau, impl=impl, precision=PRODUCTS, **options)


def test_info_nce_and_its_gradients():
    torch.manual_seed(0)
    q, k, bank = (torch.nn.functional.normalize(torch.randn(n, 20), dim=-1).to(DEVICE).requires_grad_() for n in (13, 13, 150))
    tau = torch.tensor(0.1, device=DEVICE, requires_grad=True)
    options = {"query_labels": moved(torch.arange(13) % 4), "bank_labels": moved(torch.arange(150) % 4)}
    got, want = (torch.autograd.grad(loss(impl, q, k, bank, tau, **options), (q, k, bank, tau)) for impl in ("triton", "torch"))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("divergence", ["ce", "kl"])
def test_similarity_distillation_and_its_gradients(divergence):
    torch.manual_seed(0)
    sides = (13, 20), (13, 24), (90, 20), (90, 24)
    student, teacher, bank, teacher_bank = (torch.nn.functional.normalize(torch.randn(s), dim=-1).to(DEVICE) for s in sides)
    leaves = student.requires_grad_(), bank.requires_grad_()

    def results(impl):
        loss = functional.similarity_distillation(
            student, teacher, bank, teacher_bank, student_temperature=0.2, teacher_temperature=0.1, divergence=divergence, impl=impl,
            precision=PRODUCTS,
        )  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    for x, y in zip(results("triton"), results("torch"), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)


def test_second_derivative():
    torch.manual_seed(0)
    q, bank = (torch.randn(n, 8).to(DEVICE).requires_grad_() for n in (5, 40))

    def second(impl):
        lse, pooled = ops.similarity_softmax(q, bank, scale=0.3, impl=impl, precision=PRODUCTS)
        first = torch.autograd.grad(lse.sum() + pooled.square().sum(), (q, bank), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), (q, bank))

    for x, y in zip(second("triton"), second("torch"), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-4, atol=2e-5)


def test_vmap_and_compile():
    torch.manual_seed(0)
    q, bank = torch.randn(3, 7, 8).to(DEVICE), torch.randn(40, 8).to(DEVICE)

    def lse(q, impl="triton"):
        return ops.similarity_softmax(q, bank, scale=0.3, impl=impl)[0]

    torch.testing.assert_close(torch.func.vmap(lse)(q), reference.similarity_softmax(q, bank, scale=0.3)[0], rtol=1e-5, atol=1e-5)
    compiled = torch.compile(lambda q: lse(q).sum(), backend="aot_eager", fullgraph=True)
    x, y = q[0].clone().requires_grad_(), q[0].clone().requires_grad_()
    compiled(x).backward()
    lse(y, "torch").sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)


class Counter:
    """In place of a kernel: it notes its launches and does nothing."""

    def __init__(self, name, launched):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        assert len(grid) == 1, "a batch on another axis ends at 65,535"
        return lambda *args, **options: self.launched.append(self.name)


@pytest.mark.parametrize(
    ("dtype", "forward", "of_bank"),
    [
        (torch.bfloat16, ["forward", "merge"], ["grad_keys"]),
        (torch.float32, ["wide_probabilities", "merge_statistics", "weighted_sums"], ["wide_weights", "weighted_sums"]),
    ],
    ids=["bfloat16", "float32"],
)
def test_few_queries_against_a_large_bank_take_three_launches_at_most(dtype, forward, of_bank, monkeypatch):
    """Forward and backward: the gradient comes with the parts of the bank."""
    launched = []
    for module in (triton_kernels, triton_pairs_kernels, triton_wide_kernels):
        for name in {*forward, *of_bank} & vars(module).keys():
            monkeypatch.setattr(module, name, Counter(name, launched))
    q, k, bank = (torch.zeros(n, 128, device=DEVICE, dtype=dtype) for n in (256, 256, 65536))
    functional.info_nce(q.requires_grad_(), k, bank, normalize=False, impl="triton").backward()
    assert launched == forward
    functional.info_nce(q, k, bank.requires_grad_(), normalize=False, impl="triton").backward()
    assert launched[len(forward) :] == forward + of_bank


def test_opcheck():
    a = case(2, 7, 70, 5)
    lse, _, low = map(moved, forward(**a, pooled=False))
    query, keys, scale = (moved(a[name]) for name in ("query", "keys", "scale"))
    nothing = (None,) * 9
    kernels = torch.ops.kdfast_triton
    torch.library.opcheck(kernels.similarity_softmax.default, (query, keys, scale, *nothing, True, 3))
    args = (torch.ones_like(lse), None, lse, low, query, keys, scale, *(None,) * 7)
    torch.library.opcheck(kernels.similarity_grad_rows.default, (*args, 3))
    torch.library.opcheck(kernels.similarity_grad_keys.default, (*args, True, False, False, 3))


def test_what_it_cannot_serve_says_why():
    with pytest.raises(ValueError, match="float64"):
        ops.similarity_softmax(moved(torch.randn(2, 6)).double(), moved(torch.randn(3, 6)).double(), impl="triton")
