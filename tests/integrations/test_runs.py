"""Runs of pipelines and own samplers: when they begin and end, what is refused, guidance, threads."""

import copy
import inspect
import threading
import types

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

import modiff_kernels as mk
from modiff_kernels.evaluation import sqnr
from tests.unets import (
    both_ways,
    each_backend,
    noise,
    outputs,
    pipeline,
    sample,
    text,
    trajectory,
    unet2d,
    unet2d_condition,
)

SCHEDULERS = [
    *(DDPMScheduler, DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler),
    *(HeunDiscreteScheduler, EulerDiscreteScheduler),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler):
    pipe = pipeline(scheduler())
    reference = sample(pipe)
    handle = mk.accelerate(pipe)
    first, second = sample(pipe), sample(pipe)
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert not torch.equal(first, reference)
    handle.remove()
    assert torch.equal(sample(pipe), reference)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_sample", "per_token", "per_block"])
@pytest.mark.parametrize("scale_mode", ["dynamic", "delayed"])
@each_backend
def test_fidelity(granularity, scale_mode, backend):
    """SQNR to the float UNet: weights of 8 bits set 35 dB, residuals of 4 bits are a little worse."""
    if (granularity, scale_mode) == ("per_block", "delayed"):
        with pytest.raises(ValueError, match="granularity='per_block'"):
            mk.ModiffConfig(act_bits=4, granularity=granularity, scale_mode=scale_mode)
        return
    unet = unet2d()
    reference = outputs(unet)[-1]
    for act_bits, at_least in ((4, 20), (8, 28)):
        config = mk.ModiffConfig(act_bits=act_bits, granularity=granularity, scale_mode=scale_mode, backend=backend)
        handle = mk.accelerate(unet, config)
        assert sqnr(outputs(unet, handle)[-1], reference) > at_least
        handle.remove()


@pytest.mark.parametrize("make", [(DDIMPipeline, DDIMScheduler), (DDPMPipeline, DDPMScheduler)])
def test_pipelines(make):
    pipe = make[0](unet2d(), make[1]())
    pipe.set_progress_bar_config(disable=True)

    def images(batch=2):
        generator = torch.Generator().manual_seed(0)
        options = {"batch_size": batch, "num_inference_steps": 4, "output_type": "np", "generator": generator}
        return torch.from_numpy(pipe(**options).images)

    reference = images()
    handle = mk.accelerate(pipe)
    result = images()
    assert torch.equal(result, images())
    assert (result - reference).abs().mean() < 0.02  # 8-bit weights, in a range of 1
    assert images(3).shape[0] == 3
    assert torch.equal(result, images())
    with pytest.raises(RuntimeError, match=r"outside a run \(the run has ended\)"):
        pipe.unet(noise(), 1)
    handle.remove()
    assert torch.equal(images(), reference)


class TestRuns:
    @both_ways
    def test_interrupted_run_then_a_new_run(self, fuse):
        pipe = pipeline()
        mk.accelerate(pipe, mk.ModiffConfig(act_bits=4, scale_mode="delayed", fuse=fuse))
        fresh = sample(pipe)
        sample(pipe, stop_after=3)
        assert torch.equal(sample(pipe), fresh)

    @pytest.mark.parametrize(
        ("error", "reason"), [(ZeroDivisionError, "a UNet call failed"), (KeyboardInterrupt, "interrupted")]
    )
    def test_a_failed_call_ends_the_run(self, error, reason):
        def fail(*_):
            raise error

        pipe = pipeline()
        mk.accelerate(pipe)
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
            x = noise()
            x[0, 0, 0, 0] = float("nan")
            with pytest.raises(ValueError, match=r"'down_blocks.0.resnets.0.*NaN or Inf"):
                pipe.unet(x, 1)

    @both_ways
    def test_batch_change(self, fuse):
        pipe = pipeline()
        handle = mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse))
        two = sample(pipe, batch=2)
        nbytes = handle.state.nbytes()
        sample(pipe, batch=3)
        assert handle.state.nbytes() == nbytes * 3 // 2
        assert torch.equal(sample(pipe, batch=2), two)
        sample(pipe, batch=2, stop_after=2)
        with pytest.raises(RuntimeError, match=r"layer 'down_blocks.0.resnets.0.conv1' got \(3, 16, 8, 8\).*new run"):
            pipe.unet(noise(3), 1)

    def test_a_bare_unet_outside_a_run(self):
        unet = unet2d()
        handle = mk.accelerate(unet, mk.ModiffConfig(fuse=False))
        with pytest.raises(RuntimeError, match=r"the UNet was called outside a run.*handle.sampling_run\(\)"):
            unet(noise(), 1)
        with handle.sampling_run(num_calls=1):
            unet(noise(), 1)
            with pytest.raises(RuntimeError, match="call 2 of the UNet"):
                unet(noise(), 1)
        with handle.sampling_run(), pytest.raises(RuntimeError, match="call the UNet itself"):
            unet.forward(noise(), 1)  # without the hooks of the module
        with pytest.raises(RuntimeError, match="bare UNet"):
            handle.wrap_scheduler()

    def test_more_calls_than_timesteps(self):
        pipe = pipeline()
        mk.accelerate(pipe)
        sample(pipe, steps=3)
        with pytest.raises(RuntimeError, match=r"call 4 of the UNet in context 'default'.*announced 3"):
            pipe.unet(noise(), 1)

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
        handle.remove()
        assert "set_timesteps" not in pipe.scheduler.__dict__
        assert inspect.signature(pipe.scheduler.set_timesteps) == before

    def test_failed_set_timesteps_ends_the_run(self):
        pipe = pipeline()
        mk.accelerate(pipe)
        sample(pipe, stop_after=2)
        with pytest.raises(ValueError, match="num_inference_steps"):
            pipe.scheduler.set_timesteps(10**6)
        with pytest.raises(RuntimeError, match="outside a run"):
            pipe.unet(noise(), 1)

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

    def test_copied_scheduler_is_an_ordinary_one(self):
        pipe = pipeline()
        mk.accelerate(pipe)
        copied = copy.deepcopy(pipe.scheduler)
        copied.set_timesteps(7)
        assert len(copied.timesteps) == 7
        assert pipe.scheduler.num_inference_steps is None

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


class TestConcurrency:
    def test_two_pipelines_interleaved_and_in_two_threads(self):
        def steps(pipe):
            pipe.scheduler.set_timesteps(5)
            x = noise()
            for t in pipe.scheduler.timesteps:
                x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
                yield x

        def work(index):
            with torch.no_grad():
                results[index] = list(steps(pipes[index]))[-1]

        pipes = [pipeline(unet=unet2d(seed=seed)) for seed in range(2)]
        for pipe in pipes:
            mk.accelerate(pipe)
        alone = [list(steps(pipe))[-1] for pipe in pipes]
        *_, together = zip(*[steps(pipe) for pipe in pipes])
        assert all(torch.equal(a, b) for a, b in zip(alone, together))
        results = [None, None]
        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(a, b) for a, b in zip(alone, results))

    def test_two_threads_with_one_unet(self):
        """One of them gets a clear error; the other one's picture is right."""
        pipe = pipeline()
        mk.accelerate(pipe)
        expected = sample(pipe)
        errors = []

        def other():
            try:
                with torch.no_grad():
                    pipe.unet(noise(), 1)
            except RuntimeError as error:
                errors.append(str(error))

        def at_mid_block(*_):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

        hook = pipe.unet.mid_block.register_forward_pre_hook(at_mid_block)
        result = sample(pipe)
        hook.remove()
        assert len(errors) == 6
        assert all("another thread is inside a call" in error for error in errors)
        assert torch.equal(result, expected)


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

    def test_two_passes_in_one_context_run_out_of_calls(self):
        unet = unet2d_condition()
        with mk.accelerate(unet).sampling_run(1):
            unet(noise(2, 4), 1, text())
            with pytest.raises(RuntimeError, match=r"with handle.context\('cond'\)"):
                unet(noise(2, 4), 1, text(seed=5))

    def test_stable_diffusion_pipeline(self):
        vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4).eval()
        parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        pipe = StableDiffusionPipeline(
            vae=vae, unet=unet2d_condition(), scheduler=PNDMScheduler(), requires_safety_checker=False, **parts
        )
        pipe.set_progress_bar_config(disable=True)

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
