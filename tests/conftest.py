"""Fixtures for all tests: fixed seeds, poisoned buffers, one run per backend."""

import pytest
import torch

from modiff_kernels.ops import dispatch


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty():
    """Fill every uninitialised tensor, also those made in C++: NaN for floats, the largest value for integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=dispatch.BACKENDS)
def backend(request):
    """Name of a backend that can run here; the test is skipped with the reason for the others."""
    reason = dispatch.why_unavailable(request.param)
    forced = dispatch.forced_backend()
    if reason is None and forced not in (None, request.param):
        reason = f"MODIFF_BACKEND={forced} forces another backend"
    if reason is None and request.param not in dispatch.PRIORITY["cpu"]:
        reason = "the tensors of these tests are on the CPU; tests/backends has its tests"
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    threads = torch.get_num_threads()
    if request.param == dispatch.REFERENCE:  # nothing to gain from threads at these sizes
        torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_dispatch():
    """`dispatch` without choices or warnings from earlier tests, and cleaned again afterwards."""
    dispatch.reset()
    yield dispatch
    dispatch.reset()
