"""Small pipelines of Stable Diffusion and SDXL with random weights."""

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.unets import COMMON, SDXL

UNET = {**COMMON, "norm_num_groups": 8, "block_out_channels": (32, 64), "attention_head_dim": (2, 4)}
UNET |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
UNET |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}


def tokenizer():
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *[f"{letter}</w>" for letter in letters], "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)


def text_encoder(kind):
    sizes = {"vocab_size": 190, "hidden_size": 32, "intermediate_size": 37, "projection_dim": 32}
    tokens = {"bos_token_id": 188, "eos_token_id": 189, "pad_token_id": 189}
    layers = {"num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 16}
    return kind(CLIPTextConfig(**sizes, **tokens, **layers)).eval()


def parts(**unet):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**blocks, block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4)
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, beta_schedule="scaled_linear", beta_end=0.012)
    return {"vae": vae.eval(), "unet": UNet2DConditionModel(**UNET, **unet).eval(), "scheduler": scheduler}


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    texts = {"text_encoder": text_encoder(CLIPTextModel), "tokenizer": tokenizer()}
    checks = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = diffusers.StableDiffusionPipeline(**parts(cross_attention_dim=32), **texts, **checks)
    pipe.save_pretrained(folder := tmp_path_factory.mktemp("sd"))
    return folder


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    unet = {**SDXL, "cross_attention_dim": 64, "projection_class_embeddings_input_dim": 80}
    texts = {"text_encoder": text_encoder(CLIPTextModel), "tokenizer": tokenizer(), "tokenizer_2": tokenizer()}
    texts["text_encoder_2"] = text_encoder(CLIPTextModelWithProjection)
    pipe = diffusers.StableDiffusionXLPipeline(**parts(**unet), **texts)
    pipe.save_pretrained(folder := tmp_path_factory.mktemp("sdxl"))
    return folder
