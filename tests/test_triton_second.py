"""The second derivatives of lse and the pooled output, and of the sigmoid pair loss, by Triton's kernels, against the definitions in
float64: on a GPU, or where there is none under Triton's interpreter, in a process that has TRITON_INTERPRET=1 from its start (make test).
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from similarity_cases import assert_as_good_as, everything, normal
from test_similarity_pooled_exact import near, worst
from test_similarity_pooled_second import second

from kdfast import functional
from kdfast._core import triton_runtime
from kdfast._ops.similarity import reference, second_order_pooled, tiles
from kdfast._ops.similarity.losses import sigmoid
from kdfast._ops.similarity.triton import slabs as triton_slabs
from kdfast.ops import similarity_softmax

if triton_runtime.missing() is not None:
    pytest.skip(f"{triton_runtime.missing()}, and TRITON_INTERPRET is not 1", allow_module_level=True)

DEVICE = "cpu" if triton_runtime.INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def no_tiles(monkeypatch):
    """No sums but the op's; by default of several slabs, cut along both sides."""
    monkeypatch.setattr(second_order_pooled, "_in_tiles", None)
    monkeypatch.setattr(triton_slabs, "STATISTICS_PAIRS", 8 * 32 * 32)
    monkeypatch.setattr(triton_slabs, "WEIGHTS_PAIRS", 2 * 32 * 32)


def moved(x):
    if isinstance(x, tuple):
        items = [moved(item) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else tuple(items)
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def started(op, **fixed):
    """`op` of a start whose logit and value are arguments of their own, from CPU tensors to CPU tensors."""

    def run(start_logit=None, start_value=None, **problem):
        if start_logit is not None:
            problem["start"] = start_logit, start_value
        if "impl" not in fixed:
            return op(**problem)
        return tuple(x.cpu() for x in op(**{name: moved(x) for name, x in problem.items()}, **fixed))

    return run


ours, definition = started(similarity_softmax, impl="triton"), started(reference.similarity_softmax)


def assert_accurate(problem, leaves, dtype=torch.float32, **options):
    got = second(ours, problem, leaves, dtype, **options)
    naive, truth = (second(definition, problem, leaves, t, **options) for t in (dtype, torch.float64))
    for x, y, z in zip(got, naive, truth, strict=True):
        assert_as_good_as(x, y, z)


def made_problem(n, m, d, dv, start, lead=(), keys_lead=()):
    problem = everything(n, m, d, dtype=torch.float32, batch=lead, dv=dv)
    of_start = problem.pop("start")
    problem |= dict(query=normal(*lead, n, d), keys=normal(*keys_lead, m, d))
    problem |= {} if dv is None else dict(values=normal(*keys_lead, m, dv))
    return problem | (dict(start_logit=of_start[0], start_value=of_start[1]) if start else {})


# a lone pair; one slab; rows and columns of several tiles and slabs, in ragged steps; a batch that shares its keys, and one that does not
@pytest.mark.parametrize(
    ("size", "lead", "keys_lead", "leaves"),
    [
        ((1, 1, 1, 3), (), (), "query keys values"),
        ((9, 30, 17, None), (), (), "query"),
        ((33, 40, 20, None), (), (), "query keys scale bias"),
        ((9, 50, 7, 20), (), (), "query keys scale bias values start_logit start_value"),
        ((5, 40, 16, None), (2,), (2,), "query keys start_logit start_value"),
        ((5, 40, 16, 9), (2,), (), "scale values"),
    ],
    ids=str,
)
def test_as_accurate_as_the_definition(size, lead, keys_lead, leaves):
    problem = made_problem(*size, "start" in leaves, lead, keys_lead)
    if lead and not keys_lead:
        problem |= {name: problem[name].expand(2, *problem[name].shape) for name in ("keys", "values")}
    assert_accurate(problem, leaves.split())


@pytest.mark.parametrize(("lse", "constant"), [(True, True), (False, False)])
def test_upstreams_that_are_constant_or_not_there(lse, constant):
    assert_accurate(made_problem(9, 40, 12, 5, False), ("query", "keys"), lse=lse, constant_h=constant)


def test_one_slab_of_all(monkeypatch):
    monkeypatch.setattr(triton_slabs, "STATISTICS_PAIRS", 1 << 28)
    monkeypatch.setattr(triton_slabs, "WEIGHTS_PAIRS", 1 << 24)
    assert_accurate(made_problem(5, 40, 20, None, True, (2,), (2,)), ("query", "keys", "start_logit"))


def test_one_candidate_that_holds_its_row():
    """What its rate, slope and value differ from their means by is 0 to 1e-5 of them. Means of one float each leave 0.3 of the bar or more,
    means of two 0.02."""
    n, m, width = 20, 70, 33
    keys = F.normalize(torch.randn(m, width), dim=-1)
    problem = dict(query=keys[torch.randint(m, (n,))] + 0.01 * torch.randn(n, width), keys=keys, values=torch.randn(m, 12), scale=30.0)
    names, dtypes = ("query", "keys", "values"), (torch.float32, torch.float32, torch.float64)
    found = [second(op, problem, names, t, lse=False) for op, t in zip((ours, definition, definition), dtypes, strict=True)]
    assert worst(*found) <= 0.15


def test_large_logits_of_a_tight_class():
    centre = F.normalize(torch.randn(1, 33), dim=-1)
    problem = dict(query=near(20, 33, 0.1, centre), keys=near(40, 33, 0.1, centre), scale=200.0)
    assert_accurate(problem, ("query", "keys"), lse=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_of_short_numbers(dtype):
    problem = dict(query=normal(20, 40).to(dtype).float(), keys=normal(40, 40).to(dtype).float(), scale=0.2)
    found = [second(op, problem, ("query", "keys"), t)[:2] for op, t in ((ours, dtype), (definition, torch.float64))]
    for x, z in zip(*found, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), z, rtol=2e-2, atol=2e-2 * float(z.abs().max()))


def test_a_row_that_admits_nothing_and_keys_beyond_valid():
    query, keys = normal(3, 5).requires_grad_(), normal(8, 5)
    keys[6:] = torch.nan
    keys.requires_grad_()
    for given, zero in ((None, False), (torch.full((8,), -torch.inf), True)):
        pooled = ours(query=query, keys=keys, valid=6, bias=given)[1]
        first = torch.autograd.grad(pooled.square().sum(), (query, keys), create_graph=True)
        found = torch.autograd.grad(first, (query, keys), (normal(3, 5), torch.ones(8, 5)))
        assert all(x.isfinite().all() for x in found) and bool((found[1][6:] == 0).all())
        assert all(bool((x == 0).all()) for x in found) == zero


@pytest.mark.parametrize("leaves", ["query keys scale shift", "query", "scale shift"])
@pytest.mark.parametrize("batch", [(), (2,)], ids=["alone", "batch"])
def test_sigmoid_of_every_pair(monkeypatch, batch, leaves):
    """Several slabs, ragged; with and without directions of every argument; extreme logits of one row."""
    monkeypatch.setattr(sigmoid, "second_order", None)
    n, m, d = (40, 35, 20) if not batch else (5, 20, 7)
    problem = dict(query=normal(*batch, n, d), keys=normal(*batch, m, d), scale=torch.rand(*batch, n), shift=normal(*batch, n))
    problem["query"][..., 2, :] *= 300
    index = torch.randint(-1, m, (*batch, n))
    names = leaves.split()

    def twice(loss, dtype, index):
        at = {name: x.to(dtype) for name, x in problem.items()}
        wanted = [at[name].requires_grad_() for name in names]
        g = torch.linspace(-1, 1, n, dtype=dtype).expand(*batch, n).contiguous().requires_grad_()
        first = torch.autograd.grad(loss(**at, positive_index=index), wanted, g, create_graph=True)
        return torch.autograd.grad(first, [*wanted, g], [torch.linspace(1, 2, x.numel(), dtype=dtype).view_as(x) for x in wanted])

    def fused(positive_index, **given):
        found = {name: moved(x) for name, x in given.items()}
        return sigmoid.sigmoid_pair_loss(**found, positive_index=moved(positive_index), impl="triton").cpu()

    got = twice(fused, torch.float32, index)
    naive, truth = (twice(sigmoid.reference, dtype, index) for dtype in (torch.float32, torch.float64))
    for x, y, z in zip(got, naive, truth, strict=True):
        assert_as_good_as(x, y, z)


def directed(loss, tensors, dtype):
    """Gradients of <directions, gradients of a loss> in all its tensors."""
    at = [x.to(DEVICE, dtype, copy=True).requires_grad_() for x in tensors]
    first = torch.autograd.grad(loss(*at), at, create_graph=True)
    return [x.cpu() for x in torch.autograd.grad(first, at, [torch.linspace(-1, 2, x.numel()).view(x.shape).to(x) for x in at])]


CLASSES, OTHERS = moved(torch.arange(9) % 3), moved(torch.arange(40) % 3)
LOSSES = {
    "info_nce": lambda q, k, bank, tau, **to: functional.info_nce(q, k, bank, temperature=tau, **to),
    "info_nce, classes attract": lambda q, k, bank, tau, **to: functional.info_nce(
        q, k, bank, temperature=tau, query_labels=CLASSES, bank_labels=OTHERS, same_class="positive", **to
    ),
    "clip_loss": lambda q, k, _, tau, **to: functional.clip_loss(q, k, 1 / tau, **to),
    "siglip_loss": lambda q, k, _, tau, **to: functional.siglip_loss(q, k, 1 / tau, -tau, **to),
    "nt_xent": lambda q, k, _, tau, **to: functional.nt_xent(q, k, temperature=tau, **to),
    "sup_con": lambda q, _, bank, tau, **to: functional.sup_con(q, CLASSES, temperature=tau, **to),
    "similarity_distillation": lambda q, k, bank, tau, **to: functional.similarity_distillation(
        q, k, bank, student_temperature=tau, teacher_temperature=2 * tau, divergence="kl", **to
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_differentiated_twice(name, monkeypatch):
    """By kernels alone."""

    def loss(*tensors, **to):  # a loss need not have them all
        return LOSSES[name](*tensors, **to) + sum(x.sum() ** 2 for x in tensors) / 9

    given = [*(F.normalize(torch.randn(n, 12), dim=-1) for n in (9, 9, 40)), torch.tensor(0.2)]
    monkeypatch.undo()
    naive, truth = (directed(partial(loss, impl="torch"), given, dtype) for dtype in (torch.float32, torch.float64))
    monkeypatch.setattr(tiles, "_contract", None)
    found = directed(partial(loss, impl="triton"), given, torch.float32)
    for x, y, z in zip(found, naive, truth, strict=True):
        assert_as_good_as(x, y, z)


def test_opcheck():
    query, keys, scale, values = map(moved, (normal(2, 4, 5), normal(2, 6, 5), torch.rand(2, 4), normal(2, 6, 3)))
    rules = None, None, moved(torch.zeros(2, 4, 1, dtype=torch.int64)), None, moved(torch.tensor([5, 6]))
    lse, _, low = torch.ops.kdfast_triton.similarity_softmax(query, keys, scale, None, None, values, None, *rules, True, 3)
    along = map(torch.rand_like, (query, keys, scale, values))
    given = torch.rand_like(lse), torch.rand_like(values[:, :4]), *along, lse, low, query, keys, scale, None, values, *rules
    beyond = torch.rand_like(keys[..., 0]), torch.rand(4, *lse.shape, device=DEVICE), True
    given = *given, True, True, True, True, 3, *beyond
    torch.library.opcheck(torch.ops.kdfast_triton.similarity_pooled_second.default, given)
    along = (*map(torch.rand_like, (query, keys, scale)), None)
    given = lse, *along, query, keys, scale, scale, rules[2][..., 0], True, 3
    torch.library.opcheck(torch.ops.kdfast_triton.sigmoid_second.default, given)
