"""`Handle.save_pretrained`: a low-bit UNet in the files of diffusers, in the format of `quant.checkpoint`."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn.adapters import is_adapter
from modiff_kernels.quant import checkpoint


class SavingQuantizer(DiffusersQuantizer):
    """What diffusers asks of a quantizer when it saves a model. `handle` is that of the UNet, once it is
    accelerated.
    """

    quantization_config: ModiffConfig

    def __init__(self, quantization_config: ModiffConfig, handle: Any = None, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.handle = handle

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata for the files of this UNet. ValueError unless they are safetensors."""
        if not safe_serialization:
            raise ValueError("safe_serialization=False is not allowed: low-bit models are stored in safetensors only")
        layers = {path: layer.stored() for path, layer in self.handle.layers.items()}
        return checkpoint.encode(state_dict, layers, self.handle.share_inputs)

    def dequantize(self, model: nn.Module) -> nn.Module:
        """`handle.remove()`: the UNet in full precision, with the weights that the codes stand for."""
        self.handle.remove()
        return model

    @property
    def is_serializable(self) -> bool:
        """True."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: low-bit layers have no gradient."""
        return False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Loading is for `ModiffQuantizer`."""

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model


def save(handle: Any, directory: str | os.PathLike[str], max_shard_size: int | str) -> None:
    """`Handle.save_pretrained`."""
    unet, folder = handle.unet, Path(directory)
    if not hasattr(unet, "save_pretrained") or not hasattr(unet, "_internal_dict"):
        raise TypeError(f"save_pretrained: {type(unet).__name__} is no model of diffusers, so it has no config to save")
    if handle.config.weight_bits is None:
        raise ValueError("save_pretrained: weight_bits is None, nothing is low-bit; call save_pretrained() of the UNet")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"save_pretrained: {folder} is a file; give a folder")
    if any(is_adapter(module) for module in unet.modules()):
        raise ValueError(
            "save_pretrained: a LoRA stands beside the layers, which the saved UNet would not have; call remove(), "
            "then fuse_lora() and unload_lora(), then accelerate() again"
        )
    form = handle.config.weight_bits, handle.config.group_size or -1
    for path, layer in handle.layers.items():
        if (layer.weight_bits, layer.group_size) != form:
            raise ValueError(
                f"save_pretrained: the codes of layer '{path}' have {layer.weight_bits} bits and group size "
                f"{layer.group_size}, but files hold those of the config alone, {form[0]} and {form[1]}; keep the "
                "calibration beside the model and give it to accelerate(calibration=...)"
            )
    with _quantized(handle):
        unet.save_pretrained(folder, safe_serialization=True, max_shard_size=max_shard_size)
    _remove_other_form(folder)


@contextlib.contextmanager
def _quantized(handle: Any) -> Iterator[None]:
    """Inside, `save_pretrained` of the UNet writes low-bit weights, as it always does for one that was loaded so."""
    unet = handle.unet
    if "hf_quantizer" in unet.__dict__:
        yield
        return
    config = unet._internal_dict
    # The plan itself: what "auto" or a path stands for may be another one where the files are loaded.
    saved = handle.config if handle.plan is None else dataclasses.replace(handle.config, plan=handle.plan)
    unet.hf_quantizer = SavingQuantizer(saved, handle)
    unet.register_to_config(quantization_config=saved)
    try:
        yield
    finally:
        unet._internal_dict = config
        del unet.hf_quantizer


def _remove_other_form(folder: Path) -> None:
    """Of an index of shards and a single file, remove the one that an earlier save left: diffusers reads the index."""
    from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME

    single, index = folder / SAFETENSORS_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.exists() and index.exists():
        (single if any(folder.glob(f"{single.stem}-*{single.suffix}")) else index).unlink()
