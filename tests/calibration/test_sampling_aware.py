"""Sampling-aware calibration: its solver against a known solution, and what is aligned with what."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import modiff_kernels as mk
from modiff_kernels.calibration import sampling_aware
from modiff_kernels.calibration.data import pipeline_sampler
from modiff_kernels.calibration.reconstruction import fake_quantized
from modiff_kernels.calibration.sampling_aware import Solver

STATIC = mk.ModiffConfig(weight_bits=4, act_bits=4, scale_mode="static")
SMALL = {"steps": 5, "samples": 4, "batch": 2, "quiet": True, "calls_per_sample": 2, "weight_method": "rtn"}
FEW = {"weight_iterations": 2, "act_iterations": 1, "learn_batch": 4}
OTHERS = ("down_blocks", "up_blocks", "conv_in", "conv_out", "time_emb", "attn", "attentions", "resnets.0")
ONE_BLOCK = mk.ModiffConfig(3, None, skip_modules=OTHERS)


def gaussian(solver):
    """The exact eps for images from a normal distribution, and how large x is along its exact trajectory."""

    def size(timestep):
        alpha, sigma, _ = solver.noise(timestep)
        return ((alpha * 0.5) ** 2 + sigma**2).sqrt()

    return lambda x, timestep: solver.noise(timestep)[1] * x / size(timestep) ** 2, size


def test_order_of_convergence(pipe):
    """Halving the steps divides the error by 4 or more."""
    errors = {}
    for steps in (20, 40, 80):
        solver = Solver(pipeline_sampler(pipe, steps, {}))
        solver.timesteps = torch.linspace(900, 100, steps + 1)
        network, size = gaussian(solver)
        noise = torch.ones(1, dtype=torch.float64)
        _, sample = solver.run(network, noise)
        errors[steps] = float(abs(sample / noise - size(solver.timesteps[-1]) / size(solver.timesteps[0])))
    assert min(errors[20] / errors[40], errors[40] / errors[80]) > 3.5, errors


@pytest.mark.parametrize("prediction", sampling_aware.PREDICTIONS)
def test_directions_of_all_predictions(pipe, prediction):
    pipe.scheduler.register_to_config(prediction_type=prediction)
    solver, timestep = Solver(pipeline_sampler(pipe, 5, {})), torch.tensor(300.0)
    image, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    alpha, sigma = pipe.scheduler.alphas_cumprod[300].sqrt(), (1 - pipe.scheduler.alphas_cumprod[300]).sqrt()
    output = {"epsilon": eps, "sample": image, "v_prediction": alpha * eps - sigma * image}[prediction]
    found = solver.direction(output, alpha * image + sigma * eps, timestep)
    torch.testing.assert_close(found, eps, rtol=1e-3, atol=1e-3)


def test_quantised_blocks_come_closer_to_float_ones(pipe, monkeypatch):
    captured, real = [], sampling_aware.reconstruct_blocks
    monkeypatch.setattr(sampling_aware, "reconstruct_blocks", lambda *args: captured.append(args) or real(*args))
    result = mk.calibrate(pipe, "sampling_aware", ONE_BLOCK, **SMALL, **{**FEW, "weight_iterations": 40})
    data = captured[0][2]
    assert not set(data.timestep.tolist()) & set(pipeline_sampler(pipe, 5, {}).timesteps().tolist()), "in between"

    block = "mid_block.resnets.1"
    rounded = mk.calibrate(pipe, "minmax", ONE_BLOCK, **SMALL)
    outputs = {}

    def run(name):
        module = pipe.unet.get_submodule(block)
        hook = module.register_forward_hook(lambda module, args, output: outputs.update({name: output}))
        with torch.no_grad():
            args, kwargs = data.arguments(torch.arange(len(data)))
            pipe.unet(*args, **kwargs)
        hook.remove()

    run("wanted")
    for name, layers in (("learnt", result.layers), ("rounded", rounded.layers)):
        with fake_quantized(pipe.unet, layers, "modulated", None) as fakes:
            for fake in fakes.values():
                fake.hard = True
            run(name)
    error = {name: (outputs[name] - outputs["wanted"]).square().mean() for name in ("learnt", "rounded")}
    assert error["learnt"] < 0.99 * error["rounded"], error


def test_samplers_that_it_refuses(pipe):
    with pytest.raises(ValueError, match="needs at least 3 time steps, the sampler has 2"):
        mk.calibrate(pipe, "sampling_aware", STATIC, **{**SMALL, "steps": 2, "calls_per_sample": 1})
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler .* is of another kind"):
        mk.calibrate(pipe, "sampling_aware", STATIC, **SMALL)
