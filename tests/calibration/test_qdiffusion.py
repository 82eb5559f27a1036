"""Q-Diffusion: sites and effect of the shortcut split, and that reconstruction lowers errors on quantised inputs."""

import dataclasses

import pytest
import torch

import modiff_kernels as mk
from modiff_kernels.calibration import qdiffusion, reconstruction
from modiff_kernels.calibration.data import Sampler, collect, pipeline_sampler, stream, uniform_calls
from modiff_kernels.calibration.fake import fake_quantized
from modiff_kernels.calibration.job import Job
from modiff_kernels.calibration.reconstruction import output_at
from modiff_kernels.calibration.workspace import Workspace
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
    sampler: Sampler = pipeline_sampler(pipe, 4, {})
    return collect(sampler, uniform_calls(4, 2, 4), range(4), 2)


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


@pytest.mark.parametrize("mode", ["modulated", "quantized"])
def test_the_parts_of_a_split_input_use_their_codes_alike(pipe, mode):
    with torch.no_grad():
        for name in SPLITS:  # make the skip parts small, so that one scale would waste their codes
            block = name.removesuffix(".conv_shortcut")
            pipe.unet.get_submodule(block).conv_shortcut.weight.mul_(3)
    config = dataclasses.replace(STATIC, mode=mode)
    result = mk.calibrate(pipe, "qdiffusion", config, **SMALL, **FEW)
    data = collect(pipeline_sampler(pipe, 4, {}), uniform_calls(4, 2, 4), range(4), 2)
    seen = {}

    def keep(path, x, previous, points):
        seen.setdefault(path, []).append(x if previous is None else x - previous)

    layers = {path: pipe.unet.get_submodule(path) for path in SPLITS}
    stream(pipe.unet, data, layers, keep, data.batches(2), pairs=mode == "modulated")
    for path, hidden in SPLITS.items():
        layer, x = result.layers[path], torch.cat(seen[path])
        assert layer.weight.group_size == {32: 16, 16: 16}[hidden] or layer.weight.group_size == 32
        assert (layer.input_scale[:hidden] == 1).all()
        scaled = x * layer.input_scale[:, None, None]
        parts = [half.abs().mean() for half in scaled.tensor_split([hidden], 1)]
        assert 0.3 < parts[0] / parts[1] < 3


def test_reconstruction_lowers_the_error_of_a_block_behind_quantised_ones(pipe, data, tmp_path):
    block = "up_blocks.1.resnets.0"
    paths = [f"{block}.conv1", f"{block}.conv2", f"{block}.conv_shortcut"]
    layers = {path: CalibratedLayer(QuantizedWeight.rounded(pipe.unet.get_submodule(path).weight, 3)) for path in paths}
    batches = list(data.batches(4))
    target = reconstruction.record(pipe.unet, block, data, batches, tmp_path / "out", "output")
    inputs = reconstruction.record(pipe.unet, block, data, batches, tmp_path / "in", "input")
    points = torch.arange(len(data))
    options = qdiffusion.QDiffusionOptions(learn_batch=4)
    sampler = pipeline_sampler(pipe, 4, {})
    job = Job(pipe.unet, sampler, mk.ModiffConfig(3, None), options, 4, 4, 0, Workspace(None, {}), True, {})
    module = pipe.unet.get_submodule(block)
    torch.testing.assert_close(reconstruction.call(module, inputs.read(points)), target.read(points)[0])

    def loss_of(points):
        output = reconstruction.call(module, inputs.read(points))
        return (output - target.read(points)[0]).square().mean()

    with fake_quantized(pipe.unet, layers, "modulated", None) as fakes:
        for fake in fakes.values():
            fake.hard = True
        before = loss_of(points).item()
        reconstruction.learn(
            job, "part", fakes.values(), ("variable",), loss_of, len(data), iterations=100, lr=0.1, rounding_weight=0.5
        )
        after = loss_of(points).item()
    assert after < 0.6 * before
    assert not any(fake.variable.requires_grad for fake in fakes.values())


def test_blocks_come_in_the_order_of_computation(pipe, data):
    paths = [name for name, module in pipe.unet.named_modules() if isinstance(module, torch.nn.Conv2d)]
    blocks = list(reconstruction.blocks_of(pipe.unet, paths, data))
    assert blocks[0] == "conv_in"
    assert blocks[-1] == "conv_out"
    kinds = [name.partition("_block")[0] for name in blocks[1:-1]]
    assert kinds == sorted(kinds, key=["down", "mid", "up"].index)


def test_method_is_deterministic_goes_on_and_can_be_used(pipe, tmp_path, monkeypatch):
    config = STATIC
    whole = mk.calibrate(pipe, "qdiffusion", config, **SMALL, **FEW)
    real, counts = reconstruction.learn, []

    def interrupted(*args, **kwargs):
        counts.append(1)
        if len(counts) == 7:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(reconstruction, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mk.calibrate(pipe, "qdiffusion", config, folder=tmp_path, **SMALL, **FEW)
    again = mk.calibrate(pipe, "qdiffusion", config, folder=tmp_path, **SMALL, **FEW)
    for path, layer in whole.layers.items():
        other = again.layers[path]
        for name in ("act_scale", "act_zero_point", "input_scale", "bias"):
            value = getattr(layer, name)
            assert (value is None and getattr(other, name) is None) or torch.equal(value, getattr(other, name))
        assert torch.equal(layer.weight.codes, other.weight.codes)
    assert not any("Fake" in type(module).__name__ for module in pipe.unet.modules())
    handle = mk.accelerate(pipe, calibration=tmp_path)
    shortcut = handle.layers["up_blocks.1.resnets.1.conv_shortcut"]
    assert shortcut.input_scale is not None
    image = pipe(batch_size=1, num_inference_steps=4, generator=torch.manual_seed(0), output_type="np").images
    handle.remove()
    reference = pipe(batch_size=1, num_inference_steps=4, generator=torch.manual_seed(0), output_type="np").images
    assert 0 < abs(image - reference).mean() < 0.1


def test_the_whole_network_comes_closer(pipe):
    config = mk.ModiffConfig(3, None)
    data = collect(pipeline_sampler(pipe, 4, {}), uniform_calls(4, 2, 4), range(4), 2)
    points = torch.arange(len(data))
    with torch.no_grad():
        target = output_at(pipe.unet, data, points)
    losses = {}
    for iterations in (0, 30):
        options = {"network_iterations": iterations, "network_lr": 0.02, "weight_method": "rtn", "learn_batch": 8}
        result = mk.calibrate(pipe, "distill", config, **SMALL, **options)
        handle = mk.accelerate(pipe, config, calibration=result)
        losses[iterations] = (output_at(pipe.unet, data, points) - target).square().mean()
        handle.remove()
    assert losses[30] < 0.7 * losses[0]


def test_layers_that_read_one_tensor(pipe, data):
    paths = [name for name, module in pipe.unet.named_modules() if isinstance(module, torch.nn.Linear)]
    shared = reconstruction.shared_inputs(pipe.unet, paths, data)
    attention = "mid_block.attentions.0"
    assert {shared[f"{attention}.{name}"] for name in ("to_q", "to_k", "to_v")} == {f"{attention}.to_q"}
    assert shared[f"{attention}.to_out.0"] == f"{attention}.to_out.0"
