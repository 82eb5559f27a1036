"""AccuQuant: its gradient against back-propagation through all steps, its memory, and that groups end closer."""

import dataclasses
import functools
import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler

import modiff_kernels as mk
from modiff_kernels.calibration import accuquant
from modiff_kernels.calibration.accuquant import Rollout, scheduler_at
from modiff_kernels.calibration.data import collect, pipeline_sampler
from modiff_kernels.calibration.job import Job, layers_of
from modiff_kernels.calibration.reconstruction import fake_quantized
from modiff_kernels.quant.calibrated import CalibratedLayer, QuantizedWeight

STATIC = mk.ModiffConfig(weight_bits=4, act_bits=8, scale_mode="static", mode="quantized")
SMALL = {"steps": 6, "samples": 4, "batch": 2, "quiet": True, "calls_per_sample": 2, "weight_method": "rtn"}
FEW = {"network_iterations": 0, "group_steps": 4, "group_iterations": 2, "act_iterations": 2, "learn_batch": 1}


@pytest.fixture
def sampler(pipe):
    return pipeline_sampler(pipe, 12, {})


@pytest.fixture
def layers(pipe):
    found = {}
    for path, module in pipe.unet.named_modules():
        if path.startswith(("up_blocks", "conv_out")) and hasattr(module, "weight") and module.weight.ndim in (2, 4):
            codes = QuantizedWeight.rounded(module.weight, 4)
            found[path] = CalibratedLayer(codes, torch.tensor([0.05]), torch.zeros(1, dtype=torch.int32))
    return found


def starts(sampler, first):
    return collect(sampler, torch.full((2, 1), first), range(2), 2)


def watch(fakes):
    owned = ((fake.variable, fake.weight_scale, fake.act_scale, fake.bias) for fake in fakes.values())
    return [each.requires_grad_(True) for own in owned for each in own if each is not None]


def whole_graph(pipe, sampler, start, calls, form):
    """The end of the group with the graph of all steps in memory: what each form of the gradient stands for."""
    scheduler = scheduler_at(sampler, calls.start)
    x = start
    for call in calls:
        timestep = scheduler.timesteps[call]
        seen = x if form == "exact" else x.detach()
        output = pipe.unet(seen, torch.full((len(x),), float(timestep)), return_dict=False)[0]
        given = x.detach() if form == "identity" else x
        after = scheduler.step(output, timestep, given, return_dict=False)[0]
        x = after + x - x.detach() if form == "identity" else after
    return x


@pytest.mark.parametrize("form", accuquant.GRADIENTS)
@pytest.mark.parametrize("steps", [1, 3])
def test_gradient_against_back_propagation(pipe, sampler, layers, steps, form):
    data, calls = starts(sampler, 4), range(4, 4 + steps)
    target = torch.randn(data.sample.shape, generator=torch.Generator().manual_seed(0))
    with fake_quantized(pipe.unet, layers, "quantized", 8, "straight_through") as fakes:
        parameters = watch(fakes)
        loss = (whole_graph(pipe, sampler, data.sample, calls, form) - target).square().mean()
        expected = torch.autograd.grad(loss, parameters)
        found_loss = (Rollout(sampler, data, torch.arange(2), calls).run(form) - target).square().mean()
        (3 * found_loss).backward()
    found = [parameter.grad for parameter in parameters]
    torch.testing.assert_close(found_loss, loss)
    size = max(float(part.abs().max()) for part in expected)  # some, like that of the bias of to_k, are 0 but for noise
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, 3 * theirs, rtol=1e-4, atol=1e-5 * size)


def peak_bytes(run):
    """The most bytes that run() has allocated at a time, by the allocator's own events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("form", ["identity", "exact"])
def test_memory_does_not_grow_with_the_steps_of_a_group(pipe, sampler, layers, form):
    data = starts(sampler, 1)
    target = torch.zeros_like(data.sample)
    with fake_quantized(pipe.unet, layers, "quantized", 8, "straight_through") as fakes:
        parameters = watch(fakes)

        def back_propagate(steps):
            rollout = Rollout(sampler, data, torch.arange(2), range(1, 1 + steps))
            (rollout.run(form) - target).square().mean().backward()
            for parameter in parameters:
                parameter.grad = None

        few, many = (peak_bytes(functools.partial(back_propagate, steps)) for steps in (2, 6))
    assert many <= 1.1 * few


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_groups_of_the_float_network(pipe, kind):
    """Its groups end where the next one starts, with a sampler whose steps do not depend on those before."""
    options = {} if kind is DDIMScheduler else {"solver_order": 1}
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    job = make_job(pipe, group_steps=4)
    groups = accuquant.collect_groups(job)
    assert groups.calls == [range(4), range(4, 8), range(8, 10)]
    for own, after in zip(groups.points[:-1], groups.points[1:]):
        torch.testing.assert_close(groups.target[own], groups.data.sample[after])
    images = pipe(batch_size=1, num_inference_steps=10, generator=[torch.manual_seed(0)], output_type="np").images
    last = groups.target[groups.points[-1][:1]].permute(0, 2, 3, 1).numpy()
    assert abs((last / 2 + 0.5).clip(0, 1) - images).max() < 1e-5


def make_job(pipe, **options):
    sampler, chosen = pipeline_sampler(pipe, 10, {}), accuquant.AccuQuantOptions(**options)
    return Job(pipe.unet, sampler, STATIC, chosen, 4, 2, 0, {}, None, True, layers_of(pipe.unet, STATIC))


def test_learnt_codes_lower_the_error_at_the_ends(pipe):
    sampler = pipeline_sampler(pipe, 6, {})
    groups = accuquant.collect_groups(dataclasses.replace(make_job(pipe), sampler=sampler))
    errors = {}
    for iterations in (0, 40):
        options = {**FEW, "group_iterations": iterations, "group_lr": 0.02, "learn_batch": 4}
        result = mk.calibrate(pipe, "accuquant", mk.ModiffConfig(3, None), **SMALL, **options)
        with fake_quantized(pipe.unet, result.layers, "modulated", None, "straight_through") as fakes, torch.no_grad():
            for path, fake in fakes.items():
                fake.variable.copy_(result.layers[path].weight.codes)
            ends = [
                Rollout(sampler, groups.data, points, calls).run() - groups.target[points]
                for points, calls in zip(groups.points, groups.calls)
            ]
        errors[iterations] = torch.cat(ends).square().mean()
    assert errors[40] < 0.8 * errors[0], errors  # 0.28 to 0.54 for three orders of the batches


def test_scales_of_groups_are_learnt(pipe):
    config = dataclasses.replace(STATIC, mode="modulated")
    whole = mk.calibrate(pipe, "accuquant", config, **SMALL, **FEW)
    for layer in whole.layers.values():
        assert layer.act_scale.shape == (6,)
        assert (layer.act_scale[:4] == layer.act_scale[0]).all()
        assert layer.act_scale[4] == layer.act_scale[5] != layer.act_scale[0]
    to_q, to_v = (whole.layers[f"mid_block.attentions.0.{name}"] for name in ("to_q", "to_v"))
    assert torch.equal(to_q.act_scale, to_v.act_scale)
    start = mk.calibrate(pipe, "accuquant", config, weights=whole, **SMALL, **{**FEW, "act_iterations": 0})
    started = start.layers["mid_block.attentions.0.to_q"]
    assert torch.equal(started.weight.codes, to_q.weight.codes)
    assert not torch.equal(started.act_scale, to_q.act_scale)


def test_schedulers_that_it_refuses(pipe):
    for scheduler, message in (
        (PNDMScheduler(), "which PNDMScheduler cannot; use DDIMScheduler"),
        (EulerDiscreteScheduler(), "which EulerDiscreteScheduler scales; use DDIMScheduler"),
    ):
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match=message):
            mk.calibrate(pipe, "accuquant", STATIC, **SMALL)


def test_guidance_in_one_batch_is_refused(pipe):
    sampler = pipeline_sampler(pipe, 6, {})

    def twice(seeds):
        scheduler = scheduler_at(sampler, 0)
        sample = torch.zeros(len(seeds), 3, 8, 8)
        for timestep in scheduler.timesteps:
            output = pipe.unet(torch.cat([sample, sample]), timestep.float(), return_dict=False)[0]
            sample = scheduler.step(output.chunk(2)[0], timestep, sample, return_dict=False)[0]

    with pytest.raises(ValueError, match="needs one row of the UNet's batch per image; sample without guidance"):
        mk.calibrate(pipe.unet, "accuquant", STATIC, scheduler=pipe.scheduler, sample=twice, **SMALL)
