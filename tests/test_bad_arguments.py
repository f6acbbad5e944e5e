"""Arguments of a kind that only some mistake would give: each is named, before PyTorch or a kernel stumbles over it."""

import functools
import inspect
import re

import pytest
import torch

import kdfast
from kdfast import distill, ops
from kdfast import functional as F
from kdfast.eval import knn_accuracy, neighbor_recall

N, M, D = 4, 6, 3
X, Y, BANK = torch.randn(N, D), torch.randn(N, D), torch.randn(M, D)
LABELS, INDEX, SCORES = torch.arange(N) // 2, torch.arange(N)[:, None] % M, torch.randn(N, M)
CALLS = {
    "info_nce": (F.info_nce, dict(query=X, positive=Y, bank=BANK)),
    "nt_xent": (F.nt_xent, dict(view1=X, view2=Y)),
    "sup_con": (F.sup_con, dict(features=X, labels=LABELS)),
    "clip_loss": (F.clip_loss, dict(image=X, text=Y, logit_scale=2.0)),
    "siglip_loss": (F.siglip_loss, dict(image=X, text=Y, logit_scale=2.0, logit_bias=-1.0)),
    "similarity_distillation": (
        F.similarity_distillation,
        dict(student=X, teacher=Y, student_bank=BANK, student_temperature=0.2, teacher_temperature=0.1),
    ),
    "wasserstein_dependency": (F.wasserstein_dependency, dict(query=X, positive=Y, bank=BANK, temperature=0.5)),
    "sampled_info_nce": (F.sampled_info_nce, dict(query=X, positive=Y, bank=BANK, index=INDEX)),
    "sampled_nce": (F.sampled_nce, dict(query=X, bank=BANK, index=INDEX.expand(N, 2), num_data=9)),
    "triplet_loss": (F.triplet_loss, dict(embeddings=X, labels=LABELS)),
    "margin_loss": (F.margin_loss, dict(embeddings=X, labels=LABELS)),
    "multi_similarity_loss": (F.multi_similarity_loss, dict(embeddings=X, labels=LABELS)),
    "mmd_rbf": (F.mmd_rbf, dict(x=X, y=BANK, sigmas=(1.0,))),
    "sinkhorn_loss": (F.sinkhorn_loss, dict(x=X, y=BANK)),
    "sinkhorn_assign": (F.sinkhorn_assign, dict(scores=SCORES)),
    "sinkhorn": (ops.sinkhorn, dict(cost=SCORES)),
    "similarity_softmax": (ops.similarity_softmax, dict(query=X, keys=BANK)),
    "knn": (ops.knn, dict(query=X, bank=BANK, k=2)),
}


def calls_with(*arguments: str):
    """(function, its arguments, the name of one of `arguments`) for all that the calls take."""
    taken = {f"{name}-{a}": (*call, a) for name, call in CALLS.items() for a in arguments if a in inspect.signature(call[0]).parameters}
    return pytest.mark.parametrize("function, given, argument", taken.values(), ids=taken.keys())


def refused(function, given: dict, argument: str, value, error=(TypeError, ValueError)) -> None:
    with pytest.raises(error, match=re.compile(rf"\b{argument}\b")):
        function(**{**given, argument: value})


@calls_with("group")
@pytest.mark.parametrize("value", [3, "world", object, False], ids=str)
def test_group(function, given, argument, value):
    refused(function, given, argument, value, TypeError)


@calls_with("normalize", "own", "include_positive", "soft", "swap")
@pytest.mark.parametrize("value", [1, "yes", None, torch.ones(2)], ids=["int", "str", "None", "tensor"])
def test_flags(function, given, argument, value):
    refused(function, given, argument, value, TypeError)


@calls_with("temperature", "student_temperature", "teacher_temperature", "logit_scale", "logit_bias", "epsilon", "scale", "beta")
@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(0.5, device="meta"),
        torch.tensor(0.5).to_sparse(),
        torch.tensor(1j),
        torch.tensor(True),
        10**30,
        10**400,
        "0.5",
        1j,
    ],
    ids=["meta", "sparse", "complex tensor", "bool tensor", "10**30", "10**400", "str", "complex"],
)
def test_numbers(function, given, argument, value):
    refused(function, given, argument, value)


@calls_with(
    "query", "positive", "bank", "view2", "labels", "features", "image", "text", "student", "index", "embeddings", "y", "keys", "cost"
)
@pytest.mark.parametrize("kind", ["meta", "sparse", "nested", "list"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors(function, given, argument, kind):
    x = given.get(argument, X)
    make = {"meta": lambda: x.to("meta"), "sparse": x.to_sparse, "nested": lambda: torch.nested.nested_tensor([x, x]), "list": x.tolist}
    refused(function, given, argument, make[kind]())


@calls_with("weight")
@pytest.mark.parametrize(
    "value",
    [
        torch.ones(N, device="meta"),
        torch.ones(N).to_sparse(),
    ],
    ids=["meta", "sparse"],
)
def test_weights(function, given, argument, value):
    refused(function, given, argument, value)


def test_what_leaves_the_range_of_the_arithmetic():
    """No float32 holds 1 / 1e-320 or 1e308, nor a float64 1 / 1e-320."""
    refused(F.info_nce, CALLS["info_nce"][1], "temperature", 1e-320)
    refused(F.margin_loss, CALLS["margin_loss"][1], "beta", 1e308)
    refused(ops.similarity_softmax, CALLS["similarity_softmax"][1], "scale", 1e308)
    assert F.info_nce(X, Y, temperature=1e38).isfinite()


def test_own_index_false_leaves_no_further_row_out():
    torch.testing.assert_close(F.info_nce(X, Y, own_index=False), F.info_nce(X, Y))


def test_flags_and_groups_of_banks():
    for options in ({"labels": 1}, {"normalize": "no"}, {"gather": 3}):
        refused(kdfast.QueueBank, dict(capacity=4, dim=D), *options, *options.values(), TypeError)
    refused(kdfast.QueueBank(4, D).push, dict(keys=X), "where", torch.ones(N, dtype=torch.bool).to_sparse())
    refused(kdfast.IndexedBank, dict(size=4, dim=D), "momentum", torch.ones(3))


@pytest.mark.parametrize("option", ["dim", "student_dim", "teacher_dim"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5], ids=repr)
def test_widths_of_embeddings(option, value):
    refused(distill.CRD, dict(num_data=M, dim=2, num_negatives=2), option, value)


def test_options_of_methods():
    for method, option, value in (
        (distill.KD, "T", torch.ones(3)),
        (distill.DIST, "temperature", torch.ones(3)),
        (distill.RKD, "angle_weight", torch.ones(3)),
        (distill.ICKD, "weight", -1.0),
        (distill.TWIST, "diversity", "much"),
        (distill.FacultyOT, "T", torch.ones(3)),
        (functools.partial(distill.SpectralTail, 2), "p", torch.ones(3)),
        (functools.partial(distill.SpectralTail, 2), "center", 1),
        (distill.HybridDistill, "token_weight", None),
        (distill.SRD, "logit_weight", "much"),
        (distill.MLKD, "contrast_weight", -1.0),
        (functools.partial(distill.MultiHeadKD, num_classes=3), "num_heads", 1.5),
        (distill.PESFKD, "hidden", 0),
        (distill.PESFKD, "num_classes", "4"),
        (distill.KD, "T", 1e308),
        (distill.SSKD, "temperature", torch.ones(3)),
        (distill.SSKD, "rotated_weight", 10**30),
        (distill.REFILLED, "weight", (1, 2)),
        (distill.SwAV, "banks", 2),
        (distill.CKA, "num_classes", 5),
        (functools.partial(distill.CKA, [2, 2]), "teacher_dims", 4),
        (functools.partial(distill.CKA, [2, 2]), "common_dim", -1),
        (functools.partial(distill.CKA, [2, 2]), "weights", "task"),
        (distill.ImageGenerator, "width", 0),
        (kdfast.Projector, "invert", torch.ones(3)),
    ):
        refused(method, {}, option, value)
    refused(distill.CRD, dict(num_data=M), "sampler", 3, TypeError)
    refused(kdfast.Projector(D, D), dict(student=X, teacher=Y), "teacher", None, TypeError)
    for labels in (LABELS[:2], LABELS + 3, "labels", torch.rand(N, 2)):
        refused(distill.PESFKD(), dict(student=X, teacher=Y, labels=LABELS), "labels", labels, (TypeError, ValueError, IndexError))
    refused(distill.SRD(), dict(student=(), teacher=Y), "student", (), ValueError)
    crd = distill.CRD(M, dim=2, num_negatives=2)
    refused(crd, dict(student=X, teacher=Y), "index", list(range(N)), TypeError)
    refused(distill.cutmix, dict(x_a=torch.rand(2, 3, 4, 4)), "x_p", None, TypeError)
    refused(neighbor_recall, dict(student=X, teacher=Y, teacher_gallery=BANK), "student_gallery", 3, TypeError)


def test_labels_and_rows_that_are_not_contiguous():
    """Columns of a larger table, as a data set keeps them."""
    table = torch.stack([LABELS, torch.arange(N)], 1)
    given = dict(k=2, query_labels=table[:, 0], bank_labels=torch.arange(M) // 2, own_index=table[:, 1])
    found = ops.knn(X, BANK, **given)
    torch.testing.assert_close(found, ops.knn(X, BANK, **{name: v.contiguous() if name != "k" else v for name, v in given.items()}))


def test_accuracy_takes_any_labels():
    labels = torch.tensor([-3, 7, 2**62, -3, 7, 2**62])
    assert knn_accuracy(BANK, labels, BANK, labels, k=1) == 1
