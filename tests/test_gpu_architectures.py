"""What launches on a GPU go by, without one: its architecture by name, warps on AMD's."""

from types import SimpleNamespace

import pytest
import torch

from kdfast._core import triton_runtime
from kdfast._core.architectures import named


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
    assert arch.blackwell == (name in ("sm_100", "sm_120")) and arch.amd == name.startswith("gfx")


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
