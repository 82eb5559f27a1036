"""`make_plan`: what it measures, what it decides, what it keeps and refuses."""

import dataclasses
import functools
import time

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import modiff_kernels as mk
from modiff_kernels.config.plan import FLOAT_MODE, LayerPlan, Mode
from modiff_kernels.integrations import planner
from modiff_kernels.nn.layer import ModulatedLayer
from tests.unets import stable_diffusion, text

PLAIN, MODULATED = Mode("quantized", 8), Mode("modulated", 8)
STEPS = 4
pytestmark = pytest.mark.usefixtures("cache")


def sample(unet, seed=0, steps=STEPS):
    """Two pictures from the noise of `seed`."""
    scheduler = DDIMScheduler(beta_end=0.002)
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
        return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


class Clock:
    """Seconds that pass only in layers: in float ones and in low-bit ones as told, by name where a name is given."""

    def __init__(self, monkeypatch, float_s, low_bit_s, slow=(), slow_s=0.0):
        self.now = 0.0

        def passing(original):
            @functools.wraps(original)  # a method of another module would be one that low-bit layers do not follow
            def forward(module, *args, **kwargs):
                if isinstance(module, ModulatedLayer):
                    self.now += slow_s if module.name in slow else low_bit_s
                else:
                    self.now += float_s
                return original(module, *args, **kwargs)

            return forward

        for kind in (nn.Conv2d, nn.Linear, ModulatedLayer):
            monkeypatch.setattr(kind, "forward", passing(kind.forward))

    def __call__(self):
        return self.now


def plan_for(unet, config=None, **options):
    config = config or mk.ModiffConfig(fuse=False)
    return mk.make_plan(unet, config, **{"sample": sample, "rounds": 1, "progress": False, **options})


def test_end_to_end_in_little_time(unet, cache):
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    started = time.perf_counter()
    plan = mk.make_plan(unet, mk.ModiffConfig(act_bits=4), sample=sample, rounds=2, progress=False)
    assert time.perf_counter() - started < 60  # about 3 s on an idle machine
    assert plan.source == "measured"
    assert plan.key.shape == (2, 3, 8, 8)
    assert not any(isinstance(module, ModulatedLayer) for module in unet.modules())
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    handle = mk.accelerate(unet, mk.ModiffConfig(act_bits=4))
    units = handle.replaced.units()
    assert {unit.path: unit.layers for unit in plan.units} == units
    with handle.sampling_run():
        sample(unet)
        state = handle.state.nbytes()
    handle.remove()
    modes = (FLOAT_MODE, PLAIN, Mode("modulated", 4))
    assert all(tuple(cost.mode for cost in unit.costs) == modes for unit in plan.units)
    assert all(cost.time_us > 0 for unit in plan.units for cost in unit.costs)
    assert sum(unit.cost(modes[2]).state_bytes for unit in plan.units) == state
    assert all(unit.cost(modes[1]).state_bytes == 0 for unit in plan.units)
    assert all(10 < unit.cost(mode).sqnr_db < 80 for unit in plan.units for mode in modes[1:])
    assert {"float", "float channels_last"} <= {candidate.name for candidate in plan.candidates}
    # kept, found again, and what plan="auto" takes
    assert LayerPlan.from_json(next(cache.rglob("*.json")).read_text()) == plan
    assert mk.make_plan(unet, mk.ModiffConfig(act_bits=4), sample=sample, progress=False) == plan
    handle = mk.accelerate(unet, mk.ModiffConfig(act_bits=4, plan="auto"))
    assert handle.plan == plan
    assert plan.summary in handle.explain()


def test_never_slower_all_float_where_low_bits_lose(unet, monkeypatch):
    plan = plan_for(unet, clock=Clock(monkeypatch, float_s=1.0, low_bit_s=1.0))
    assert plan.is_float
    assert plan.summary.startswith("all float: the fastest plan (all ")
    assert "1.000x as fast as float" in plan.summary
    assert {unit.reason for unit in plan.units} == {"nothing gains"}
    assert not mk.accelerate(unet, mk.ModiffConfig(plan=plan)).layers


def test_low_bits_where_they_win_and_float_where_they_lose(unet, monkeypatch):
    slow = ("mid_block.resnets.0.conv1", "down_blocks.0.resnets.0.conv2")
    clock = Clock(monkeypatch, float_s=1.0, low_bit_s=0.25, slow=slow, slow_s=3.0)
    plan = plan_for(unet, clock=clock, max_loss_db=3.0)
    assert all((unit.mode == FLOAT_MODE) == (unit.path in slow) for unit in plan.units)
    unit = next(unit for unit in plan.units if unit.layers == ("mid_block.attentions.0.to_out.0",))
    assert [cost.time_us for cost in unit.costs] == [1e6, 0.25e6, 0.25e6]
    shared = next(unit for unit in plan.units if "mid_block.attentions.0.to_k" in unit.layers)
    assert (len(shared.layers), shared.cost(FLOAT_MODE).time_us) == (3, 3e6)
    mixed = next(candidate for candidate in plan.candidates if candidate.name.startswith("plan: "))
    floats = next(candidate for candidate in plan.candidates if candidate.name == "float")
    gain = 0.75e6 * sum(len(unit.layers) for unit in plan.units if unit.path not in slow)
    assert floats.step_us - mixed.step_us == pytest.approx(gain)


def test_max_state_bytes_is_respected(unet, monkeypatch):
    config = mk.ModiffConfig(fuse=False, plan="auto", max_state_bytes=0)
    plan = plan_for(unet, config, clock=Clock(monkeypatch, float_s=1.0, low_bit_s=0.25), max_loss_db=40.0)
    assert {unit.mode for unit in plan.units} == {PLAIN}
    assert plan.state_bytes == 0
    whole = plan_for(unet, clock=Clock(monkeypatch, float_s=1.0, low_bit_s=0.25))
    assert whole.key != plan.key


def test_less_state_where_the_times_are_equal(unet, monkeypatch):
    plan = plan_for(unet, clock=Clock(monkeypatch, float_s=1.0, low_bit_s=0.25), max_loss_db=40.0)
    assert {unit.mode for unit in plan.units} == {PLAIN}


def psnr_db(unet, config, exact):
    """Mean over the pictures of a sampling with `config`, by the definition."""
    handle = mk.accelerate(unet, config)
    with handle.sampling_run():
        error = ((sample(unet) - exact) ** 2).mean(axis=(1, 2, 3))
    handle.remove()
    return float((-10 * np.log10(error)).mean())


def test_pictures_that_are_worse_than_allowed_are_not_taken(unet, monkeypatch):
    """Plain 3-bit layers are far worse than modulated ones, and here they take the least time."""
    plain3 = Mode("quantized", 3)
    monkeypatch.setattr(planner, "low_bit_modes", lambda config: (plain3, MODULATED))
    exact = sample(unet)
    best_db = psnr_db(unet, mk.ModiffConfig(fuse=False), exact)
    assert psnr_db(unet, mk.ModiffConfig(fuse=False, act_bits=3, mode="quantized"), exact) < best_db - 3
    clock = Clock(monkeypatch, float_s=1.0, low_bit_s=0.25)
    plan = plan_for(unet, clock=clock, max_loss_db=3.0)
    monkeypatch.undo()
    assert {MODULATED} <= {unit.mode for unit in plan.units}
    assert psnr_db(unet, mk.ModiffConfig(fuse=False, plan=plan), exact) >= best_db - 3.0
    assert "all quantized 3" not in {candidate.name for candidate in plan.candidates}
    assert "not within the limits: all quantized 3 (" in plan.describe()


@pytest.mark.parametrize("sampled_by", ["itself", "a function"])
def test_a_conditional_pipeline(sampled_by):
    """Cross-attention, encoder states by keyword, guidance in one batch."""
    pipe = stable_diffusion(DDIMScheduler(beta_end=0.002))
    unet, prompts = pipe.unet, {"prompt_embeds": text(1), "negative_prompt_embeds": text(1, seed=5)}

    def pictures(_):
        generator = torch.Generator().manual_seed(0)
        return pipe(**prompts, num_inference_steps=2, output_type="np", generator=generator).images

    config = mk.ModiffConfig()
    ways = {"itself": {"call": {**prompts, "num_inference_steps": 2}}, "a function": {"sample": pictures}}
    target = pipe if sampled_by == "itself" else unet
    plan = mk.make_plan(target, config, rounds=1, progress=False, **ways[sampled_by])
    assert plan.key.shape[0] == 2
    assert pipe.unet is unet
    handle = mk.accelerate(pipe, config)
    assert {layer for unit in plan.units for layer in unit.layers} == set(handle.layers)
    handle.remove()
    mk.accelerate(pipe, dataclasses.replace(config, plan=plan))
    pictures(unet)


def test_bad_input(unet):
    for options, message in (
        ({"sample": None}, "give sample="),
        ({"rounds": 0}, "rounds=0"),
        ({"max_loss_db": 0}, "max_loss_db=0"),
        ({"config": mk.ModiffConfig(act_bits=None)}, "act_bits=None leave no low-bit mode"),
        ({"sample": lambda unet: sample(unet, steps=1)}, "called the UNet 1 times"),
        ({"sample": lambda unet: sample(unet, seed=time.perf_counter_ns())}, "begin from the same noise"),
    ):
        with pytest.raises(ValueError, match=f"plan: .*{message}"):
            plan_for(unet, **options)
    mk.accelerate(unet, mk.ModiffConfig())
    with pytest.raises(RuntimeError, match="accelerated already"):
        plan_for(unet)


def test_calibrated_codes_are_what_is_measured(unet):
    config = mk.ModiffConfig(weight_bits=4)
    handle = mk.accelerate(unet, config)
    layers = {path: layer.stored() for path, layer in handle.layers.items()}
    handle.remove()
    nearest = mk.CalibrationResult("given", config, layers)
    path = "up_blocks.1.resnets.1.conv2"
    wrong = torch.arange(16.0) % 5  # no constant, which the next norm would take away
    shifted = {**layers, path: dataclasses.replace(layers[path], bias=wrong)}
    decibels = [
        {c.name: c.psnr_db for c in plan_for(unet, config, calibration=result, use_cache=False).candidates}
        for result in (None, nearest, mk.CalibrationResult("given", config, shifted))
    ]
    modulated = next(name for name in decibels[0] if "modulated" in name)
    assert decibels[1][modulated] == pytest.approx(decibels[0][modulated], abs=1e-6)
    assert decibels[2][modulated] < decibels[0][modulated] - 1
