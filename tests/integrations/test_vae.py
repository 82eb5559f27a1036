"""`accelerate(pipe, vae=True)`: the decoder in plain W8A8, whole, in slices and in tiles, and the way back."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler
from diffusers.models.resnet import ResnetBlock2D

import modiff_kernels as mk
from modiff_kernels.backends import cpu
from modiff_kernels.evaluation import sqnr
from modiff_kernels.nn.blocks.resnet import FusedResnetBlock2D
from tests.unets import assert_close, assert_equal, fused_blocks, pipeline, snapshot, stable_diffusion

LATENTS = torch.linspace(0, 99, 2 * 4 * 16 * 12).sin().view(2, 4, 16, 12)
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
TINY = {f"num_{kind}_blocks": (1, 1, 1, 1) for kind in ("encoder", "decoder")}
TINY |= {f"{kind}_block_out_channels": (16,) * 4 for kind in ("encoder", "decoder")}
VAES = {
    "AutoencoderKL": lambda: AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=4, latent_channels=4, **BLOCKS),
    "AutoencoderTiny": lambda: AutoencoderTiny(**TINY),
}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", VAES)
def test_decoder(name, fuse, tmp_path):
    torch.manual_seed(0)
    vae, pipe = VAES[name]().eval(), stable_diffusion(DDIMScheduler())
    pipe.register_modules(vae=vae)
    vae.tile_sample_min_size = vae.tile_latent_min_size = 8
    ways = vae.disable_tiling, vae.enable_slicing, vae.disable_slicing, vae.enable_tiling
    before, exact = snapshot(vae), [vae.decode(LATENTS).sample for way in ways if way() is None]
    handle = mk.accelerate(pipe, mk.ModiffConfig(fuse=fuse), vae=True)
    convs = [path for path, module in vae.decoder.named_modules() if isinstance(module, torch.nn.Conv2d)]
    modes = {row.name: row.mode for row in handle.vae.rows()}
    assert {path for path, mode in modes.items() if mode == "float"} == {convs[0], convs[-1]} < set(modes)
    assert set(modes.values()) == {"float", "quantized"}
    assert "\nVAE, Decoder" in handle.explain()
    resnets = [path for path, module in vae.decoder.named_modules() if isinstance(module, ResnetBlock2D)]
    assert list(fused_blocks(vae.decoder, FusedResnetBlock2D)) == resnets * fuse
    found = [vae.decode(LATENTS).sample for way in ways if way() is None]
    assert all(15 < sqnr(low - low.mean(), own - own.mean()) < 60 for low, own in zip(found, exact))
    assert_close(found[1], found[0])
    assert not torch.equal(found[3], found[0]), "tiles are others"
    pipe.vae.save_pretrained(tmp_path)
    handle.remove()
    assert snapshot(vae) == before
    assert_equal([vae.decode(LATENTS).sample for way in ways if way() is None], exact)
    saved = type(vae).from_pretrained(tmp_path)
    vae.disable_tiling()
    assert_equal(saved.decode(LATENTS).sample, exact[0])


def test_where_it_is_not_possible(monkeypatch, caplog):
    for target in (pipeline(), pipeline().unet):
        with pytest.raises(TypeError, match=r"vae=True is not possible, .* has none to decode with; give a pipeline"):
            mk.accelerate(target, vae=True)
    pipe = stable_diffusion(DDIMScheduler())
    before = snapshot(pipe.vae), snapshot(pipe.unet)
    with pytest.raises(ValueError, match="needs a calibrated scale"):
        mk.accelerate(pipe, mk.ModiffConfig(scale_mode="static"), vae=True)
    monkeypatch.setattr(cpu, "why_slow", lambda: "want of instructions")
    handle = mk.accelerate(pipe, mk.ModiffConfig(plan="quantized"), vae=True)
    assert handle.vae is None
    assert "the decoder stays float, for want of instructions" in caplog.text
    handle.remove()
    assert (snapshot(pipe.vae), snapshot(pipe.unet)) == before
