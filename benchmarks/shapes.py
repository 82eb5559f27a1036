"""Named networks and layers that benchmarks run on, each with the number of times it occurs in one UNet call.

A network is a diffusers UNet (`build_unet`); its layer table is read off the network itself (`layer_table`), so that no
shape is written down twice.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

NETWORKS = ("cifar10_small16", "ddpm_cifar10")
"""cifar10_small16: the shipped model, 16x16. ddpm_cifar10: configuration of google/ddpm-cifar10-32, 35.7 M, 32x32."""

LAYER_TABLES = (*NETWORKS, "sd15", "sdxl")
"""Networks with a layer table. sd15, sdxl: the UNets of Stable Diffusion 1.5 (512x512) and XL (1024x1024), without
weights (device meta)."""

SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TEXT_TOKENS = 77
NOT_COUNTED = {"time_embedding", "time_emb_proj", "add_embedding"}  # once per image, not per pixel or token

DDPM_CIFAR10 = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "center_input_sample": False,
}


@dataclass(frozen=True)
class Layer:
    """One Linear or Conv2d problem: `h`, `w` are of the input, a Linear has `h` rows per image, w 1 and kernel 1."""

    kind: str
    c_in: int
    c_out: int
    h: int
    w: int
    kernel: int
    stride: int = 1
    padding: int = 0

    def __str__(self) -> str:
        if self.kind == "linear":
            return f"linear-{self.c_in}-{self.c_out}@{self.h}"
        return f"conv{self.kernel}x{self.kernel}-{self.c_in}-{self.c_out}@{self.h}x{self.w}-s{self.stride}"


def build_unet(network: str) -> torch.nn.Module:
    """The network in float32, eval; ddpm_cifar10 has random weights (seed 0)."""
    from diffusers import UNet2DModel

    if network == "cifar10_small16":
        from modiff_kernels.models import shipped_model_path

        unet = UNet2DModel.from_pretrained(shipped_model_path()).float()
    elif network == "ddpm_cifar10":
        torch.manual_seed(0)
        unet = UNet2DModel(**DDPM_CIFAR10)
    else:
        raise ValueError(f"network {network!r} is unknown; allowed: {', '.join(NETWORKS)}")
    return unet.eval().requires_grad_(False)


def _network_and_inputs(network: str) -> tuple[torch.nn.Module, tuple, dict]:
    """A UNet whose call with these arguments is one step of one image; only its shapes matter."""
    if network not in ("sd15", "sdxl"):
        unet = build_unet(network)
        size = unet.config.sample_size
        return unet, (torch.zeros(1, 3, size, size), 0), {}
    from diffusers import UNet2DConditionModel

    config = SD15 if network == "sd15" else SDXL
    size = config["sample_size"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
        text = torch.empty(1, TEXT_TOKENS, config["cross_attention_dim"])
        inputs = (torch.empty(1, 4, size, size), torch.empty(1), text)
        conditions = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
    return unet, inputs, {"added_cond_kwargs": conditions} if network == "sdxl" else {}


def layer_table(network: str) -> dict[Layer, int]:
    """Every Linear and Conv2d problem of one UNet call -> how often it occurs; without those of the time embedding."""
    unet, inputs, keywords = _network_and_inputs(network)
    table: Counter[Layer] = Counter()

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        if isinstance(module, torch.nn.Conv2d):
            padding = module.padding[0]
            table[
                Layer(
                    "conv",
                    module.in_channels,
                    module.out_channels,
                    *x.shape[2:],
                    module.kernel_size[0],
                    module.stride[0],
                    padding,
                )
            ] += 1
        else:
            table[Layer("linear", module.in_features, module.out_features, x.numel() // module.in_features, 1, 1)] += 1

    for name, module in unet.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and not NOT_COUNTED & set(name.split(".")):
            module.register_forward_pre_hook(count)
    with torch.inference_mode():
        unet(*inputs, **keywords)
    return dict(table)
