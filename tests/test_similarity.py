"""similarity_softmax and similarity_lse: values against the float64 reference, exclusions, numerics, memory, arguments."""

import pytest
import torch
from similarity_cases import IMPLS, SIZES, assert_as_good_as, cast, everything, normal, serve_or_skip
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast._ops.similarity import reference, similarity_lse
from kdfast.ops import Harder, KeyIndex, SameLabel, similarity_softmax

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.parametrize("impl", IMPLS)


def check(query, keys, impl, **kwargs):
    """Both outputs against the truth; the portable passes on half precision inputs are held to float32's error."""
    ours = similarity_softmax(query, keys, impl=impl, **kwargs)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    rival = wide if impl != "cpu" else query.dtype
    naive = reference.similarity_softmax(query.to(rival), keys.to(rival), **cast(kwargs, rival))
    truth = reference.similarity_softmax(query.double(), keys.double(), **cast(kwargs, torch.float64))
    for x, y, z in zip(ours, naive, truth, strict=True):
        assert x.dtype == wide
        assert_as_good_as(x, y, z)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, m, d", SIZES)
def test_plain(impl, n, m, d, dtype):
    serve_or_skip(impl, dtype)
    check(normal(n, d, dtype=dtype), normal(m, d, dtype=dtype), impl, scale=d**-0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, m, d", SIZES)
def test_everything_at_once(impl, n, m, d, dtype):
    serve_or_skip(impl, dtype)
    kwargs = everything(n, m, d, dtype=dtype)
    if dtype.itemsize <= 2:  # a rounded score may fall on the other side of the limit: a different problem, not an error
        kwargs["exclude"] = kwargs["exclude"][:2]
    check(normal(n, d, dtype=dtype), normal(m, d, dtype=dtype), impl, **kwargs)


@pytest.mark.parametrize("rule", ["label", "index", "harder", "bias", "valid"])
def test_each_exclusion_alone(impl, rule):
    query, keys = normal(5, 8), normal(257, 8)
    kwargs = {
        "label": dict(exclude=(SameLabel(torch.arange(5, dtype=torch.uint8), torch.arange(257) % 3),)),
        "index": dict(exclude=(KeyIndex(torch.tensor([-1, 0, 256, 100, -1])),)),
        "harder": dict(scale=torch.tensor(2.0), exclude=(Harder(torch.zeros(5), torch.tensor(0.5)),)),
        "bias": dict(bias=torch.where(torch.arange(257) % 2 == 0, -torch.inf, 0.3)),
        "valid": dict(valid=torch.tensor(65)),
    }[rule]
    lse, pooled = check(query, keys, impl, **kwargs)
    unrestricted = similarity_softmax(query, keys, impl=impl, scale=kwargs.get("scale", 1.0))
    assert not torch.allclose(lse, unrestricted[0]) and not torch.allclose(pooled, unrestricted[1])


def test_harder_is_strict_and_compared_before_bias(impl):
    query, keys = torch.eye(2)[:1], torch.tensor([[1.0, 0.0], [0.5, 0.0]])
    lse, _ = similarity_softmax(query, keys, bias=torch.tensor([3.0, 0.0]), exclude=(Harder(torch.tensor([0.75]), 0.25),), impl=impl)
    torch.testing.assert_close(lse, torch.logsumexp(torch.tensor([[4.0, 0.5]]), -1))
    lse, _ = similarity_softmax(query, keys, bias=torch.tensor([3.0, 0.0]), exclude=(Harder(torch.tensor([0.5]), 0.25),), impl=impl)
    torch.testing.assert_close(lse, torch.tensor([0.5]))


@pytest.mark.parametrize("shared", [True, False], ids=["shared bank", "a bank each"])
def test_leading_dimensions(impl, shared):
    batch = (2, 3)
    bank = () if shared else batch
    kwargs = everything(5, 65, 8, dtype=torch.float32, batch=batch)
    if not shared:  # the bank's side batched in part: labels and bias are shared still
        kwargs["valid"] = torch.tensor([[65, 64, 1], [0, 33, 65]])
    check(normal(*batch, 5, 8), normal(*bank, 65, 8), impl, **kwargs)


def test_values_other_than_the_keys(impl):
    check(normal(7, 8), normal(257, 8), impl, values=normal(257, 5), start=(normal(7), normal(7, 5)))
    check(normal(2, 7, 8), normal(257, 8), impl, values=normal(2, 257, 5))


def test_several_indices_excluded_per_query(impl):
    indices = torch.randint(-1, 65, (7, 3))
    query, keys = normal(7, 8), normal(65, 8)
    bias = torch.zeros(7, 65).scatter_(1, indices.clamp(min=0), -torch.inf)
    bias[:, 0] = torch.where((indices == 0).any(-1), -torch.inf, 0.0)  # column 0 also took the -1s
    expected = similarity_softmax(query[:, None], keys.expand(7, 65, 8), bias=bias, impl=impl)
    lse, pooled = similarity_softmax(query, keys, exclude=(KeyIndex(indices),), impl=impl)
    torch.testing.assert_close((lse, pooled), (expected[0][:, 0], expected[1][:, 0]))


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5), torch.rand(5), torch.rand(2, 5)], ids=["float", "0-d", "row", "batch"])
def test_forms_of_scale(impl, scale):
    query, keys = normal(2, 5, 8), normal(65, 8)
    full = scale if isinstance(scale, float) else scale.expand(2, 5)
    lse, _ = similarity_softmax(query, keys, scale=scale, impl=impl)
    torch.testing.assert_close(lse, reference.similarity_softmax(query, keys, scale=full)[0])


def test_non_contiguous_and_expanded_inputs(impl):
    query, keys = normal(8, 2, 7).permute(1, 2, 0), normal(8, 65).T
    check(query, keys, impl)
    check(normal(1, 8).expand(7, 8), normal(1, 8).expand(65, 8), impl, bias=normal(1).expand(65), scale=torch.ones(1).expand(7))
    check(normal(3, 7, 8), normal(65, 8).expand(3, 65, 8), impl)
    check(normal(7, 16)[:, ::2], normal(130, 8)[::2], impl)


@pytest.mark.parametrize("shape", [(0, 8), (0, 5, 8), (2, 0, 8)])
def test_empty_batch(impl, shape):
    lse, pooled = similarity_softmax(torch.zeros(shape, requires_grad=True), normal(65, 8), impl=impl)
    assert lse.shape == shape[:-1] and pooled.shape == shape
    lse.sum().backward()


def test_similarity_lse_equals_the_public_op(impl):
    query, keys, kwargs = normal(7, 8), normal(257, 8), everything(7, 257, 8, dtype=torch.float32)
    expected = similarity_softmax(query, keys, impl=impl, **kwargs)
    lse, pooled = similarity_lse(query.requires_grad_(), keys, impl=impl, need_pooled=True, **kwargs)
    torch.testing.assert_close((lse.detach(), pooled), tuple(x.detach() for x in expected))
    assert lse.requires_grad and not pooled.requires_grad
    assert similarity_lse(query, keys, impl=impl, **kwargs)[1] is None


# numerics


def test_low_cosine_rows_at_scale_150(impl):
    """The best cosine of each row is far below 1: exp(z - scale) underflows for all, so a fixed shift gives log 0."""
    keys = torch.nn.functional.normalize(normal(257, 16), dim=-1)
    query = -torch.nn.functional.normalize(keys.mean(0) + 0.01 * normal(5, 16), dim=-1)
    keys = torch.nn.functional.normalize(keys + 2 * keys.mean(0, keepdim=True) / keys.mean(0).norm(), dim=-1)
    lse, _ = check(query, keys, impl, scale=150.0)
    assert (lse < -50).all()


def test_all_logits_below_minus_88_with_a_ragged_bank(impl):
    """Padded columns counted as 0 instead of -inf would outweigh every real one; exp underflows without a running maximum."""
    query = normal(7, 16).abs() + 1
    lse, _ = check(query, -normal(259, 16).abs() - 1, impl, scale=10.0)
    assert (lse < -88).all()


def test_flat_softmax_over_65536_rows(impl):
    keys = normal(65536, 8)
    _, pooled = check(normal(3, 8), keys, impl, scale=1e-3)
    assert pooled.abs().max() < 0.05


def test_logits_that_overflow_exp(impl):
    lse, _ = check(normal(5, 16), normal(65, 16), impl, scale=1e4)
    assert (lse > 1e3).all()


def test_half_precision_scores_beyond_its_range(impl):
    serve_or_skip(impl, torch.float16)
    query, keys = 200 * torch.ones(2, 64, dtype=torch.float16), 200 * torch.ones(65, 64, dtype=torch.float16)
    lse, pooled = similarity_softmax(query, keys, impl=impl)
    torch.testing.assert_close(lse, torch.full((2,), 200.0 * 200 * 64).add(torch.tensor(65.0).log()))
    torch.testing.assert_close(pooled, torch.full((2, 64), 200.0))


def test_rows_with_nothing_admitted(impl):
    query, keys = normal(3, 8, requires_grad=True), normal(65, 8, requires_grad=True)
    excluded = (SameLabel(torch.tensor([0, 1, 0]), torch.zeros(65, dtype=torch.int64)),)
    lse, pooled = similarity_softmax(query, keys, exclude=excluded, impl=impl)
    assert lse.isneginf().tolist() == [True, False, True]
    assert (pooled[::2] == 0).all()
    (lse + pooled.sum(-1)).sum().backward()
    assert (query.grad[::2] == 0).all() and query.grad[1].abs().sum() > 0
    assert keys.grad.isfinite().all()


@pytest.mark.parametrize("valid", [0, torch.tensor(0)], ids=["int", "tensor"])
def test_an_unfilled_bank_leaves_the_start(impl, valid):
    query, keys = normal(3, 8, requires_grad=True), torch.full((65, 8), torch.nan)
    lse, pooled = similarity_softmax(query, keys, valid=valid, impl=impl)
    assert lse.isneginf().all() and (pooled == 0).all()
    logit, value = normal(3), normal(3, 8)
    lse, pooled = similarity_softmax(query, keys, valid=valid, start=(logit, value), impl=impl)
    torch.testing.assert_close((lse, pooled), (logit, value))
    lse.sum().backward()
    assert (query.grad == 0).all()


def test_rows_beyond_valid_are_not_read(impl):
    query, keys = normal(3, 8, requires_grad=True), normal(65, 8)
    expected = similarity_softmax(query, keys[:40], impl=impl)
    keys[40:] = torch.nan
    torch.testing.assert_close(similarity_softmax(query, keys, valid=40, impl=impl), expected)


def test_nan_and_infinity_propagate_as_in_the_formula(impl):
    query, keys = normal(4, 8), normal(65, 8)
    query[1, 3] = torch.nan
    lse, pooled = similarity_softmax(query, keys, impl=impl)
    assert lse.isnan().tolist() == [False, True, False, False] and pooled.isnan().any(-1).tolist() == [False, True, False, False]
    query = normal(4, 8)
    query[:, 0] = torch.tensor([1.0, -1.0, 2.0, -2.0])
    keys[7, 0] = torch.nan
    lse, _ = similarity_softmax(query, keys, exclude=(KeyIndex(torch.tensor([7, 7, -1, 0])),), impl=impl)
    assert lse.isnan().tolist() == [False, False, True, True]
    keys[7] = 0
    keys[7, 0] = torch.inf
    lse, _ = similarity_softmax(query, keys, impl=impl)
    expected, _ = reference.similarity_softmax(query, keys)  # +inf where q.k is +inf; log_softmax would say nan there: either will do
    assert 0 < expected.isinf().sum() < 4
    assert torch.equal(lse.isfinite(), expected.isfinite())
    torch.testing.assert_close(lse[lse.isfinite()], expected[expected.isfinite()])


def test_same_inputs_give_the_same_bits(impl):
    query, keys = normal(65, 16, requires_grad=True), normal(1100, 16, requires_grad=True)

    def run():
        lse, pooled = similarity_softmax(query, keys, impl=impl)
        return lse, pooled, *torch.autograd.grad(lse.sum() + pooled.square().sum(), (query, keys))

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


# autocast and precision


def test_autocast_may_round_operands_and_nothing_else(impl):
    query, keys = normal(7, 16, requires_grad=True), normal(257, 16)
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    expected = similarity_softmax(query.bfloat16(), keys.bfloat16(), scale=scale, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        lse, pooled = similarity_softmax(query, keys.bfloat16(), scale=scale, impl=impl)  # a bank of another dtype is fine here
        both = similarity_softmax(query, keys, scale=scale, impl=impl)
        dquery, dscale = torch.autograd.grad(lse.sum() + pooled.sum(), (query, scale))
    for ours in ((lse, pooled), both):  # a kernel may round less than autocast allows
        for got, rounded in zip(ours, expected, strict=True):
            torch.testing.assert_close(got, rounded, rtol=2e-2, atol=0.15)
    assert lse.dtype == torch.float32 and dquery.dtype == torch.float32
    for ours, theirs in zip((dquery, dscale), torch.autograd.grad(expected[0].sum() + expected[1].sum(), (query, scale)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_precision_costs_no_more_than_its_name_says(impl):
    query, keys = normal(7, 16), normal(257, 16)
    exact = similarity_softmax(query.double(), keys.double(), impl="torch")
    rounded = similarity_softmax(query.bfloat16(), keys.bfloat16(), impl=impl)
    coarse, fine = (similarity_softmax(query, keys, precision=name, impl=impl) for name in ("bf16", "bf16x3"))
    for got, fine_got, bound, want in zip(coarse, fine, rounded, exact, strict=True):
        assert (got - want).abs().max() <= 2 * (bound - want).abs().max() + 1e-6
        torch.testing.assert_close(fine_got, want, rtol=1e-4, atol=1e-4, check_dtype=False)


# memory


class LargestTensor(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def test_no_tensor_of_the_size_of_the_scores(impl):
    query, keys = normal(600, 8, requires_grad=True), normal(9000, 8, requires_grad=True)
    with LargestTensor() as mode:
        lse, pooled = similarity_softmax(query, keys, exclude=(KeyIndex(torch.arange(600)),), impl=impl)
        first = torch.autograd.grad(lse.sum() + pooled.square().sum(), (query, keys), create_graph=True)
        (first[0].square().sum() + first[1].square().sum()).backward()
    assert mode.largest <= 4 * (1 << 18)  # a tile; the scores are 20 times that


# arguments


def test_bad_input_is_named(impl):
    q, k = normal(3, 8), normal(5, 8)
    labels = torch.zeros(3, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    for error, word, args, kwargs in [
        (TypeError, "query must be a Tensor", (None, k), {}),
        (TypeError, "query must be float16", (q.long(), k), {}),
        (ValueError, "query must have at least 2", (q[0], k), {}),
        (ValueError, "keys must have the width of query", (q, normal(5, 7)), {}),
        (ValueError, "keys must have at least 1 row", (q, k[:0]), {}),
        (ValueError, r"keys must be \[M, D\] or have the leading", (q, normal(2, 5, 8)), {}),
        (TypeError, "keys must have the dtype of query", (q, k.double()), {}),
        (ValueError, "keys must hold values, got a tensor on the meta device", (q, k.to("meta")), {}),
        (ValueError, "values must have a row for each", (q, k), dict(values=normal(4, 8))),
        (ValueError, "bias must have shape", (q, k), dict(bias=normal(4))),
        (TypeError, "bias must be float16", (q, k), dict(bias=labels[1])),
        (TypeError, "scale must be a float", (q, k), dict(scale="1")),
        (ValueError, "scale must be a float, 0-d", (q, k), dict(scale=normal(4))),
        (TypeError, "start must be a tuple", (q, k), dict(start=normal(3))),
        (ValueError, "start logit must have shape", (q, k), dict(start=(normal(4), None))),
        (ValueError, "start value must have shape", (q, k), dict(start=(normal(3), normal(3, 7)))),
        (TypeError, "exclude must be a tuple", (q, k), dict(exclude=KeyIndex(labels[0]))),
        (TypeError, "exclude must hold SameLabel", (q, k), dict(exclude=(labels,))),
        (ValueError, "at most one SameLabel", (q, k), dict(exclude=(SameLabel(*labels), SameLabel(*labels)))),
        (ValueError, "SameLabel.key_labels must have shape", (q, k), dict(exclude=(SameLabel(labels[0], labels[0]),))),
        (TypeError, "SameLabel.query_labels must have an integer", (q, k), dict(exclude=(SameLabel(normal(3), labels[1]),))),
        (IndexError, r"KeyIndex.index must lie in \[-1, 5\)", (q, k), dict(exclude=(KeyIndex(torch.tensor([0, 5, 1])),))),
        (ValueError, r"KeyIndex.index must have shape \(3\) or \(3, E\)", (q, k), dict(exclude=(KeyIndex(labels[0][0]),))),
        (ValueError, r"KeyIndex.index must have shape", (q, k), dict(exclude=(KeyIndex(labels[1]),))),
        (ValueError, "Harder.than must have shape", (q, k), dict(exclude=(Harder(normal(4), 0.1),))),
        (ValueError, r"valid must lie in \[0, 5\], got 6", (q, k), dict(valid=6)),
        (TypeError, "valid must be an int", (q, k), dict(valid=1.5)),
        (IndexError, r"valid must lie in \[0, 6\)", (q, k), dict(valid=torch.tensor(6))),
        (ValueError, "precision must be one of", (q, k), dict(precision="fp8")),
        (ValueError, "impl must be None or one of", (q, k), dict(impl="gpu")),
        (ValueError, "impl='triton' cannot serve similarity_softmax", (q, k), dict(impl="triton")),
    ]:
        with pytest.raises(error, match=word):
            similarity_softmax(*args, **{"impl": impl, **kwargs})
