"""DeepCache computes the same in both of its forms, by a stand-in for its package; and which baselines there are."""

import sys
import types

import torch

from benchmarks.baselines import deepcache
from benchmarks.baselines.deepcache import CachedUNet
from benchmarks.baselines.openvino_unet import PRECISIONS
from benchmarks.baselines.x86_inductor import X86_INT8
from benchmarks.configurations import BFLOAT16, QUICK, TORCHAO, run_rows, step_rows
from benchmarks.steps import BASELINES, least_sqnr_db
from tests.unets import unet2d

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Helper:
    """What DeepCacheSDHelper does, for the mid block alone."""

    def __init__(self, pipe):
        self.pipe = pipe

    def set_params(self, cache_interval, cache_branch_id):
        assert cache_branch_id == 0
        self.interval = cache_interval

    def enable(self):
        self.cached_output, self.start_timestep, self.cur_timestep = {}, None, 0
        self.plain, self.mid = self.pipe.unet.forward, self.pipe.unet.mid_block.forward
        self.pipe.unet.forward, self.pipe.unet.mid_block.forward = self.forward, self.mid_forward

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


def capture(step, device):
    """Stands for a CUDA graph: replaying writes into the tensors that the captured call gave."""
    assert device == CPU
    outputs = step()

    def replay():
        torch.utils._pytree.tree_map_(lambda kept, new: kept.copy_(new), outputs, step())

    return replay, outputs


def test_both_forms_of_deepcache_compute_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "DeepCache", types.SimpleNamespace(DeepCacheSDHelper=Helper))
    monkeypatch.setattr(deepcache.torch, "compile", lambda function, dynamic: function)
    scheduler = types.SimpleNamespace(timesteps=torch.tensor([900, 700, 500, 300, 200, 100, 50]))
    inputs = torch.randn(7, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    with torch.no_grad():
        unet = unet2d().to(memory_format=torch.channels_last)
        dense = [unet(x, t).sample for x, t in zip(samples, scheduler.timesteps)]
        expected = None
        for options, times in (({}, 1), ({"compiled": True}, 2), ({"compiled": True, "capture": capture}, 3)):
            unet = unet2d().to(memory_format=torch.channels_last)
            cached = CachedUNet(unet, 3, **options)
            for _ in range(times):
                with cached.run(scheduler):
                    outputs = [unet(x, t).sample for x, t in zip(samples, scheduler.timesteps)]
                assert cached.calls_full == 3, "calls 1, 4 and 7 of 7"
                expected = expected or outputs
                for i, (out, same) in enumerate(zip(outputs, expected, strict=True)):
                    torch.testing.assert_close(out, same, rtol=0, atol=0)
                    assert torch.equal(out, dense[i]) == (i % 3 == 0), "in between something is reused"


def test_the_strongest_baselines_are_there(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    steps = {row.key: row for row in step_rows(CPU, torch.float32, compiled=True)}
    peers = {BFLOAT16, X86_INT8, *PRECISIONS}
    assert peers | {"float-compile"} <= set(steps)
    least = {key: least_sqnr_db(steps[key], torch.float32) for key in peers}
    in_int8 = {X86_INT8} | {key for key, (_, what) in PRECISIONS.items() if what}
    assert least == {key: 80 if key == "openvino-float32" else 15 if key in in_int8 else 25 for key in peers}
    on_gpu = {row.key for row in step_rows(GPU, torch.bfloat16, compiled=True)}
    assert {"float-compile", "float-compile-graphs", QUICK, TORCHAO} <= on_gpu
    assert not peers & (on_gpu | {row.key for row in run_rows(CPU, torch.float32, compiled=True)})
    assert {key for keys in BASELINES.values() for key in keys if "." not in key} <= on_gpu
    runs = {row.key for row in run_rows(GPU, torch.bfloat16, compiled=True)}
    assert {"deepcache-3", "deepcache-3-compile", "deepcache-5-compile", "float-compile-graphs"} <= runs
