"""Q-Diffusion: sites and effect of the shortcut split, and that reconstruction lowers errors on quantised inputs."""

import pytest
import torch

import modiff_kernels as mk
from modiff_kernels.calibration import qdiffusion, reconstruction
from modiff_kernels.calibration.data import collect, pipeline_sampler, stream, uniform_calls
from modiff_kernels.calibration.job import Job
from modiff_kernels.calibration.reconstruction import fake_quantized
from modiff_kernels.quant.calibrated import CalibratedLayer, QuantizedWeight

STATIC = mk.ModiffConfig(weight_bits=4, act_bits=4, scale_mode="static")
SMALL = {"steps": 4, "samples": 4, "batch": 2, "quiet": True, "calls_per_sample": 2}
FEW = {"weight_iterations": 2, "act_iterations": 2, "learn_batch": 2, "weight_method": "rtn"}
SPLITS = {
    "up_blocks.0.resnets.0.conv_shortcut": 32,
    "up_blocks.0.resnets.1.conv_shortcut": 32,
    "up_blocks.1.resnets.0.conv_shortcut": 32,
    "up_blocks.1.resnets.1.conv_shortcut": 16,
}


@pytest.fixture
def data(pipe):
    return collect(pipeline_sampler(pipe, 4, {}), uniform_calls(4, 2, 4), range(4), 2)


def test_split_sites_are_where_the_network_concatenates(pipe, monkeypatch):
    real, parts = torch.cat, []

    def cat(tensors, *args, **kwargs):
        parts.append([t.shape[1] for t in tensors])
        return real(tensors, *args, **kwargs)

    monkeypatch.setattr(torch, "cat", cat)
    with torch.no_grad():
        pipe.unet(torch.randn(1, 3, 8, 8), torch.tensor([5.0]))
    joined = [both[0] for both in parts if len(both) == 2 and both != [8, 8]][-4:]
    assert qdiffusion.split_sites(pipe.unet) == SPLITS == dict(zip(SPLITS, joined))


def test_the_parts_of_a_split_input_use_their_codes_alike(pipe, data):
    with torch.no_grad():
        for name in SPLITS:  # make the skip parts small, so that one scale would waste their codes
            block = name.removesuffix(".conv_shortcut")
            pipe.unet.get_submodule(block).conv_shortcut.weight.mul_(3)
    result = mk.calibrate(pipe, "qdiffusion", STATIC, **SMALL, **FEW)
    seen = {}

    def keep(path, x, previous, points):
        seen.setdefault(path, []).append(x if previous is None else x - previous)

    layers = {path: pipe.unet.get_submodule(path) for path in SPLITS}
    stream(pipe.unet, data, layers, keep, torch.arange(len(data)).split(2), pairs=True)
    for path, hidden in SPLITS.items():
        layer, x = result.layers[path], torch.cat(seen[path])
        assert layer.weight.group_size in (16, 32)
        assert (layer.input_scale[:hidden] == 1).all()
        scaled = x * layer.input_scale[:, None, None]
        parts = [half.abs().mean() for half in scaled.tensor_split([hidden], 1)]
        assert 0.3 < parts[0] / parts[1] < 3


def test_reconstruction_lowers_the_error_of_a_block_behind_quantised_ones(pipe, data, tmp_path):
    block = "up_blocks.1.resnets.0"
    paths = [f"{block}.conv1", f"{block}.conv2", f"{block}.conv_shortcut"]
    layers = {path: CalibratedLayer(QuantizedWeight.rounded(pipe.unet.get_submodule(path).weight, 3)) for path in paths}
    batches = torch.arange(len(data)).split(4)
    target = reconstruction.record(pipe.unet, block, data, batches, tmp_path / "out", "output")
    inputs = reconstruction.record(pipe.unet, block, data, batches, tmp_path / "in", "input")
    points = torch.arange(len(data))
    options, sampler = qdiffusion.QDiffusionOptions(learn_batch=4), pipeline_sampler(pipe, 4, {})
    job = Job(pipe.unet, sampler, mk.ModiffConfig(3, None), options, 4, 4, 0, {}, None, True, {})
    module = pipe.unet.get_submodule(block)
    torch.testing.assert_close(reconstruction.call(module, inputs.read(points)), target.read(points)[0])

    def loss_of(points, fakes):
        output = reconstruction.call(module, inputs.read(points))
        return (output - target.read(points)[0]).square().mean()

    def error(layers):
        with fake_quantized(pipe.unet, layers, "modulated", None) as fakes, torch.no_grad():
            for fake in fakes.values():
                fake.hard = True
            return loss_of(points, fakes).item()

    given = job, "part", layers, ("variable",), loss_of, data, len(data)
    learnt = reconstruction.learn(*given, 100, 0.1, rounding_weight=0.5)
    assert error(learnt) < 0.6 * error(layers)


def test_blocks_come_in_the_order_of_computation(pipe, data):
    paths = [name for name, module in pipe.unet.named_modules() if isinstance(module, torch.nn.Conv2d)]
    blocks = list(reconstruction.blocks_of(pipe.unet, paths, data))
    assert (blocks[0], blocks[-1]) == ("conv_in", "conv_out")
    kinds = [name.partition("_block")[0] for name in blocks[1:-1]]
    assert kinds == sorted(kinds, key=["down", "mid", "up"].index)
    paths = [name for name, module in pipe.unet.named_modules() if isinstance(module, torch.nn.Linear)]
    shared, attention = reconstruction.shared_inputs(pipe.unet, paths, data), "mid_block.attentions.0"
    assert {shared[f"{attention}.{name}"] for name in ("to_q", "to_k", "to_v")} == {f"{attention}.to_q"}
    assert shared[f"{attention}.to_out.0"] == f"{attention}.to_out.0"


def test_the_whole_network_comes_closer(pipe, data):
    config, points = mk.ModiffConfig(3, None), torch.arange(len(data))
    with torch.no_grad():
        target = data.run(pipe.unet, points)[0]
    losses = {}
    for iterations in (0, 30):
        options = {"network_iterations": iterations, "network_lr": 0.02, "weight_method": "rtn", "learn_batch": 8}
        result = mk.calibrate(pipe, "distill", config, **SMALL, **options)
        handle = mk.accelerate(pipe, config, calibration=result)
        losses[iterations] = (data.run(pipe.unet, points)[0] - target).square().mean()
        handle.remove()
    assert losses[30] < 0.7 * losses[0]
