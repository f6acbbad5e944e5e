"""AliasSampler and ClassSampler: the right distribution, never the sample's own row or class, reproducible."""

import copy

import pytest
import torch

from kdfast._core import extension
from kdfast.bank import AliasSampler, ClassSampler
from kdfast.bank.samplers import _alias_table


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> None:
    """Counts fit `expected`: chi-square within five standard deviations of its mean; nothing where nothing is expected."""
    assert (counts[expected == 0] == 0).all()
    counts, expected = counts[expected > 0].double(), expected[expected > 0].double()
    freedom = len(expected) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert freedom - 5 * (2 * freedom) ** 0.5 <= statistic < freedom + 5 * (2 * freedom) ** 0.5 + 10


WEIGHTS = {
    "equal": torch.ones(37),
    "frequencies": torch.arange(1, 41).float() ** 0.75,
    "one-heavy": torch.tensor([1.0, 2, 60, 1, 0, 3] + [1.0] * 30),
    "two": torch.tensor([0.99, 0.01]),
    "zeros": torch.tensor([0.0, 3, 0, 0, 1, 2, 0]),
    "counts": torch.arange(5.0),  # a row of the mean weight, which has nothing to spare
    "used up": torch.tensor([1.0, 1, 1, 2, 2, 2, 3, 3, 3]),  # spares that end where lacks do
    "power-law": 1 / torch.arange(1, 200).double() ** 2,
}


@pytest.mark.parametrize("weights", [*WEIGHTS.values(), torch.rand(10_000)], ids=[*WEIGHTS, "large"])
def test_alias_table_holds_the_weights(weights):
    keep, alias = _alias_table(weights)
    assert ((keep >= 0) & (keep <= 1)).all()
    mass = torch.zeros(len(weights), dtype=torch.float64)
    mass += keep.double()
    mass.index_add_(0, alias, 1 - keep.double())
    torch.testing.assert_close(mass / len(weights), weights.double() / weights.double().sum(), rtol=1e-5, atol=1e-6 / len(weights))


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_alias_draws_fit(weights):
    k = 20_000
    sampler = AliasSampler(weights, k)
    rows = torch.tensor([0, 1, int(weights.argmax()), len(weights) - 1])
    index = sampler.draw(rows, torch.Generator().manual_seed(1))
    assert index.shape == (4, k) and index.dtype == torch.int64
    for row, drawn in zip(rows, index, strict=True):
        chances = weights.double().index_fill(0, row, 0.0)
        chi_square(drawn.bincount(minlength=len(weights)), chances / chances.sum() * k)


def test_weights_may_overflow_their_sum():
    weights = torch.tensor([1.0, 0.25, 1.0, 0.5], dtype=torch.float64)
    rows, seed = torch.arange(4), torch.tensor(0)
    assert AliasSampler(weights * 2.0**1023, 50).draw(rows, seed).equal(AliasSampler(weights, 50).draw(rows, seed))


def test_class_draws_fit():
    labels = torch.tensor([5, -2, 5, 9, 9, 5, -2, 5, 9, 9, 9, 100])
    k = 20_000
    index = ClassSampler(labels, k).draw(torch.arange(12), torch.Generator().manual_seed(2))
    for row in range(12):
        chances = (labels != labels[row]).double()
        chi_square(index[row].bincount(minlength=12), chances / chances.sum() * k)


SAMPLERS = {
    "alias": lambda **kw: AliasSampler(torch.arange(1.0, 51), 16, **kw),
    "class": lambda **kw: ClassSampler(torch.arange(50) % 7, 16, **kw),
}
samplers = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)


@samplers
def test_a_draw_depends_on_seed_row_and_slot_alone(make):
    sampler = make()
    rows, seed = torch.tensor([3, 7, 3, 49]), torch.tensor(11)
    index = sampler.draw(rows, seed)
    assert torch.equal(index[0], index[2]) and not torch.equal(index[0], index[1])
    assert torch.equal(sampler.draw(rows[1:2].int(), seed)[0], index[1])
    assert not torch.equal(sampler.draw(rows, torch.tensor(12)), index)
    assert torch.equal(sampler.draw(rows, seed, positive=True), torch.cat([rows[:, None], index], 1))
    assert sampler.draw(rows[:0], seed).shape == (0, 16)


@samplers
def test_rows_and_slots_are_independent(make):
    # neighbouring rows and slots of one seed must not repeat each other's draws
    index = make().draw(torch.arange(50), torch.tensor(5)).double()
    index = index - index.mean()
    for other in (index.roll(1, 0), index.roll(1, 1)):
        assert abs(float((index * other).mean() / index.var())) < 0.2


@samplers
def test_generators_and_saved_state(make):
    rows = torch.arange(4)
    torch.manual_seed(4)
    first = make().draw(rows)
    torch.manual_seed(4)
    assert torch.equal(make().draw(rows), first)  # PyTorch's global generator
    sampler = make(generator=torch.Generator().manual_seed(8))
    sampler.draw(rows)
    state = copy.deepcopy(sampler.state_dict())
    following = [sampler.draw(rows) for _ in range(2)]
    assert not torch.equal(*following)
    restored = make(generator=torch.Generator())
    restored.load_state_dict(state)
    assert torch.equal(restored.draw(rows), following[0]) and torch.equal(restored.draw(rows), following[1])
    assert make().load_state_dict(make().state_dict())


@samplers
def test_compiles_whole(make):
    sampler = make()
    draw = torch.compile(lambda rows, seed: sampler.draw(rows, seed), backend="aot_eager", fullgraph=True)
    rows, seed = torch.arange(5), torch.tensor(3)
    assert torch.equal(draw(rows, seed), sampler.draw(rows, seed))


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "weights", lambda: AliasSampler(torch.tensor([1.0, -1, 2]), 3)),
        (ValueError, "weights", lambda: AliasSampler(torch.tensor([1.0, torch.nan]), 3)),
        (ValueError, "at least two", lambda: AliasSampler(torch.tensor([1.0, 0, 0]), 3)),
        (TypeError, "weights", lambda: AliasSampler(torch.tensor([1, 2]), 3)),
        (ValueError, "k must", lambda: AliasSampler(torch.ones(3), 0)),
        (TypeError, "generator", lambda: AliasSampler(torch.ones(3), 2, generator=3)),
        (ValueError, "two classes", lambda: ClassSampler(torch.zeros(4).long(), 3)),
        (ValueError, "two classes", lambda: ClassSampler(torch.zeros(0).long(), 3)),
        (ValueError, "labels", lambda: ClassSampler(torch.zeros(4, 2).long(), 3)),
        (TypeError, "labels", lambda: ClassSampler(torch.zeros(4), 3)),
        (IndexError, "rows", lambda: ClassSampler(torch.arange(4), 3).draw(torch.tensor([4]))),
        (IndexError, "rows", lambda: AliasSampler(torch.ones(4), 3).draw(torch.tensor([-1]))),
        (ValueError, "rows", lambda: AliasSampler(torch.ones(4), 3).draw(torch.tensor(1))),
        (TypeError, "rows", lambda: AliasSampler(torch.ones(4), 3).draw(torch.tensor([1.0]))),
        (TypeError, "generator", lambda: AliasSampler(torch.ones(4), 3).draw(torch.tensor([1]), 7)),
    ],
)
def test_bad_input(error, match, call):
    with pytest.raises(error, match=match):
        call()


SAMPLERS = {
    **{name: lambda k, w=weights: AliasSampler(w, k) for name, weights in WEIGHTS.items()},
    "classes": lambda k: ClassSampler(torch.arange(60) % 7, k),
}


@pytest.mark.skipif(extension.missing_cpu() is not None, reason=str(extension.missing_cpu()))
@pytest.mark.parametrize("made", SAMPLERS.values(), ids=SAMPLERS)
def test_the_kernel_draws_what_torch_draws(made, threads):
    for k in (1, 5, 3000):
        sampler = made(k)
        rows = torch.randint(sampler._size, (9,))
        for seed in (0, -5, 2**62 + 12345):
            seed = torch.tensor(seed)
            want = sampler._draw(rows[:, None], seed)
            assert sampler.draw(rows, seed).equal(want)
            assert sampler.draw(rows[::2], seed, positive=True).equal(torch.cat([rows[::2, None], want[::2]], 1))
    assert sampler.draw(rows[:0]).shape == (0, 3000)
    assert sampler.double().draw(rows, seed).equal(want)  # with a model's .double()


@pytest.mark.skipif(extension.missing_cpu() is not None, reason=str(extension.missing_cpu()))
def test_opcheck():
    alias, classes = AliasSampler(torch.rand(6), 4), ClassSampler(torch.arange(6) % 2, 4)
    own, seed = torch.tensor([0, 5, 3]), torch.tensor(7)
    tables = alias.keep, alias.alias, alias.heavy, alias.heaviest, alias.tries
    for positive in (False, True):
        torch.library.opcheck(torch.ops.kdfast.draw_alias, (own, seed, *tables, 4, positive))
        torch.library.opcheck(torch.ops.kdfast.draw_class, (own, seed, classes.by_class, classes.first, classes.count, 4, positive))
    with pytest.raises(RuntimeError, match="own must be in"):
        torch.ops.kdfast.draw_alias(own + 1, seed, *tables, 4, False)
