import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

import modiff_kernels as mk


def build_pipe():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    pipe = DDPMPipeline(unet.eval().requires_grad_(False), DDIMScheduler(beta_end=0.002))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference_of(pipe, calibration, steps):
    """How far the image of low-bit layers is from that of the float network, 0..1; it is not the same."""

    def image():
        return pipe(batch_size=1, num_inference_steps=steps, generator=torch.manual_seed(0), output_type="np").images

    handle = mk.accelerate(pipe, calibration=calibration)
    found = image()
    handle.remove()
    difference = abs(found - image()).mean()
    assert difference > 0
    return difference


def interrupt(monkeypatch, owner, name, at):
    """Let call number `at` of owner.name raise KeyboardInterrupt; the arguments of the calls so far."""
    real, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    return calls


def tensors_of(result):
    found = {}
    for path, layer in result.layers.items():
        found |= {f"{path}.codes": layer.weight.codes, f"{path}.scale": layer.weight.scale}
        found |= {f"{path}.{name}": getattr(layer, name) for name in ("act_scale", "act_zero_point")}
    return {name: value for name, value in found.items() if value is not None}


def assert_equal(result, other):
    a, b = tensors_of(result), tensors_of(other)
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def pipe():
    """A DDPM pipeline with a tiny UNet of random weights, the same in every test."""
    return build_pipe()


@pytest.fixture(scope="session")
def calibrated():
    """calibrated(method, config, **options): a result for the network of `pipe`, found once."""
    known = {}

    def result_of(method, config, **options):
        key = method, config.to_json(), tuple(sorted(options.items()))
        if key not in known:
            known[key] = mk.calibrate(build_pipe(), method, config, **options)
        return dataclasses.replace(known[key], layers=dict(known[key].layers))

    return result_of
