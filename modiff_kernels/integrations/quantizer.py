"""The quantization method "modiff" of diffusers: loads low-bit UNets, and makes them while loading.

diffusers' `from_pretrained` calls the methods of `ModiffQuantizer` in this order: validate_environment;
maybe_update_loaded_keys and _process_model_before_weight_loading (the model is on the meta device: here the files are
compared with it); maybe_update_state_dict with the tensors of every file; _process_model_after_weight_loading. The
format is that of `quant.checkpoint`.
"""

import importlib.util
from typing import Any

from torch import nn

from modiff_kernels.calibration.result import CalibrationResult
from modiff_kernels.config import ModiffConfig
from modiff_kernels.integrations.accelerate import accelerate
from modiff_kernels.integrations.handle import Handle
from modiff_kernels.integrations.saving import SavingQuantizer
from modiff_kernels.quant import checkpoint
from modiff_kernels.quant.checkpoint import Checkpoint


def register() -> None:
    """Put the method into diffusers' tables."""
    from diffusers.quantizers import auto

    method = ModiffConfig.quant_method.value
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = ModiffConfig
    auto.AUTO_QUANTIZER_MAPPING[method] = ModiffQuantizer


class ModiffQuantizer(SavingQuantizer):
    """One load of a UNet, and afterwards its way into files."""

    def __init__(self, quantization_config: ModiffConfig, handle: Handle | None = None, **kwargs: Any) -> None:
        super().__init__(quantization_config, handle, **kwargs)
        self._checkpoint: Checkpoint | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """ImportError without Hugging Face accelerate, which diffusers loads with; ValueError for several devices."""
        if importlib.util.find_spec("accelerate") is None:
            raise ImportError(
                "diffusers needs the package accelerate to load low-bit models; pip install 'modiff-kernels[diffusers]'"
            )
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        if isinstance(device_map, str) or len(set(devices)) > 1 or "disk" in devices:
            raise ValueError(
                f"device_map={device_map!r} is not allowed for a low-bit UNet, which has its state on one device; give "
                "one device, such as device_map={'': 'cuda'}, or none and move the model with .to()"
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        """The keys of the state_dict that saved files stand for; ValueError where their headers are not those of one.

        Files of a full-precision model are left alone.
        """
        if not self.pre_quantized:
            return loaded_keys
        wrong = [str(file) for file in checkpoint_files if not str(file).endswith(".safetensors")]
        if wrong:
            raise ValueError(f"{wrong[0]}: low-bit models are stored in safetensors, and pickled files are not read")
        self._checkpoint = Checkpoint(checkpoint_files)
        return self._checkpoint.state_dict_keys()

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The tensors of one file as part of the state_dict of the UNet; ValueError for damaged ones."""
        return state_dict if self._checkpoint is None else self._checkpoint.decode(state_dict)

    @property
    def supports_parallel_loading(self) -> bool:
        """False: the tensors of one layer may come with two files, and are put together here."""
        return False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self._checkpoint is not None:
            config = self.quantization_config
            shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
            self._checkpoint.check(shapes, config.weight_bits, config.group_size or -1)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        stored = self._checkpoint
        if stored is None:
            self.handle = accelerate(model, self.quantization_config)
        else:
            saved = CalibrationResult("saved", self.quantization_config, stored.layers)
            try:
                self.handle = accelerate(
                    model, self.quantization_config, calibration=saved, share_inputs=stored.share_inputs
                )
            except ValueError as error:
                raise ValueError(f"the quantization_config of config.json does not fit the files: {error}") from error
            _require_all_used(self.handle, stored)
            self._checkpoint = None
        self.handle.mark_as_loaded(_forget_quantization)
        return model


def _forget_quantization(unet: Any) -> None:
    """Let diffusers take `unet` for a model in full precision."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        unet.__dict__.pop(name, None)
    config = {key: value for key, value in unet._internal_dict.items() if key != "quantization_config"}
    unet._internal_dict = type(unet._internal_dict)(config)


def _require_all_used(handle: Handle, stored: Checkpoint) -> None:
    unused = set(stored.layers) - set(handle.layers)
    if unused:
        handle.remove()
        raise ValueError(
            f"{min(unused) + checkpoint.WEIGHT!r} is low-bit in the files, but not so for the quantization_config of "
            "config.json (look at skip_modules); give the config.json that belongs to the files"
        )
