"""capture, encode and Features."""

import copy
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import kdfast
from kdfast import Features, capture, encode
from kdfast.features.encode import fingerprint


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))


class TwoHeads(nn.Module):
    """Returns a tuple from a submodule and takes its input by keyword."""

    class Body(nn.Module):
        def forward(self, x):
            return x + 1, x - 1

    def __init__(self):
        super().__init__()
        self.body, self.fc, self.unused = self.Body(), nn.Linear(3, 2), nn.Linear(1, 1)

    def forward(self, x):
        return {"logits": self.fc(self.body(x=x)[0])}


# -- capture ---------------------------------------------------------------------------------------------------


def test_capture_gives_outputs_and_inputs_with_their_graph():
    model, x = net(), torch.randn(3, 1, 4, 4)
    with capture(model, ["0", "4:in"]) as feats:
        out = model(x)
    torch.testing.assert_close(feats["0"], model[0](x))
    torch.testing.assert_close(out, model[4](feats["4:in"]))
    feats["0"].sum().backward()
    assert model[0].weight.grad is not None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_capture_takes_element_0_of_tuples_and_keyword_inputs():
    model, x = TwoHeads(), torch.randn(2, 3)
    with capture(model, ["body", "body:in"]) as feats:
        model(x)
    assert torch.equal(feats["body"], x + 1) and feats["body:in"] is x


def test_capture_finds_a_shared_module_by_every_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model.add_module("again", model[0])
    with capture(model, ["0", "again"]) as feats:
        out = model(torch.randn(2, 3))
    assert feats["again"] is out and feats["0"] is out  # one module: what it gave last


def test_capture_removes_hooks_after_an_error():
    model = net()
    with pytest.raises(RuntimeError), capture(model, ["0"]):
        model(torch.randn(3, 2, 4, 4))
    assert not any(m._forward_hooks for m in model.modules())


def test_capture_errors_name_the_key():
    with pytest.raises(ValueError, match=r"'fcc' names no module of TwoHeads.*'fc'"):
        capture(TwoHeads(), ["fcc"])
    with pytest.raises(ValueError, match="'fc:out'"):
        capture(TwoHeads(), ["fc:out"])
    model = TwoHeads()
    with capture(model, ["unused"]) as feats:
        with pytest.raises(RuntimeError, match="no value was captured for 'unused'"):
            model(torch.randn(2, 3))
        with pytest.raises(RuntimeError, match="'unused'"):
            feats["unused"]


def test_capture_through_wrappers():
    averaged = torch.optim.swa_utils.AveragedModel(net())
    with capture(averaged, ["0"]) as feats:
        averaged(torch.randn(3, 1, 4, 4))
    assert feats["0"].shape == (3, 4, 4, 4)


def test_capture_before_compiling_works_with_a_full_graph():
    model, x = net(), torch.randn(3, 1, 4, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with capture(compiled, ["0", "4:in"]) as feats:
        out = compiled(x)
        torch.testing.assert_close(out, model[4](feats["4:in"]))
        (out.sum() + feats["0"].sum()).backward()


def test_a_hook_after_compilation_is_an_error_not_a_stale_value():
    model, x = net(), torch.randn(3, 1, 4, 4)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    with capture(compiled, ["0"]), pytest.raises(RuntimeError, match="compiled"):
        compiled(x)


def test_copies_and_pickles_of_a_hooked_model_record_nothing():
    model, x = net(), torch.randn(3, 1, 4, 4)
    with capture(model, ["0"]) as feats:
        model(x)
        kept = feats["0"]
        copy.deepcopy(model)(x)
        pickle.loads(pickle.dumps(model))(x)
        assert feats["0"] is kept


# -- Features --------------------------------------------------------------------------------------------------


def features(n=5) -> Features:
    return Features({"output": torch.randn(n, 3), "deep": torch.randn(n, 2)}, torch.arange(n) * 2, torch.arange(n))


def test_features_select_rows_by_dataset_index():
    f = features()
    rows = f.select(torch.tensor([8, 0, 8], dtype=torch.int32))
    assert torch.equal(rows["deep"], f["deep"][[4, 0, 4]])
    assert len(f) == 5
    with pytest.raises(IndexError, match="first is 3"):
        f.select(torch.tensor([2, 3]))
    with pytest.raises(ValueError, match="deep must have one row an index"):
        Features({"deep": torch.zeros(2, 3)}, torch.arange(3))


def test_features_save_and_load_bit_for_bit(tmp_path):
    f = features()
    f.save(tmp_path / "f.safetensors", {"at": "null"})
    g = Features.load(tmp_path / "f.safetensors")
    assert torch.equal(f.index, g.index) and torch.equal(f.labels, g.labels)
    assert all(torch.equal(f[name], g[name]) for name in f.tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "f.safetensors"
    features().save(path)
    before = path.read_bytes()

    def broken(tensors, name, metadata):
        name.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("kdfast.features.store.save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        features().save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]


# -- encode ----------------------------------------------------------------------------------------------------


def data(n=23) -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 1, 4, 4, generator=g), torch.randint(0, 3, (n,), generator=g), torch.arange(n))


def test_encode_is_the_eval_forward_and_restores_modes():
    model, dataset = net(), data()
    model[1].eval()
    f = encode(model, DataLoader(dataset, 5), at=["0", "4:in"], dtype=torch.float32, progress=False)
    assert model.training and not model[1].training
    model.eval()
    x, y, _ = dataset.tensors
    with torch.no_grad():
        torch.testing.assert_close(f["0"], model[0](x).mean((2, 3)))
        torch.testing.assert_close(f["4:in"], model[:4](x))
        g = encode(model, DataLoader(dataset, 5), dtype=torch.float32, progress=False)
        torch.testing.assert_close(g["output"], model(x))
    assert torch.equal(f.labels, y) and torch.equal(f.index, torch.arange(23))
    assert not g["output"].requires_grad


@pytest.mark.parametrize("index", [2, -1], ids=["position", "from the end"])
def test_rows_stand_at_their_dataset_index(index):
    dataset = data()
    loader = DataLoader(dataset, 5, shuffle=True)
    f = encode(net(), loader, index=index, progress=False)
    assert torch.equal(f.labels, dataset.tensors[1]) and torch.equal(f.index, dataset.tensors[2])
    assert f["output"].dtype == torch.float16


def test_a_shuffling_loader_without_index_is_an_error():
    with pytest.raises(ValueError, match="loader shuffles: give index="):
        encode(net(), DataLoader(data(), 5, shuffle=True))
    sampler = torch.utils.data.SubsetRandomSampler([3, 1])
    with pytest.raises(ValueError, match="loader shuffles"):
        encode(net(), DataLoader(data(), 5, sampler=sampler))
    f = encode(net(), DataLoader(data(), 5, sampler=sampler), index=2, progress=False)
    assert f.index.tolist() == [1, 3]


def test_batches_may_be_tensors_dicts_or_a_stream():
    model, x = net().eval(), data().tensors[0]
    plain = encode(model, [x[:9], x[9:]], progress=False)
    assert plain.labels is None

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(x)

    streamed = encode(model, DataLoader(Stream(), 9), progress=False)
    torch.testing.assert_close(plain["output"], streamed["output"])
    keyed = [{"x": torch.randn(4, 3), "labels": torch.arange(4), "where": torch.tensor([3, 2, 1, 0])}]
    f = encode(TwoHeads(), keyed, index="where", progress=False)
    assert f.labels.tolist() == [3, 2, 1, 0]


class Interrupted:
    """The batches of a loader up to one, then Ctrl-C."""

    def __init__(self, loader, after):
        self.loader, self.after = loader, after

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for k, batch in enumerate(self.loader):
            if k == self.after:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("rows_per_part", [4, 1000], ids=["several parts", "one part"])
def test_an_interrupted_run_goes_on_and_is_bit_equal(tmp_path, rows_per_part):
    model, loader = net(), DataLoader(data(), 4)
    path = tmp_path / "teacher.safetensors"
    whole = encode(model, loader, dtype=torch.float32, progress=False)
    with pytest.raises(KeyboardInterrupt):
        encode(model, Interrupted(loader, 3), path, dtype=torch.float32, rows_per_part=rows_per_part, progress=False)
    assert not path.exists() and not list(tmp_path.rglob("*.tmp*"))
    folder = tmp_path / "teacher.safetensors.parts"
    (folder / ".000009.77.tmp.safetensors").write_bytes(b"half a part, from a run that was killed")

    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    f = encode(model, loader, path, dtype=torch.float32, rows_per_part=rows_per_part, progress=False)
    handle.remove()
    assert len(forwards) == 3  # of 6 batches, 3 were done
    assert torch.equal(f["output"], whole["output"]) and torch.equal(f.labels, whole.labels)
    assert [p.name for p in tmp_path.iterdir()] == ["teacher.safetensors"]


def test_a_finished_file_is_read_again_and_another_teacher_refused(tmp_path):
    model, path = net(), tmp_path / "teacher.safetensors"
    f = encode(model, DataLoader(data(), 5), path, progress=False)
    again = encode(model, Interrupted(DataLoader(data(), 5), 0), path, progress=False)
    assert torch.equal(f["output"], again["output"])
    for change in (dict(at="0"), dict(dtype=torch.float32)):
        with pytest.raises(ValueError, match="holds another encoding"):
            encode(model, DataLoader(data(), 5), path, progress=False, **change)
    with pytest.raises(ValueError, match="another encoding \\(teacher"):
        encode(net(), DataLoader(data(), 5), path, progress=False)


def test_metadata_names_version_teacher_at_and_dtype(tmp_path):
    model, path = net(), tmp_path / "teacher.safetensors"
    encode(model, DataLoader(data(), 5), path, at={"deep": "0", "logits": None}, progress=False)
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
    assert meta["kdfast_version"] == kdfast.__version__ and meta["dtype"] == "float16"
    assert meta["teacher"] == fingerprint(model) and json.loads(meta["at"]) == {"deep": "0", "logits": None}


def test_the_fingerprint_sees_one_changed_weight():
    model = net()
    before = fingerprint(model)
    assert before == fingerprint(copy.deepcopy(model))
    with torch.no_grad():
        model[4].bias[2] += 1
    assert fingerprint(model) != before


def test_progress_is_shown_unless_turned_off(capsys):
    encode(net(), DataLoader(data(), 5))
    shown = capsys.readouterr().err
    assert "encode" in shown and "5/5" in shown
    encode(net(), DataLoader(data(), 5), progress=False)
    assert capsys.readouterr().err == ""


def test_bad_encodings_are_named():
    loader = DataLoader(data(), 5)
    with pytest.raises(ValueError, match="gave no batches"):
        encode(net(), [], progress=False)
    with pytest.raises(TypeError, match="dtype must be"):
        encode(net(), loader, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"output holds values beyond torch\.float16"):
        encode(nn.Hardtanh(-1e6, 1e6), [torch.full((2, 3), 1e5)], progress=False)
    with pytest.raises(ValueError, match="names no module"):
        encode(net(), loader, at="layer4", progress=False)
    with pytest.raises(TypeError, match="at must be"):
        encode(net(), loader, at=3, progress=False)
    with pytest.raises(ValueError, match="index=2 needs batches that are tuples"):
        encode(net(), [torch.randn(2, 1, 4, 4)], index=2, progress=False)
