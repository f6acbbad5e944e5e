"""`kdfast bench --device cuda` without a GPU: what is planned, what becomes of a failure, and the files."""

import csv
import json
import multiprocessing
import os
import threading
import time

import pytest
import torch

from kdfast import bench, cli
from kdfast._core import extension, impls
from kdfast.bench import clocks, devices, gpu, registry, report, runner
from kdfast.bench.runner import Row

CHOSEN = {"similarity": ["lse", "clip"], "methods": ["rkd"], "knn": ["search"]}
FACTS = {"gpu": "some GPU", "driver": "1.2", "commit": "abc", "date": "2026-01-02"}
TASK = gpu.Task("knn", "search", (4, 5, 6, 7), torch.float32, "quick")


def rows_of(task: gpu.Task) -> list[Row]:
    about = Row(task.family, task.name, str(task.shape), runner.dtype_name(task.dtype), "kdfast", 1, "cuda")
    measured = about._replace(median=2e-3, low=1e-3, high=3e-3, rounds=3, per_kdfast=1.0, flop_rate=5e14, extra_bytes=2**20, error=1e-6)
    rows = [measured._replace(clock=clock) for clock in ("cuda", "wall")]
    return rows + [about._replace(peer="other", clock=clock, note="not installed: pip install other") for clock in ("cuda", "wall")]


def test_first_shapes_come_first():
    tasks = gpu.plan(CHOSEN, "default")
    places = [registry.cases_of(task.family)[task.name].shapes["cuda"].index(task.shape) for task in tasks]
    assert tasks[0][:4] in gpu.TARGETS and places[1:] == sorted(places[1:]) and places[-1] > 0
    assert [task.name for task in tasks[:6]] == ["clip", "lse", "lse", "clip", "rkd", "search"]  # a target; two dtypes, one
    quick = {(task.family, task.name, task.shape) for task in gpu.plan(CHOSEN, "quick")}
    assert quick == {(f, n, shape) for f, names in CHOSEN.items() for n in names for shape in registry.cases_of(f)[n].shapes["quick"]}


def test_what_has_no_shapes_for_a_gpu_is_not_planned(monkeypatch):
    case = registry.cases_of("knn")["search"]
    monkeypatch.setitem(registry.cases_of("knn"), "search", case._replace(shapes={"quick": case.shapes["quick"]}))
    assert gpu.plan({"knn": ["search"]}, "quick") == []


def answer(task: gpu.Task, tell) -> list[Row]:
    tell("kdfast")
    return rows_of(task)


def fail(task: gpu.Task, tell) -> list[Row]:
    raise torch.OutOfMemoryError("too much\nand more")


def die(task: gpu.Task, tell) -> list[Row]:
    tell("eager")
    os._exit(7)


def hang(task: gpu.Task, tell) -> list[Row]:
    tell("kdfast")
    time.sleep(60)


def test_a_worker_outlives_its_processes(monkeypatch):
    worker, later = gpu.Worker(), time.monotonic() + 600
    try:
        assert worker.ask(answer, TASK, until=later)[:4] == (rows_of(TASK), None, False, False)
        assert worker.ask(die, TASK, until=later)[:3] == ([], "the process ended with exit code 7, in the call of eager", False)
        assert worker.ask(hang, TASK, until=time.monotonic() + 0.2)[1].startswith("no answer within 0 s")
        monkeypatch.setattr(gpu, "OWN_LIMIT", 0.1)
        rows, problem, own, hung, _ = worker.ask(hang, TASK, until=later)
        assert not rows and problem.endswith("in the call of kdfast") and own and hung
    finally:
        worker.stop()


def test_what_a_question_raises_is_answered():
    here, there = multiprocessing.Pipe()
    threading.Thread(target=gpu._serve, args=(there,), daemon=True).start()
    for function, *expected in ((fail, ([], "OutOfMemoryError: too much")), (answer, "kdfast", (rows_of(TASK), None))):
        here.send((function, TASK, None))
        assert [here.recv() for _ in expected] == expected


def test_a_question_may_name_the_kernels(monkeypatch):
    monkeypatch.setattr(impls, "DEFAULT", None)
    here, there = multiprocessing.Pipe()
    threading.Thread(target=gpu._serve, args=(there,), daemon=True).start()
    for impl in ("triton", None):
        here.send((default, TASK, impl))
        assert here.recv() == (impl, None)


def default(task: gpu.Task, tell):
    return impls.DEFAULT


class Asked:
    """A worker in this process. Whole comparisons of `lse` have no answer, nor those after `left` questions, for then the time is over."""

    def __init__(self, questions: int):
        self.left = questions

    def ask(self, function, task, *, until, impl=None):
        self.left -= 1
        if self.left < 0:
            time.sleep(max(0.0, until - time.monotonic()))
            return gpu.Answer([], "no answer within 0 s")
        if task.name == "lse" and function is gpu._measure:
            return gpu.Answer([], "RuntimeError: CUDA error")
        return gpu.Answer(rows_of(task), None)

    def stop(self):
        pass


def test_results_are_written_whatever_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "Worker", lambda: Asked(4))
    monkeypatch.setattr(report, "gpu_facts", lambda: FACTS)
    tasks = [TASK, TASK._replace(family="similarity", name="lse", shape=(4, 5, 6)), TASK, TASK._replace(shape=(9, 9, 9, 9))]
    with pytest.raises(RuntimeError, match=r"of 4 comparisons these failed:\n  similarity lse .* float32: RuntimeError: CUDA error$"):
        gpu.run(tasks, tmp_path / "new", seconds=0.5)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["cuda.csv", "cuda.json", "cuda.md"]
    with (tmp_path / "new" / "cuda.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and rows[0]["gpu"] == "some GPU" and rows[4]["case"] == "lse"  # of lse: kdfast and the formula alone
    found = json.loads((tmp_path / "new" / "cuda.json").read_text())
    assert found["about"] == FACTS and len(found["rows"]) == 12 and len(found["failed"]) == 1
    assert found["left"] == ["knn search N=9 M=9 D=9 k=9 float32"]
    text = (tmp_path / "new" / "cuda.md").read_text()
    assert text.startswith("gpu some GPU, driver 1.2, commit abc, date 2026-01-02\n")
    assert "| kdfast | 2 ms | 2 ms | 1.00 | 500 | 1.0 | 1e-06 | |" in text and "| other | | | | | | | not installed" in text
    assert "the GPU's time, caches flushed" in capsys.readouterr().out


OF = {name: TASK._replace(family="similarity", name=name, shape=(4, 5, 6)) for name in ("lse", "second", "clip", "queue")}
OF |= {"clip": OF["clip"]._replace(shape=(4, 5)), "queue": OF["queue"]._replace(dtype=torch.bfloat16)}


def test_what_hangs_goes_last(monkeypatch, tmp_path):
    """Of a family and dtype in which kdfast has hung, the other comparisons come after all else, and it is not asked again."""
    asked = []

    class Hanging(Asked):
        def ask(self, function, task, *, until, impl=None):
            asked.append(task.name)
            return gpu.Answer([], "no answer", own=True, hung=True) if task.name in ("lse", "clip") else gpu.Answer(rows_of(task), None)

    monkeypatch.setattr(gpu, "Worker", lambda: Hanging(9))
    monkeypatch.setattr(report, "gpu_facts", lambda: FACTS)
    with pytest.raises(RuntimeError, match=r"(?s)similarity lse .*\n.*similarity clip"):
        gpu.run([OF["lse"], OF["clip"], OF["second"], OF["queue"], TASK], tmp_path)
    assert asked == ["lse", "queue", "search", "clip", "second"]


@pytest.mark.parametrize("way", ["hangs", "ends", "wrong"])
def test_compiled_kernels_that_fail_give_way(way, monkeypatch, tmp_path):
    """To Triton's, in their family and dtype: at once, or where one hung when all else is measured. The rows say so."""
    asked = []

    class Failing(Asked):
        def ask(self, function, task, *, until, impl=None):
            asked.append((task.name, impl))
            rows = rows_of(task)
            if task.name != "lse" or impl is not None:
                return gpu.Answer(rows, None)
            failed = [row._replace(median=None, error=0.5, note="wrong: error 5.0e-01") if row.peer == "kdfast" else row for row in rows]
            problem = gpu.wrong(failed, "kdfast") if way == "wrong" else "no answer"
            return gpu.Answer(failed, problem, own=True, hung=way == "hangs")

    monkeypatch.setattr(gpu, "Worker", lambda: Failing(9))
    monkeypatch.setattr(report, "gpu_facts", lambda: FACTS)
    monkeypatch.setattr(extension, "missing_cuda", lambda: None)
    with pytest.raises(RuntimeError, match="similarity lse .* float32: " + ("wrong" if way == "wrong" else "no answer")):
        gpu.run([OF["lse"], OF["clip"], OF["queue"], TASK], tmp_path)
    others, again = [("queue", None), ("search", None)], [("lse", "triton"), ("clip", "triton")]
    assert asked == [("lse", None), *(others + again if way == "hangs" else again + others)]
    rows = json.loads((tmp_path / "cuda.json").read_text())["rows"]
    assert {row["case"] for row in rows if row["note"] == "impl='triton'"} == {"lse", "clip"}
    assert "| kdfast | 2 ms | 2 ms | 1.00 | 500 | 1.0 | 1e-06 | impl='triton' |" in (tmp_path / "cuda.md").read_text()


def test_clocks(monkeypatch, tmp_path):
    """Medians of what was told while the GPU was at work; a lost GPU says so in words."""
    told = iter(["99, 1755, 640.5, 60", "98, 1745, 650.5, 62", "3, 345, 90.0, 40", "[GPU is lost]", "97, 1000, 1.0, 1"])
    monkeypatch.setattr(clocks, "EVERY", 0.001)
    monkeypatch.setattr(clocks.shutil, "which", lambda name: name)
    watching = clocks.Clocks()

    def answer(*command, **options):
        line = next(told, None)
        if line is None:
            watching._ended.set()
        return clocks.subprocess.CompletedProcess(command, 0, stdout=line or "")

    monkeypatch.setattr(clocks.subprocess, "run", answer)
    watching.start()
    watching._thread.join(10)
    watching.stop()
    assert watching.since(0.0) == (1745, 640.5, 60) and watching.since(time.monotonic()) == (None, None, None)


def test_targets_come_first():
    """Each is a comparison that the cases have."""
    tasks = gpu.plan(bench._chosen([], ()), "default")
    assert [task[:4] for task in tasks[: len(gpu.TARGETS)]] == list(gpu.TARGETS)


def test_a_comparison_by_several_clocks(monkeypatch):
    """Built and checked once, timed by each; the plain formula may not fit into memory."""
    built = []

    def build(name):
        return lambda x: built.append(name) or (lambda: (x[0] * 2,))

    def too_large(x):
        raise torch.OutOfMemoryError("too much")

    case = registry.Case(
        shapes=dict.fromkeys((*registry.LEVELS, "cuda"), ((8,),)),
        axes="N",
        dtypes=(torch.float32,),
        inputs=lambda shape, dtype: (torch.arange(*shape, dtype=dtype), 3),
        reference=lambda x: (x[0].double() * 2,),
        flop=lambda shape: 2 * shape[0],
        peers=(
            registry.Peer("kdfast", build("kdfast")),
            registry.Peer("eager", too_large),
            registry.Peer("of a GPU", build("of a GPU"), device="cuda"),
            registry.Peer("of the CPU", build("of the CPU"), device="cpu"),
        ),
    )
    monkeypatch.setattr(registry, "cases_of", lambda family: {"some": case})
    monkeypatch.setattr(devices, "place", lambda inputs, device: inputs)
    monkeypatch.setattr(devices, "peak_on_gpu", lambda call: 5)
    clocks = tuple(devices.Clock(name, lambda call, repeats: call() and 1e-3, probed=False) for name in ("cuda", "wall"))
    device = devices.Device("cuda", lambda: ((1, clocks),), {"quick": (0.0, 2)})
    rows = runner.compare("fake", "some", (8,), torch.float32, "quick", device)
    assert [(row.peer, row.clock) for row in rows] == [(p, c) for c in ("cuda", "wall") for p in ("kdfast", "eager", "of a GPU")]
    assert built == ["kdfast", "of a GPU"]
    assert rows[0].flop_rate == 16e3 and rows[0].extra_bytes == 5 and rows[0].fma_rate is None and rows[1].note.startswith("OutOfMemory")
    told = []
    own = runner.compare("fake", "some", (8,), torch.float32, "quick", device, own=True, tell=told.append)
    assert [row.peer for row in own] == ["kdfast", "eager"] * 2 and told == ["kdfast", "eager"]


def test_places_are_kept():
    case = registry.cases_of("knn")["search"]
    inputs = case.inputs((3, 4, 5, 2), torch.float32)
    moved = devices.place(inputs, "meta")
    assert type(moved) is type(inputs) and moved.query.device.type == "meta" and moved.k == 2
    assert devices.place((inputs.query, 7), "meta")[0].device.type == "meta" and devices.place(inputs, "cpu") is inputs


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in (["--output", str(tmp_path / "new")], ["--compile-only"]):
        assert cli.main(["bench", "knn", "--device", "cuda", *arguments]) == 1
        assert "no GPU is visible to PyTorch" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_arguments_reach_it(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(bench, "run_on_gpu", lambda *given, **options: calls.append((given, options)))
    monkeypatch.setattr(bench, "compile_for_gpu", lambda *given, **options: calls.append((given, options)))
    assert cli.main(["bench", "knn", "--device", "cuda", "--quick", "--seconds", "9", "--output", str(tmp_path)]) == 0
    assert cli.main(["bench", "--device", "cuda", "--compile-only", "--case", "clip"]) == 0
    assert calls == [((["knn"], "quick", tmp_path, []), {"seconds": 9}), (([], "default", ["clip"]), {"seconds": None})]
