"""What the tests of the C++ similarity kernels share: arguments, and the definition with everything materialised."""

import math

import pytest
import torch
from torch import Tensor

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
ULP = 2.0**-23

# Products are chosen by the number of queries (similarity/bind_similarity.h). 2: the bank is read in place; 5: for floats; 20: floats on
# vectors; 70: on tiles, where there are any.
ROWS = pytest.mark.parametrize("rows", [2, 5, 20, 70])

# So wide that blocks of columns are packed in pieces (similarity/wide.inl): whole blocks where they lie and a ragged one; an odd width;
# rows of two chunks.
WIDE = [(1, 20, 130, 1024), (1, 9, 257, 1025), (1, 580, 17, 800)]


def case(batch, rows, columns, width, dtype=torch.float32, *, shared=False, scale=None, unit=True, **options) -> dict:
    """Arguments of cpu.forward; `options` gives any of the optional ones."""
    query, keys = torch.randn(batch, rows, width), torch.randn(1 if shared else batch, columns, width)
    if unit:
        query, keys = (torch.nn.functional.normalize(x, dim=-1) for x in (query, keys))
    names = ("bias", "start_logit", "start_value", "query_labels", "key_labels", "key_index", "limit", "valid")
    scale = torch.rand(batch, rows) * 20 if scale is None else torch.full((batch, rows), float(scale))
    made = {"query": query.to(dtype), "keys": keys.to(dtype).expand(batch, -1, -1), "scale": scale}
    return {**made, **dict.fromkeys(names), **options}


def options(batch: int, rows: int, columns: int, width: int, dtype) -> dict:
    return {
        "bias": {"bias": torch.randn(batch, columns).masked_fill(torch.rand(batch, columns) < 0.2, -math.inf)},
        "start": {"start_logit": torch.randn(batch, rows) * 5, "start_value": torch.randn(batch, rows, width).to(dtype)},
        "labels": {"query_labels": torch.randint(3, (batch, rows)), "key_labels": torch.randint(3, (batch, columns))},
        "index": {"key_index": torch.randint(-1, columns, (batch, rows, 2))},
        "limit": {"limit": torch.randn(batch, rows)},
        "valid": {"valid": torch.randint(columns + 1, (batch,))},
    }


CHOSEN = pytest.mark.parametrize("chosen", ["bias", "start", "labels", "index", "limit", "valid", "all"])


def chosen_options(chosen: str, shape: tuple[int, ...], dtype=torch.float32) -> dict:
    """One kind of options, or all of them together."""
    return {k: v for name, part in options(*shape, dtype).items() if chosen in (name, "all") for k, v in part.items()}


#: four ways to exclude every column of case(*NOTHING_SHAPE)
NOTHING_SHAPE = (2, 7, 70, 5)
NOTHING = pytest.mark.parametrize(
    "nothing",
    [
        {"query_labels": torch.ones(2, 7, dtype=torch.long), "key_labels": torch.ones(2, 70, dtype=torch.long)},
        {"valid": torch.zeros(2, dtype=torch.long)},
        {"bias": torch.full((2, 70), -math.inf)},
        {"limit": torch.full((2, 7), -1e30)},
    ],
    ids=["labels", "valid", "bias", "limit"],
)


def candidates(a: dict, dtype=torch.float64) -> Tensor:  # [B, N, M], or [B, N, 1 + M] with a start
    """The logits of every candidate, -inf where excluded."""
    query, keys, scale = a["query"].to(dtype), a["keys"].to(dtype), a["scale"].to(dtype)
    logits = scale[..., None] * (query @ keys.transpose(1, 2))  # [B, N, M]
    column = torch.arange(keys.shape[1])
    dropped = torch.zeros_like(logits, dtype=torch.bool)
    if a["limit"] is not None:
        dropped |= logits > a["limit"].to(dtype)[..., None]
    if a["query_labels"] is not None:
        dropped |= a["query_labels"][..., None] == a["key_labels"][:, None]
    if a["key_index"] is not None:
        dropped |= (column[:, None] == a["key_index"][:, :, None]).any(-1)
    if a["valid"] is not None:
        dropped |= (column >= a["valid"][:, None])[:, None]
    if a["bias"] is not None:
        logits = logits + a["bias"].to(dtype)[:, None]
    logits = logits.masked_fill(dropped, -math.inf)
    if a["start_logit"] is not None:
        logits = torch.cat([a["start_logit"].to(dtype)[..., None], logits], -1)
    return logits


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and weights, which are 0 in a row where all is excluded."""
    lse = logits.logsumexp(-1)
    return lse, torch.where(lse[..., None] == -math.inf, 0, (logits - lse[..., None]).exp())


def assert_accurate(got: Tensor, want: Tensor, naive: Tensor, extra: float = 0.0) -> None:
    """Error at most twice that of the same formula in the inputs' dtype, plus 4 units in the last place of fp32 and `extra`, a share."""
    assert got.dtype == torch.float32
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert torch.equal(got.double()[~finite & ~want.isnan()], want[~finite & ~want.isnan()])
    largest = want[finite].abs().max().item() if finite.any() else 0.0
    error = (got.double() - want)[finite].abs().max().item() if finite.any() else 0.0
    naive_error = (naive.double() - want)[finite].abs().max().item() if finite.any() else 0.0
    assert error <= 2 * naive_error + (4 * ULP + extra) * max(1.0, largest), (error, naive_error, largest)


# ---- gradients of the pooled output ---------------------------------------------------------------------------------------

OVER_KEYS, VALUES = None, 20  # widths of values
OVER = pytest.mark.parametrize("width", [OVER_KEYS, VALUES], ids=["values are keys", "values"])


def of_pooled(a: dict, width: int | None, dtype: torch.dtype) -> dict:
    """h, an upstream gradient of the pooled output, and values (None: the keys) for a problem."""
    (batch, rows, own), columns = a["query"].shape, a["keys"].shape[1]
    values = None if width is None else torch.randn(batch, columns, width).to(dtype)
    return {"h": torch.randn(batch, rows, width or own), "values": values}


def shared_values(u: dict) -> tuple[dict, dict]:
    """`u` with one batch entry's values for all, as a view and laid out."""
    if u["values"] is None:
        return u, u
    values = u["values"][:1].expand(len(u["values"]), -1, -1)
    return {**u, "values": values}, {**u, "values": values.contiguous()}


def gradient_sums(a: dict, u: dict, p: Tensor, slopes, dtype) -> dict[str, Tensor]:
    """The gradients that weights p [B, N, M] and logits' gradients p (slopes(h.v)) make, everything materialised; "dz" are the latter."""
    query, keys, h = (x.to(dtype) for x in (a["query"], a["keys"], u["h"]))
    values = keys if u["values"] is None else u["values"].to(dtype)
    dz = p * slopes(h @ values.mT)
    dkeys, dvalues = (dz * a["scale"].to(dtype)[..., None]).mT @ query, p.mT @ h
    if u["values"] is None:
        dkeys, dvalues = dkeys + dvalues, dvalues.new_zeros(0)
    return {"rows": dz @ keys, "dkeys": dkeys, "dbias": dz.sum(1), "dvalues": dvalues, "dz": dz}


def assert_all_accurate(ours: dict[str, Tensor], truth: dict[str, Tensor], naive: dict[str, Tensor]) -> None:
    """Of all that is wanted."""
    for name, got in ours.items():
        if got.shape != (0,):
            assert_accurate(got, truth[name], naive[name])
