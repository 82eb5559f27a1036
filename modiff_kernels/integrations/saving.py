"""`Handle.save_pretrained`: a low-bit UNet in the files of diffusers, in the format of `quant.checkpoint`."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME

from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn.blocks.base import is_adapter


def save(handle: Any, directory: str | os.PathLike[str], max_shard_size: int | str) -> None:
    unet: Any = handle.unet
    config, folder = handle.config, Path(directory)
    if not hasattr(unet, "save_pretrained") or not hasattr(unet, "_internal_dict"):
        raise TypeError(f"save_pretrained: {type(unet).__name__} is no model of diffusers, so it has no config to save")
    if config.weight_bits is None:
        raise ValueError("save_pretrained: weight_bits is None, nothing is low-bit; call save_pretrained() of the UNet")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"save_pretrained: {folder} is a file; give a folder")
    if any(is_adapter(module) for module in unet.modules()):
        text = "would not have; call remove(), then fuse_lora() and unload_lora(), then accelerate() again"
        raise ValueError(f"save_pretrained: a LoRA stands beside the layers, which the saved UNet {text}")
    form = config.weight_bits, config.group_size or -1
    for path, layer in handle.layers.items():
        if (layer.weight_bits, layer.group_size) != form:
            have = f"{layer.weight_bits} bits and group size {layer.group_size}"
            text = f"but files hold those of the config, {form[0]} and {form[1]}; give accelerate() the calibration"
            raise ValueError(f"save_pretrained: the codes of layer '{path}' have {have}, {text}")
    plain, accelerated_in_place = unet._internal_dict, "hf_quantizer" not in unet.__dict__
    if accelerated_in_place:  # for the time of the call, it is like one that was loaded in low bits
        # The plan itself: what "auto" or a path stands for may be another one where the files are loaded.
        saved = config if handle.plan is None else dataclasses.replace(config, plan=handle.plan)
        quantizer: Any = AUTO_QUANTIZER_MAPPING[ModiffConfig.quant_method.value]
        unet.hf_quantizer = quantizer(saved, handle)
        unet.register_to_config(quantization_config=saved)
    try:
        type(unet).save_pretrained(unet, folder, safe_serialization=True, max_shard_size=max_shard_size)
    finally:
        if accelerated_in_place:
            unet._internal_dict = plain
            del unet.hf_quantizer
    # Of an index of shards and a single file, remove the one that an earlier save left: diffusers reads the index.
    single, index = folder / SAFETENSORS_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.exists() and index.exists():
        (single if any(folder.glob(f"{single.stem}-*{single.suffix}")) else index).unlink()
