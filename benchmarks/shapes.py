"""Named networks and layers that benchmarks run on, each with the number of times it occurs in one UNet call.

A network is a diffusers UNet (`build_unet`); its layer table is read off the network itself (`layer_table`), so that no
shape is written down twice."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

SMALL_NETWORKS = ("cifar10_small16", "ddpm_cifar10")
"""cifar10_small16: the shipped model, 16x16. ddpm_cifar10: configuration of google/ddpm-cifar10-32, 35.7 M, 32x32."""

NETWORKS = (*SMALL_NETWORKS, "ldm8_churches", "sd15", "sdxl")
"""ldm8_churches: after latent diffusion's LDM-8 for LSUN Churches (256x256), with heads of one width at all levels as
diffusers builds them. sd15, sdxl: the UNets of Stable Diffusion 1.5 (512x512) and XL (1024x1024). All but the shipped
model have random weights."""

VAE_DECODER = "sd_vae_decoder"
"""That of Stable Diffusion's AutoencoderKL with random weights, as a network that gets a timestep."""

OF_STEPS = (*NETWORKS, "sdxl_512", "dit_s2", VAE_DECODER)
"""What whole steps are timed of. sdxl_512: sdxl on latents of 512x512. dit_s2: a DiT of the shape S/2 on latents of
256x256, random weights."""

CONFIGS: dict[str, Any] = json.loads(Path(__file__).with_name("networks.json").read_text())
"""Of those: class and configuration of the UNet in diffusers, and the noise schedule that it is trained on."""
CONFIGS["sdxl_512"] = {**CONFIGS["sdxl"], "unet": {**CONFIGS["sdxl"]["unet"], "sample_size": 64}}
TEXT_TOKENS = 77
NOT_COUNTED = {"time_embedding", "time_emb_proj", "add_embedding", "timestep_embedder", "norm1", "proj_out_1"}
"""Once per image, not per pixel or token."""


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

    @property
    def h_out(self) -> int:
        return (self.h + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def w_out(self) -> int:
        return (self.w + 2 * self.padding - self.kernel) // self.stride + 1

    def __str__(self) -> str:
        if self.kind == "linear":
            return f"linear-{self.c_in}-{self.c_out}@{self.h}"
        return f"conv{self.kernel}x{self.kernel}-{self.c_in}-{self.c_out}@{self.h}x{self.w}-s{self.stride}"


class TimedDecoder(torch.nn.Module):
    """The decoder of `vae`, called like a UNet."""

    device, dtype = property(lambda self: next(self.parameters()).device), torch.float32

    def __init__(self, vae: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.config = SimpleNamespace(sample_size=vae.config.sample_size, in_channels=vae.config.latent_channels)

    def forward(self, sample: torch.Tensor, timestep: Any, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (self.decoder(sample),)


def build_unet(network: str, device: str | torch.device = "cpu") -> torch.nn.Module:
    """The network in float32, eval, on `device`; random weights are those of seed 0 (none on device meta)."""
    import diffusers

    if network not in OF_STEPS:
        raise ValueError(f"network {network!r} is unknown; allowed: {', '.join(OF_STEPS)}")
    if network == "cifar10_small16":
        from modiff_kernels.models import shipped_model_path

        unet = diffusers.UNet2DModel.from_pretrained(shipped_model_path())
        return unet.float().to(device).eval().requires_grad_(False)
    torch.manual_seed(0)
    with torch.device(device):
        unet = getattr(diffusers, CONFIGS[network]["class"])(**CONFIGS[network]["unet"]).eval().requires_grad_(False)
    return TimedDecoder(unet).eval() if network == VAE_DECODER else unet


def conditions(unet: torch.nn.Module, batch: int) -> dict[str, Any]:
    """Keyword arguments of a call beside sample and timestep: classes, or random text and sizes in its dtype."""
    if classes := getattr(unet.config, "num_embeds_ada_norm", None):
        return {"class_labels": torch.arange(batch, device=unet.device) % classes}
    width = getattr(unet.config, "cross_attention_dim", None)
    if width is None:
        return {}
    dtype, device = next(unet.parameters()).dtype, unet.device

    def random(*shape: int) -> torch.Tensor:
        values = torch.empty(shape, device=device, dtype=dtype)
        return values if values.is_meta else values.normal_()

    keywords: dict[str, Any] = {"encoder_hidden_states": random(batch, TEXT_TOKENS, width)}
    if unet.config.addition_embed_type == "text_time":
        keywords["added_cond_kwargs"] = {"text_embeds": random(batch, 1280), "time_ids": random(batch, 6)}
    return keywords


def layer_table(network: str) -> dict[Layer, int]:
    """Every Linear and Conv2d problem of one UNet call -> how often it occurs; without those of the time embedding."""
    unet = build_unet(network, "cpu" if network in SMALL_NETWORKS else "meta")
    channels, size = unet.config.in_channels, unet.config.sample_size
    inputs = (torch.empty(1, channels, size, size, device=unet.device), torch.zeros(1, device=unet.device))
    keywords = conditions(unet, 1)
    table: Counter[Layer] = Counter()

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        if isinstance(module, torch.nn.Conv2d):
            size = (*x.shape[2:], module.kernel_size[0], module.stride[0], module.padding[0])
            table[Layer("conv", module.in_channels, module.out_channels, *size)] += 1
        else:
            table[Layer("linear", module.in_features, module.out_features, x.numel() // module.in_features, 1, 1)] += 1

    for name, module in unet.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and not NOT_COUNTED & set(name.split(".")):
            module.register_forward_pre_hook(count)
    with torch.inference_mode():
        unet(*inputs, **keywords)
    return dict(table)
