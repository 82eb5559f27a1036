"""What diffusers can do to a UNet: works with low-bit layers as with float ones, or is refused with the way out."""

import functools

import accelerate as hugging_face
import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import modiff_kernels as mk
from modiff_kernels.evaluation import sqnr
from tests.integrations.fake_capture import capture_calls
from tests.unets import noise, outputs, stable_diffusion, text, unet2d_condition

FIDELITY_DB = 34.5
"""SQNR that every feature reaches against itself on the float UNet: 8-bit weights set it, to 37 to 39 dB in float32."""
BFLOAT16_DB = 32.0
"""The same in bfloat16, whose own rounding is as large as that of 8-bit weights."""
IGNORED_DB = 25.0
"""SQNR to the plain UNet below which a feature has changed the picture, far more than rounding does."""


def last_output(unet, handle=None, **keywords):
    """Of a run along a trajectory."""
    return outputs(unet, handle, calls=4, **keywords)[-1]


@functools.cache
def plain():
    return last_output(unet2d_condition())


@pytest.fixture(params=[True, False], ids=["fused", "layers"])
def fuse(request):
    return request.param


class TestAttentionAndNorms:
    def test_freeu_between_runs_of_graphs(self):
        """Its numbers are in the kernels of a graph."""
        unet = unet2d_condition()
        handle = mk.accelerate(unet)
        graphs = capture_calls(handle)
        wanted, other = plain(), unet2d_condition()
        for change in ("disable_freeu", "enable_freeu", "disable_freeu"):
            for one in (unet, other):
                getattr(one, change)(*((0.2, 0.2, 1.5, 1.6) if change == "enable_freeu" else ()))
            replayed = graphs.replayed
            assert sqnr(last_output(unet, handle), last_output(other)) > FIDELITY_DB
            assert graphs.replayed > replayed
        assert sqnr(last_output(unet, handle), wanted) > FIDELITY_DB

    @pytest.mark.parametrize(
        ("dtype", "processor"), [(torch.float16, AttnProcessor), (torch.bfloat16, AttnProcessor2_0)], ids=str
    )
    def test_dtypes_with_upcast_attention(self, dtype, processor):
        def make():
            unet = unet2d_condition(upcast_attention=True).to(dtype)
            unet.set_attn_processor(processor())
            return unet

        unet = make()
        got = last_output(unet, mk.accelerate(unet))
        assert got.dtype == dtype
        assert sqnr(got, last_output(make())) > (BFLOAT16_DB if dtype is torch.bfloat16 else FIDELITY_DB)


CPU = torch.device("cpu")
FLOAT8 = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
# What is done, and whether it puts hooks on all layers. Layerwise casting passes over low-bit ones.
OFFLOADS = {
    "model": (lambda unet: hugging_face.cpu_offload_with_hook(unet, CPU), False),
    "blocks": (lambda unet: unet.enable_group_offload(CPU, CPU, "block_level", 1), False),
    "leaves": (lambda unet: unet.enable_group_offload(CPU, CPU, "leaf_level"), True),
    "sequential": (lambda unet: hugging_face.cpu_offload(unet, CPU), True),
    "dispatched": (lambda unet: hugging_face.dispatch_model(unet, {"": CPU}, CPU, force_hooks=True), True),
    "float8": (lambda unet: unet.enable_layerwise_casting(**FLOAT8), True),
}


@pytest.mark.parametrize("way", OFFLOADS)
def test_offload_and_casting(way, fuse):
    change, on_layers = OFFLOADS[way]

    def result(before):
        unet = unet2d_condition()
        change(unet) if before else None
        handle = mk.accelerate(unet, mk.ModiffConfig(fuse=fuse))
        return change(unet) if not before else None, sqnr(last_output(unet, handle), plain())

    for before in (True, False):
        if on_layers and (before or (fuse and way != "float8")):
            with pytest.raises((RuntimeError, ValueError), match=r"ModiffConfig\(fuse=False\)"):
                result(before)
        else:
            assert result(before)[1] > (25 if way == "float8" else FIDELITY_DB)


def test_inference_mode_and_then_without():
    """Accelerated, and sampled first, where tensors may not be written to later."""
    with torch.inference_mode():
        unet = unet2d_condition()
        handle = mk.accelerate(unet, mk.ModiffConfig(scale_mode="delayed"))
        first = last_output(unet, handle)
    assert torch.equal(last_output(unet, handle), first)
    with torch.inference_mode():
        assert torch.equal(last_output(unet, handle), first)


PAG = diffusers.StableDiffusionPAGPipeline, {"pag_applied_layers": ["mid"]}
SAG = diffusers.StableDiffusionSAGPipeline, {"requires_safety_checker": False}


@pytest.mark.parametrize(("name", "kind", "options"), [("pag_scale", *PAG), ("sag_scale", *SAG)])
def test_attention_guidance(name, kind, options, fuse):
    """Processors, which a pipeline sets for a run, call projections twice, or keep what they see."""
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = kind(**stable_diffusion(scheduler).components, **options)
    pipe.set_progress_bar_config(disable=True)

    def latents(scale):
        prompts = {"prompt_embeds": text(1), "negative_prompt_embeds": text(1, 3), "latents": noise(1, 4)}
        return pipe(**prompts, **{name: scale}, num_inference_steps=4, output_type="latent").images

    expected = [latents(scale) for scale in (3.0, 0.0)]
    handle = mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse, plan="modulated"))
    assert all(sqnr(latents(scale), wanted) > FIDELITY_DB for scale, wanted in zip((3.0, 0.0), expected))
    if kind is diffusers.StableDiffusionSAGPipeline:  # whose hook has to see every call
        handle.remove()
        mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse, plan="modulated", schedule="UF3"))
        with pytest.warns(UserWarning, match="because hooks are on modules"):
            assert sqnr(latents(3.0), expected[0]) > FIDELITY_DB


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MORE = ("ff.net.0.proj", "conv1", "conv2", "proj_in", "time_emb_proj", "linear_1")


class TestLora:
    """linear_1 is of the time embedding, whose results are kept from run to run."""

    @pytest.fixture(autouse=True)
    def peft(self):
        import peft

        return peft

    @pytest.fixture
    def with_lora(self, peft, fuse):
        targets = [*ATTENTION, *MORE] if fuse else [*ATTENTION]

        def make():
            unet = unet2d_condition()
            torch.manual_seed(3)
            unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=2, target_modules=targets, init_lora_weights=False))
            return unet

        return make

    def test_beside_the_layers(self, with_lora, fuse):
        reference = last_output(with_lora())
        assert sqnr(reference, plain()) < IGNORED_DB
        unet = with_lora()
        handle = mk.accelerate(unet, mk.ModiffConfig(fuse=fuse))
        assert sqnr(last_output(unet, handle), reference) > FIDELITY_DB
        rows = {row.name: row for row in handle.rows()}
        layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        assert rows[f"{layer}.base_layer"].mode == "modulated"
        assert rows[f"{layer}.lora_A.default"].mode == "float"
        assert "fuse_lora() and unload_lora() before accelerate()" in rows[f"{layer}.lora_A.default"].reason
        unet.set_adapters(["default"], [0.0])
        assert sqnr(last_output(unet, handle), plain()) > FIDELITY_DB
        unet.set_adapters(["default"], [1.0])
        assert sqnr(last_output(unet, handle), reference) > FIDELITY_DB
        half = {"cross_attention_kwargs": {"scale": 0.5}}
        assert sqnr(last_output(unet, handle, **half), last_output(with_lora(), **half)) > FIDELITY_DB
        unet.disable_adapters()
        assert sqnr(last_output(unet, handle), plain()) > FIDELITY_DB
        handle.remove()
        unet.enable_adapters()
        assert torch.equal(last_output(unet), reference)

    @pytest.mark.parametrize("unload", [True, False])
    def test_fused_into_the_weights_before(self, with_lora, fuse, unload):
        reference = last_output(with_lora())
        unet = with_lora()
        unet.fuse_lora()
        if unload:
            unet.unload_lora()
        handle = mk.accelerate(unet, mk.ModiffConfig(fuse=fuse))
        assert sqnr(last_output(unet, handle), reference) > FIDELITY_DB
        if unload:
            assert not any("lora" in row.name for row in handle.rows())
            return
        with pytest.raises(RuntimeError, match=r"disable_adapters\(\) changes layers of a UNet that is accelerated"):
            unet.disable_adapters()  # peft would take it out of the weights, and the codes would keep it
        adapters = [module for module in unet.modules() if hasattr(module, "lora_A")]
        for adapter in adapters:
            with pytest.raises(RuntimeError, match=r"unmerge\(\) changes layers"):
                adapter.unmerge()  # as `pipe.unfuse_lora()` does
        handle.remove()
        for adapter in adapters:
            adapter.unmerge()
        unet.disable_adapters()
        assert sqnr(last_output(unet), plain()) > 100  # up to the rounding of weights that were added and taken off

    def test_changes_afterwards_are_refused(self, peft, with_lora, tmp_path):
        unet = with_lora()
        with pytest.raises(ValueError, match=r"cuda_graphs=True is not possible with a LoRA.*fuse_lora\(\)"):
            mk.accelerate(unet, mk.ModiffConfig(cuda_graphs=True))
        handle = mk.accelerate(unet)
        with pytest.raises(ValueError, match=r"save_pretrained: a LoRA stands beside the layers"):
            handle.save_pretrained(tmp_path / "unet")
        before = last_output(unet, handle)
        for name in ("fuse_lora", "unfuse_lora", "unload_lora", "fuse_qkv_projections"):
            with pytest.raises(RuntimeError, match=rf"{name}\(\) changes .* call handle.remove\(\), then {name}\(\)"):
                getattr(unet, name)()
        for name, config in (("add_adapter", peft.LoraConfig(target_modules=["to_q"])), ("load_lora_adapter", {})):
            with pytest.raises(RuntimeError, match=rf"{name}\(\) changes layers"):
                getattr(unet, name)(config)
        assert torch.equal(last_output(unet, handle), before)
        handle.remove()
        unet.unload_lora()
        assert torch.equal(last_output(unet), plain())
