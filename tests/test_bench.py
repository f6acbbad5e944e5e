"""The benchmark's instruments: the gate, the clock, the memory meter, and what a case's rows say."""

import csv
import math
import time

import numpy as np
import pytest
import torch

from kdfast import bench
from kdfast.bench import devices, measure, memory, peers, registry, report, runner
from kdfast.bench.cases.gather import samplers
from kdfast.bench.registry import Case, Peer

MIB = 2**20


def test_error_is_relative_to_the_largest_reference_entry():
    reference = (torch.tensor([0.0, 100.0], dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64))
    assert measure.error((torch.tensor([1.0, 100.0]), torch.tensor(2.0)), reference) == pytest.approx(0.01)
    assert measure.error((torch.tensor([0.0, 100.0]), torch.tensor(3.0)), reference) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "result",
    [
        (torch.ones(2),),
        (torch.ones(3), torch.ones(())),
        (torch.tensor([1, torch.nan]), torch.ones(())),
        (torch.tensor([1, torch.inf]), torch.ones(())),
    ],
    ids=["count", "shape", "nan", "inf"],
)
def test_error_of_what_cannot_be_compared_is_infinite(result):
    assert measure.error(result, (torch.ones(2).double(), torch.ones(()).double())) == math.inf


def test_tolerance():
    assert measure.tolerance(1e-3, torch.float32) == pytest.approx(2e-3 + 4 * 2**-23)


def test_calls_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name) or time.sleep(2 * measure.SAMPLE)) for name in "ab"}
    timings = measure.interleave(calls, seconds=0, rounds=8)
    timed = "".join(order).removeprefix("aabb")  # two calls each to warm up and to count repeats: one is a sample
    rounds = {timed[i : i + 2] for i in range(0, len(timed), 2)}
    assert timings["a"].rounds == timings["b"].rounds == 8
    assert len(timed) == 16
    assert rounds == {"ab", "ba"}  # nobody always follows the same
    assert 0 < timings["a"].low <= timings["a"].median <= timings["a"].high


def test_short_calls_are_repeated():
    calls = []
    timing = measure.interleave({"short": lambda: calls.append(0)}, seconds=0, rounds=2)["short"]
    assert len(calls) > 100
    assert timing.median < 1e-3  # of one call, not of a sample


def test_threads_are_restored():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), measure.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def torch_scratch(mib: int):
    def call():
        scratch = torch.ones(mib * MIB // 4)
        return (scratch[: MIB // 4] + 1,)  # 1 MiB returned

    return call


def other_scratch(mib: int):
    def call():
        np.ones(mib * MIB // 8)
        return ()

    return call


@pytest.mark.parametrize("build", [torch_scratch, other_scratch], ids=["torch", "not torch"])
def test_memory_of_scratch_is_seen(build):
    """Whoever allocates it; what is returned does not count; the small warm call does not hide it."""
    assert memory.peak_extra(build, 48, warm=(1,)) / MIB == pytest.approx(48, abs=3)


def fake_case(ours=lambda x: x * 2, **peer) -> Case:
    def build(function):
        return lambda inputs: lambda: (function(inputs),)

    return Case(
        shapes={"quick": ((8,),), "default": ((8,),), "full": ((8,),)},
        axes="N",
        dtypes=(torch.float32,),
        inputs=lambda shape, dtype: torch.arange(*shape, dtype=dtype),
        reference=lambda x: (x.double() * 2,),
        flop=lambda shape: 2 * shape[0],
        peers=(
            Peer("kdfast", build(ours)),
            Peer("eager", build(lambda x: x + x)),
            Peer("other", **{"build": build(lambda x: x * 2), **peer}),
        ),
    )


def rows_of(monkeypatch, case: Case) -> dict[str, runner.Row]:
    monkeypatch.setattr(registry, "cases_of", lambda family: {"some": case})
    monkeypatch.setattr(memory, "peak_extra", lambda *args, **kwargs: 0)
    monkeypatch.setitem(devices.CPU.budget, "quick", (0.0, 2))
    (rows,) = runner.run("fake", "some", "quick")
    assert [row.clock for row in rows] == ["cpu"] * 3 + ["wall"] * 3
    return {row.peer: row for row in rows}


@pytest.mark.parametrize(
    ("peer", "note"),
    [
        ({"build": lambda x: lambda: (x * 3,)}, "wrong: error 5.0e-01"),
        ({"build": lambda x: 1 / 0}, "ZeroDivisionError: division by zero"),
        ({"missing": lambda: "not installed: pip install other"}, "not installed: pip install other"),
        ({"quick": False}, "not under --quick"),
    ],
    ids=["wrong", "fails", "missing", "slow"],
)
def test_a_peer_without_a_right_answer_has_no_time(monkeypatch, peer, note):
    rows = rows_of(monkeypatch, fake_case(**peer))
    assert rows["other"].median is None and rows["other"].note.startswith(note)
    assert rows["kdfast"].median > 0 and rows["kdfast"].per_kdfast == 1 and rows["eager"].median > 0


def test_a_peer_may_be_allowed_an_error(monkeypatch):
    rows = rows_of(monkeypatch, fake_case(build=lambda x: lambda: (x * 2.001,), allowance=1e-2))
    assert rows["other"].median > 0 and rows["other"].tolerance == 1e-2 and rows["kdfast"].tolerance < 1e-2


def test_a_wrong_kdfast_has_no_time_either(monkeypatch):
    rows = rows_of(monkeypatch, fake_case(ours=lambda x: x * 2.1))
    assert rows["kdfast"].median is None and rows["kdfast"].note.startswith("wrong")
    assert rows["eager"].median > 0 and rows["eager"].per_kdfast is None


def test_a_failing_kdfast_is_not_hidden(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        rows_of(monkeypatch, fake_case(ours=lambda x: 1 / 0))


@pytest.mark.parametrize(
    ("families", "level", "names", "named"),
    [(["nonsense"], "quick", [], "family"), (["gather"], "nonsense", [], "level"), (["gather"], "quick", ["clip", "nonsense"], "case")],
    ids=["family", "level", "case of another family"],
)
def test_unknown_names(tmp_path, families, level, names, named):
    with pytest.raises(ValueError, match=f"{named} must be one of .*, got '(nonsense|clip)'"):
        bench.run(families, level, tmp_path, names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("families", "names", "measured"),
    [
        (["knn"], [], ["knn search", "knn growth"]),
        (["similarity", "gather"], ["growth"], ["similarity growth", "gather growth"]),
        ([], ["clip"], ["similarity clip"]),
        (["similarity"], ["clip", "lse"], ["similarity lse", "similarity clip"]),
    ],
    ids=["a family", "one case in two families", "in any family", "two cases"],
)
def test_cases_are_chosen_by_name(monkeypatch, tmp_path, families, names, measured):
    asked = []
    monkeypatch.setattr(runner, "run", lambda family, name, level: asked.append(f"{family} {name}") or [])
    bench.run(families, "quick", tmp_path, names)
    assert asked == measured


SMALL = {"N": 13, "M": 100, "D": 24, "K": 30, "Ds": 24, "Dt": 40, "B": 3, "T": 20, "n": 5, "k": 4, "C": 4, "Dv": 20}  # ragged
CASES = [(family, name) for family in registry.families() for name in registry.cases_of(family)]
every_case = pytest.mark.parametrize(("family", "name"), CASES, ids=[" ".join(case) for case in CASES])


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_peers_agree_with_the_reference(family, name, dtype):
    """Each that is installed and needs no compilation."""
    case = registry.cases_of(family)[name]
    inputs = case.inputs(tuple(SMALL[axis] for axis in case.axes.split()), dtype)
    reference = case.reference(inputs)
    allowed = measure.tolerance(measure.error(case.peers[1].build(inputs)(), reference), dtype)
    for peer in case.peers:
        if not runner.serves(peer, dtype, "cpu"):
            continue
        if peer.quick and peer.missing() is None and not peer.floor:
            assert measure.error(peer.build(inputs)(), reference) <= max(allowed, peer.allowance), peer.name
        elif peer.floor:
            assert measure.error(peer.build(inputs)(), peer.floor(inputs)) <= 0.02, peer.name  # it may round to bf16


@every_case
def test_formulas_stay_on_the_device_of_their_inputs(family, name):
    """What names no device is made on "meta" here, and does not mix with tensors of the CPU."""
    case = registry.cases_of(family)[name]
    inputs = case.inputs(tuple(SMALL[axis] for axis in case.axes.split()), torch.float32)
    if "cuda" in case.shapes:
        with torch.device("meta"):
            results = [case.reference(inputs), *(peer.build(inputs)() for peer in case.peers[:2])]
        assert all(x.device.type == "cpu" for result in results for x in result)


@every_case
def test_shapes_fit_their_axes(family, name):
    case = registry.cases_of(family)[name]
    assert set(case.shapes) - {"cuda"} == set(registry.LEVELS)
    for shapes in case.shapes.values():
        assert shapes and len(set(shapes)) == len(shapes) and all(len(shape) == len(case.axes.split()) for shape in shapes)


@pytest.mark.parametrize(
    ("draw", "wrong"),
    [
        (lambda x: x.rows[:, None].expand(-1, x.k), True),  # the sample's own row
        (lambda x: samplers.by_weight(x).sign().multinomial(x.k, replacement=True), True),
        (lambda x: samplers.by_weight(x).multinomial(x.k + 1, replacement=True), True),
        (lambda x: samplers.by_weight(x).multinomial(x.k, replacement=True), False),
    ],
    ids=["forbidden", "all alike", "too many", "right"],
)
def test_draws_are_judged_by_their_shares(draw, wrong):
    case = registry.cases_of("gather")["alias"]
    x = case.inputs((13, 100, 30), torch.float32)
    call = samplers.drawing(samplers.by_weight, lambda x: lambda: draw(x), x)
    assert (measure.error(call(), case.reference(x)) > samplers.ALLOWANCE) == wrong


def test_octaves():
    assert registry.octaves((3, 5, 7), entries=(0, 2), count=2) == ((3, 5, 7), (6, 5, 7), (12, 5, 7), (3, 5, 14), (3, 5, 28))


def test_chunks_are_the_whole():
    x, y, shared = torch.randn(7, 3), torch.randn(7, 3), torch.randn(3)
    loss = lambda x, y, shared: ((x * y).sum(-1) * shared.sum()).square().mean()
    for got, whole in zip(peers.in_chunks(loss, (x, y), shared, size=3), peers.step(loss, x, y, shared), strict=True):
        torch.testing.assert_close(got, whole)


def test_bare_mm_restores_the_precision():
    attention = peers.bare_mm(peers.attention_products, lambda x: (x, x))[1].build(torch.ones(3, 4))
    both = peers.bare_mm(peers.gradient_products, lambda x: (x, 2 * x))[1].build(torch.ones(3, 4))
    before = torch.get_float32_matmul_precision()
    for _ in range(2):
        torch.testing.assert_close(attention()[0], torch.full((3, 4), 12.0))
        torch.testing.assert_close(both(), (torch.full((3, 4), 48.0), torch.full((3, 4), 24.0)))
    assert torch.get_float32_matmul_precision() == before


def test_a_library_that_is_not_there_is_named():
    peer = peers.library("some-package", "no_such_module", lambda: 1 / 0)
    assert peer.missing() == "not installed: pip install some-package"


def test_run_writes_a_table_and_a_csv(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(registry, "cases_of", lambda family: {"some": fake_case()})
    monkeypatch.setattr(memory, "peak_extra", lambda *args, **kwargs: 3 * MIB)
    monkeypatch.setitem(devices.CPU.budget, "quick", (0.0, 2))
    (path,) = bench.run(["fake"], "quick", tmp_path / "new")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and rows[0]["peer"] == "kdfast" and float(rows[0]["median"]) > 0
    assert rows[0]["torch"] == torch.__version__ and rows[0]["extra_bytes"] == str(3 * MIB)
    assert list((tmp_path / "new").iterdir()) == [path]
    text = capsys.readouterr().out
    assert "fake some  N=8  float32" in text and "1 thread, process-CPU" in text and "3.0" in text


def test_table_gives_reasons():
    row = runner.Row("similarity", "info_nce", "N=1", "float32", "peer", 1, "cpu", note="not installed")
    assert "peer  not installed" in report.table([row])


@pytest.mark.parametrize("wall, busy", [(0.6, False), (1.4, False), (1.6, True)])
def test_table_says_that_threads_had_to_wait(wall, busy):
    """For other programs: no wall time is half as long again as the processor time of one thread."""
    cpu = runner.Row("similarity", "info_nce", "N=1", "float32", "kdfast", 1, "cpu", median=1.0, low=1.0, high=1.0)
    both = report.table([cpu, cpu._replace(threads=2, clock="wall", median=wall)])
    assert ("2 threads, wall; no FMA probe; the machine was busy" in both) == busy
    assert "1 thread, process-CPU; no FMA probe\n" in both
