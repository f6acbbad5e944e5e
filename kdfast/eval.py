"""Measures of a representation: k-NN accuracy, agreement of neighbourhoods, a linear probe. All return floats in [0, 1]."""

import torch
from torch import Tensor

from . import ops
from ._core import checks


def knn_accuracy(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    k: int = 5,
    metric: str = "cosine",
) -> float:
    """The share of queries whose label is the most frequent among their k nearest gallery rows (a tie: the lowest label).

    Args:
        query: [N, D] with query_labels [N], integers.
        gallery: [M, D] with gallery_labels [M]; None: the queries themselves, each left out for itself.
        k: neighbours, default 5.
        metric: as in kdfast.ops.knn.

    Raises: ValueError, TypeError naming the argument.
    """
    checks.rows("query", query, ndim=2)
    query_labels = checks.integral("query_labels", query_labels, shape=(len(query),))
    checks.count("k", k)
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels must be given together")
    own = gallery is None
    gallery, gallery_labels = (query, query_labels) if own else (gallery, gallery_labels)
    gallery_labels = checks.integral("gallery_labels", gallery_labels, shape=(len(checks.rows("gallery", gallery, ndim=2)),))
    index = ops.knn(query, gallery, k, metric=metric, own_index=True if own else None)[1]
    classes, place = gallery_labels.unique(return_inverse=True)
    votes = torch.zeros(len(query), len(classes), device=query.device)
    found = (index >= 0).to(votes.dtype)
    votes.scatter_add_(1, place[index.clamp(min=0)], found)
    return (classes[votes.argmax(1)] == query_labels).double().mean().item()


def neighbor_recall(
    student: Tensor,
    teacher: Tensor,
    student_gallery: Tensor | None = None,
    teacher_gallery: Tensor | None = None,
    *,
    k: int = 10,
    metric: str = "cosine",
) -> float:
    """The share of the teacher's k nearest gallery samples that are among the student's k nearest, the mean over queries.

    Args:
        student [N, D_s], teacher [N, D_t]: the queries, row i of both the same sample.
        student_gallery [M, D_s], teacher_gallery [M, D_t]: the gallery; None: the queries, each left out for itself.
        k: neighbours, 1 <= k <= M (M - 1 without a gallery).
        metric: as in kdfast.ops.knn.

    Raises: ValueError, TypeError naming the argument.
    """
    for name, x in (("student", student), ("teacher", teacher)):
        checks.rows(name, x, ndim=2)
    if len(student) != len(teacher):
        raise ValueError(f"student and teacher must have a row each a sample, got {len(student)} and {len(teacher)}")
    if (student_gallery is None) != (teacher_gallery is None):
        raise ValueError("student_gallery and teacher_gallery must be given together")
    own = student_gallery is None
    for name, x in () if own else (("student_gallery", student_gallery), ("teacher_gallery", teacher_gallery)):
        checks.rows(name, x, ndim=2)
    rows = len(student) - 1 if own else len(student_gallery)
    if not own and rows != len(teacher_gallery):
        raise ValueError(f"student_gallery and teacher_gallery must have a row each a sample, got {rows} and {len(teacher_gallery)}")
    if checks.count("k", k) > rows:
        raise ValueError(f"k must be at most the {rows} gallery rows, got {k}")
    found = [
        ops.knn(query, query if own else gallery, k, metric=metric, own_index=True if own else None)[1]
        for query, gallery in ((student, student_gallery), (teacher, teacher_gallery))
    ]
    both = torch.cat([indices.to(found[0].device) for indices in found], 1).sort(1).values
    return (both[:, 1:] == both[:, :-1]).sum(1).double().mean().item() / k  # each list holds an index once


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, C: float = 1.0, max_iter: int = 1000) -> float:
    """Test accuracy of a logistic regression on standardised features (scikit-learn's, L2 penalty 1 / C).

    Args:
        train [N, D], test [M, D]: features; labels are integers [N] and [M].
        C: inverse strength of the penalty, > 0.
        max_iter: of the solver.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError, TypeError: naming the argument.
    """
    for name, x, labels in (("train", train, train_labels), ("test", test, test_labels)):
        checks.rows(name, x, ndim=2)
        checks.integral(f"{name}_labels", labels, shape=(len(x),))
    checks.same_width("test", test, "train", train)
    checks.positive_number("C", C)
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("kdfast.eval.linear_probe needs scikit-learn: pip install scikit-learn") from error
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=max_iter))
    arrays = [x.detach().cpu().double().numpy() for x in (train, test)]
    model.fit(arrays[0], train_labels.cpu().numpy())
    return float(model.score(arrays[1], test_labels.cpu().numpy()))
