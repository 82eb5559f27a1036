"""Runs of pipelines and own samplers: when they begin and end, what is refused, guidance, threads."""

import contextlib
import copy
import inspect
import types

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from diffusers.callbacks import SDCFGCutoffCallback

import modiff_kernels as mk
from modiff_kernels.evaluation import sqnr
from tests.unets import both_ways, noise, pipeline, sample, stable_diffusion, text, trajectory, unet2d, unet2d_condition

KINDS = {"plain": "quantized", "modulated": "modulated"}


class TestRuns:
    @pytest.mark.parametrize(
        ("error", "reason"), [(ZeroDivisionError, "a UNet call failed"), (KeyboardInterrupt, "interrupted")]
    )
    def test_a_failed_call_ends_the_run_and_leaves_nothing_to_the_next(self, error, reason):
        def fail(*_):
            raise error

        pipe = pipeline()
        fuse = error is KeyboardInterrupt
        mk.accelerate(pipe, mk.ModiffConfig(act_bits=4, scale_mode="delayed", fuse=fuse))
        fresh = sample(pipe)
        sample(pipe, stop_after=2)
        hook = pipe.unet.mid_block.resnets[1].register_forward_pre_hook(fail)
        with pytest.raises(error):
            pipe.unet(noise(), pipe.scheduler.timesteps[2])
        hook.remove()
        with pytest.raises(RuntimeError, match=rf"outside a run \(.*{reason}"):
            pipe.unet(noise(), 1)
        assert torch.equal(sample(pipe), fresh)

    def test_runs_of_few_calls_are_plain(self, caplog):
        def samples(plan, *steps):
            pipe = stable_diffusion(DDIMScheduler(clip_sample=False))
            prompts = {"prompt_embeds": text(1), "negative_prompt_embeds": text(1, 3), "output_type": "latent"}
            handle = mk.accelerate(pipe, mk.ModiffConfig(plan=plan))
            for count in steps:
                generator = torch.Generator().manual_seed(1)
                yield pipe(num_inference_steps=count, generator=generator, **prompts).images, handle

        modes = ("plain", 1), ("modulated", 5), ("plain", 4), ("modulated", 5), ("plain", 2)
        known = {kind: dict(zip((1, 2, 4, 5), samples(plan, 1, 2, 4, 5))) for kind, plan in KINDS.items()}
        for (image, handle), (kind, steps) in zip(samples(None, *(steps for _, steps in modes)), modes, strict=True):
            assert torch.equal(image, known[kind][steps][0]), (kind, steps)
            assert {row.mode for row in handle.rows()} & set(KINDS.values()) == {KINDS[kind]}
            has_state = handle.state.nbytes() > known["plain"][1][1].state.nbytes()
            assert has_state == (steps > 1), "the first run with updates takes it"
            assert "runs of up to 4 calls are plain W8A8" in handle.explain()
        assert caplog.text.count("runs of up to 4 calls are plain W8A8") == 1

    @both_ways
    def test_nan_names_the_layer(self, fuse):
        pipe = pipeline()
        mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse))
        for calls in (0, 2):
            sample(pipe, stop_after=calls)
            x = noise().fill_(float("nan"))
            with pytest.raises(ValueError, match=r"'down_blocks.0.resnets.0.*NaN or Inf"):
                pipe.unet(x, pipe.scheduler.timesteps[calls])

    def test_a_bare_unet_outside_a_run(self):
        unet = unet2d()
        handle = mk.accelerate(unet, mk.ModiffConfig(fuse=False))
        with pytest.raises(RuntimeError, match=r"the UNet was called outside a run.*handle.sampling_run\(\)"):
            unet(noise(), 1)
        with handle.sampling_run(), pytest.raises(RuntimeError, match="call the UNet itself"):
            unet.forward(noise(), 1)  # without the hooks of the module
        for given, match in (((), "bare UNet"), ((DDIMScheduler(),), "a DDIMScheduler has no scheduler; give a pipe")):
            with pytest.raises(RuntimeError, match=match):
                handle.wrap_scheduler(*given)

    def test_another_scheduler_after_an_interrupted_picture(self):
        pipe = pipeline(DDIMScheduler(clip_sample=False))
        handle = mk.accelerate(pipe, mk.ModiffConfig(act_bits=3, schedule="forecast"))
        second = pipeline(DDIMScheduler(clip_sample=False), pipe.unet)
        expected = sample(pipe, 7)
        for _ in range(2):
            sample(pipe, 10, stop_after=4)
            with pytest.raises(RuntimeError, match=r"did not announce.*handle.wrap_scheduler\(pipe\)"):
                sample(second, 7)
        handle.wrap_scheduler(second)
        for steps in (10, 7):
            found = sample(second, steps), sample(pipe, steps)
        assert torch.equal(torch.stack(found), torch.stack([expected, expected]))
        handle.remove()
        assert not {"set_timesteps", "step"} & (second.scheduler.__dict__.keys() | pipe.scheduler.__dict__.keys())

    @pytest.mark.parametrize("stop", [3, 8])
    def test_a_second_picture_without_set_timesteps_begins_anew(self, stop):
        pipe = pipeline()
        mk.accelerate(pipe, mk.ModiffConfig(act_bits=3, schedule="forecast every=2"))
        expected, x = sample(pipe, 8), noise()
        sample(pipe, 8, stop_after=stop)
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
        assert torch.equal(x, expected)


class TestScheduler:
    def test_signature_and_name_stay(self):
        pipe = pipeline(EulerDiscreteScheduler())
        before = inspect.signature(pipe.scheduler.set_timesteps)
        handle = mk.accelerate(pipe)
        assert inspect.signature(pipe.scheduler.set_timesteps) == before
        assert pipe.scheduler.set_timesteps.__name__ == "set_timesteps"
        pipe.scheduler.set_timesteps(timesteps=[900, 500, 100])
        pipe.unet(noise(), 1)
        copied = copy.deepcopy(pipe.scheduler)
        copied.set_timesteps(7)  # of an ordinary scheduler: no run begins
        assert (len(copied.timesteps), len(pipe.scheduler.timesteps)) == (7, 3)
        handle.remove()
        assert "set_timesteps" not in pipe.scheduler.__dict__
        assert inspect.signature(pipe.scheduler.set_timesteps) == before

    def test_replaced_scheduler(self):
        pipe = pipeline()
        handle = mk.accelerate(pipe)
        expected = sample(pipe)
        old, pipe.scheduler = pipe.scheduler, DDIMScheduler()
        with pytest.raises(RuntimeError, match=r"pipe.scheduler was replaced.*wrap_scheduler\(\)"):
            sample(pipe)
        with handle.sampling_run():
            assert torch.equal(sample(pipe), expected)
        handle.wrap_scheduler()
        assert "set_timesteps" not in old.__dict__
        assert torch.equal(sample(pipe), expected)
        handle.remove()
        assert "set_timesteps" not in pipe.scheduler.__dict__

    @pytest.mark.parametrize("first", [0, 1])
    def test_one_scheduler_for_two_pipelines(self, first):
        scheduler = DDIMScheduler()
        pipes = [types.SimpleNamespace(unet=unet2d(seed=seed), scheduler=scheduler) for seed in range(2)]
        handles = [mk.accelerate(pipe) for pipe in pipes]
        for pipe in pipes:
            sample(pipe, steps=2)
        handles[first].remove()
        sample(pipes[1 - first], steps=2)
        handles[1 - first].remove()
        assert "set_timesteps" not in scheduler.__dict__


PROMPTS = {"cond": text(), "uncond": torch.zeros_like(text())}


class TestGuidance:
    CALLS = tuple(zip(trajectory((2, 4, 8, 8), 4), (900, 800, 700, 600)))

    def guided(self, unet, handle, passes, named=True):
        """The last prediction for either prompt, in one batch or in contexts of their own."""
        both = torch.cat([*PROMPTS.values()])
        with handle.sampling_run(len(self.CALLS)):
            for x, t in self.CALLS:
                if passes == 1:
                    found = unet(torch.cat([x, x]), t, encoder_hidden_states=both).sample.chunk(2)
                    continue
                found = []
                for name, prompt in PROMPTS.items():
                    with handle.context(name) if named else contextlib.nullcontext():
                        found.append(unet(x, t, prompt).sample)
        return found

    @both_ways
    @pytest.mark.parametrize("passes", [1, 2])
    def test_one_batch_or_two_passes(self, passes, fuse):
        unet = unet2d_condition()
        reference = [unet(*self.CALLS[-1], prompt).sample for prompt in PROMPTS.values()]
        handle = mk.accelerate(unet, mk.ModiffConfig(granularity="per_sample", fuse=fuse))
        got = self.guided(unet, handle, passes)
        unnamed = self.guided(unet, handle, passes, named=False)
        assert torch.equal(torch.stack(unnamed), torch.stack([*got]))
        for ours, theirs, prompt in zip(got, reference, PROMPTS.values()):
            assert sqnr(ours, theirs) > 30  # weights of 8 bits
            with handle.sampling_run():
                alone = [unet(x, t, prompt).sample for x, t in self.CALLS]
            if passes == 2:  # in one batch, float sums have another order
                assert torch.equal(ours, alone[-1])

    def test_stable_diffusion_pipeline(self):
        pipe = stable_diffusion(PNDMScheduler())

        def latents(**options):
            prompts = {"prompt_embeds": PROMPTS["cond"][:1], "negative_prompt_embeds": PROMPTS["uncond"][:1]}
            generator = torch.Generator().manual_seed(0)
            return pipe(**prompts, num_inference_steps=4, generator=generator, output_type="latent", **options).images

        cut_off = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.4)}  # drops half of the batch
        reference, shorter = latents(), latents(**cut_off)
        handle = mk.accelerate(pipe)
        result = latents()
        assert sqnr(result, reference) > 20  # weights of 8 bits, times a guidance of 7.5
        assert sqnr(latents(**cut_off), shorter) > 20
        assert torch.equal(latents(), result)
        handle.remove()
        assert torch.equal(latents(), reference)

    def test_a_pipeline_with_two_calls_per_step(self):
        pipe = diffusers.ScoreSdeVePipeline(unet2d(), diffusers.ScoreSdeVeScheduler(sigma_max=5.0))
        pipe.set_progress_bar_config(disable=True)

        def picture():
            generator = torch.Generator().manual_seed(0)
            return torch.from_numpy(pipe(num_inference_steps=4, generator=generator, output_type="np").images)

        reference = picture()
        handle = mk.accelerate(pipe, mk.ModiffConfig(plan="modulated"))
        assert sqnr(picture(), reference) > 25
        assert handle.state.contexts() == {"default", "default/1"}
