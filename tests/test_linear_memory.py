"""No loss over scores holds an N x M matrix: the peak of a process's memory, PyTorch's tensors and C++ scratch alike."""

import pytest
import torch
import torch.nn.functional as F

import kdfast.functional as KF
from kdfast import ops
from kdfast._core import extension
from kdfast.bench import memory

MIB = 2**20
N, M, D, PAIRS = 1024, 16384, 8, 4096  # the scores of a bank, and of a batch with itself, are 64 MiB of floats
MOST = 16  # MiB
SEED = 1


def unit(*shape: int) -> torch.Tensor:
    global SEED
    SEED += 1
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(SEED)), dim=-1)


def classes(n: int) -> torch.Tensor:
    return torch.arange(n) % 97


def rates(n: int = N) -> torch.Tensor:
    return torch.linspace(0.1, 0.5, n).requires_grad_()


LABELS = {"query_labels": classes(N), "bank_labels": classes(M)}
BANK_FORMS = {  # options of info_nce(query, positive, bank)
    "plain": {},
    "sums": {"reduction": "sum"},
    "rows": {"reduction": "none"},
    "a temperature": {"temperature": torch.tensor(0.1, requires_grad=True)},
    "temperatures": {"temperature": rates()},
    "weights": {"weight": torch.rand(N)},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing, temperatures, rows": {"label_smoothing": 0.1, "temperature": rates(), "reduction": "none"},
    "classes": LABELS,
    "attraction": {**LABELS, "same_class": "positive"},
    "attraction, temperatures, rows": {**LABELS, "same_class": "positive", "temperature": rates(), "reduction": "none"},
    "own rows": {"own_index": True},
    "valid": {"bank_valid": 10_000},
    "margin": {"false_negative_margin": 0.1},
    "decoupled": {"include_positive": False},
    "biases": {"bank_bias": torch.zeros(M, requires_grad=True)},
    "targets": {"targets": torch.arange(N)},
    "unit length": {"normalize": True},
}
PAIR_FORMS = {  # of two views
    "in batch": lambda x, y: KF.info_nce(x, y),
    "in batch, smoothing, rows": lambda x, y: KF.info_nce(x, y, label_smoothing=0.1, reduction="none"),
    "in batch, classes": lambda x, y: KF.info_nce(x, y, query_labels=classes(PAIRS)),
    "in batch, temperatures": lambda x, y: KF.info_nce(x, y, temperature=rates(PAIRS)),
    "in batch, attraction": lambda x, y: KF.info_nce(x, y, query_labels=classes(PAIRS), same_class="positive"),
    "in batch, margin": lambda x, y: KF.info_nce(x, y, false_negative_margin=0.1),
    "clip_loss": lambda x, y: KF.clip_loss(x, y, 10.0),
    "clip_loss, smoothing, rows": lambda x, y: KF.clip_loss(x, y, 10.0, label_smoothing=0.1, reduction="none", weight=torch.rand(PAIRS)),
    "siglip_loss": lambda x, y: KF.siglip_loss(x, y, 10.0, -10.0),
    "siglip_loss, rows": lambda x, y: KF.siglip_loss(x, y, 10.0, -10.0, reduction="none"),
    "nt_xent": lambda x, y: KF.nt_xent(x[::2], y[::2]),
    "nt_xent, classes, rows": lambda x, y: KF.nt_xent(x[::2], y[::2], labels=classes(PAIRS // 2), reduction="none"),
    "nt_xent, temperatures": lambda x, y: KF.nt_xent(x[::2], y[::2], temperature=rates(PAIRS)),
    "sup_con": lambda x, y: KF.sup_con(x, classes(PAIRS)),
    "sup_con, temperatures, rows": lambda x, y: KF.sup_con(x, classes(PAIRS), temperature=rates(PAIRS), reduction="none"),
}


def distillation(x, k, bank, **options):
    both = {"student_temperature": 0.1, "teacher_temperature": 0.05, **options}
    return KF.similarity_distillation(x, k.detach(), bank, bank.detach(), **both)


def batched(x, k, bank):
    return KF.info_nce(x.view(4, -1, D), k.view(4, -1, D), bank, label_smoothing=0.1, temperature=rates().view(4, -1))


def mapped(x, k, bank):
    return torch.vmap(KF.info_nce, in_dims=(0, 0, None))(x.view(4, -1, D), k.view(4, -1, D), bank)


def both_outputs(x, k, bank, values=None):
    lse, pooled = ops.similarity_softmax(x, bank, scale=10.0, values=values)
    return lse.sum() + pooled.square().sum()


OTHER_FORMS = {  # of rows, their positives and a bank
    "lse and pooled": both_outputs,
    "lse and pooled values": lambda x, k, bank: both_outputs(x, k, bank, bank.flip(0)),
    "four positives": lambda x, k, bank: KF.info_nce(x, torch.stack([k, x, -k, -x], 1), bank),
    "batched": batched,
    "vmap": mapped,
    "sup_con over a bank": lambda x, k, bank: KF.sup_con(x, classes(N), bank=bank, bank_labels=classes(M)),
    "distillation": distillation,
    "distillation, KL, temperatures, rows": lambda *x: distillation(*x, divergence="kl", reduction="none", student_temperature=rates()),
    "distillation, a teacher's temperature": lambda *x: distillation(*x, teacher_temperature=torch.tensor(0.1, requires_grad=True)),
    "distillation, own rows": lambda *x: distillation(*x, own_index=True, bank_valid=10_000),
    "wasserstein_dependency": lambda x, k, bank: KF.wasserstein_dependency(x, k, bank, temperature=0.1, **LABELS),
}


def plain_formula(x, k, bank):
    return F.cross_entropy(torch.cat([(x * k).sum(1, keepdim=True), x @ bank.T], 1) / 0.07, torch.zeros(N, dtype=torch.long))


def of_bank(name: str):
    options = BANK_FORMS[name]
    return lambda x, k, bank: KF.info_nce(x, None if {"targets", "same_class"} & options.keys() else k, bank, **options)


FORMS = {
    **{name: (of_bank(name), M) for name in BANK_FORMS},
    **{name: (form, M) for name, form in OTHER_FORMS.items()},
    **{name: (lambda x, y, form=form: form(x, y), None) for name, form in PAIR_FORMS.items()},
    "the plain formula": (plain_formula, M),
}
SECOND = ["plain", "rows", "smoothing", "classes", "attraction", "in batch", "clip_loss", "nt_xent", "distillation"]


def build(name: str, dtype: torch.dtype, moving_bank: bool, second: bool):
    """Loss and gradients, or the second derivative along ones, of a form."""
    if module := extension.load("_C")[0]:
        module.release_scratch()
    form, rows = FORMS[name]
    n = PAIRS if rows is None else N
    given = [unit(n, D).to(dtype).requires_grad_(), unit(n, D).to(dtype).requires_grad_()]
    if rows is not None:
        given.append(unit(rows, D).to(dtype).requires_grad_(moving_bank))
    wanted = [x for x in given if x.requires_grad]

    def call():
        first = torch.autograd.grad(form(*given).sum(), wanted, create_graph=second, materialize_grads=True)
        if not second:
            return first
        moving = [g for g in first if g.requires_grad]
        return torch.autograd.grad(sum(g.sum() for g in moving), wanted, materialize_grads=True)

    return call


@pytest.fixture(scope="module")
def process():
    with memory.fresh_process() as pool:
        yield pool


def peak(process, *args) -> float:
    return memory.peak_in(process, build, *args) / MIB


@pytest.mark.parametrize("name", [name for name in FORMS if name != "the plain formula"])
def test_loss_and_gradients(process, name):
    assert peak(process, name, torch.float32, True, False) < MOST
    assert peak(process, name, torch.bfloat16, FORMS[name][1] is None, False) < MOST


@pytest.mark.parametrize("name", SECOND)
def test_second_derivative(process, name):
    assert peak(process, name, torch.float32, True, True) < MOST


def test_the_plain_formula_would_be_seen(process):
    assert peak(process, "the plain formula", torch.float32, True, False) > 100
