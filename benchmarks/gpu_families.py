"""Losses of matched pairs, mining, nearest neighbours, sampled negatives and optimal transport on a GPU, beside the formulas in PyTorch.

Each implementation's result is held to the formula's before its time is shown. Writes families.csv, .json and .md.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from gpu_measure import about, attempt, median_ms, peak_mib, write

import kdfast.functional as kd
from kdfast import ops


class Case(NamedTuple):
    """One problem: what is timed by name; "eager" is the reference of the others' results."""

    name: str
    shape: str
    runs: dict[str, Callable[[], torch.Tensor]]
    floor: float  # FLOP or bytes that the floor counts
    unit: str


def batch_hard(n: int, d: int, device: str) -> Case:
    x = F.normalize(torch.randn(n, d, device=device), dim=-1).requires_grad_()
    labels = torch.arange(n, device=device) // 8

    def step(loss):
        return torch.autograd.grad(loss(x), x)[0]

    def eager(x):
        distance = torch.cdist(x, x)
        same = labels[:, None] == labels
        own = torch.eye(n, dtype=torch.bool, device=device)
        farthest = distance.masked_fill(~same | own, -torch.inf).amax(1)
        nearest = distance.masked_fill(same, torch.inf).amin(1)
        losses = (farthest - nearest + 0.2).relu()
        return losses.sum() / (losses > 0).sum().clamp_min(1)

    runs = {impl: functools.partial(step, lambda x, i=impl: kd.triplet_loss(x, labels, normalize=False, impl=i)) for impl in IMPLS}
    runs |= {"eager": lambda: step(eager), "torch.compile": functools.partial(step, torch.compile(eager))}
    return Case("batch_hard", f"{n}, {d}", runs, 2 * n * n * d, "FLOP")


def matched(n: int, d: int, device: str, sigmoid: bool = False) -> Case:
    x, y = (F.normalize(torch.randn(n, d, device=device), dim=-1).bfloat16().requires_grad_() for _ in range(2))
    own = torch.arange(n, device=device)

    def step(loss):
        return torch.cat(torch.autograd.grad(loss(x, y), (x, y)))

    def softmaxes(x, y):
        z = 50.0 * (x @ y.T).float()
        return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2

    def sigmoids(x, y):
        z = 10.0 * (x @ y.T).float() - 10
        return -F.logsigmoid(torch.where(own[:, None] == own, z, -z)).sum() / n

    def ours(x, y, impl):
        return kd.siglip_loss(x, y, 10.0, -10.0, impl=impl) if sigmoid else kd.clip_loss(x, y, 50.0, impl=impl)

    eager = sigmoids if sigmoid else softmaxes
    runs = {impl: functools.partial(step, functools.partial(ours, impl=impl)) for impl in IMPLS}
    runs |= {"eager": lambda: step(eager), "torch.compile": functools.partial(step, torch.compile(eager))}
    return Case("siglip_loss" if sigmoid else "clip_loss", f"{n}, {d}", runs, 8 * n * n * d, "FLOP")


def distilled(n: int, m: int, d: int, device: str) -> Case:
    """A student and a teacher twice as wide, each with a bank, which has no gradient."""
    shapes = ((n, d), (n, 2 * d), (m, d), (m, 2 * d))
    student, teacher, bank, teacher_bank = (F.normalize(torch.randn(s, device=device), dim=-1).bfloat16() for s in shapes)
    student.requires_grad_()

    def step(loss):
        return torch.autograd.grad(loss(student), student)[0]

    def ours(student, impl):
        options = {"student_temperature": 0.1, "teacher_temperature": 0.05, "impl": impl}
        return kd.similarity_distillation(student, teacher, bank, teacher_bank, **options)

    def eager(student):
        p = (20.0 * (teacher @ teacher_bank.T).float()).softmax(-1)
        return -(p * (10.0 * (student @ bank.T).float()).log_softmax(-1)).sum(-1).mean()

    runs = {impl: functools.partial(step, functools.partial(ours, impl=impl)) for impl in IMPLS}
    runs |= {"eager": lambda: step(eager), "torch.compile": functools.partial(step, torch.compile(eager))}
    return Case("similarity_distillation", f"{n}, {m}, {d}", runs, 10 * n * m * d, "FLOP")


def supervised(n: int, d: int, device: str) -> Case:
    x = F.normalize(torch.randn(n, d, device=device), dim=-1).bfloat16().requires_grad_()
    labels = torch.arange(n, device=device) // 8

    def step(loss):
        return torch.autograd.grad(loss(x), x)[0]

    def eager(x):
        own = torch.eye(n, dtype=torch.bool, device=device)
        same = (labels[:, None] == labels) & ~own
        log_p = (10.0 * (x @ x.T).float()).masked_fill(own, -torch.inf).log_softmax(-1)
        return -(log_p.masked_fill(~same, 0).sum(-1) / same.sum(-1)).mean()

    runs = {
        impl: functools.partial(step, lambda x, i=impl: kd.sup_con(x, labels, temperature=0.1, normalize=False, impl=i)) for impl in IMPLS
    }
    runs |= {"eager": lambda: step(eager), "torch.compile": functools.partial(step, torch.compile(eager))}
    return Case("sup_con", f"{n}, {d}", runs, 6 * n * n * d, "FLOP")


def distances(x: torch.Tensor) -> torch.Tensor:
    square = x.square().sum(-1)
    apart = (square[:, None] + square - 2 * x @ x.T).clamp_min(1e-12).sqrt()
    return apart * ~torch.eye(len(x), dtype=torch.bool, device=x.device)


def all_pairs(loss: str, n: int, d: int, device: str) -> Case:
    """Classes of 4. contrastive_loss, or batch_all, whose formula holds every triplet in turns of anchors."""
    x = F.normalize(torch.randn(n, d, device=device), dim=-1).requires_grad_()
    labels = torch.arange(n, device=device) // 4
    same, own = labels[:, None] == labels, torch.eye(n, dtype=torch.bool, device=device)
    functions = {
        "contrastive": functools.partial(kd.contrastive_loss, normalize=False),
        "batch_all": functools.partial(kd.triplet_loss, normalize=False, mining="batch_all", max_positives=3),
    }

    def step(f):
        return torch.autograd.grad(f(x), x)[0]

    def eager(x):
        distance = distances(x)
        if loss == "contrastive":
            pull, push = distance[same & ~own], (1 - distance[~same]).relu()
            return sum(t.sum() / (t > 0).sum().clamp_min(1) for t in (pull, push))
        total, count = 0.0, 0
        place = torch.arange(n, device=device)
        for k in range(1, 4):  # the k-th other row of the class
            positive = place // 4 * 4 + (place + k) % 4
            hinge = (distance.gather(1, positive[:, None]) - distance + 0.2).relu() * ~same
            total, count = total + hinge.sum(), count + (hinge > 0).sum()
        return total / count.clamp_min(1)

    runs = {impl: functools.partial(step, lambda x, i=impl: functions[loss](x, labels, impl=i)) for impl in IMPLS}
    return Case(loss, f"{n}, {d}", {**runs, "eager": functools.partial(step, eager)}, 10 * n * n * d, "FLOP")


def ratios(n: int, d: int, device: str) -> Case:
    """rkd_distance: 12 N^2 D with the means, of them 4 for the gradient."""
    student, teacher = torch.randn(n, d, device=device, requires_grad=True), torch.randn(n, d, device=device)

    def relative(x):
        distance = distances(x)
        return distance / distance[distance > 0].mean()

    def step(loss):
        return torch.autograd.grad(loss(student, teacher), student)[0]

    runs = {impl: functools.partial(step, functools.partial(kd.rkd_distance, impl=impl)) for impl in IMPLS}
    runs["eager"] = lambda: step(lambda s, t: F.smooth_l1_loss(relative(s), relative(t)))
    return Case("rkd_distance", f"{n}, {d}", runs, 12 * n * n * d, "FLOP")


def angles(n: int, d: int, device: str) -> Case:
    """rkd_angle: 60 operations a triple with the gradient."""
    student, teacher = torch.randn(n, d, device=device, requires_grad=True), torch.randn(n, d, device=device)

    def cosines(x):
        direction = F.normalize(x[None] - x[:, None], dim=-1)
        return direction @ direction.mT

    def step(loss):
        return torch.autograd.grad(loss(student, teacher), student)[0]

    runs = {impl: functools.partial(step, functools.partial(kd.rkd_angle, impl=impl)) for impl in IMPLS}
    runs["eager"] = lambda: step(lambda s, t: F.smooth_l1_loss(cosines(s), cosines(t)))
    return Case("rkd_angle", f"{n}, {d}", runs, 60 * n**3, "FLOP")


def neighbours(n: int, m: int, d: int, device: str) -> Case:
    query, bank = (F.normalize(torch.randn(rows, d, device=device), dim=-1) for rows in (n, m))

    def eager():
        parts = [(1 - part @ bank.T).topk(10, largest=False) for part in query.split(max(1, (1 << 28) // m))]
        return torch.cat([values for values, _ in parts])

    runs = {impl: lambda impl=impl: ops.knn(query, bank, 10, impl=impl)[0] for impl in IMPLS}
    return Case("knn, k = 10", f"{n}, {m}, {d}", {**runs, "eager": eager}, 2 * n * m * d, "FLOP")


def sampled(n: int, k: int, m: int, d: int, device: str) -> Case:
    query = F.normalize(torch.randn(n, d, device=device), dim=-1).requires_grad_()
    bank, index = F.normalize(torch.randn(m, d, device=device), dim=-1), torch.randint(m, (n, k), device=device)

    def ours(impl):
        loss, _ = kd.sampled_nce(query, bank, index, temperature=0.07, num_data=m, normalizer=float(m), impl=impl)
        return torch.autograd.grad(loss, query)[0]

    def eager():
        z = torch.bmm(bank[index.flatten()].view(n, k, d), query[:, :, None])[..., 0] / 0.07
        x, c = (z.exp() / m).double(), (k - 1) / m
        loss = -(x[:, 0] / (x[:, 0] + c + 1e-7)).log().sum() - (c / (x[:, 1:] + c + 1e-7)).log().sum()
        return torch.autograd.grad(loss / n, query)[0].float()

    runs = {impl: functools.partial(ours, impl) for impl in IMPLS}
    return Case("sampled_nce", f"{n}, {k}, {m}, {d}", {**runs, "eager": eager}, 4 * n * k * d, "B")


def transport(batch: int, n: int, iterations: int, device: str, width: int | None = None) -> Case:
    if width is None:
        source = {"cost": torch.rand(batch, n, n, device=device)}
        moved, epsilon = 8 * iterations * batch * n * n, 0.05
    else:
        source = {"x": torch.randn(batch, n, width, device=device), "y": torch.randn(batch, n, width, device=device)}
        moved, epsilon = 4 * iterations * batch * n * n * width, 0.1 * width

    def ours(impl):
        return ops.sinkhorn(**source, epsilon=epsilon, max_iters=iterations, impl=impl).value

    def eager():
        c = source["cost"] if width is None else torch.cdist(source["x"], source["y"]).square()
        g = torch.zeros(batch, n, device=device)
        size = torch.tensor(float(n)).log().item()
        for _ in range(iterations):
            f = -epsilon * (((g[:, None] - c) / epsilon).logsumexp(-1) - size)
            g = -epsilon * (((f[..., None] - c) / epsilon).logsumexp(-2) - size)
        return f.mean(-1) + g.mean(-1)

    runs = {impl: functools.partial(ours, impl) for impl in (GIVEN if width is None else IMPLS)}
    name = "sinkhorn, given" if width is None else "sinkhorn, points"
    shape = f"{batch}, {n}" + ("" if width is None else f", {width}") + f", {iterations} iterations"
    return Case(name, shape, {**runs, "eager": eager}, moved, "B" if width is None else "FLOP")


def assigned(n: int, k: int, device: str) -> Case:
    """Codes in three iterations."""
    scores = torch.rand(n, k, device=device) * 2 - 1

    def eager():
        q = (scores / 0.05).exp()
        for _ in range(3):
            q = q / q.sum(-2, keepdim=True)
            q = q / q.sum(-1, keepdim=True)
        return q

    runs = {impl: functools.partial(kd.sinkhorn_assign, scores, impl=impl) for impl in ("cuda", "torch")}
    return Case("sinkhorn_assign", f"{n}, {k}", {**runs, "eager": eager}, 5 * 4 * n * k, "B")


def normalized(batch: int, n: int, device: str) -> Case:
    """Matrices and their gradient, 20 iterations."""
    logits = torch.randn(batch, n, n, device=device, requires_grad=True)

    def step(f):
        return torch.autograd.grad(f(logits).square().sum(), logits)[0]

    def eager(x):
        x = x.softmax(-1) + 1e-6
        for dim in [-2] + [-1, -2] * 19:
            x = x / (x.sum(dim, keepdim=True) + 1e-6)
        return x

    runs = {impl: functools.partial(step, functools.partial(kd.sinkhorn_normalize, impl=impl)) for impl in ("cuda", "torch")}
    return Case("sinkhorn_normalize", f"{batch}, {n}", {**runs, "eager": functools.partial(step, eager)}, 5 * 4 * batch * n * n, "B")


IMPLS = ("triton", "torch")
GIVEN = ("cuda", *IMPLS)  # of a cost
SIZES = {
    "full": [
        (matched, (16384, 512)), (matched, (16384, 512), True), (supervised, (8192, 256)), (distilled, (4096, 65536, 128)),
        (batch_hard, (4096, 128)), (batch_hard, (16384, 256)), (all_pairs, ("contrastive", 8192, 128)),
        (all_pairs, ("batch_all", 8192, 128)), (ratios, (8192, 128)), (angles, (1024, 128)),
        (neighbours, (4096, 65536, 128)), (neighbours, (4096, 1_000_000, 128)),
        (sampled, (64, 16384, 50_000, 128)), (sampled, (256, 4096, 1_000_000, 128)), (transport, (256, 256, 50)),
        (transport, (100_000, 4, 20)), (transport, (1024, 64, 50)), (transport, (1024, 128, 50)),
        (transport, (1, 10_000, 20)), (transport, (1, 10_000, 10), 64),
        (assigned, (4096, 3000)), (assigned, (8192, 65536)), (normalized, (100_000, 4)), (normalized, (4096, 32)),
    ],
    "small": [
        (matched, (65, 24)), (matched, (65, 24), True), (supervised, (65, 24)), (distilled, (65, 300, 24)),
        (batch_hard, (65, 24)), (all_pairs, ("contrastive", 64, 24)), (all_pairs, ("batch_all", 64, 24)), (ratios, (64, 24)),
        (angles, (40, 24)), (neighbours, (20, 300, 24)),
        (sampled, (5, 40, 100, 24)), (transport, (2, 33, 4)), (transport, (1, 33, 4), 24),
        (transport, (40, 4, 4)), (transport, (1, 140, 4)), (transport, (1, 300, 4)),
        (assigned, (30, 70)), (assigned, (5, 9000)), (normalized, (40, 4)),
    ],
}  # fmt: skip


def measure(run: Callable, reference: torch.Tensor, repeats: int, device: str) -> dict:
    result = run()
    error = ((result - reference).norm() / reference.norm().clamp_min(1e-30)).item()
    if not error < 0.02:
        return {"problem": f"differs from the formula by {error:.2g}"}
    del result
    return {"MiB": peak_mib(run, device), "ms": median_ms(run, repeats, device), "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=tuple(SIZES), default="full")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()

    results = []
    for make, sizes, *width in SIZES[args.sizes]:
        torch.manual_seed(0)
        case = make(*sizes, args.device, *width)
        reference = case.runs["eager"]()
        for name, run in case.runs.items():
            found = attempt(functools.partial(measure, run, reference, args.repeats, args.device))
            row = {"case": case.name, "shape": case.shape, "name": "kdfast, " + name if name in GIVEN else name, **found}
            if "ms" in found:
                row[f"T{case.unit}/s"] = case.floor / found["ms"] / 1e9
            results.append(row)
            print(row, flush=True)
            if args.device == "cuda":
                torch.cuda.empty_cache()
    if args.output:
        columns = ["case", "shape", "name", "ms", "TFLOP/s", "TB/s", "MiB", "error", "problem"]
        write(args.output, "families", columns, about(args.device, args.commit), results)


if __name__ == "__main__":
    main()
