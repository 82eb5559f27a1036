"""Backends through the public ops, on the device that each is for."""

from typing import NamedTuple

import pytest

from modiff_kernels.ops import dispatch


class At(NamedTuple):
    """A backend and its device."""

    backend: str
    device: str

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


ON_GPU = [pytest.param(At(name, "cuda"), marks=pytest.mark.gpu, id=name) for name in ("cuda", "triton")]


@pytest.fixture(params=[pytest.param(At("cpu", "cpu"), id="cpu"), *ON_GPU])
def at(request):
    """A backend that can run here; the test is skipped with the reason for the others."""
    if (reason := dispatch.why_unavailable(request.param.backend)) is not None:
        pytest.skip(f"backend {request.param.backend}: {reason}")
    return request.param
