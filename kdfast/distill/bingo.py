"""BINGO: a sample and the members of its bag are drawn to one teacher embedding (Xu et al. 2022, 2107.01691)."""

import torch
from torch import Tensor

from .._core import checks
from ..functional import info_nce
from .base import DistillLoss, bank_rows, like_bank, own_rows, query_labels, unit, vectors, views
from .pairs import make_projector


class BINGO(DistillLoss):
    """Bag-wise InfoNCE between student queries and the frozen teacher's keys; all are normalised here.

    `loss(student, teacher, index=None, ...)` with dicts of views [N, D] (names below, or views 0, 1, 2 in that order;
    a single teacher view may be a tensor). Every form is one pass over the bank.

    variant "paper": student views a (of the anchor) and p (of a bag member), teacher view a. With k = teacher(a):
        loss = intra + inter = InfoNCE(student(a), k) + InfoNCE(student(p), k).
    variant "released" (as in the authors' code): student views a, p and mix (`cutmix` of both), teacher views a and p.
        Each query meets both keys as positives with weights: a (1, 0) and p (0, 1) for the first `warmup_epochs` epochs,
        then (1/2, 1/2); mix (lam, 1 - lam). loss = the mean over the three; give `epoch` and `lam` with every call.

    bank: a QueueBank: its rows are the negatives, and the anchor's keys are pushed. An IndexedBank: needs `index`, the
        sample's own row is left out. None ("paper" alone): the batch's other keys. A Tensor [M, D] with the embeddings
        of all samples (normalised here once, never pushed): with `index` the positive is row index[i], so no teacher
        runs at all; `positive_index` [N], the dataset index of each bag member, leaves that row out of the
        member's negatives.

    Args:
        variant: "paper" or "released".
        temperature: > 0, default 0.2; a float or an nn.Parameter.
        bank: published: QueueBank(65536, 128).
        warmup_epochs: see "released".
        projector, student_dim, teacher_dim: a map to the keys' width, as for MSE; None when the student's head gives it. With an
            inverted Projector the keys, and so the bank's rows, have the student's width.
        push: see DistillLoss.

    Raises:
        ValueError, TypeError: missing views, bank, index, epoch or lam; shapes that do not fit.
    """

    def __init__(
        self,
        variant: str = "paper",
        temperature: float = 0.2,
        bank=None,
        *,
        warmup_epochs: int = 10,
        projector=None,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        push: bool = True,
    ) -> None:
        super().__init__(unit(bank).to(bank.dtype) if isinstance(bank, Tensor) else bank, push)
        checks.choice("variant", variant, ("paper", "released"))
        checks.positive_number("temperature", temperature)
        if variant == "released" and bank is None:
            raise ValueError('bank must be given for variant="released"')
        self.variant, self.temperature = variant, temperature
        self.warmup_epochs = checks.count("warmup_epochs", warmup_epochs, minimum=0)
        self.projector = make_projector(projector, student_dim, teacher_dim)

    def materialize(self, student, teacher) -> None:
        if self.projector is not None:
            query = views("student", student, ("a",))[0]
            self.projector.materialize(query, self._some_key(teacher))

    def forward(self, student, teacher=None, *, index=None, labels=None, positive_index=None, lam=None, epoch: int | None = None) -> Tensor:
        if self.variant == "paper":
            losses, key = self._paper(student, teacher, index, labels, positive_index)
            loss = self._report(intra=losses[0], inter=losses[1])
        else:
            losses, key = self._released(student, teacher, index, labels, lam, epoch)
            loss = self._report(anchor=losses[0] / 3, member=losses[1] / 3, mix=losses[2] / 3)
        self._update_bank(key, index, labels)
        return loss

    def _paper(self, student, teacher, index, labels, positive_index) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.bank, Tensor) and index is not None:
            queries = self._queries_of_stored_keys(views("student", student, ("a", "p")))
            index = checks.integral("index", index, shape=(len(queries[0]),)).to(self.bank.device)
            none = torch.full_like(index, -1)
            own = none if positive_index is None else checks.integral("positive_index", positive_index, shape=tuple(index.shape))
            return self._scored(queries, None, targets=index.repeat(2), own_index=torch.cat([none, own.to(index.device)])), None
        queries, (key,) = self._embedded(views("student", student, ("a", "p")), views("teacher", teacher, ("a",)))
        if self.bank is None:
            return torch.stack([info_nce(query, key.to(query.dtype), temperature=self.temperature) for query in queries]), key
        return self._scored(queries, key.repeat(2, 1), **self._left_out(index, labels, 2)), key

    def _released(self, student, teacher, index, labels, lam, epoch) -> tuple[Tensor, Tensor]:
        if lam is None or epoch is None:
            raise ValueError('lam and epoch must be given for variant="released" (extra={"bingo": {"lam": lam, "epoch": epoch}})')
        queries, (anchor, member) = self._embedded(views("student", student, ("a", "p", "mix")), views("teacher", teacher, ("a", "p")))
        n, warm = len(anchor), epoch < self.warmup_epochs
        weights = anchor.new_tensor([[1.0, 0.0], [0.0, 1.0]] if warm else [[0.5, 0.5], [0.5, 0.5]])
        lam = torch.as_tensor(lam, dtype=anchor.dtype, device=anchor.device)
        rows = torch.cat([weights.repeat_interleave(n, 0), torch.stack([lam, 1 - lam], -1).expand(n, 2)])  # [3 N, 2]
        keys = torch.stack([anchor, member], 1).repeat(3, 1, 1)  # [3 N, 2, D]
        return self._scored(queries, keys, positive_weights=rows, **self._left_out(index, labels, 3)), anchor

    def _embedded(self, student: list, teacher: list) -> tuple[list[Tensor], list[Tensor]]:
        """Unit queries of the student's views and unit keys of the teacher's, projected."""
        queries, keys = [vectors(view, "student") for view in student], [vectors(view, "teacher").detach() for view in teacher]
        if self.projector is not None:
            pairs = [self.projector(query, keys[min(i, len(keys) - 1)]) for i, query in enumerate(queries)]
            queries, keys = [query for query, _ in pairs], [key for _, key in pairs[: len(keys)]]
        return [unit(query) for query in queries], [unit(key) for key in keys]

    def _queries_of_stored_keys(self, student: list) -> list[Tensor]:
        """The same where the keys are the bank's rows."""
        queries = [vectors(view, "student") for view in student]
        if self.projector is not None:
            if self.projector.invert:
                raise ValueError("projector must not be inverted where a bank Tensor holds the keys: it maps no stored row")
            queries = [self.projector(query, self.bank[:2])[0] for query in queries]
        return [unit(query) for query in queries]

    def _some_key(self, teacher) -> Tensor:
        return self.bank[:1] if teacher is None else vectors(views("teacher", teacher, ("a",))[0], "teacher")

    def _scored(self, queries: list[Tensor], keys: Tensor | None, **options) -> Tensor:
        """The mean loss of each group of queries, all scored in one pass over the bank."""
        rows = bank_rows(self.bank)
        keys = None if keys is None else like_bank(keys, rows)
        query = like_bank(torch.cat(queries), rows)
        losses = info_nce(query, keys, self.bank, temperature=self.temperature, reduction="none", **options)
        return losses.view(len(queries), -1).mean(1)

    def _left_out(self, index, labels, copies: int) -> dict:
        """Rows of an indexed or labelled bank that are no negatives, for `copies` queries a sample."""
        own, classes = own_rows(self.bank, index), query_labels(self.bank, labels)
        return {
            "own_index": None if own is None else own.repeat(copies),
            "query_labels": None if classes is None else classes.repeat(copies),
        }
