"""Pipelines of diffusers around the networks of benchmarks/shapes.py, called as users call them.

Text encoders and VAE are left out, since no configuration changes them: Stable Diffusion gets random embeddings and
gives latents. Its guidance is that of the pipeline's own scale, both passes in one batch, so the UNet sees twice as
many samples as there are images. All other networks are sampled by DDPMPipeline with the scheduler put in; the latents
of LDM-8 are taken as they are."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import shared as models
from benchmarks.configurations import label
from benchmarks.shapes import CONFIGS, TEXT_TOKENS

OF_PIXELS = ("cifar10_small16", "ddpm_cifar10")
GUIDED = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


@dataclass(frozen=True)
class Sampler:
    """A sampler as rows name it. name: of models.make_scheduler."""

    key: str
    label: str
    name: str
    steps: int


SAMPLERS = {
    "ddim50": Sampler("ddim50", "DDIM, 50 steps", "ddim", 50),
    "dpm20": Sampler("dpm20", "DPM-Solver++, 20 steps", "dpmsolver++", 20),
}


class Workload:
    """What is sampled: `images` pictures, or latents, of `network` from the noise of seeds 0, 1, ... in one batch.

    unet: gives sizes, dtype and device."""

    def __init__(self, network: str, unet: torch.nn.Module, sampler: Sampler, images: int) -> None:
        self.network, self.label = network, label(network, unet)
        self.sampler, self.images, self.steps = sampler, images, sampler.steps
        self.in_pixels = network in OF_PIXELS
        shipped = models.load_model(None, None, torch.device("cpu")).scheduler_config
        schedule = CONFIGS[network]["scheduler"] if network in CONFIGS else shipped
        self._model = models.Model(network, unet, schedule)
        self._text = _embeddings(network, unet, images) if network in GUIDED else {}

    def pipe(self, unet: torch.nn.Module) -> Any:
        import diffusers

        clipped = {} if self.in_pixels or self.sampler.name != "ddim" else {"clip_sample": False}
        scheduler = models.make_scheduler(self._model, self.sampler.name, **clipped)
        kind = getattr(diffusers, GUIDED.get(self.network, "DDPMPipeline"))
        parts = {name: None for name in inspect.signature(kind.__init__).parameters if name in NOT_USED}
        more = {"requires_safety_checker": False} if self.network == "sd15" else {}
        pipe = kind(**parts, **more, unet=unet, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(self, pipe: Any) -> torch.Tensor:
        """Pictures [N, C, H, W] in 0..1, or latents, from the same noise at every call; the device may still work."""
        generators = [torch.Generator().manual_seed(seed) for seed in range(self.images)]
        options = {"generator": generators, "num_inference_steps": self.steps}
        if self.network in GUIDED:
            return pipe(**options, **self._text, output_type="latent").images
        return pipe(**options, batch_size=self.images, output_type="pt").images


NOT_USED = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "safety_checker", "feature_extractor")


def _embeddings(network: str, unet: torch.nn.Module, images: int) -> dict[str, torch.Tensor]:
    """Random text for each image and none for its guidance, as the pipeline takes them."""
    generator = torch.Generator().manual_seed(0)
    parameter = next(unet.parameters())

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(parameter.device, parameter.dtype)

    width = unet.config.cross_attention_dim
    found = {name: random(images, TEXT_TOKENS, width) for name in ("prompt_embeds", "negative_prompt_embeds")}
    if network == "sdxl":
        times = unet.config.addition_time_embed_dim * 6
        text = unet.config.projection_class_embeddings_input_dim - times
        found |= {f"{name}pooled_prompt_embeds": random(images, text) for name in ("", "negative_")}
    return found
