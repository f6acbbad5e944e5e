"""What launches on a GPU go by, without one: its architecture by name, warps on AMD's, parts of columns that fill it."""

from types import SimpleNamespace

import pytest
import torch

from kdfast._core import triton_runtime
from kdfast._core.architectures import named
from kdfast._ops.similarity.triton import KERNELS, in_slabs


@pytest.mark.parametrize(
    ("name", "kilobytes", "from_shared", "small", "lanes"),
    [
        ("sm_80", 163, False, False, 32),
        ("sm_86", 99, False, True, 32),
        ("sm_90", 227, True, False, 32),
        ("sm_100", 227, True, False, 32),
        ("sm_120", 99, False, True, 32),
        ("gfx90a:sramecc+:xnack-", 64, False, True, 64),
        ("gfx942", 64, False, True, 64),
        ("gfx950", 160, False, True, 64),
        ("gfx1100", 64, False, True, 32),
    ],
)
def test_architectures(name, kilobytes, from_shared, small, lanes):
    arch = named(name)
    assert (arch.shared, arch.from_shared, arch.small, arch.lanes) == (kilobytes << 10, from_shared, small, lanes)
    assert arch.blackwell == (name in ("sm_100", "sm_120")) and arch.amd == name.startswith("gfx") and arch.crowded == (name == "gfx1100")


def test_an_amd_gpu_is_not_taken_for_the_other_maker_s(monkeypatch):
    """Its capability is that of a name: gfx942 says (9, 4), gfx1100 (11, 0)."""
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", "7")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton_runtime, "architecture", triton_runtime.architecture.__wrapped__)
    for name, warps in (("gfx942:sramecc+:xnack-", 4), ("gfx1100", 8)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, name=name: SimpleNamespace(gcnArchName=name))
        assert triton_runtime.architecture(0) == named(name) and not triton_runtime.architecture(0).from_shared
        assert triton_runtime.pipeline(8, 3) == {"num_warps": warps, "STAGES": 2}


@pytest.fixture
def splits(monkeypatch):
    """On a GPU of 132 multiprocessors."""
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    monkeypatch.setattr(triton_runtime, "processors", lambda _: 132)
    return lambda *sizes: triton_runtime.splits(*sizes[:3], torch.device("cuda", 0), *sizes[3:])


@pytest.mark.parametrize("part", [0, triton_runtime.SUMS])
@pytest.mark.parametrize("row_tiles", [1, 3, 67, 100, 133, 157, 265])
def test_no_round_of_programs_is_mostly_idle(row_tiles, part, splits):
    parts = splits(row_tiles, 65536, 64, part)
    programs = row_tiles * parts
    assert programs / (-(-programs // 132) * 132) > 0.85  # of one part 0.02 to 0.76
    assert (parts - 1) * triton_runtime.share(65536, parts, 64) < 65536  # none is empty


def test_parts_that_would_cost_more_than_they_save(splits):
    assert splits(132, 65536, 64) == splits(264, 65536, 64) == 1  # nothing is idle
    assert splits(100, 65536, 64, triton_runtime.SUMS) > 1 == splits(100, 4096, 64, triton_runtime.SUMS)
    assert splits(5000, 65536, 64) == 1  # a last round among many
    assert splits(1, 255, 64) == splits(0, 0, 64) == 1
    assert splits(1, 1024, 64) == 4  # of 4 tiles at least


def test_kernels_that_wait_for_memory_are_split_to_fill_alone(monkeypatch, splits):
    assert triton_runtime.fill(157, 65536, 64, torch.device("cuda", 0)) == 1
    assert triton_runtime.fill(33, 65536, 64, torch.device("cuda", 0)) == 4


@pytest.mark.parametrize(
    ("name", "width", "of_h", "slabs"),
    [
        ("sm_80", 256, False, False),
        ("sm_80", 160, True, True),  # registers hold what Hopper reads from shared memory
        ("sm_80", 128, True, False),
        ("sm_90", 256, True, False),
        ("sm_120", 256, False, True),
        ("gfx942", 128, True, False),
        ("gfx1100", 16, False, True),
    ],
)
def test_rows_too_wide_for_a_tile_of_their_sums(name, width, of_h, slabs, monkeypatch):
    monkeypatch.setattr(triton_runtime, "architecture", lambda _: named(name))
    keys = torch.empty(1, 4, width, dtype=torch.bfloat16)
    assert in_slabs(keys, None, KERNELS.products["ieee"], small_weights=True, of_h=of_h) == slabs
