"""What the tests of step schedules share: tiny UNets, a sampling loop, and the actions of a run as letters."""

import types

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel

FLOAT = {"weight_bits": None, "act_bits": None}


def unet_of(levels=2, condition=False):
    torch.manual_seed(0)
    widths = (8, 16, 16)[:levels]
    if condition:
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=widths,
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=12,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", *["DownBlock2D"] * (levels - 1)),
            up_block_types=(*["UpBlock2D"] * (levels - 1), "CrossAttnUpBlock2D"),
        ).eval()
    return UNet2DModel(
        sample_size=8,
        block_out_channels=widths,
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * (levels - 1)),
        up_block_types=(*["AttnUpBlock2D"] * (levels - 1), "UpBlock2D"),
    ).eval()


def noise(batch=2, size=8):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def pipeline(scheduler=None, unet=None):
    return types.SimpleNamespace(unet=unet or unet_of(), scheduler=scheduler or DDIMScheduler())


def sample(pipe, steps=12, start=0, on_call=lambda: None):
    """A sampling loop as pipelines have it; start: calls that image-to-image leaves out."""
    pipe.scheduler.set_timesteps(steps)
    x = noise() * pipe.scheduler.init_noise_sigma
    for t in pipe.scheduler.timesteps[start:]:
        prediction = pipe.unet(pipe.scheduler.scale_model_input(x, t), t).sample
        on_call()
        x = pipe.scheduler.step(prediction, t, x).prev_sample
    return x


def letters(handle, context="default"):
    short = {"initialize": "U", "update": "U", "hold": "H", "forecast": "F", "deep-hold": "h", "deep-forecast": "f"}
    return "".join(short[action] for action in handle.actions(context))
