"""What only a GPU shows of the Triton kernels: equal bits on every run, capture in a graph, compilation by Inductor, 64-bit addresses."""

import pytest
import torch
from gpu_cases import LARGE, check_large_cost, same_when_replayed

from kdfast import functional, ops
from kdfast._core import triton_runtime
from kdfast._ops.similarity.triton import slabs as triton_slabs

if triton_runtime.missing() is not None or triton_runtime.INTERPRETED:
    pytest.skip(triton_runtime.missing() or "it takes a GPU", allow_module_level=True)

N, M, D, K = 300, 5000, 96, 700


def inputs():
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "generator": generator}
    return {
        "q": torch.randn(N, D, **options, requires_grad=True), "bank": torch.randn(M, D, **options),
        "labels": torch.randint(20, (N,), **options), "bank_labels": torch.randint(20, (M,), **options),
        "index": torch.randint(M, (N, K), **options), "cost": torch.rand(8, 100, 120, **options),
    }  # fmt: skip


def loss_and_gradient(loss, q):
    return (loss.detach(), *torch.autograd.grad(loss, q))


def info_nce(i):
    return loss_and_gradient(functional.info_nce(i["q"], i["q"].detach(), i["bank"], impl="triton"), i["q"])


def smoothed(i):
    """Rows of the bank are summed: all, with gradient, and a part."""
    q, bank, given = i["q"], i["bank"].clone().requires_grad_(), {"temperature": 9.0, "label_smoothing": 0.1, "impl": "triton"}
    losses = [functional.info_nce(q, q.detach(), b, bank_valid=valid, **given) for b, valid in ((bank, None), (i["bank"], M - 700))]
    losses.append(functional.clip_loss(q, i["bank"][:N] + q, 0.1, label_smoothing=0.1, impl="triton"))
    return (*(loss.detach() for loss in losses), *torch.autograd.grad(sum(losses), (q, bank)))


def wide(i):
    """Rows of 2 KB and a bank with gradient."""
    q, bank = (i[name].detach().repeat(1, 11)[:, :1024].bfloat16().requires_grad_() for name in ("q", "bank"))
    loss = functional.info_nce(q, q.detach(), bank, bank_labels=i["bank_labels"], query_labels=i["labels"], temperature=50.0, impl="triton")
    return loss.detach(), *torch.autograd.grad(loss, (q, bank))


def matched(i):
    other = i["bank"][:N] + i["q"]
    loss = functional.clip_loss(i["q"], other, 0.1, impl="triton") + functional.siglip_loss(i["q"], other, 0.1, -1.0, impl="triton")
    return loss_and_gradient(loss, i["q"])


def views(i):
    loss = functional.nt_xent(i["q"], i["bank"][:N] + i["q"], temperature=0.3, impl="triton")
    return loss_and_gradient(loss, i["q"])


def sup_con(i):
    return loss_and_gradient(functional.sup_con(i["q"], i["labels"], temperature=0.1, impl="triton"), i["q"])


def attracted(i):
    """A bank with and without gradient, and a temperature for each row."""
    q, bank, options = i["q"], i["bank"].clone().requires_grad_(), {"query_labels": i["labels"], "bank_labels": i["bank_labels"]}
    losses = [
        functional.info_nce(q, q.detach(), b, same_class="positive", temperature=9.0, impl="triton", **options) for b in (bank, i["bank"])
    ]
    temperature = i["cost"].flatten()[:N] + 0.1
    losses.append(functional.sup_con(q, i["labels"], temperature=temperature, impl="triton"))
    return (*(loss.detach() for loss in losses), *torch.autograd.grad(sum(losses), (q, bank)))


def distillation(i):
    sides = (i["q"], i["q"].detach(), i["bank"], i["bank"])
    loss = functional.similarity_distillation(*sides, student_temperature=9.0, teacher_temperature=4.0, divergence="kl", impl="triton")
    return loss_and_gradient(loss, i["q"])


def twice(i):
    """Second derivatives of what is pooled, with a start."""
    q, bank = i["q"], i["bank"].clone().requires_grad_()
    _, pooled = ops.similarity_softmax(q, bank, scale=0.1, start=(q[:, 0], q), impl="triton")
    first = torch.autograd.grad(pooled.square().sum() / N, (q, bank), create_graph=True)
    return torch.autograd.grad(first, (q, bank), (q.detach(), i["bank"]))


def triplet(i):
    options = {"ref": i["bank"], "ref_labels": i["bank_labels"], "impl": "triton"}
    return loss_and_gradient(functional.triplet_loss(i["q"], i["labels"], **options), i["q"])


def dense(i):
    bank = i["bank"].requires_grad_()
    options = {"ref": bank, "ref_labels": i["bank_labels"], "impl": "triton"}
    losses = [
        functional.triplet_loss(i["q"], i["labels"], mining=name, max_positives=400, **options) for name in ("batch_all", "semi_hard")
    ]
    losses += [f(i["q"], i["labels"], **options) for f in (functional.contrastive_loss, functional.multi_similarity_loss)]
    losses.append(functional.triplet_loss(i["q"], i["labels"], mining="multi_similarity", impl="triton"))
    return (*(loss.detach() for loss in losses), *torch.autograd.grad(sum(losses), (i["q"], bank)))


def pairs(i):
    options = {"ref": i["bank"], "ref_labels": i["bank_labels"], "max_positives": 9, "impl": "triton"}
    seeded = {"generator": torch.tensor(3, device="cuda"), **options}
    losses = [functional.triplet_loss(i["q"], i["labels"], mining=name, **seeded) for name in ("semi_hard_facenet", "distance_weighted")]
    losses.append(functional.angular_loss(i["q"], i["labels"], **options))
    return (*(loss.detach() for loss in losses), *torch.autograd.grad(sum(losses), i["q"]))


def relations(i):
    loss = functional.mmd_rbf(i["q"], i["bank"], sigmas=(5.0, 10.0), impl="triton")
    loss = loss + sum(f(i["q"], i["bank"][:N, :60], impl="triton") for f in (functional.rkd_distance, functional.rkd_angle))
    return loss_and_gradient(loss, i["q"])


def extrema(i):
    found = ops.row_extrema(i["q"].detach(), i["bank"], i["labels"], i["bank_labels"], impl="triton")
    return tuple(x for extreme in found for x in extreme)


def knn(i):
    return ops.knn(i["q"].detach(), i["bank"], 10, query_labels=i["labels"], bank_labels=i["bank_labels"], impl="triton")


def sampled(i):
    loss, _ = functional.sampled_nce(i["q"], i["bank"], i["index"], temperature=0.1, num_data=M, normalizer=50.0, impl="triton")
    loss = loss + functional.sampled_info_nce(i["q"], i["q"].detach(), i["bank"], i["index"], temperature=0.1, impl="triton")
    return loss_and_gradient(loss, i["q"])


def sinkhorn(i):
    given = ops.sinkhorn(i["cost"], epsilon=0.1, max_iters=10, impl="triton")
    points = ops.sinkhorn(x=i["q"].detach()[None], y=i["bank"][None, :900], epsilon=20.0, max_iters=10, impl="triton")
    return given.f, given.g, given.value, points.f, points.g, points.value


def potentials(i):
    """Gradients through the iterations and at their fixed point, of a cost and of points."""
    cost, q = i["cost"].clone().requires_grad_(), i["q"]
    given = [ops.sinkhorn(cost, epsilon=0.3, max_iters=10, grad=grad, impl="triton") for grad in ("unrolled", "implicit")]
    points = ops.sinkhorn(x=q[None], y=i["bank"][None, :900], epsilon=20.0, max_iters=4, grad="unrolled", impl="triton")
    found = [torch.autograd.grad(result.transport_cost.sum(), cost)[0] for result in given]
    return *found, *torch.autograd.grad(points.transport_cost.sum(), q)


KERNELS = [
    *(
        info_nce,
        smoothed,
        wide,
        distillation,
        matched,
        views,
        sup_con,
        attracted,
        twice,
        triplet,
        dense,
        pairs,
        relations,
        extrema,
        knn,
        sampled,
        sinkhorn,
    ),
    potentials,
]
CASES = pytest.mark.parametrize("case", KERNELS, ids=lambda c: c.__name__)


@CASES
def test_the_same_bits_every_time(case):
    i = inputs()
    for first, second in zip(case(i), case(i), strict=True):
        assert torch.equal(first, second)


@CASES
def test_as_in_plain_pytorch(case, monkeypatch):
    i = inputs()
    got = case(i)
    real = {name: getattr(module, name) for module, name in TARGETS}
    for module, name in TARGETS:
        monkeypatch.setattr(module, name, lambda *a, run=real[name], **k: run(*a, **{**k, "impl": "torch"}))
    for x, y in zip(got, case(i), strict=True):
        if x.dtype.is_floating_point:
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
        else:  # indices: neighbours within rounding of one another may change places
            assert (x == y).double().mean() > 0.99


TARGETS = [
    (functional, "info_nce"),
    (functional, "similarity_distillation"),
    (functional, "clip_loss"),
    (functional, "siglip_loss"),
    (functional, "nt_xent"),
    (functional, "sup_con"),
    (functional, "triplet_loss"),
    (functional, "contrastive_loss"),
    (functional, "angular_loss"),
    (functional, "mmd_rbf"),
    (functional, "rkd_distance"),
    (functional, "rkd_angle"),
    (functional, "multi_similarity_loss"),
    (functional, "sampled_nce"),
    (functional, "sampled_info_nce"),
    (ops, "similarity_softmax"),
    (ops, "row_extrema"),
    (ops, "knn"),
    (ops, "sinkhorn"),
]


@pytest.mark.parametrize("case", [wide, matched, views, sup_con, attracted, twice], ids=lambda c: c.__name__)
def test_slab_by_slab(case, monkeypatch):
    """As in one slab, which these sizes fit into."""
    i = inputs()
    whole = case(i)
    for name in ("STATISTICS_PAIRS", "HALF_PAIRS", "WEIGHTS_PAIRS"):
        monkeypatch.setattr(triton_slabs, name, 2**15)
    for x, y in zip(case(i), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


@CASES
def test_capture_in_a_graph(case):
    i = inputs()
    same_when_replayed(lambda: case(i))


@pytest.mark.parametrize("name", ["info_nce", "triplet"])
def test_inductor(name):
    i = inputs()

    def loss(q):
        if name == "info_nce":
            return functional.info_nce(q, q.detach(), i["bank"], impl="triton")
        return functional.triplet_loss(q, i["labels"], ref=i["bank"], ref_labels=i["bank_labels"], impl="triton")

    compiled = torch.compile(loss, fullgraph=True)
    for x, y in zip(loss_and_gradient(compiled(i["q"]), i["q"]), loss_and_gradient(loss(i["q"]), i["q"]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@LARGE
def test_beyond_two_to_the_31_elements():
    """A bank of 2.3e9 numbers: what is nearest, sampled, or of most weight lies at its end."""
    rows = 9_000_000
    bank = torch.empty(rows, 256, dtype=torch.bfloat16, device="cuda")
    for part in bank.split(1_000_000):
        part.normal_()
    last = rows - torch.arange(1, 9, device="cuda")
    q = bank[last].clone()
    assert ops.knn(q, bank, 1, impl="triton")[1][:, 0].equal(last)
    labels, bank_labels = torch.zeros(8, dtype=torch.int64, device="cuda"), torch.ones(rows, dtype=torch.int64, device="cuda")
    assert ops.gather_similarity(q, bank, last[:, None], impl="triton")[:, 0].allclose(q.float().square().sum(1), rtol=1e-3)
    lse, pooled = ops.similarity_softmax(q, bank, scale=1.0, impl="triton")
    torch.testing.assert_close(pooled, q.float(), rtol=1e-2, atol=1e-2)
    half = bank[: rows // 2]  # three parts of it are beyond 2^31 numbers
    q = half[-8:].clone()
    found = ops.row_extrema(q, half, labels, bank_labels[: rows // 2], impl="triton").hardest_negative
    assert found.index.equal(torch.arange(rows // 2 - 8, rows // 2, device="cuda")) and (found.value == 0).all()
    assert lse.isfinite().all()


def test_more_problems_than_a_second_grid_axis_holds():
    problems = 70_000
    q, keys = (torch.randn(problems, n, 16, device="cuda", requires_grad=True) for n in (2, 3))

    def gradients(impl):
        lse, pooled = ops.similarity_softmax(q, keys, impl=impl)
        return torch.autograd.grad(lse.sum() + pooled.square().sum(), (q, keys))

    for x, y in zip(gradients("triton"), gradients("torch"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3)


@LARGE
def test_a_cost_beyond_two_to_the_31_elements():
    check_large_cost("triton")
