"""What only a Hopper GPU shows of its similarity kernels: full sizes, equal bits on every run, capture in a graph, launches, Inductor."""

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import same_when_replayed

from kdfast import functional, ops
from kdfast._core import cuda_runtime, impls
from kdfast._ops.similarity import similarity_lse

if cuda_runtime.missing() is not None or not cuda_runtime.is_hopper():
    pytest.skip(cuda_runtime.missing() or "it takes a GPU of compute capability 9.0", allow_module_level=True)

# the target shapes, a split bank that is ragged, rows in a second round of blocks, few rows
SHAPES = [(4096, 65536, 128), (8192, 65536, 256), (1000, 40001, 64), (20_000, 5000, 200), (7, 100_003, 128)]


def rows(count, width, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return F.normalize(torch.randn(count, width, device="cuda", generator=generator), dim=-1).to(dtype)


def step(impl, q, k, bank, **options):
    q = q.detach().requires_grad_()
    loss = functional.info_nce(q, k, bank, temperature=0.07, impl=impl, **options)
    return loss.detach(), *torch.autograd.grad(loss, q)


def labelled(bank, queries):
    generator = torch.Generator("cuda").manual_seed(1)
    classes = torch.randint(50, (queries + len(bank),), device="cuda", generator=generator)
    return {"query_labels": classes[:queries], "bank_labels": classes[queries:]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_sizes(shape, dtype):
    """Beside float64, a few rows of it; the same bits every time."""
    n, m, d = shape
    q, k, bank = rows(n, d, dtype), rows(n, d, dtype, 1), rows(m, d, dtype, 2)
    for options in ({}, labelled(bank, n), {"bank_bias": torch.linspace(-2, 2, m, device="cuda")}):
        first, again = step("cuda", q, k, bank, **options), step("cuda", q, k, bank, **options)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        some = torch.arange(0, n, max(1, n // 16), device="cuda")
        chosen = {name: x[some] if name == "query_labels" else x for name, x in options.items()}
        want = step("torch", *(x.double() for x in (q[some], k[some], bank)), **chosen)[1] * len(some) / n
        assert (first[1][some].double() - want).norm() <= 0.01 * want.norm()


@pytest.mark.parametrize("width", [64, 128, 256])
def test_the_banks_gradient(width):
    q, k, bank = rows(2000, width), rows(2000, width, seed=1), rows(20_001, width, seed=2)
    for options in ({}, labelled(bank, len(q))):

        def gradient(impl, q, k, bank, options=options):
            bank = bank.detach().requires_grad_()
            return torch.autograd.grad(functional.info_nce(q, k, bank, temperature=0.07, impl=impl, **options), bank)[0]

        first, again = gradient("cuda", q, k, bank), gradient("cuda", q, k, bank)
        assert torch.equal(first, again)
        want = gradient("torch", q.double(), k.double(), bank.double())
        assert (first.double() - want).norm() <= 0.01 * want.norm()


def test_values_of_their_own():
    q, keys, values = rows(3000, 128), rows(20_001, 128, seed=1), rows(20_001, 64, seed=2)
    _, pooled = ops.similarity_softmax(q, keys, values=values, scale=20.0, impl="cuda")
    p = (20.0 * q.double() @ keys.double().T).softmax(-1)
    assert (pooled.double() - p @ values.double()).norm() <= 0.01 * pooled.norm()
    assert torch.equal(pooled, ops.similarity_softmax(q, keys, values=values, scale=20.0, impl="cuda")[1])


def test_capture_in_a_graph():
    q, k, bank = rows(300, 128), rows(300, 128, seed=1), rows(9001, 128, seed=2)
    options = labelled(bank, len(q))
    same_when_replayed(lambda: step("cuda", q, k, bank))
    same_when_replayed(lambda: step("cuda", q, k, bank, **options))


def test_launches():
    """The streaming softmax, and the parts of its bank joined."""
    q, bank = rows(256, 128), rows(65536, 128, seed=1)
    similarity_lse(q, bank, need_pooled=True, impl="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        similarity_lse(q, bank, need_pooled=True, impl="cuda")
        torch.cuda.synchronize()
    names = {event.key: event.count for event in profile.key_averages()}
    assert sum(count for name, count in names.items() if "softmax_kernel" in name or "merge_kernel" in name) == 2, names


def test_what_is_chosen():
    facts = {"device_type": "cuda", "dtype": torch.bfloat16, "stored": torch.bfloat16}
    assert impls.choose("similarity_softmax", None, width=128, **facts) == "cuda"
    assert impls.choose("similarity_softmax", None, width=512, **facts) != "cuda"
    assert impls.choose("similarity_softmax", None, width=128, **facts | {"value_width": 136}) != "cuda"


def test_inductor():
    q, bank = rows(100, 64), rows(5000, 64, seed=1)

    def run(x):
        return similarity_lse(x, bank, scale=10.0, impl="cuda")[0].sum()

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(q), run(q))


def test_a_bank_beyond_32_bits():
    """Of 2^31 numbers and a few rows: only the last ones count."""
    count = 2**31 // 256 + 1000
    bank = torch.zeros(count, 256, dtype=torch.bfloat16, device="cuda")
    bank[-100:] = rows(100, 256)
    q = rows(130, 256, seed=3)
    got = similarity_lse(q, bank, scale=40.0, impl="cuda")[0]
    near = (40.0 * q.double() @ bank[-100:].double().T).logsumexp(-1)
    want = torch.logaddexp(near, torch.tensor(float(count - 100), dtype=torch.float64, device="cuda").log())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
