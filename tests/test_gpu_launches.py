"""How many kernels every loss launches on an H200, ours and PyTorch's, and that the host never waits: counted without a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from kdfast import functional, ops  # noqa: E402
from kdfast._core import triton_runtime  # noqa: E402

if triton_runtime.INTERPRETED:
    pytest.skip("launches are those of compiled kernels", allow_module_level=True)

from gpu_launches import census, h200  # noqa: E402

N, M, D = 256, 65536, 128
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])


class Inputs:
    """On the meta device: a float tensor of the case's dtype, learnt or not, numbers of float32, and integers."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.learnt = dtype, []

    def __call__(self, *shape: int, learnt: bool = False, dtype: torch.dtype | None = None) -> torch.Tensor:
        x = torch.empty(shape, dtype=dtype or self.dtype, device="meta", requires_grad=learnt)
        self.learnt += [x] if learnt else []
        return x

    def number(self, *shape: int, learnt: bool = False) -> torch.Tensor:
        return self(*shape, learnt=learnt, dtype=torch.float32)

    def integers(self, *shape: int) -> torch.Tensor:
        return self(*shape, dtype=torch.int64)

    def rows(self) -> torch.Tensor:
        """Queries that are learnt."""
        return self(N, D, learnt=True)


def info_nce(i: Inputs, bank_learnt: bool = False, positive: bool = True, **options):
    q, p, bank = i.rows(), i(N, D) if positive else None, i(M, D, learnt=bank_learnt)
    return lambda: functional.info_nce(q, p, bank, normalize=False, **options)


def against_bank(i: Inputs, loss, **options):
    q, p, bank = i.rows(), i(N, D), i(M, D)
    return lambda: loss(q, p, bank, **options)


def pooled_twice(i: Inputs):
    """Gradients of a loss of what is pooled, whose gradients are counted as the backward pass."""
    q, bank = i.rows(), i(M, D, learnt=True)

    def loss():
        pooled = ops.similarity_softmax(q, bank, scale=10.0)[1]
        return sum(x.sum() for x in torch.autograd.grad(pooled.sum(), (q, bank), create_graph=True))

    return loss


def entries(i: Inputs, **options):
    q, p, bank = i(3, N, D, learnt=True), i(3, N, D), i(3, 500, D, learnt=True)
    labels = {"query_labels": i.integers(3, N), "bank_labels": i.integers(500)}
    return lambda: functional.info_nce(q, p, bank, **labels, **options)


def several_positives(i: Inputs):
    q, p, bank, weights = i.rows(), i(N, 3, D, learnt=True), i(M, D), i.number(N, 3)
    return lambda: functional.info_nce(q, p, bank, positive_weights=weights, temperature=i.number(N))


def classes(i: Inputs) -> dict:
    return {"query_labels": i.integers(N), "bank_labels": i.integers(M)}


def of_batch(i: Inputs, loss, *numbers: torch.Tensor | float, **options):
    """Of a batch, and of as many learnt rows of another view."""
    x, y = i.rows(), i.rows()
    return lambda: loss(x, y, *numbers, **options)


def of_teacher(i: Inputs, loss):
    student, teacher = i.rows(), i(N, D)
    return lambda: loss(student, teacher)


def labelled(i: Inputs, loss, **options):
    q, labels = i.rows(), i.integers(N)
    return lambda: loss(q, labels, **options)


def drawn(i: Inputs):
    return labelled(i, functional.triplet_loss, mining="distance_weighted", max_positives=1)


def distillation(i: Inputs, one_bank: bool = False, **options):
    student, teacher, bank, other = i.rows(), i(N, D if one_bank else 2 * D), i(M, D), i(M, 2 * D)
    banks = (bank, bank if one_bank else other)
    return lambda: functional.similarity_distillation(
        student, teacher, *banks, student_temperature=0.1, teacher_temperature=0.05, **options
    )


def sampled(i: Inputs):
    q, p, bank, index = i.rows(), i(N, D), i(M, D), i.integers(N, 4096)
    return lambda: functional.sampled_info_nce(q, p, bank, index)


def noise(i: Inputs):
    q, bank, index = i.rows(), i(M, D), i.integers(N, 4097)
    return lambda: functional.sampled_nce(q, bank, index, num_data=M)[0]


def given_cost(i: Inputs, of: str, **options):
    cost = i.number(8, 100, 120, learnt=True)
    return lambda: getattr(ops.sinkhorn(cost, epsilon=0.1, max_iters=ITERATIONS, **options), of).sum()


def points(i: Inputs, loss, **options):
    x, y = i.number(8, 100, 64, learnt=True), i.number(8, 120, 64, learnt=True)
    return lambda: loss(x, y, epsilon=0.1, max_iters=ITERATIONS, **options)


def plan(i: Inputs):
    cost, v = i.number(8, 100, 120, learnt=True), i.number(8, 120, 4)
    return lambda: ops.sinkhorn(cost, epsilon=0.1, max_iters=ITERATIONS, grad="implicit").plan() @ v


def of_matrix(i: Inputs, loss, *shape: int, **options):
    x = i.number(*shape, learnt=loss is not functional.sinkhorn_assign)
    return lambda: loss(x, **options)


def neighbours(i: Inputs):
    q, bank = i(N, D), i(M, D)
    return lambda: ops.knn(q, bank, 10)[0]


ITERATIONS = 50
F = functional
#: whose own launches these are; others may cut an operation otherwise
COUNTED_WITH = "2.13."

# kernels of ours + operations of PyTorch that launch, forward, backward; with rows in bfloat16 and in float32
CASES = {
    "info_nce": (info_nce, "2 + 9, 0 + 10", "3 + 14, 0 + 8"),
    "info_nce, labels and own rows": (lambda i: info_nce(i, **classes(i), own_index=i.integers(N)), "2 + 10, 0 + 10", "3 + 15, 0 + 8"),
    "info_nce, targets": (lambda i: info_nce(i, positive=False, targets=i.integers(N)), "2 + 27, 0 + 14", "3 + 32, 0 + 12"),
    "info_nce, learnt temperature": (lambda i: info_nce(i, temperature=i.number(learnt=True)), "2 + 10, 0 + 20", "3 + 15, 0 + 17"),
    "info_nce, learnt bank": (lambda i: info_nce(i, bank_learnt=True), "2 + 9, 1 + 11", "3 + 14, 2 + 9"),
    "info_nce, attraction": (lambda i: info_nce(i, **classes(i), same_class="positive"), "4 + 69, 0 + 24", "4 + 67, 0 + 22"),
    "info_nce, smoothing": (lambda i: info_nce(i, label_smoothing=0.1), "2 + 40, 0 + 19", "3 + 43, 0 + 16"),
    "info_nce, smoothing and labels": (lambda i: info_nce(i, label_smoothing=0.1, **classes(i)), "2 + 54, 0 + 19", "3 + 57, 0 + 16"),
    "info_nce, margin": (lambda i: info_nce(i, false_negative_margin=0.1), "2 + 17, 0 + 10", "3 + 20, 0 + 8"),
    "info_nce of a batch": (lambda i: of_batch(i, F.info_nce), "1 + 27, 1 + 20", "3 + 30, 2 + 17"),
    "info_nce of a batch, labels": (lambda i: of_batch(i, F.info_nce, query_labels=i.integers(N)), "1 + 28, 1 + 20", "3 + 31, 2 + 17"),
    "similarity_softmax, pooled, second derivative": (pooled_twice, "4 + 30, 8 + 14", "9 + 42, 8 + 12"),
    "clip_loss": (lambda i: of_batch(i, F.clip_loss, i.number(learnt=True)), "3 + 17, 3 + 24", "3 + 17, 3 + 24"),
    "clip_loss, smoothing": (lambda i: of_batch(i, F.clip_loss, 10.0, label_smoothing=0.1), "3 + 74, 3 + 64", "3 + 68, 3 + 56"),
    "siglip_loss": (lambda i: of_batch(i, F.siglip_loss, i.number(learnt=True), i.number(learnt=True)), "1 + 7, 3 + 13", "1 + 7, 3 + 11"),
    "nt_xent": (lambda i: of_batch(i, F.nt_xent), "3 + 22, 2 + 43", "3 + 20, 2 + 40"),
    "sup_con": (lambda i: labelled(i, F.sup_con), "3 + 29, 2 + 35", "3 + 27, 2 + 32"),
    "sup_con, a temperature a row": (lambda i: labelled(i, F.sup_con, temperature=i.number(N)), "2 + 34, 3 + 32", "2 + 32, 3 + 27"),
    "similarity_distillation": (distillation, "6 + 16, 0 + 10", "8 + 34, 0 + 8"),
    "similarity_distillation, one bank": (lambda i: distillation(i, one_bank=True, divergence="kl"), "6 + 22, 0 + 10", "8 + 39, 0 + 8"),
    "sampled_info_nce": (sampled, "1 + 23, 0 + 9", "1 + 21, 0 + 8"),
    "sampled_nce": (noise, "2 + 23, 0 + 4", "2 + 22, 0 + 3"),
    "triplet_loss, batch_hard": (lambda i: labelled(i, F.triplet_loss), "3 + 103, 0 + 46", "3 + 102, 0 + 45"),
    "triplet_loss, batch_all": (lambda i: labelled(i, F.triplet_loss, mining="batch_all"), "3 + 102, 3 + 29", "3 + 101, 3 + 28"),
    "triplet_loss, semi_hard": (lambda i: labelled(i, F.triplet_loss, mining="semi_hard"), "3 + 100, 3 + 29", "3 + 99, 3 + 28"),
    "triplet_loss, distance_weighted": (drawn, "4 + 169, 0 + 86", "4 + 168, 0 + 85"),
    "multi_similarity_loss": (lambda i: labelled(i, F.multi_similarity_loss), "3 + 106, 3 + 27", "3 + 105, 3 + 26"),
    "margin_loss": (lambda i: labelled(i, F.margin_loss), "2 + 99, 3 + 32", "2 + 98, 3 + 31"),
    "contrastive_loss": (lambda i: labelled(i, F.contrastive_loss), "2 + 95, 3 + 31", "2 + 94, 3 + 30"),
    "angular_loss": (lambda i: labelled(i, F.angular_loss), "3 + 67, 2 + 35", "3 + 66, 2 + 34"),
    "rkd_distance": (lambda i: of_teacher(i, F.rkd_distance), "5 + 61, 0 + 2", "5 + 59, 0 + 1"),
    "rkd_angle": (lambda i: of_teacher(i, F.rkd_angle), "2 + 100, 0 + 2", "2 + 100, 0 + 1"),
    "mmd_rbf": (lambda i: of_batch(i, F.mmd_rbf, sigmas=[1.0]), "10 + 74, 0 + 4", "10 + 72, 0 + 2"),
    "knn": (neighbours, "6 + 68, 0 + 0", "6 + 54, 0 + 0"),
    "sinkhorn value": (lambda i: given_cost(i, "value"), "102 + 43, 1 + 3", "102 + 43, 1 + 3"),
    "sinkhorn transport_cost": (lambda i: given_cost(i, "transport_cost", grad="implicit"), "102 + 31, 161 + 72", "102 + 31, 161 + 72"),
    "sinkhorn_loss": (lambda i: points(i, F.sinkhorn_loss), "104 + 49, 6 + 9", "104 + 49, 6 + 9"),
    "sinkhorn_loss, unrolled": (lambda i: points(i, F.sinkhorn_loss, grad="unrolled"), "104 + 51, 116 + 46", "104 + 51, 116 + 46"),
    "sinkhorn_loss, implicit": (lambda i: points(i, F.sinkhorn_loss, grad="implicit"), "104 + 49, 172 + 88", "104 + 49, 172 + 88"),
    "sinkhorn_divergence": (lambda i: points(i, F.sinkhorn_divergence), "312 + 148, 18 + 31", "312 + 148, 18 + 31"),
}

#: further ways through the losses, whose launches are not counted
MORE = {
    "info_nce, margin and a count": lambda i: info_nce(i, false_negative_margin=0.1, bank_valid=i.integers(), own_index=True),
    "info_nce, several positives": lambda i: several_positives(i),
    "info_nce, bias": lambda i: info_nce(i, bank_learnt=True, bank_bias=i.number(M, learnt=True)),
    "info_nce, attraction and targets' rows": lambda i: info_nce(
        i, bank_learnt=True, **classes(i), same_class="positive", own_index=True, include_positive=False, bank_bias=i.number(M, learnt=True)
    ),
    "info_nce, smoothing of a part": lambda i: info_nce(i, label_smoothing=0.1, bank_valid=i.integers(), own_index=i.integers(N)),
    "info_nce, entries of a batch": lambda i: entries(i, label_smoothing=0.1),
    "info_nce, entries attracted": lambda i: entries(i, same_class="positive", bank_bias=i.number(3, 500, learnt=True)),
    "clip_loss, weights": lambda i: of_batch(i, F.clip_loss, i.number(learnt=True), weight=i.number(N), normalize=True),
    "nt_xent, labels": lambda i: of_batch(i, F.nt_xent, labels=i.integers(N), temperature=i.number(2 * N, learnt=True)),
    "sup_con, a bank": lambda i: labelled(i, F.sup_con, bank=i(M, D), bank_labels=i.integers(M), bank_valid=i.integers()),
    "similarity_distillation, own": lambda i: distillation(i, one_bank=True, own=True, bank_valid=i.integers()),
    "wasserstein_dependency": lambda i: against_bank(i, F.wasserstein_dependency, temperature=0.1, **classes(i)),
    **{
        f"triplet_loss, {mining}": lambda i, mining=mining: labelled(i, F.triplet_loss, mining=mining, max_positives=4)
        for mining in ("easy_positive", "easy_semihard", "hard_semihard", "multi_similarity", "semi_hard_facenet", "focal")
    },
    "triplet_loss, soft and swapped": lambda i: labelled(i, F.triplet_loss, soft=True, swap=True, metric="cosine"),
    "triplet_loss, batch_all, soft": lambda i: labelled(i, F.triplet_loss, mining="batch_all", soft=True),
    "triplet_loss, a bank": lambda i: labelled(
        i, F.triplet_loss, ref=i(M, D), ref_labels=i.integers(M), ref_valid=i.integers(), own_index=i.integers(N)
    ),
    "angular_loss, few positives": lambda i: labelled(i, F.angular_loss, max_positives=4),
    "sinkhorn, tolerance and lengths": lambda i: given_cost(
        i, "transport_cost", grad="unrolled", tol=1e-3, lengths=(i.integers(8), i.integers(8)), anneal=(1.0, 0.9)
    ),
    "sinkhorn plan": lambda i: plan(i),
    "sinkhorn_loss, relaxed": lambda i: points(i, F.sinkhorn_loss, rho=1.0, metric="euclidean", tol=1e-3),
    "sinkhorn_assign": lambda i: of_matrix(i, F.sinkhorn_assign, M, 3000),
    "sinkhorn_normalize": lambda i: of_matrix(i, F.sinkhorn_normalize, 8, 32, 32),
    "log_optimal_transport": lambda i: of_matrix(i, F.log_optimal_transport, 2, 500, 400, alpha=i.number(learnt=True)),
}
#: where scatter_add adds one number to each place, and zeros: a positive's distance is taken once
TAKEN_ONCE = {"triplet_loss, batch_all, soft"}


def counted(text: str) -> tuple[tuple[int, int], ...]:
    return tuple(tuple(map(int, part.split("+"))) for part in text.split(","))


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_a_call_launches_no_more_than_it_did_in_a_fixed_order_and_the_host_never_waits(name, dtype):
    make, *texts = CASES[name]
    expected = counted(texts[dtype == torch.float32])
    inputs = Inputs(dtype)
    with h200():
        passes = census(make(inputs), inputs.learnt)
    for found, (ours, others) in zip(passes, expected, strict=True):
        assert not found.waits and not found.unordered, found.places
        assert found.counts[0] == ours, found.ours
        assert found.counts[1] <= others or not torch.__version__.startswith(COUNTED_WITH), (found.counts, found.places)


@pytest.mark.parametrize("name", MORE)
def test_the_host_never_waits_and_sums_are_in_a_fixed_order(name):
    inputs = Inputs(torch.bfloat16)
    with h200():
        passes = census(MORE[name](inputs), inputs.learnt)
    assert passes[0].others and not any(found.waits or (found.unordered and name not in TAKEN_ONCE) for found in passes)


@DTYPES
def test_a_plain_call_has_three_kernels_of_ours(dtype):
    """Against a bank without gradient, forward and backward."""
    inputs = Inputs(dtype)
    with h200():
        passes = census(info_nce(inputs), inputs.learnt)
    assert 0 < sum(found.counts[0] for found in passes) <= 3


@pytest.mark.parametrize(
    "wait", [torch.Tensor.item, torch.Tensor.nonzero, torch.Tensor.cpu, torch.Tensor.tolist, bool], ids=lambda f: f.__name__
)
def test_a_wait_is_noticed(wait):
    with h200(), pytest.raises((RuntimeError, NotImplementedError)):
        census(lambda: wait(torch.empty(1, device="meta")), [])


def test_what_pytorch_launches_for_a_wait_is_noticed():
    def masked():
        return torch.empty(4, device="meta").index_put((torch.empty(4, dtype=torch.bool, device="meta"),), torch.ones(1, device="meta"))

    with h200():
        copied, _ = census(lambda: torch.zeros(3).to("meta"), [])
        chosen, _ = census(masked, [])
    assert copied.waits == ["_to_copy"] and chosen.waits
