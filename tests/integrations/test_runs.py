"""Runs of pipelines and own samplers: when they begin and end, what is refused, guidance, threads."""

import copy
import inspect
import types

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler

import modiff_kernels as mk
from modiff_kernels.evaluation import sqnr
from tests.unets import both_ways, noise, pipeline, sample, stable_diffusion, text, trajectory, unet2d, unet2d_condition


@pytest.mark.parametrize("make", [(DDIMPipeline, DDIMScheduler), (DDPMPipeline, DDPMScheduler)])
def test_pipelines(make):
    pipe = make[0](unet2d(), make[1]())
    pipe.set_progress_bar_config(disable=True)

    def images():
        generator = torch.Generator().manual_seed(0)
        options = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np", "generator": generator}
        return torch.from_numpy(pipe(**options).images)

    reference = images()
    handle = mk.accelerate(pipe)
    result = images()
    assert torch.equal(result, images())
    assert (result - reference).abs().mean() < 0.02  # 8-bit weights, in a range of 1
    handle.remove()
    assert torch.equal(images(), reference)


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
            pipe.unet(noise(), 1)
        hook.remove()
        with pytest.raises(RuntimeError, match=rf"outside a run \(.*{reason}"):
            pipe.unet(noise(), 1)
        assert torch.equal(sample(pipe), fresh)

    @both_ways
    def test_nan_names_the_layer(self, fuse):
        pipe = pipeline()
        mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse))
        for calls in (0, 2):
            sample(pipe, stop_after=calls)
            x = noise().fill_(float("nan"))
            with pytest.raises(ValueError, match=r"'down_blocks.0.resnets.0.*NaN or Inf"):
                pipe.unet(x, 1)

    def test_a_bare_unet_outside_a_run(self):
        unet = unet2d()
        handle = mk.accelerate(unet, mk.ModiffConfig(fuse=False))
        with pytest.raises(RuntimeError, match=r"the UNet was called outside a run.*handle.sampling_run\(\)"):
            unet(noise(), 1)
        with handle.sampling_run(), pytest.raises(RuntimeError, match="call the UNet itself"):
            unet.forward(noise(), 1)  # without the hooks of the module
        with pytest.raises(RuntimeError, match="bare UNet"):
            handle.wrap_scheduler()

    @both_ways
    def test_gradients_are_refused(self, fuse):
        pipe = pipeline()
        mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse))
        pipe.scheduler.set_timesteps(2)
        with torch.enable_grad(), pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
            pipe.unet(noise(), 1)


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
    STEPS = 4
    XS = trajectory((2, 4, 8, 8), STEPS)

    def guided(self, unet, handle, passes):
        """The last prediction for either prompt, in one batch or in contexts of their own."""
        both = torch.cat([*PROMPTS.values()])
        with handle.sampling_run(self.STEPS):
            for x in self.XS:
                if passes == 1:
                    found = unet(torch.cat([x, x]), 1, encoder_hidden_states=both).sample.chunk(2)
                    continue
                found = []
                for name, prompt in PROMPTS.items():
                    with handle.context(name):
                        found.append(unet(x, 1, prompt).sample)
        return found

    @both_ways
    @pytest.mark.parametrize("passes", [1, 2])
    def test_one_batch_or_two_passes(self, passes, fuse):
        unet = unet2d_condition()
        reference = [unet(self.XS[-1], 1, prompt).sample for prompt in PROMPTS.values()]
        handle = mk.accelerate(unet, mk.ModiffConfig(granularity="per_sample", fuse=fuse))
        got = self.guided(unet, handle, passes)
        for ours, theirs, prompt in zip(got, reference, PROMPTS.values()):
            assert sqnr(ours, theirs) > 30  # weights of 8 bits
            with handle.sampling_run():
                alone = [unet(x, 1, prompt).sample for x in self.XS]
            if passes == 2:  # in one batch, float sums have another order
                assert torch.equal(ours, alone[-1])

    def test_stable_diffusion_pipeline(self):
        pipe = stable_diffusion(PNDMScheduler())

        def latents(**options):
            prompts = {"prompt_embeds": PROMPTS["cond"], "negative_prompt_embeds": PROMPTS["uncond"]}
            generator = torch.Generator().manual_seed(0)
            return pipe(**prompts, num_inference_steps=4, generator=generator, output_type="latent", **options).images

        def cut_off(pipe, step, timestep, tensors):
            """Drops the unconditional half of the batch, which changes the shape within the run."""
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}

        reference = latents()
        handle = mk.accelerate(pipe)
        result = latents()
        assert sqnr(result, reference) > 20  # weights of 8 bits, times a guidance of 7.5
        with pytest.raises(RuntimeError, match=r"layer 'down_blocks.0.* got \(2, .* in a run that began with \(4, "):
            latents(callback_on_step_end=cut_off, callback_on_step_end_tensor_inputs=["prompt_embeds"])
        assert torch.equal(latents(), result)
        handle.remove()
        assert torch.equal(latents(), reference)
