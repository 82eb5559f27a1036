"""Step schedules on accelerated UNets: what runs, what is returned, and that the state stays consistent."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

import modiff_kernels as mk
from modiff_kernels.nn.blocks import FusedBlock
from modiff_kernels.nn.layer import ModulatedLayer
from modiff_kernels.quant.affine import dequantize_weight, quantize_weight
from tests.integrations.schedule_cases import FLOAT, letters, noise, pipeline, sample, unet_of


def count_runs(modules):
    """Dict of path -> number of forward calls so far, from hooks on all `modules`."""
    counts = dict.fromkeys(modules, 0)

    def count(path):
        def hook(*_):
            counts[path] += 1

        return hook

    for path, module in modules.items():
        module.register_forward_hook(count(path))
    return counts


def assert_invariant(handle):
    """y_hat == A(x_hat) + bias for every layer with a state of its own, by torch in float64."""
    checked = 0
    for layer in handle.layers.values():
        slot = layer.output.contexts.get("default") if layer.output is not None else None
        if slot is None or layer.name.endswith("conv_shortcut") or layer.output.key != layer.name:
            continue
        shares_output = any(other is not layer and other.output is layer.output for other in handle.layers.values())
        x_hat = layer.input.contexts["default"].tensor.double()
        if shares_output or slot.shape[2:] != layer.output_shape(x_hat.shape)[2:]:
            continue  # its y_hat holds the shortcut's product too, or its x_hat is kept before the upsampling
        weight = layer.original.weight.double()
        codes, scale = quantize_weight(layer.original.weight, layer.weight_bits, layer.group_size)
        weight = dequantize_weight(codes, scale, layer.group_size, weight.shape).double()
        bias = None if layer.bias is None else layer.bias.double()
        if weight.ndim == 4:
            expected = F.conv2d(x_hat, weight, bias, *layer.window[1:])
        else:
            expected = F.linear(x_hat, weight, bias)
        torch.testing.assert_close(slot.tensor.double(), expected, rtol=1e-4, atol=1e-4)
        checked += 1
    assert checked > 3


class TestWholeNetwork:
    @pytest.mark.parametrize("options", [FLOAT, {}], ids=["float", "w8a8"])
    def test_a_skipped_call_runs_no_layer(self, options):
        pipe = pipeline()
        handle = mk.accelerate(pipe, mk.ModiffConfig(schedule="forecast every=3 first=2 last=1", **options))
        kinds = (nn.Conv2d, nn.Linear, nn.GroupNorm, ModulatedLayer)
        counts = count_runs({path: module for path, module in pipe.unet.named_modules() if isinstance(module, kinds)})
        sample(pipe)
        assert letters(handle) == "UUFFUFFUFFUU"
        assert counts["conv_in"] == 6
        assert set(counts.values()) <= {0, 6}  # 0: what fused blocks call by function

    def test_hold_returns_the_last_output_and_forecast_extrapolates(self):
        scheduler, unet = DDIMScheduler(), unet_of()
        inputs = [noise() * factor for factor in (1.0, 0.9, 0.8, 0.7)]
        for text, expect in {
            "U3H axis=timestep": lambda y, t: y[2],
            "U3F order=1 axis=timestep": lambda y, t: y[2] + (y[2] - y[1]) * (t[3] - t[2]) / (t[2] - t[1]),
            "U1F3 axis=timestep": lambda y, t: y[0],
        }.items():
            scheduler.set_timesteps(4)
            times = [int(t) for t in scheduler.timesteps]
            dense = [unet(x, t).sample for x, t in zip(inputs, times)]
            handle = mk.accelerate(unet, mk.ModiffConfig(schedule=text, **FLOAT))
            with handle.sampling_run(scheduler=scheduler):
                found = [unet(x, t).sample for x, t in zip(inputs, times)]
            torch.testing.assert_close(found[3], expect(dense, times))
            handle.remove()

    @pytest.mark.parametrize(("axis", "degree"), [("timestep", 2), ("sigma", 1), ("root_sigma", 2), ("log_snr", 1)])
    def test_polynomials_on_the_axis_are_forecast_exactly(self, axis, degree):
        scheduler = DDIMScheduler()
        place = {
            "timestep": lambda t: t / 1000,
            "sigma": lambda t: (1 / scheduler.alphas_cumprod[t] - 1).double().sqrt(),
            "root_sigma": lambda t: (1 / scheduler.alphas_cumprod[t] - 1).double() ** 0.25,
            "log_snr": lambda t: -(1 / scheduler.alphas_cumprod[t] - 1).double().log(),
        }[axis]

        class Polynomial(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 1)

            def forward(self, sample, timestep):
                return sample * (1 + 0.3 * place(int(timestep)) ** degree).__float__()

        unet, x = Polynomial(), noise()
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule=f"U3F2UF2 order={degree} axis={axis}", **FLOAT))
        scheduler.set_timesteps(8)
        with handle.sampling_run(scheduler=scheduler):
            found = [unet(x, t) for t in scheduler.timesteps]
        assert letters(handle) == "UUUFFUFF"
        handle.remove()
        for t, value in zip(scheduler.timesteps, found):
            torch.testing.assert_close(value, unet(x, t), rtol=1e-4, atol=1e-4)

    def test_results_do_not_alias_what_is_remembered(self):
        unet = unet_of()
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule="U2H2 axis=timestep", **FLOAT))
        with handle.sampling_run(4):
            unet(noise(), 3)
            value = unet(noise(), 2).sample
            kept = value.clone()
            value.zero_()
            first = unet(noise(), 1).sample
            assert torch.equal(first, kept)
            first.zero_()
            assert torch.equal(unet(noise(), 0).sample, kept)

    def test_the_form_of_the_output_is_kept(self):
        unet = unet_of()
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule="UHH axis=timestep", **FLOAT))
        with handle.sampling_run(3):
            found = [unet(noise(), t, return_dict=False) for t in (2, 1, 0)]
        assert all(isinstance(value, tuple) for value in found)
        with handle.sampling_run(3):
            found = [unet(sample=noise(), timestep=t) for t in (2, 1, 0)]
        assert {type(value).__name__ for value in found} == {"UNet2DOutput"}


SCHEDULES = ["forecast every=2", "hold every=3 first=1", "deep-forecast every=2", "deep-hold every=3", "U2F2UhfUH3U2"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", [{}, {"act_bits": 4}, {"scale_mode": "delayed"}, {"fuse": False}], ids=str)
def test_state_is_consistent_and_runs_repeat(schedule, options):
    pipe = pipeline()
    dense = sample(pipe)
    handle = mk.accelerate(pipe, mk.ModiffConfig(schedule=schedule, **options))
    first = sample(pipe, on_call=lambda: assert_invariant(handle))
    assert len(set(letters(handle))) > 1
    assert torch.equal(first, sample(pipe))
    handle.remove()
    assert torch.equal(sample(pipe), dense)
    assert "forward" not in pipe.unet.__dict__
    assert all("forward" not in module.__dict__ for module in pipe.unet.modules())


def test_without_schedule_nothing_is_wrapped():
    unet = unet_of()
    mk.accelerate(unet)
    wrapped = [path for path, module in unet.named_modules() if "forward" in module.__dict__]
    # By the door of handle.compile() and CUDA graphs, and by the time table.
    assert set(wrapped) <= {"", "time_proj", "time_embedding"}


class TestDeepLevels:
    @pytest.mark.parametrize("condition", [False, True], ids=["unet2d", "condition"])
    @pytest.mark.parametrize("level", [1, 2])
    @pytest.mark.parametrize("options", [FLOAT, {}], ids=["float", "w8a8"])
    def test_only_what_is_above_the_cut_runs(self, condition, level, options):
        unet = unet_of(3, condition)
        more = {"encoder_hidden_states": torch.ones(2, 5, 12)} if condition else {}
        shape = noise() if not condition else torch.randn(2, 4, 8, 8)
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule=f"U2h4U axis=timestep level={level}", **options))
        kinds = (nn.Conv2d, ModulatedLayer, FusedBlock)
        counts = count_runs({path: module for path, module in unet.named_modules() if isinstance(module, kinds)})
        with handle.sampling_run(7):
            for t in range(7, 0, -1):
                unet(shape * (1 + t / 50), t, **more)
        assert letters(handle) == "UUhhhhU"
        skipped_down = range(3 - level, 3)
        below = [f"down_blocks.{i}." for i in skipped_down] + ["mid_block."] + [f"up_blocks.{i}." for i in range(level)]
        below.append(f"down_blocks.{2 - level}.downsamplers.")
        above = {path: n for path, n in counts.items() if not path.startswith(tuple(below)) and n}
        deep = {path: n for path, n in counts.items() if path.startswith(tuple(below)) and n}
        assert set(above.values()) == {7}
        assert set(deep.values()) == {3}

    def test_the_shallow_part_gets_the_boundary_that_was_computed(self):
        unet = unet_of(3)
        dense = unet(noise(), 9).sample
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule="Uh2f2 axis=timestep", **FLOAT))
        with handle.sampling_run(5):
            for _ in range(5):  # same input: held and forecast deep levels are the right ones
                torch.testing.assert_close(unet(noise(), 9).sample, dense)

    def test_unknown_levels_are_refused_before_anything_changes(self):
        unet = unet_of()
        before = {path: id(module) for path, module in unet.named_modules()}
        with pytest.raises(ValueError, match="level=2 is not allowed; UNet2DModel has 2 up blocks, so give 1 to 1"):
            mk.accelerate(unet, mk.ModiffConfig(schedule="deep-hold level=2"))
        assert before == {path: id(module) for path, module in unet.named_modules()}
        with pytest.raises(ValueError, match="no levels to skip"):
            mk.accelerate(nn.Sequential(nn.Conv2d(3, 3, 1)), mk.ModiffConfig(schedule="deep-hold"))

    def test_controlnet_is_refused(self):
        unet = unet_of(condition=True)
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule="deep-hold axis=timestep", **FLOAT))
        with handle.sampling_run(9), pytest.raises(ValueError, match="ControlNet or T2I-Adapter"):
            unet(
                torch.randn(1, 4, 8, 8), 1, torch.ones(1, 5, 12), mid_block_additional_residual=torch.zeros(1, 16, 4, 4)
            )


class OneConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, sample, timestep):
        return self.conv(sample)


@pytest.mark.parametrize("mode", ["delayed", "static"])
def test_scales_cope_with_the_gap(mode):
    """An input that moves by the same step per call: after a gap of 3 calls the residual is 3 times as large."""

    def clipped(schedule):
        torch.manual_seed(0)
        unet = OneConv()
        step = torch.randn(1, 4, 8, 8)
        scales = {"conv": float(step.abs().max() / 127)} if mode == "static" else None
        handle = mk.accelerate(
            unet,
            mk.ModiffConfig(scale_mode=mode, schedule=schedule, backend="reference"),
            static_scales=scales,
        )
        with handle.sampling_run(9):
            for call in range(9):
                unet(step * call, 9 - call)
        edge = handle.layers["conv"].input
        error = (edge.contexts["default"].tensor - step * 8).abs().max()
        handle.remove()
        return float(error / step.abs().max())

    assert clipped("U2HU2H3U axis=timestep") < 0.05
    assert clipped("U2H6U axis=timestep") < 0.05


class TestRefusals:
    def test_the_length_of_the_run_must_be_known(self):
        unet = unet_of()
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule="hold", **FLOAT))
        with handle.sampling_run(), pytest.raises(ValueError, match=r"number of calls .* is not known"):
            unet(noise(), 1)
        with pytest.raises(RuntimeError, match="outside a run"):
            unet(noise(), 1)

    @pytest.mark.parametrize("schedule", ["forecast", "auto"])
    def test_the_noise_levels_must_be_known(self, schedule):
        unet = unet_of()
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule=schedule, **FLOAT))
        with handle.sampling_run(20), pytest.raises(ValueError, match=r"sampling_run\(scheduler="):
            unet(noise(), 1)

    def test_more_calls_than_planned(self):
        pipe = pipeline()
        unet, scheduler = pipe.unet, pipe.scheduler
        scheduler.set_timesteps(6)
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule="hold", **FLOAT))
        with handle.sampling_run(scheduler=scheduler):
            for t in scheduler.timesteps:
                unet(noise(), t)
            with pytest.raises(RuntimeError, match="call 7 of the UNet"):
                unet(noise(), 0)

    def test_stochastic_samplers_are_warned_about_unless_meant(self):
        for text, warned in (("forecast", 1), ("forecast stochastic=True", 0)):
            pipe = pipeline(DDPMScheduler())
            mk.accelerate(pipe, mk.ModiffConfig(schedule=text, **FLOAT))
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                sample(pipe, 6)
                sample(pipe, 6)
            assert sum("adds noise at its steps" in str(warning.message) for warning in seen) == warned

    def test_a_short_run_is_warned_about(self):
        pipe = pipeline()
        handle = mk.accelerate(pipe, mk.ModiffConfig(schedule="U3FUF", **FLOAT))
        with pytest.warns(UserWarning, match="a run of 3 calls is too short"):
            sample(pipe, 3)
        assert letters(handle) == "UUU"


def test_explain_names_the_schedule():
    pipe = pipeline()
    handle = mk.accelerate(pipe, mk.ModiffConfig(schedule="deep-hold every=2"))
    assert "schedule: deep-hold: skips the levels below up block -1, held" in handle.explain()
    sample(pipe, 6)
    assert "last run, context default: UUUhUU" in handle.explain()
    assert handle.state.nbytes() > sum(
        slot.tensor.nbytes
        for holder in [*handle.state.inputs.values(), *handle.state.outputs.values()]
        for slot in holder.contexts.values()
    )


def test_another_schedule_from_the_next_run_on():
    pipe = pipeline()
    handle = mk.accelerate(pipe, mk.ModiffConfig(schedule="hold every=2", **FLOAT))
    sample(pipe, 6)
    handle.set_schedule(mk.StepSchedule("UH4U"))
    sample(pipe, 6)
    assert letters(handle) == "UHHHHU"
    handle.set_schedule(None)
    found = sample(pipe, 6)
    assert letters(handle) == "U" * 6
    assert "schedule: none" in handle.explain()
    with pytest.raises(ValueError, match="skips deep levels that were not prepared"):
        handle.set_schedule(mk.StepSchedule("deep-hold"))
    handle.remove()
    handle = mk.accelerate(pipe, mk.ModiffConfig(**FLOAT))
    assert torch.equal(found, sample(pipe, 6))
    with pytest.raises(RuntimeError, match="got no schedule"):
        handle.set_schedule(mk.StepSchedule("hold"))
