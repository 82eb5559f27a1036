"""benchmarks/deepcache.py against DeepCache's rule, by a stand-in with the attributes of its package."""

import sys
import types

import pytest
import torch

from benchmarks import deepcache
from benchmarks.deepcache import CachedUNet
from benchmarks.shapes import build_unet
from tests.integrations.fake_capture import FakeCapture

CPU = torch.device("cpu")


class Helper:
    """What DeepCacheSDHelper does, for the mid block alone."""

    def __init__(self, pipe):
        self.pipe = pipe

    def set_params(self, cache_interval, cache_branch_id):
        assert cache_branch_id == 0
        self.interval = cache_interval

    def enable(self):
        self.cached_output, self.start_timestep, self.cur_timestep = {}, None, 0
        self.plain = self.pipe.unet.forward
        self.mid = self.pipe.unet.mid_block.forward
        self.pipe.unet.forward = self.forward
        self.pipe.unet.mid_block.forward = self.mid_forward

    def disable(self):
        self.pipe.unet.forward, self.pipe.unet.mid_block.forward = self.plain, self.mid

    def forward(self, *args, **kwargs):
        self.cur_timestep = [float(t) for t in self.pipe.scheduler.timesteps].index(float(args[1]))
        return self.plain(*args, **kwargs)

    def mid_forward(self, *args, **kwargs):
        start = self.cur_timestep if self.start_timestep is None else self.start_timestep
        self.start_timestep = start
        if (self.cur_timestep - start) % self.interval == 0:
            self.cached_output["mid"] = self.mid(*args, **kwargs)
        return self.cached_output["mid"]


@pytest.fixture
def package(monkeypatch):
    monkeypatch.setitem(sys.modules, "DeepCache", types.SimpleNamespace(DeepCacheSDHelper=Helper))
    monkeypatch.setattr(deepcache.torch, "compile", lambda function, dynamic: function)


@pytest.fixture
def capture():
    """Stands for CUDA graphs: kernels that read and write the same tensors at each replay. Counts what it captures."""
    nothing = types.SimpleNamespace(edges={}, outputs={}, constants=types.SimpleNamespace(_kept={}))
    captures = FakeCapture(nothing)

    def counted(step, device):
        assert device == CPU
        counted.captured += 1
        return captures(step, device)

    counted.captured = 0
    return counted


SCHEDULER = types.SimpleNamespace(timesteps=torch.tensor([900, 700, 500, 300, 200, 100, 50]))


def build():
    return build_unet("cifar10_small16").to(memory_format=torch.channels_last)


def run(cached, unet, inputs):
    with cached.run(SCHEDULER):
        samples = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        return [unet(x, t).sample for x, t in zip(samples, SCHEDULER.timesteps)]


def test_both_forms_compute_the_same(package, capture):
    inputs = torch.randn(7, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    forms = (({}, 1), ({"compiled": True}, 2), ({"compiled": True, "capture": capture}, 3))
    with torch.no_grad():
        plain = build()
        samples = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        dense = [plain(x, t).sample for x, t in zip(samples, SCHEDULER.timesteps)]
        expected = None
        for options, times in forms:
            unet = build()
            cached = CachedUNet(unet, 3, **options)
            runs = [run(cached, unet, inputs) for _ in range(times)]
            assert cached.calls_full == 3, "calls 1, 4 and 7 of 7"
            expected = expected or runs[0]
            for outputs in runs:
                for i, (out, same) in enumerate(zip(outputs, expected, strict=True)):
                    torch.testing.assert_close(out, same, rtol=0, atol=0)
                    assert torch.equal(out, dense[i]) == (i % 3 == 0), "in between something is reused"
    assert capture.captured == 2, "the full call and the shallow one"


def test_outside_a_run_of_the_plain_form_the_unet_is_as_it_was(package):
    unet = build_unet("cifar10_small16")
    x = torch.zeros(1, 3, 16, 16)
    with torch.no_grad():
        before = unet(x, 10).sample
        run(CachedUNet(unet, 2), unet, torch.randn(7, 1, 3, 16, 16))
        assert torch.equal(unet(x, 10).sample, before)
    assert not unet.conv_out._forward_hooks
