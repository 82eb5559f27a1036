import copy
import inspect
import logging
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
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.hooks import apply_layerwise_casting
from diffusers.models import modeling_utils
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import modiff_kernels as mk
from modiff_kernels.nn.layer import ModulatedLayer
from modiff_kernels.ops import BackendUnavailable, dispatch

SCHEDULERS = [
    DDPMScheduler,
    DDIMScheduler,
    PNDMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    HeunDiscreteScheduler,
    EulerDiscreteScheduler,
]


@pytest.fixture(params=[False, True], ids=["layers", "fused"])
def fuse(request):
    return request.param


class FloatProducts(TorchDispatchMode):
    """Counts the float products that torch runs, those of attention itself aside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten":
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def count(self, name):
        return self.seen.count(name)


def tiny_unet(seed=0):
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def tiny_condition_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def pipeline(unet=None, scheduler=DDIMScheduler):
    return types.SimpleNamespace(unet=unet or tiny_unet(), scheduler=scheduler())


def noise(batch=2, channels=3):
    return torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def sample(pipe, batch=2, steps=6, stop_after=None):
    """A sampling loop as the pipelines have it."""
    scheduler, generator = pipe.scheduler, torch.Generator().manual_seed(2)
    scheduler.set_timesteps(steps)
    x = noise(batch) * scheduler.init_noise_sigma
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps[:stop_after]:
        prediction = pipe.unet(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(prediction, t, x, **options).prev_sample
    return x


def inputs_of(pipe):
    """The UNet inputs of one float run."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args))
    sample(pipe, steps=8)
    hook.remove()
    return seen


def last_output(unet, inputs):
    return [unet(*args).sample for args in inputs][-1]


def snapshot(unet):
    """Everything that accelerate may touch, for comparison."""
    modules = {path: id(module) for path, module in unet.named_modules(remove_duplicate=False)}
    hooks = len(unet._forward_pre_hooks), len(unet._forward_hooks)
    return modules, hooks, sorted(unet.__dict__)


def sqnr_db(x, reference):
    return 10 * torch.log10(reference.square().sum() / (x - reference).square().sum()).item()


class TestSampling:
    @pytest.mark.parametrize("scheduler", SCHEDULERS)
    def test_schedulers(self, scheduler, fuse):
        pipe = pipeline(scheduler=scheduler)
        reference = sample(pipe)
        handle = mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse))
        first, second = sample(pipe), sample(pipe)
        assert torch.equal(first, second)
        assert first.isfinite().all()
        assert not torch.equal(first, reference)
        handle.remove()
        assert torch.equal(sample(pipe), reference)

    @pytest.mark.parametrize("granularity", ["per_tensor", "per_sample", "per_token"])
    @pytest.mark.parametrize("scale_mode", ["dynamic", "delayed"])
    def test_scales(self, granularity, scale_mode, backend, fuse):
        pipe = pipeline()
        inputs = inputs_of(pipe)
        reference = last_output(pipe.unet, inputs)
        errors = {}
        for act_bits in (4, 8):
            config = mk.ModiffConfig(
                act_bits=act_bits, granularity=granularity, scale_mode=scale_mode, backend=backend, fuse=fuse
            )
            handle = mk.accelerate(pipe, config)
            with handle.sampling_run():
                errors[act_bits] = sqnr_db(last_output(pipe.unet, inputs), reference)
            handle.remove()
        assert errors[4] > 10
        assert errors[8] > 25

    @pytest.mark.parametrize("make", [(DDIMPipeline, DDIMScheduler), (DDPMPipeline, DDPMScheduler)])
    def test_pipelines(self, make, fuse):
        pipe = make[0](tiny_unet(), make[1]())
        pipe.set_progress_bar_config(disable=True)

        def images(batch=2):
            generator = torch.Generator().manual_seed(0)
            options = {"batch_size": batch, "num_inference_steps": 4, "output_type": "np", "generator": generator}
            return torch.from_numpy(pipe(**options).images)

        reference = images()
        handle = mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse))
        result = images()
        assert torch.equal(result, images())
        assert (result - reference).abs().mean() < 0.02
        assert images(3).shape[0] == 3
        assert torch.equal(result, images())
        with pytest.raises(RuntimeError, match=r"outside a run \(the run has ended\)"):
            pipe.unet(noise(), 1)
        handle.remove()
        assert torch.equal(images(), reference)

    def test_plain_and_float_modes_need_no_run(self):
        unet = tiny_unet()
        reference = unet(noise(), 5).sample
        for options in ({"mode": "quantized"}, {"act_bits": None}, {"weight_bits": None, "act_bits": None}):
            handle = mk.accelerate(unet, mk.ModiffConfig(**options))
            assert sqnr_db(unet(noise(), 5).sample, reference) > 25
            assert handle.state.nbytes() == 0
            handle.remove()
        assert torch.equal(unet(noise(), 5).sample, reference)

    def test_output_is_contiguous_in_every_form(self):
        unet = tiny_unet()
        with mk.accelerate(unet).sampling_run():
            sample_out = unet(noise(), 5).sample
            assert sample_out.is_contiguous()
            assert unet(sample=noise(), timestep=5, return_dict=False)[0].is_contiguous()

    def test_plain_module_as_root(self):
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 1))
        reference = net(noise())
        with mk.accelerate(net).sampling_run():
            for _ in range(4):
                out = net(noise())
        assert sqnr_db(out, reference) > 30

    def test_update_calls_run_the_skipped_layers_only_in_float(self, fuse):
        reason = dispatch.why_unavailable("cpu")
        if reason is not None:
            pytest.skip(f"backend cpu: {reason}")
        unet = tiny_unet()
        handle = mk.accelerate(unet, mk.ModiffConfig(act_bits=4, backend="cpu", fuse=fuse))
        with handle.sampling_run():
            unet(noise(), 9)
            with FloatProducts() as products:
                unet(noise(), 8)
        left_float = [row for row in handle.rows() if row.mode == "float"]
        assert products.count("convolution") == sum(row.kind.startswith("Conv2d") for row in left_float) == 2
        linears = [row.name for row in left_float if row.kind == "Linear"]
        if fuse:  # all projections of the time embedding are one product
            linears = [name for name in linears if "time_emb_proj" not in name] + ["time_emb_proj"]
        assert products.count("addmm") == len(linears)
        assert products.count("mm") == products.count("linear") == 0


class TestRuns:
    def test_interrupted_run_then_a_new_run(self, fuse):
        pipe = pipeline()
        mk.accelerate(pipe, mk.ModiffConfig(act_bits=4, scale_mode="delayed", fuse=fuse))
        fresh = sample(pipe)
        sample(pipe, stop_after=3)
        assert torch.equal(sample(pipe), fresh)

    def test_failed_call_then_a_new_run(self, fuse):
        pipe = pipeline()
        mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse))
        fresh = sample(pipe)
        sample(pipe, stop_after=2)
        handle = pipe.unet.mid_block.resnets[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipe.unet(noise(), 1)
        handle.remove()
        with pytest.raises(RuntimeError, match=r"outside a run \(a UNet call failed\)"):
            pipe.unet(noise(), 1)
        assert torch.equal(sample(pipe), fresh)

    def test_keyboard_interrupt(self):
        def interrupt(*_):
            raise KeyboardInterrupt

        pipe = pipeline()
        mk.accelerate(pipe)
        fresh = sample(pipe)
        sample(pipe, stop_after=2)
        handle = pipe.unet.mid_block.resnets[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            pipe.unet(noise(), 1)
        handle.remove()
        with pytest.raises(RuntimeError, match="was interrupted"):
            pipe.unet(noise(), 1)
        assert torch.equal(sample(pipe), fresh)

    def test_nan_names_the_layer(self, fuse):
        pipe = pipeline()
        mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse))
        sample(pipe, stop_after=2)
        x = noise()
        x[0, 0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"'down_blocks.0.resnets.0.*NaN or Inf"):
            pipe.unet(x, 1)

    def test_batch_change(self, fuse):
        pipe = pipeline()
        handle = mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse))
        two = sample(pipe, batch=2)
        nbytes = handle.state.nbytes()
        sample(pipe, batch=3)
        assert handle.state.nbytes() == nbytes * 3 // 2
        assert torch.equal(sample(pipe, batch=2), two)
        sample(pipe, batch=2, stop_after=2)
        with pytest.raises(RuntimeError, match=r"layer 'down_blocks.0.resnets.0.conv1' got \(3, 8, 8, 8\).*new run"):
            pipe.unet(noise(3), 1)

    def test_bare_unet_outside_a_run(self, fuse):
        unet = tiny_unet()
        handle = mk.accelerate(unet, mk.ModiffConfig(fuse=fuse))
        with pytest.raises(RuntimeError, match=r"the UNet was called outside a run.*handle.sampling_run\(\)"):
            unet(noise(), 1)
        with handle.sampling_run(num_calls=1):
            unet(noise(), 1)
            with pytest.raises(RuntimeError, match="call 2 of the UNet"):
                unet(noise(), 1)

    def test_forward_without_hooks_is_refused(self):
        unet = tiny_unet()
        with (
            mk.accelerate(unet, mk.ModiffConfig(fuse=False)).sampling_run(),
            pytest.raises(RuntimeError, match="call the UNet itself"),
        ):
            unet.forward(noise(), 1)

    def test_more_calls_than_timesteps(self):
        pipe = pipeline()
        mk.accelerate(pipe)
        sample(pipe, steps=3)
        with pytest.raises(RuntimeError, match=r"call 4 of the UNet in context 'default'.*announced 3"):
            pipe.unet(noise(), 1)

    def test_gradients_are_refused(self, fuse):
        pipe = pipeline()
        mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse))
        pipe.scheduler.set_timesteps(2)
        with torch.enable_grad(), pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
            pipe.unet(noise(), 1)

    def test_failed_set_timesteps_ends_the_run(self):
        pipe = pipeline()
        mk.accelerate(pipe)
        sample(pipe, stop_after=2)
        with pytest.raises(ValueError, match="num_inference_steps"):
            pipe.scheduler.set_timesteps(10**6)
        with pytest.raises(RuntimeError, match="outside a run"):
            pipe.unet(noise(), 1)


class TestScheduler:
    def test_signature_and_name_stay(self):
        pipe = pipeline(scheduler=EulerDiscreteScheduler)
        before = inspect.signature(pipe.scheduler.set_timesteps)
        handle = mk.accelerate(pipe)
        assert inspect.signature(pipe.scheduler.set_timesteps) == before
        assert pipe.scheduler.set_timesteps.__name__ == "set_timesteps"
        pipe.scheduler.set_timesteps(timesteps=[900, 500, 100])
        pipe.unet(noise(), 1)
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
        pipes = [types.SimpleNamespace(unet=tiny_unet(seed), scheduler=scheduler) for seed in range(2)]
        handles = [mk.accelerate(pipe) for pipe in pipes]
        for pipe in pipes:
            sample(pipe)
        handles[first].remove()
        sample(pipes[1 - first])
        handles[1 - first].remove()
        assert "set_timesteps" not in scheduler.__dict__

    def test_wrap_scheduler_needs_a_pipeline(self):
        handle = mk.accelerate(tiny_unet())
        with pytest.raises(RuntimeError, match="bare UNet"):
            handle.wrap_scheduler()


class TestConcurrency:
    def test_two_pipelines_interleaved(self, fuse):
        def steps(pipe):
            pipe.scheduler.set_timesteps(5)
            x = noise()
            for t in pipe.scheduler.timesteps:
                x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
                yield x

        pipes = [pipeline(tiny_unet(seed)) for seed in range(2)]
        for pipe in pipes:
            mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse))
        alone = [list(steps(pipe))[-1] for pipe in pipes]
        *_, together = zip(*[steps(pipe) for pipe in pipes])
        assert all(torch.equal(a, b) for a, b in zip(alone, together))

    def test_two_threads_with_one_unet(self):
        """One of them gets a clear error; the other one's picture is right."""
        pipe = pipeline()
        mk.accelerate(pipe)
        expected = sample(pipe)
        sample(pipe, stop_after=2)
        errors = []

        def other():
            with torch.no_grad():
                try:
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

    def test_two_pipelines_in_two_threads(self):
        pipes = [pipeline(tiny_unet(seed)) for seed in range(2)]
        for pipe in pipes:
            mk.accelerate(pipe)
        expected = [sample(pipe) for pipe in pipes]
        results = [None, None]

        def work(index):
            with torch.no_grad():
                results[index] = sample(pipes[index])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(a, b) for a, b in zip(expected, results))


class TestGuidance:
    STEPS = 5

    def inputs(self):
        generator = torch.Generator().manual_seed(3)
        return torch.randn(2, 7, 12, generator=generator), torch.zeros(2, 7, 12)

    def xs(self):
        return [noise(2, 4) * (1 - 0.1 * step) for step in range(self.STEPS)]

    def test_one_batch(self, fuse):
        unet = tiny_condition_unet()
        cond, uncond = self.inputs()
        reference = unet(torch.cat([self.xs()[-1]] * 2), 1, torch.cat([uncond, cond])).sample
        with mk.accelerate(unet, mk.ModiffConfig(fuse=fuse)).sampling_run(self.STEPS):
            for x in self.xs():
                out = unet(torch.cat([x, x]), 1, encoder_hidden_states=torch.cat([uncond, cond])).sample
        assert sqnr_db(out, reference) > 30

    def test_two_passes_equal_two_runs(self, fuse):
        unet = tiny_condition_unet()
        handle = mk.accelerate(unet, mk.ModiffConfig(act_bits=4, scale_mode="delayed", fuse=fuse))
        alone = []
        for states in self.inputs():
            with handle.sampling_run():
                alone.append([unet(x, 1, states).sample for x in self.xs()][-1])
        with handle.sampling_run(self.STEPS):
            for x in self.xs():
                together = []
                for name, states in zip(("cond", "uncond"), self.inputs()):
                    with handle.context(name):
                        together.append(unet(x, 1, states).sample)
        assert all(torch.equal(a, b) for a, b in zip(alone, together))

    def test_two_passes_in_one_context_run_out_of_calls(self):
        unet = tiny_condition_unet()
        cond, uncond = self.inputs()
        with mk.accelerate(unet).sampling_run(self.STEPS):
            for _ in range(self.STEPS):
                unet(noise(2, 4), 1, cond)
            with pytest.raises(RuntimeError, match=r"with handle.context\('cond'\)"):
                unet(noise(2, 4), 1, uncond)

    def stable_diffusion(self):
        vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4).eval()
        parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        pipe = StableDiffusionPipeline(
            vae=vae, unet=tiny_condition_unet(), scheduler=PNDMScheduler(), requires_safety_checker=False, **parts
        )
        pipe.set_progress_bar_config(disable=True)
        cond, uncond = self.inputs()

        def latents(**options):
            return pipe(
                prompt_embeds=cond,
                negative_prompt_embeds=uncond,
                num_inference_steps=4,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
                **options,
            ).images

        return pipe, latents

    def test_stable_diffusion_pipeline(self, fuse):
        pipe, latents = self.stable_diffusion()
        reference = latents()
        handle = mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse))
        result = latents()
        assert sqnr_db(result, reference) > 20
        assert torch.equal(latents(), result)
        handle.remove()
        assert torch.equal(latents(), reference)

    def test_guidance_cut_off_within_a_run(self):
        """A callback that drops the unconditional half of the batch changes the shape within the run."""

        def cut_off(pipe, step, timestep, tensors):
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}

        pipe, latents = self.stable_diffusion()
        mk.accelerate(pipe)
        options = {"callback_on_step_end": cut_off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        with pytest.raises(RuntimeError, match=r"layer 'down_blocks.0.* got \(2, .* in a run that began with \(4, "):
            latents(**options)
        latents()

    def test_projections_share_their_input(self):
        unet = tiny_condition_unet()
        handle = mk.accelerate(unet, mk.ModiffConfig(fuse=False))
        block = "down_blocks.0.attentions.0.transformer_blocks.0"
        edges = {
            name.removeprefix(f"{block}."): layer.edge.key for name, layer in handle.layers.items() if block in name
        }
        assert edges["attn1.to_q"] == edges["attn1.to_k"] == edges["attn1.to_v"] == f"{block}.attn1.to_q"
        assert edges["attn2.to_k"] == edges["attn2.to_v"] == f"{block}.attn2.to_k"
        assert edges["attn2.to_q"] == f"{block}.attn2.to_q"
        shared = self.state_bytes(unet, handle)
        handle.remove()
        assert shared < self.state_bytes(unet, mk.accelerate(unet, mk.ModiffConfig(fuse=False), share_edges=False))

    def state_bytes(self, unet, handle):
        with handle.sampling_run():
            unet(noise(2, 4), 1, self.inputs()[0])
        return handle.state.nbytes()


class TestReplacement:
    @pytest.mark.parametrize("options", [{}, {"mode": "quantized"}, {"act_bits": None}])
    def test_state_dict_stays(self, options, fuse, tmp_path):
        unet = tiny_unet()
        before = {key: value.clone() for key, value in unet.state_dict().items()}
        parameters = [name for name, _ in unet.named_parameters()]
        mk.accelerate(unet, mk.ModiffConfig(fuse=fuse, **options))
        after = unet.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert [name for name, _ in unet.named_parameters()] == parameters
        assert unet.dtype == torch.float32
        unet.save_pretrained(tmp_path)
        loaded = UNet2DModel.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(loaded[key], before[key]) for key in before)

    def test_loaded_state_dict_is_used(self, fuse):
        pipe, other = pipeline(tiny_unet(0)), pipeline(tiny_unet(1))
        mk.accelerate(other, mk.ModiffConfig(fuse=fuse))
        expected = sample(other)
        handle = mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse))
        pipe.unet.load_state_dict(tiny_unet(1).state_dict())
        assert torch.equal(sample(pipe), expected)
        handle.remove()
        assert torch.equal(pipe.unet(noise(), 3).sample, tiny_unet(1)(noise(), 3).sample)

    def test_remove_restores_the_very_same_modules(self, fuse):
        pipe = pipeline()
        before, reference = snapshot(pipe.unet), sample(pipe)
        handle = mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse))
        assert snapshot(pipe.unet) != before
        sample(pipe, stop_after=3)
        handle.remove()
        handle.remove()
        assert snapshot(pipe.unet) == before
        assert handle.state.nbytes() == 0
        assert torch.equal(sample(pipe), reference)
        with pytest.raises(RuntimeError, match="was removed"):
            handle.sampling_run()
        mk.accelerate(pipe).remove()
        assert snapshot(pipe.unet) == before

    def test_remove_puts_an_own_reset_back(self):
        unet = tiny_unet()
        own = unet._reset_stateful_cache = lambda: None
        mk.accelerate(unet).remove()
        assert unet.__dict__["_reset_stateful_cache"] is own

    def test_twice(self, fuse):
        unet = tiny_unet()
        mk.accelerate(unet, mk.ModiffConfig(fuse=fuse))
        for target in (unet, unet.mid_block, nn.Sequential(unet)):
            with pytest.raises(RuntimeError, match=r"accelerated already; call remove\(\)"):
                mk.accelerate(target)

    @pytest.mark.parametrize(
        ("target", "error", "text"),
        [
            (None, TypeError, "got NoneType; give a UNet"),
            (types.SimpleNamespace(transformer=nn.Linear(1, 1)), TypeError, "pipeline with a `unet`"),
            (nn.Sequential(nn.GroupNorm(1, 4)), ValueError, "holds no Linear and no Conv2d"),
            (
                nn.ModuleDict({"conv_in": nn.Conv2d(3, 4, 1)}),
                ValueError,
                "none of the 1 layers.*skip_modules has 'conv_in'",
            ),
        ],
    )
    def test_impossible_targets(self, target, error, text):
        with pytest.raises(error, match=text):
            mk.accelerate(target)

    def test_compiled_unet_and_wrong_config(self):
        with pytest.raises(TypeError, match="the UNet is compiled; accelerate the UNet itself"):
            mk.accelerate(torch.compile(tiny_unet()))
        with pytest.raises(TypeError, match="config is a dict; give a ModiffConfig"):
            mk.accelerate(tiny_unet(), {"act_bits": 4})

    def test_errors_leave_everything_as_it_was(self, monkeypatch):
        pipe = pipeline()
        before = snapshot(pipe.unet)
        reference = sample(pipe)
        for scheduler in (None, object()):
            with pytest.raises(ValueError, match=r"has no set_timesteps\(\)"):
                mk.accelerate(types.SimpleNamespace(unet=pipe.unet, scheduler=scheduler))
            assert snapshot(pipe.unet) == before
        with pytest.raises(ValueError, match="needs a calibrated scale"):
            mk.accelerate(pipe, mk.ModiffConfig(scale_mode="static"))
        monkeypatch.setattr(dispatch, "load", lambda name: "it is broken")
        dispatch.select.cache_clear()
        with pytest.raises((BackendUnavailable, ValueError), match="it is broken"):
            mk.accelerate(pipe, mk.ModiffConfig(backend="reference"))
        monkeypatch.undo()
        dispatch.reset()
        pipe.unet.up_blocks[1].resnets[1].conv2.weight[0, 0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"'up_blocks.1.resnets.1.conv2': .*NaN or Inf"):
            mk.accelerate(pipe)
        assert snapshot(pipe.unet) == before
        assert "set_timesteps" not in pipe.scheduler.__dict__
        pipe.unet.load_state_dict(tiny_unet().state_dict())
        assert torch.equal(sample(pipe), reference)

    def test_static_scales(self, fuse):
        pipe = pipeline()
        inputs = inputs_of(pipe)
        reference = last_output(pipe.unet, inputs)
        handle = mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse))
        names = list(handle.layers)
        handle.remove()
        config = mk.ModiffConfig(act_bits=8, scale_mode="static", fuse=fuse)
        handle = mk.accelerate(pipe, config, static_scales=dict.fromkeys(names, 0.02))
        with handle.sampling_run():
            assert sqnr_db(last_output(pipe.unet, inputs), reference) > 25

    def test_unfitting_static_scales(self):
        unet = tiny_unet()
        with pytest.raises(ValueError, match="scale_mode='dynamic' does not use them"):
            mk.accelerate(unet, static_scales={"conv_in": 1.0})
        with pytest.raises(ValueError, match=r"names 'conv', which is no Linear or Conv2d.*such as 'conv_in'"):
            mk.accelerate(unet, mk.ModiffConfig(scale_mode="static"), static_scales={"conv": 1.0})

    def test_skip_modules(self, caplog):
        unet = tiny_unet()
        with caplog.at_level(logging.WARNING, logger="modiff_kernels"):
            handle = mk.accelerate(unet, mk.ModiffConfig(skip_modules=("conv_in", "mid_block", "no_such")))
        assert "'no_such' fits no module" in caplog.text
        assert not any("mid_block" in name for name in handle.layers)
        assert "time_embedding.linear_1" in handle.layers
        with handle.sampling_run():
            unet(noise(), 1)

    def test_a_module_under_two_names_stays_one(self):
        conv = nn.Conv2d(3, 3, 1)
        net = nn.ModuleDict({"a": conv, "b": conv, "c": nn.Linear(2, 2)})
        mk.accelerate(net)
        assert net["a"] is net["b"]
        assert isinstance(net["a"], ModulatedLayer)

    def test_attention_processors_read_the_weight_dtype(self):
        unet = tiny_unet()
        mk.accelerate(unet, mk.ModiffConfig(fuse=False))
        assert unet.mid_block.attentions[0].to_q.weight.dtype == torch.float32

    def test_layers_that_stay_float(self):
        class OwnForward(nn.Linear):
            def forward(self, x):
                return super().forward(x) + 1

        hooked = nn.Linear(2, 2)
        hooked.register_forward_hook(lambda *_: None)
        net = nn.ModuleDict(
            {
                "own": OwnForward(2, 2),
                "hooked": hooked,
                "parametrised": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
                "attention": nn.MultiheadAttention(4, 2),
                "meta": nn.Linear(2, 2, device="meta"),
                "float64": nn.Linear(2, 2).double(),
                "reflect": nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
                "good": nn.Linear(2, 2),
            }
        )
        rows = {row.name: row for row in mk.accelerate(net).rows()}
        reasons = {
            "own": "OwnForward has a forward of its own",
            "hooked": "it has hooks; accelerate() before they are added",
            "parametrised": "its weight is parametrised",
            "attention.out_proj": "torch.nn.MultiheadAttention reads its weight without calling it",
            "meta": "its weight is not loaded (meta device)",
            "float64": "its weight is torch.float64",
            "reflect": "padding_mode='reflect' is not supported, only 'zeros'",
            "good": "",
        }
        assert {name: row.reason for name, row in rows.items()} == reasons
        assert rows["good"].mode == "modulated"

    @pytest.mark.filterwarnings("ignore")
    def test_lora_compatible_layers(self):
        from diffusers.models.lora import LoRACompatibleConv, LoRACompatibleLinear, LoRALinearLayer

        net = nn.ModuleDict(
            {
                "linear": LoRACompatibleLinear(4, 4),
                "conv": LoRACompatibleConv(4, 4, 1),
                "busy": LoRACompatibleLinear(4, 4, lora_layer=LoRALinearLayer(4, 4)),
            }
        )
        rows = {row.name: row for row in mk.accelerate(net).rows()}
        assert rows["linear"].mode == rows["conv"].mode == "modulated"
        assert rows["busy"].reason == "it has a LoRA layer; fuse it into the weight first"


class TestExplain:
    def test_every_layer_has_a_line(self, fuse):
        pipe = pipeline()
        paths = [path for path, m in pipe.unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        handle = mk.accelerate(pipe, mk.ModiffConfig(act_bits=4, backend="reference", fuse=fuse))
        sample(pipe, stop_after=2)
        assert [row.name for row in handle.rows()] == paths
        text = handle.explain()
        lines = text.splitlines()
        assert len(lines) == len(paths) + 3
        assert f"{len(handle.layers)} of {len(paths)} layers low-bit" in lines[0]
        assert f"{handle.state.nbytes() / 2**20:.1f} MiB" in lines[0]
        row = next(row for row in handle.rows() if row.name == "down_blocks.0.resnets.0.conv1")
        assert (row.kind, row.shape, row.mode, row.bits) == ("Conv2d 3x3", "8->8", "modulated", "w8a4")
        assert row.backend == "reference"
        row = handle.rows()[0]
        assert (row.name, row.mode, row.bits, row.reason) == ("conv_in", "float", "-", "skip_modules has 'conv_in'")

    def test_shapes_and_modes(self):
        net = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, stride=2, groups=2), "linear": nn.Linear(5, 7)})
        rows = mk.accelerate(net, mk.ModiffConfig(weight_bits=4, act_bits=None)).rows()
        assert [row.shape for row in rows] == ["4->6 /2 groups 2", "5->7"]
        assert all((row.mode, row.bits, row.backend) == ("float", "w4a-", "torch") for row in rows)
        assert all("dequantised weights" in row.reason for row in rows)


class TestDtype:
    def test_is_answered_without_a_walk_over_the_modules(self, monkeypatch):
        walks, seen = [], []
        walk = modeling_utils.get_parameter_dtype
        monkeypatch.setattr(modeling_utils, "get_parameter_dtype", lambda unet: walks.append(unet) or walk(unet))
        unet = tiny_unet()
        plain = type(unet)
        handle = mk.accelerate(unet, mk.ModiffConfig(mode="quantized"))
        unet.conv_in.register_forward_pre_hook(lambda *_: seen.append((isinstance(unet, plain), unet.dtype)))
        for dtype in (torch.float32, torch.bfloat16):
            unet.to(dtype)
            walks.clear()
            unet(noise().to(dtype), 1)
            assert seen.pop() == (True, dtype)
            assert not walks
            assert unet.dtype == dtype
            assert type(unet) is plain  # outside a call
        handle.remove()
        walks.clear()
        unet(noise().to(dtype), 1)
        assert walks

    def test_a_failed_call_leaves_the_class(self):
        unet = tiny_unet()
        plain = type(unet)
        mk.accelerate(unet, mk.ModiffConfig(mode="quantized"))
        with pytest.raises(TypeError):
            unet(noise(), None)
        assert type(unet) is plain

    def test_hooks_that_change_it_are_still_asked(self):
        unet = tiny_unet()
        apply_layerwise_casting(unet.conv_out, storage_dtype=torch.float16, compute_dtype=torch.float32)
        plain = type(unet)
        mk.accelerate(unet, mk.ModiffConfig())
        assert type(unet) is plain
        assert unet.dtype == torch.float32
