"""The streaming softmax on Hopper against the float64 definitions: on such a GPU, elsewhere emulated on the CPU."""

import math

import pytest
import torch
from cuda_kernels import DEVICE, EMULATED, cuda, moved  # noqa: F401  the fixture serves every test
from similarity_kernel_cases import CHOSEN, NOTHING, NOTHING_SHAPE, assert_accurate, candidates, case, chosen_options, softmax

from kdfast import functional, ops, selfcheck
from kdfast._core import cuda_runtime
from kdfast._ops.similarity import SameLabel, cpu, reference, similarity_lse
from kdfast._ops.similarity import cuda as implementation

if not EMULATED and not cuda_runtime.is_hopper():
    pytest.skip("it takes a GPU of compute capability 9.0", allow_module_level=True)

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
EMULATION = pytest.mark.skipif(not EMULATED, reason="settings of the emulator")
# one number and the least width; two tiles of rows; columns around a tile; every width of tile, filled and not
SHAPES = [(1, 1, 1, 8), (2, 3, 65, 64), (1, 130, 63, 40), (1, 70, 257, 128), (3, 5, 129, 72), (2, 66, 200, 256), (1, 9, 64, 136)]


def forward(a, pooled=True, values=None):
    out = cpu.forward(**{k: moved(v) for k, v in a.items()}, pooled=pooled, values=moved(values), kernels=implementation.KERNELS)
    return tuple(x.cpu() for x in out)


def check(a, extra=1e-6):
    lse, pooled, low = forward(a)
    (want, p), (naive, naive_p) = (softmax(candidates(a, dtype)) for dtype in (torch.float64, a["query"].dtype))
    assert_accurate(lse, want, naive)
    assert_accurate(pooled, mean(a, p), mean(a, naive_p), extra)
    exact = want.isfinite()
    assert (lse.double() + low - want)[exact].abs().max() <= 2e-6 * max(1, want[exact].abs().max()) if exact.any() else True
    alone, nothing, _ = forward(a, pooled=False)
    assert nothing.numel() == 0
    torch.testing.assert_close(alone, lse, rtol=1e-6, atol=1e-6)


def mean(a, p):
    """What weights p of the candidates pool."""
    starts = a["start_logit"] is not None
    pooled = p[..., starts:] @ a["keys"].to(p.dtype)
    return pooled if a["start_value"] is None else pooled + p[..., :1] * a["start_value"].to(p.dtype)


def grad_keys(a, seed=0):
    """The bank's gradient of sum_i g_i lse_i, exactly and by our kernels; and by the formula in the inputs' dtype."""
    g = torch.randn(a["scale"].shape, generator=torch.Generator().manual_seed(seed)) / a["query"].shape[1]
    lse, _, low = forward(a, pooled=False)
    rest = {k: moved(v) for k, v in a.items() if k not in ("start_logit", "start_value")}
    columns = {"want_keys": True, "want_bias": False, "kernels": implementation.KERNELS}
    got, bias, values = cpu.grad_keys(moved(g), moved(lse), moved(low), **rest, **columns)
    assert bias.numel() == values.numel() == 0

    def formula(dtype):
        starts = a["start_logit"] is not None
        _, p = softmax(candidates(a, dtype))
        return (p[..., starts:] * (g * a["scale"]).to(dtype)[..., None]).mT @ a["query"].to(dtype)

    return got.cpu(), formula(torch.float64), formula(a["query"].dtype)


@HALVES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_sizes(shape, dtype):
    a = case(*shape, dtype)
    check(a)
    single = shape[1] * shape[2] == 1  # no other rounding of a weight makes up for one
    assert_accurate(*grad_keys(a), extra=2**-8 if single else 1e-6)


@HALVES
@CHOSEN
def test_exclusions(chosen, dtype):
    for shape in ((2, 70, 150, 24), (1, 3, 300, 200)):
        a = case(*shape, dtype, **chosen_options(chosen, shape, dtype))
        check(a)
        assert_accurate(*grad_keys(a), extra=1e-6)


@HALVES
@pytest.mark.parametrize("shape", [(2, 70, 300, 24, 64), (1, 3, 129, 128, 40), (3, 130, 515, 16, 128), (1, 1, 1, 8, 8)], ids=str)
def test_values_of_their_own(shape, dtype):
    """With all options; shared by the batch; values beyond `valid` that are NaN."""
    *shape, width = shape
    a = case(*shape, dtype, **chosen_options("all", shape, dtype))
    a["start_value"] = torch.randn(*shape[:2], width).to(dtype)
    values = torch.randn(1, shape[2], width).to(dtype).expand(shape[0], -1, -1)
    lse, pooled, _ = forward(a, values=values)
    want, naive = (mean({**a, "keys": values}, softmax(candidates(a, t))[1]) for t in (torch.float64, dtype))
    assert_accurate(pooled, want, naive, extra=1e-6)
    torch.testing.assert_close(lse, forward(a, pooled=False)[0], rtol=1e-6, atol=1e-6)
    laid_out = values.contiguous()
    for batch, count in enumerate(a["valid"]):
        laid_out[batch, count:] = math.nan
    assert torch.equal(forward(a, values=begun_later(laid_out))[1], pooled)


def test_own_index():
    a = case(1, 150, 150, 64, torch.bfloat16, key_index=torch.arange(150).reshape(1, 150, 1))
    check(a)
    assert_accurate(*grad_keys(a), extra=1e-6)


def test_the_banks_gradient_of_extreme_rows():
    """Weights of either sign, of 0 and of rows that admit nothing; a bank shared by the batch; keys beyond `valid` that are NaN."""
    a = case(2, 150, 200, 72, torch.bfloat16, shared=True, valid=torch.tensor([130, 0]))
    a["scale"][:, ::3] *= -1
    a["scale"][:, 5] = 0
    got, want, naive = grad_keys(a)
    assert_accurate(got, want, naive, extra=1e-6)
    assert (got[0, 130:] == 0).all() and (got[1] == 0).all()
    b = {**a, "keys": a["keys"].clone()}
    b["keys"][0, 130:] = math.nan
    assert torch.equal(grad_keys(b)[0], got)


@NOTHING
def test_nothing_admitted(nothing):
    batch, rows, columns, _ = NOTHING_SHAPE
    lse, pooled, low = forward(case(batch, rows, columns, 16, torch.bfloat16, **nothing))
    assert (lse == -math.inf).all() and (pooled == 0).all() and (low == 0).all()


def test_a_shared_bank_is_the_expanded_bank():
    labels = {"key_labels": torch.randint(3, (1, 130)).expand(3, -1), "query_labels": torch.randint(3, (3, 20))}
    a = case(3, 20, 130, 24, torch.float16, shared=True, bias=torch.randn(1, 130).expand(3, -1), **labels)
    b = {**a, **{name: a[name].contiguous() for name in ("keys", "key_labels", "bias")}}
    for x, y in zip(*(forward(c) for c in (a, b)), strict=True):
        assert torch.equal(x, y)


def test_rows_beyond_valid_are_not_read():
    for width, count in ((64, 37), (256, 70), (128, 128)):
        a = case(1, 70, 200, width, torch.bfloat16, valid=torch.tensor([count]))
        want = forward(a)
        a["keys"][:, count:] = math.nan
        for x, y in zip(forward(a), want, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("scale", [-20.0, 0.0, 1e4, 1e-30])
def test_scales(scale):
    shape = (1, 70, 200, 32)
    check(case(*shape, torch.bfloat16, scale=scale, **chosen_options("labels", shape)))
    mixed = case(*shape, torch.bfloat16, **chosen_options("limit", shape))
    mixed["scale"][:, ::3] *= -1
    check(mixed)


def test_a_level_that_rises():
    """Logits that grow by hundreds from tile to tile, and fall: sums are scaled anew. (A level is rounded by 2^-24 of itself.)"""
    a = case(1, 70, 700, 64, torch.bfloat16, scale=10.0, unit=False)
    for growth in (torch.linspace(0, 4, 700), torch.linspace(4, 0, 700)):
        check({**a, "keys": (a["keys"].float() * growth[:, None]).bfloat16()}, extra=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(value):
    a = case(1, 70, 200, 32, torch.bfloat16)
    a["keys"][0, 150, 3] = value
    lse, _, _ = forward(a)
    want, _ = softmax(candidates(a))
    assert torch.equal(lse.isnan(), want.isnan()) and torch.equal(lse.isinf(), want.isinf())
    a["query"][0, 5, 0] = value
    lse, _, _ = forward(a)
    assert lse[0, 5].isnan() == softmax(candidates(a))[0][0, 5].isnan()


@EMULATION
@pytest.mark.parametrize("processors", ["3", "7", "40"])
def test_a_split_bank(processors, monkeypatch):
    """Fewer tiles of rows than multiprocessors, and more units than blocks."""
    monkeypatch.setenv("KDFAST_EMULATE_PROCESSORS", processors)
    for shape in ((2, 130, 1300, 16), (1, 70, 1000, 136)):
        check(case(*shape, torch.bfloat16, **chosen_options("all", shape, torch.bfloat16)))
        check(case(*shape, torch.float16))
    a, values = case(2, 130, 1300, 16, torch.bfloat16), torch.randn(2, 1300, 72).bfloat16()
    (_, p), (_, naive_p) = (softmax(candidates(a, t)) for t in (torch.float64, torch.bfloat16))
    assert_accurate(forward(a, values=values)[1], p @ values.double(), naive_p @ values, extra=1e-6)


@EMULATION
@pytest.mark.parametrize("width", [64, 128, 256])
def test_threads_and_copies_in_any_order(width, monkeypatch):
    """The same bits whichever warp runs first, and whether copies arrive at once or when all wait: no barrier is missing."""
    monkeypatch.setenv("KDFAST_EMULATE_PROCESSORS", "2")
    shape = (1, 200, 1200, width)
    a = case(*shape, torch.bfloat16, **{k: v for name in ("labels", "valid", "bias") for k, v in chosen_options(name, shape).items()})

    def run():
        valued = forward(a, values=a["keys"].flip(-1))[1] if width <= implementation.VALUED_WIDTH else torch.zeros(0)
        return *forward(a), grad_keys(a)[0], valued

    want = run()
    for order in ("warps", "lanes"):
        monkeypatch.setenv("KDFAST_EMULATE_BACKWARD", order)
        for x, y in zip(run(), want, strict=True):
            assert torch.equal(x, y)


def leaf(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1).bfloat16().to(DEVICE).requires_grad_()


def test_info_nce_and_its_gradients():
    q, k, bank = leaf(70, 64), leaf(70, 64), leaf(300, 64)
    options = {"query_labels": torch.randint(4, (70,)), "bank_labels": torch.randint(4, (300,)), "bank_bias": torch.randn(300)}
    loss = functional.info_nce(q, k, bank, temperature=0.1, impl="cuda", **{name: moved(x) for name, x in options.items()})
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, bank)]
    want = functional.info_nce(*exact, temperature=0.1, impl="torch", **options)
    torch.testing.assert_close(loss.double().cpu(), want, rtol=1e-5, atol=1e-5)
    for x, y in zip(torch.autograd.grad(loss, (q, k, bank)), torch.autograd.grad(want, exact), strict=True):
        assert (x.cpu().double() - y).norm() <= 0.01 * y.norm()


def test_nt_xent():
    a, b = leaf(40, 32), leaf(40, 32)
    loss = functional.nt_xent(a, b, temperature=0.2, impl="cuda")
    want = functional.nt_xent(a.detach().cpu().double(), b.detach().cpu().double(), temperature=0.2, impl="torch")
    torch.testing.assert_close(loss.double().cpu(), want, rtol=1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (a, b)))


def test_softmax_with_a_gradient_on_pooled_and_twice():
    q, keys = leaf(2, 9, 16), leaf(150, 16)
    lse, pooled = ops.similarity_softmax(q, keys, scale=4.0, impl="cuda")
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, keys)]
    want_lse, want_pooled = reference.similarity_softmax(*exact, scale=4.0)
    weight = torch.randn(want_pooled.shape, dtype=torch.float64)
    first = torch.autograd.grad(lse.sum() + (pooled * moved(weight.float())).sum(), (q, keys))
    for x, y in zip(first, torch.autograd.grad(want_lse.sum() + (want_pooled * weight).sum(), exact), strict=True):
        assert (x.cpu().double() - y).norm() <= 0.02 * y.norm()
    (slope,) = torch.autograd.grad(similarity_lse(q, keys, scale=4.0, impl="cuda")[0].sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(slope.float().square().sum(), q)
    assert second.isfinite().all()


def test_under_vmap_and_compiled():
    q, keys = leaf(3, 7, 16).detach(), leaf(140, 16).detach()
    want = similarity_lse(q, keys, scale=4.0, impl="cuda")[0]
    got = torch.func.vmap(lambda x: similarity_lse(x, keys, scale=4.0, impl="cuda")[0])(q)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    compiled = torch.compile(lambda x: similarity_lse(x, keys, scale=4.0, impl="cuda")[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_rows_that_begin_anywhere(shared):
    """Copies begin at multiples of 16 bytes: other rows are copied first, a bank that the batch shares once."""
    a = case(3, 9, 130, 24, torch.bfloat16, shared=shared)
    b = {**a, "query": begun_later(a["query"]), "keys": begun_later(a["keys"])}
    assert b["keys"].stride() == a["keys"].stride()
    for x, y in zip((*forward(a), grad_keys(a)[0]), (*forward(b), grad_keys(b)[0]), strict=True):
        assert torch.equal(x, y)


def begun_later(x):
    """The same numbers, strides too, from an address that is no multiple of 4."""
    one = x[:1] if x.stride(0) == 0 else x
    return torch.cat([one.new_zeros(1), one.flatten()]).to(DEVICE)[1:].view(one.shape).expand(x.shape)


def test_empty():
    lse, pooled = ops.similarity_softmax(leaf(0, 16).detach(), leaf(5, 16).detach(), impl="cuda")
    assert lse.shape == (0,) and pooled.shape == (0, 16)
    bank = leaf(20, 16)
    loss = functional.info_nce(leaf(0, 16).detach(), leaf(0, 16).detach(), bank, impl="cuda", reduction="sum")
    assert (torch.autograd.grad(loss, bank)[0] == 0).all()
    a = case(1, 3, 5, 16, torch.bfloat16)
    with pytest.raises(RuntimeError, match="at least one row"):
        forward(a | {"keys": a["keys"][:, :0]})


def test_what_it_serves():
    q, keys = leaf(4, 16).detach(), leaf(9, 16).detach()
    with pytest.raises(ValueError, match="beside values"):
        ops.similarity_softmax(q, keys, values=keys.repeat(1, 9), impl="cuda")
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        ops.similarity_softmax(q.float(), keys.float(), impl="cuda", precision="ieee")
    with pytest.raises(ValueError, match="stored as"):
        ops.similarity_softmax(q.float(), keys.float(), impl="cuda", precision="bf16")
    with pytest.raises(ValueError, match="multiple of 8"):
        ops.similarity_softmax(q[:, :12], keys[:, :12], impl="cuda")
    with pytest.raises(ValueError, match="multiple of 8"):
        ops.similarity_softmax(q.repeat(1, 17), keys.repeat(1, 17), impl="cuda")
    exclude = (SameLabel(torch.zeros(4, dtype=torch.long, device=DEVICE), torch.zeros(9, dtype=torch.long, device=DEVICE)),)
    assert (ops.similarity_softmax(q, keys, exclude=exclude, impl="cuda")[0] == -math.inf).all()


def test_the_self_check(monkeypatch):
    monkeypatch.setattr(selfcheck, "_device", lambda impl: DEVICE)
    for name in ("similarity_softmax", "info_nce"):
        assert max(selfcheck._error(*pair) for pair in selfcheck.CHECKS[name]("cuda")) < selfcheck.HALF_TOLERANCE
