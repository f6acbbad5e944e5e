"""Every implementation of the Sinkhorn family that is here, taken in turn by the tests that import `every_impl`."""

import pytest

from kdfast._core import impls
from kdfast.ops import sinkhorn  # noqa: F401  registers the implementations

AVAILABLE = [name for name, missing in impls.table()["sinkhorn"].items() if missing is None and name != "triton"]


@pytest.fixture(params=AVAILABLE, autouse=True)
def every_impl(request, monkeypatch):
    """The implementation that calls take which name none."""
    monkeypatch.setattr("kdfast._core.impls.DEFAULT", request.param)
    return request.param
