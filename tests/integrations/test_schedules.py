"""Step schedules: what runs, what is returned, that the state stays consistent; with diffusers' samplers and "auto"."""

import collections
import contextlib
import itertools
import warnings

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from torch import nn

import modiff_kernels as mk
from modiff_kernels.nn.blocks import FusedBlock, covering
from modiff_kernels.nn.layer import ModulatedLayer
from tests import unets
from tests.unets import FLOAT, assert_invariant, noise, pipeline, sample, snapshot, text, unet2d, unet2d_condition

# diffusers' Heun and KDPM2 schedulers hand tensors to NumPy functions, and NumPy 2 wants more of them than torch has.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]


@contextlib.contextmanager
def count_runs(handle, *kinds):
    """Counter of forward calls by path of the modules of these kinds that are called."""
    counts, paths = collections.Counter(), {module: path for path, module in handle.unet.named_modules()}

    def count(module, args, output):
        path = paths.get(module)
        if path and isinstance(module, kinds) and covering(path, handle.replaced.fused) is None:
            counts.update([path])

    with nn.modules.module.register_module_forward_hook(count):
        yield counts


def letters(handle, context="default"):
    """The actions of the last run."""
    short = {"update": "U", "hold": "H", "forecast": "F"}
    return "".join(short[action] for action in handle.actions(context))


class TestWholeNetwork:
    def test_a_skipped_call_runs_no_layer(self):
        pipe = pipeline()
        handle = mk.accelerate(pipe, mk.ModiffConfig(schedule="forecast every=3 first=2 last=1"))
        with count_runs(handle, nn.Conv2d, nn.Linear, nn.GroupNorm, ModulatedLayer, FusedBlock) as counts:
            sample(pipe, 12)
        assert letters(handle) == "UUFFUFFUFFUU"
        assert counts["conv_in"] == 6
        assert set(counts.values()) == {6}
        sample(pipe, 20, start=10)  # image to image: the schedule lies over its part
        assert letters(handle) == "UUFFUFFUFU"
        pipe.unet.mid_block.register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match="every call is computed, because hooks are on modules"):
            sample(pipe, 12)
        assert letters(handle) == "U" * 12

    def test_results_keep_their_form_and_do_not_alias_what_is_remembered(self):
        unet = unet2d()
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule="U2H2", **FLOAT))
        with handle.sampling_run(4):
            unet(noise(), 3)
            value = unet(noise(), 2).sample
            kept = value.clone()
            value.zero_()
            first = unet(sample=noise(), timestep=1)
            assert type(first).__name__ == "UNet2DOutput"
            assert torch.equal(first.sample, kept)
            first.sample.zero_()
            assert torch.equal(unet(noise(), 0).sample, kept)
        with handle.sampling_run(6):
            asked = (True, False, True, False, False, True)
            found = [isinstance(unet(noise(), t, return_dict=form), tuple) for t, form in enumerate(asked)]
        assert found == [not form for form in asked]
        assert letters(handle) == "UUUHHH"
        assert "3 update, 3 hold" in handle.explain_schedule()

    def test_outputs_of_another_shape_are_held(self):
        unet = OneConv()
        unet.forward = lambda sample, timestep: sample[:, :1, ::2]
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule="UH3", **FLOAT))
        with handle.sampling_run(4):
            assert {unet(noise(), t).shape for t in (9, 8, 7, 6)} == {(2, 1, 4, 8)}
        assert letters(handle) == "UHHH"

    def test_other_conditions_are_a_new_beginning(self):
        """Calls are computed until as many are known as the schedule counts on."""
        unet, scheduler = unet2d_condition(), DDIMScheduler()
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule="forecast every=3 first=2", **FLOAT))
        scheduler.set_timesteps(14)
        with handle.sampling_run(scheduler=scheduler):
            for call, t in enumerate(scheduler.timesteps):
                residual = torch.full((2, 32, 4, 4), float(call))  # of a ControlNet: no condition
                unet(noise(channels=4), t, text(seed=int(call > 4)), mid_block_additional_residual=residual)
        assert letters(handle) == "UUFFUUUUFFUFFU"
        assert "; 2 computed that the schedule would skip: too little" in handle.explain_schedule()
        with handle.sampling_run(scheduler=scheduler):
            scheduler.set_timesteps(30)
            with pytest.warns(UserWarning, match="pass the same tensors"):
                [unet(noise(channels=4), t, text(seed=call)) for call, t in enumerate(scheduler.timesteps)]

    @pytest.mark.parametrize("knows_noise", [True, False])
    def test_polynomials_are_forecast_exactly(self, knows_noise):
        """Of degree 2 in the root of sigma, or in the timestep where the noise levels are not known."""
        scheduler = DDIMScheduler()
        place = (1 / scheduler.alphas_cumprod - 1).double() ** 0.25 if knows_noise else torch.arange(1000) / 1000
        unet, x = OneConv(), noise()
        unet.forward = lambda sample, timestep: sample * float(1 + 0.3 * place[int(timestep)] ** 2)
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule="U3F2UF2", **FLOAT))
        scheduler.set_timesteps(8)
        with handle.sampling_run(scheduler=scheduler) if knows_noise else handle.sampling_run(8):
            found = [unet(x, t) for t in scheduler.timesteps]
        assert letters(handle) == "UUUFFUFF"
        handle.remove()
        for t, value in zip(scheduler.timesteps, found):
            torch.testing.assert_close(value, unet(x, t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("forecast every=2", {"act_bits": 4}),
        ("forecast every=2", {"fuse": False}),
        ("hold every=3", {"scale_mode": "delayed"}),
        ("U2F2UHFUH3U2", {}),
    ],
    ids=str,
)
def test_state_is_consistent_and_runs_repeat(schedule, options):
    pipe = pipeline()
    before, dense = snapshot(pipe.unet), sample(pipe, 12)
    handle = mk.accelerate(pipe, mk.ModiffConfig(schedule=schedule, **options))
    layers = handle.layers.values()
    first = sample(pipe, 12, on_call=lambda: assert_invariant(layers, 13))
    assert len(set(letters(handle))) > 1
    assert torch.equal(first, sample(pipe, 12))
    assert f"last run, context default: {letters(handle)}" in handle.explain()
    states = [*handle.state.inputs.values(), *handle.state.outputs.values()]
    of_layers = sum(held.tensor.nbytes for holder in states for held in holder.contexts.values())
    assert handle.state.nbytes() > of_layers  # what a schedule remembers counts
    handle.remove()
    assert torch.equal(sample(pipe, 12), dense)
    assert snapshot(pipe.unet) == before


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
        config = mk.ModiffConfig(scale_mode=mode, schedule=schedule, backend="reference")
        handle = mk.accelerate(unet, config, calibration=unets.static_scales(unet, config, step.abs().max() / 127))
        with handle.sampling_run(9):
            for call in range(9):
                unet(step * call, 9 - call)
        error = (unets.x_hat_of(handle.layers["conv"]) - step * 8).abs().max()
        handle.remove()
        return float(error / step.abs().max())

    assert clipped("U2HU2H3U") < 0.05
    assert clipped("U2H6U") < 0.06  # delayed: half a step of 8 bits over twice a residual of 7 steps


class TestRefusals:
    @pytest.mark.parametrize(
        ("schedule", "calls", "match"),
        [("hold", (), r"number of calls .* is not known"), ("auto", (20,), r"sampling_run\(scheduler=")],
    )
    def test_what_must_be_known(self, schedule, calls, match):
        unet = unet2d()
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule=schedule, **FLOAT))
        with handle.sampling_run(*calls), pytest.raises(ValueError, match=match):
            unet(noise(), 1)
        with pytest.raises(RuntimeError, match="outside a run"):
            unet(noise(), 1)

    def test_stochastic_samplers_are_warned_about_unless_meant(self):
        samplers = [(DDPMScheduler, {}), (DDIMScheduler, {"eta": 0.5}), (EulerDiscreteScheduler, {"s_churn": 1.0})]
        for (scheduler, options), meant in itertools.product(samplers, (False, True)):
            pipe = pipeline(scheduler())
            handle = mk.accelerate(pipe, mk.ModiffConfig(schedule=f"UF5 stochastic={meant}", **FLOAT))
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                sample(pipe, 6, **options)
                sample(pipe, 6, **options)
            assert sum("adds noise at its steps" in str(warning.message) for warning in seen) == (not meant)
            assert letters(handle) == ("UFFFFF" if meant else "UUUUUU")
            assert ("every call is computed, because" in handle.explain_schedule()) != meant
            handle.remove()
            sample(pipe, 6, **options)


def test_another_schedule_from_the_next_run_on():
    pipe = pipeline()
    handle = mk.accelerate(pipe, mk.ModiffConfig(schedule="hold every=2", **FLOAT))
    sample(pipe, 6)
    handle.set_schedule(mk.StepSchedule("U3FUF"))
    with pytest.warns(UserWarning, match="a run of 3 calls is too short"):
        sample(pipe, 3)
    assert letters(handle) == "UUU"
    handle.set_schedule(mk.StepSchedule("UH4U"))
    for steps in (6, 12):  # a pattern fits every number of steps
        sample(pipe, steps)
        assert letters(handle) == f"U{'H' * (steps - 2)}U"
    handle.set_schedule(None)
    found = sample(pipe, 6)
    assert letters(handle) == "U" * 6
    handle.remove()
    handle = mk.accelerate(pipe, mk.ModiffConfig(**FLOAT))
    assert torch.equal(found, sample(pipe, 6))
    with pytest.raises(RuntimeError, match="got no schedule"):
        handle.set_schedule(mk.StepSchedule("hold"))


class TestFitted:
    """Weights that nobody would fit, so that every mistake shows."""

    def schedule(self, pattern="U2F2UFU"):
        computed, rows = 0, []
        for call, letter in enumerate(mk.StepSchedule(pattern).actions(7)):
            computed += letter == "U"
            rows.append([*(0.8, 0.3, -0.2, 0.1)[: min(computed, 4)], 0.05 * (call % 3)])
        return mk.StepSchedule(pattern, weights=rows)

    def test_image_to_image_is_no_whole_run(self):
        """Weights make up for errors that were made before; measured, polynomials are better for a part of a run."""
        pipe = pipeline()
        handle = mk.accelerate(pipe, mk.ModiffConfig(schedule=self.schedule(), **FLOAT))
        with pytest.warns(UserWarning, match="fitted to whole runs; from call 2 on it is 'forecast every=3' instead"):
            sample(pipe, 7, start=2)
        assert letters(handle) == "UUUFU"

    def test_other_runs_are_refused_and_other_conditions_begin_anew(self):
        pipe = pipeline()
        handle = mk.accelerate(pipe, mk.ModiffConfig(schedule=self.schedule(), **FLOAT))
        with pytest.raises(ValueError, match=r"fitted to runs of 7 calls, and this one has 8; .*alone: 'U2F2UFU'"):
            sample(pipe, 8)
        unet, scheduler = unet2d_condition(), DDIMScheduler()
        scheduler.set_timesteps(7)
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule=self.schedule(), **FLOAT))
        with handle.sampling_run(scheduler=scheduler):
            for call, t in enumerate(scheduler.timesteps):
                unet(noise(channels=4), t, text(seed=int(call > 2)))
        assert letters(handle) == "UUFUUUU"


class TestSchedulers:
    @pytest.mark.parametrize(
        "scheduler",
        [
            DDIMScheduler,
            PNDMScheduler,
            DPMSolverMultistepScheduler,
            EulerDiscreteScheduler,
            diffusers.HeunDiscreteScheduler,
        ],
    )
    def test_every_scheduler(self, scheduler):
        pipe = pipeline(scheduler())
        handle = mk.accelerate(pipe, mk.ModiffConfig(schedule="forecast every=2", **FLOAT))
        sample(pipe, 8)
        assert "F" in letters(handle)
        handle.remove()
        dense, handle = sample(pipe), mk.accelerate(pipe)
        first = sample(pipe)
        assert first.isfinite().all()
        assert not torch.equal(first, dense)
        assert torch.equal(sample(pipe), first)
        handle.remove()
        assert torch.equal(sample(pipe), dense)

    def test_two_contexts_have_their_own_values(self):
        unet = unet2d()
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(6)
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule="UH", **FLOAT))
        with handle.sampling_run(scheduler=scheduler):
            for call, t in enumerate(scheduler.timesteps):
                with handle.context("cond"):
                    cond = unet(noise(), t).sample
                if call < 4:
                    continue
                with handle.context("uncond"):  # guidance that begins late
                    uncond = unet(-noise(), t).sample
        assert letters(handle, "cond") == "UHHHHH"
        assert letters(handle, "uncond") == "UH"
        handle.remove()
        torch.testing.assert_close(cond, unet(noise(), scheduler.timesteps[0]).sample)
        torch.testing.assert_close(uncond, unet(-noise(), scheduler.timesteps[4]).sample)
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule="UH3U", **FLOAT))
        with handle.sampling_run(5):  # another batch is computed
            sizes = [unet(noise(batch), t).sample.shape[0] for batch, t in zip((4, 4, 2, 2, 2), range(5, 0, -1))]
        assert sizes == [4, 4, 2, 2, 2]
        assert letters(handle) == "UHUHU"


class TestAuto:
    @pytest.mark.parametrize(
        ("scheduler", "steps", "schedule", "reason"),
        [
            (DDPMScheduler, 20, "auto", "DDPMScheduler adds noise at its steps"),
            (DDIMScheduler, 6, "auto", "6 calls are few"),
            (DDIMScheduler, 14, "auto 5", "no schedule of 5 evaluations is stored for it"),
        ],
    )
    def test_it_computes_everything_where_skipping_does_not_pay(self, scheduler, steps, schedule, reason):
        pipe = pipeline(scheduler())
        dense = sample(pipe, steps)
        handle = mk.accelerate(pipe, mk.ModiffConfig(schedule=schedule, **FLOAT))
        with pytest.warns(UserWarning, match=f"every call is computed, because {reason}"):
            found = sample(pipe, steps)
        if scheduler is DDIMScheduler:
            torch.testing.assert_close(found, dense, rtol=1e-3, atol=1e-3)  # channels_last adds up in another order
        assert letters(handle) == "U" * steps
