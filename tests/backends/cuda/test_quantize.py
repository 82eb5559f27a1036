"""The insides of `quantize` of the backend cuda, emulated: the order of threads. Packed codes: test_ptx.py."""

import pytest
import torch

from modiff_kernels.backends.cuda import library
from modiff_kernels.backends.cuda.quantize_launch import quantize
from modiff_kernels.quant.operands import IDENTITY, Prologue

pytestmark = pytest.mark.usefixtures("poisoned_empty")
GRANULARITIES = ["per_tensor", "per_sample", "per_token"]


@pytest.fixture
def emulator(emulators, monkeypatch):
    monkeypatch.setattr(library, "quantize_op", lambda: emulators("quantize").quantize)
    yield emulators("quantize")
    emulators("quantize").falling = False


def image(shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


def norm(kind, channels, **more):
    return Prologue(kind, torch.randn(channels), torch.randn(channels), eps=1e-5, **more)


class TestOrderOfThreads:
    """A missing barrier lets a thread read what another has not written yet: then the order of turns shows."""

    @pytest.mark.parametrize("granularity", [*GRANULARITIES, "per_block"])
    def test_it_changes_no_residual(self, emulator, granularity):
        for h, prologue in (
            (image((2, 96, 13, 5)), norm("group_norm", 96, num_groups=8, silu=True)),
            (torch.randn(2, 35, 320), norm("layer_norm", 320)),
            (torch.randn(1, 3, 5120), norm("layer_norm", 5120)),
            (torch.randn(3, 49, 64), IDENTITY),
        ):
            self.check(emulator, h, prologue, torch.zeros_like(h), 4, granularity)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_it_changes_no_activation(self, emulator, granularity):
        self.check(emulator, torch.randn(2, 49, 640), IDENTITY, None, 8, granularity)

    @staticmethod
    def check(emulator, h, prologue, x_hat, bits, granularity):
        results = []
        for emulator.falling in (False, True):
            state = None if x_hat is None else x_hat.clone()
            found = quantize(h, prologue, state, None, bits, granularity, 1.0, True)
            results.append([*found] if state is None else [*found, state])
        for rising, falling in zip(*results, strict=True):
            assert torch.equal(rising, falling)
