"""What the tests of similarity distillation's C++ kernels share: arguments, the ops, and the definition with everything materialised."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast._ops.similarity.losses import distillation  # noqa: F401  (registers the fakes)

PRODUCTS = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 0}
NAMES = (
    "student",
    "keys",
    "teacher",
    "teacher_keys",
    "scale",
    "teacher_scale",
    "bias",
    "start_logit",
    "teacher_start_logit",
    "key_index",
    "valid",
)


def case(rows, columns, width, teacher_width, dtype=torch.float32, teacher_dtype=None, **options) -> dict:
    """Arguments of the op by name; `options` gives any of the optional ones."""
    unit = lambda *shape: F.normalize(torch.randn(*shape), dim=-1)
    teacher_dtype = teacher_dtype or dtype
    made = {
        "student": unit(rows, width).to(dtype),
        "keys": unit(columns, width).to(dtype),
        "teacher": unit(rows, teacher_width).to(teacher_dtype),
        "teacher_keys": unit(columns, teacher_width).to(teacher_dtype),
        "scale": torch.rand(rows) * 20,
        "teacher_scale": torch.rand(rows) * 40,
    }
    return dict.fromkeys(NAMES) | made | options


def options(rows: int, columns: int) -> dict:
    return {
        "bias": {"bias": torch.randn(columns).masked_fill(torch.rand(columns) < 0.2, -math.inf)},
        "start": {"start_logit": torch.randn(rows) * 5, "teacher_start_logit": torch.randn(rows) * 5},
        "index": {"key_index": torch.randint(-1, columns, (rows, 2))},
        "valid": {"valid": torch.tensor([columns - 2])},
    }


def forward(a: dict, products: int = 0, kl: bool = False) -> tuple[Tensor, ...]:
    """(loss, difference, log_sums)"""
    return torch.ops.kdfast.similarity_distillation(*(a[name] for name in NAMES), products, kl)[:3]


def kept(a: dict, products: int = 0, kl: bool = False) -> tuple[Tensor, ...]:
    """(mean of the losses, difference, log_sums, dkeys for an upstream of 1) of few pairs"""
    found = torch.ops.kdfast.similarity_distillation(*(a[name] for name in NAMES), products, kl, True, True)
    assert found[3].shape == a["keys"].shape
    return found


def grad_keys(a: dict, g: Tensor, log_sums: Tensor, products: int = 0) -> Tensor:
    given = (a[name] for name in NAMES if not name.endswith("start_logit"))
    return torch.ops.kdfast.similarity_distillation_grad_keys(g, log_sums, *given, products)


def logits(a: dict, side: str, dtype) -> Tensor:  # [N, 1 + M], the start first
    query, keys, prefix = (a["student"], a["keys"], "") if side == "student" else (a["teacher"], a["teacher_keys"], "teacher_")
    z = a[f"{prefix}scale"].to(dtype)[:, None] * (query.to(dtype) @ keys.to(dtype).T)
    if a["bias"] is not None:
        z = z + a["bias"].to(dtype)
    column = torch.arange(z.shape[1])
    if a["key_index"] is not None:
        z = z.masked_fill((column[:, None] == a["key_index"][:, None]).any(-1), -math.inf)
    if a["valid"] is not None:
        z = z.masked_fill(column >= a["valid"], -math.inf)
    start = a[f"{prefix}start_logit"]
    return torch.cat([torch.full((len(z), 1), -math.inf, dtype=dtype) if start is None else start.to(dtype)[:, None], z], 1)


def formula(a: dict, g: Tensor, dtype=torch.float64) -> tuple[Tensor, ...]:
    """(cross-entropy, KL, difference, student's lse, teacher's lse, p - q of the start, dkeys) with everything materialised."""
    z, t = logits(a, "student", dtype), logits(a, "teacher", dtype)
    p, q = (x.softmax(-1).masked_fill(x == -math.inf, 0) for x in (z, t))
    log_p, log_q = (x.log_softmax(-1).masked_fill(x == -math.inf, 0) for x in (z, t))
    change = (p - q)[:, 1:]
    weights = g.to(dtype)[:, None] * a["scale"].to(dtype)[:, None] * change
    return (
        -(q * log_p).sum(-1), (q * (log_q - log_p)).sum(-1), change @ a["keys"].to(dtype), z.logsumexp(-1), t.logsumexp(-1),
        (p - q)[:, 0], weights.T @ a["student"].to(dtype),
    )  # fmt: skip
