"""The quantization method "modiff" of diffusers: loads low-bit UNets, makes them while loading, and gives
their tensors to files. To import this module puts it into diffusers' tables.

diffusers' `from_pretrained` calls the methods of `ModiffQuantizer` in this order: validate_environment;
maybe_update_loaded_keys and _process_model_before_weight_loading (the model is on the meta device: here the files are
compared with it); maybe_update_state_dict with the tensors of every file; check_if_quantized_param and
create_quantized_param with each of the parameters; _process_model_after_weight_loading. Float weights of low-bit layers
are never made, and not kept where files have them: a `placeholder` stands for them. Its
`save_pretrained` calls get_state_dict_and_metadata. The format is that of `quant.checkpoint`."""

import importlib.util
from typing import Any

from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from modiff_kernels.calibration.result import CalibrationResult
from modiff_kernels.config import ModiffConfig
from modiff_kernels.integrations.accelerate import accelerate
from modiff_kernels.integrations.handle import Handle
from modiff_kernels.nn.weight import placeholder
from modiff_kernels.quant.checkpoint import WEIGHT, Checkpoint, encode


class ModiffQuantizer(DiffusersQuantizer):
    """One load of a UNet, and its way into files. `handle` is that of the UNet, once it is accelerated."""

    quantization_config: ModiffConfig
    is_serializable = True
    is_trainable = False  # low-bit layers have no gradient
    supports_parallel_loading = False  # the tensors of one layer may come with two files, and are put together here

    def __init__(self, quantization_config: ModiffConfig, handle: Handle | None = None, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.handle = handle
        self._checkpoint: Checkpoint | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """ImportError without Hugging Face accelerate, which diffusers loads with; ValueError for several devices."""
        if importlib.util.find_spec("accelerate") is None:
            raise ImportError("diffusers loads low-bit models by accelerate: pip install 'modiff-kernels[diffusers]'")
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        if isinstance(device_map, str) or len(set(devices)) > 1 or "disk" in devices:
            text = "which has its state on one device; give one, such as {'': 'cuda'}, or none and use .to()"
            raise ValueError(f"device_map={device_map!r} is not allowed for a low-bit UNet, {text}")

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        """The keys of the state_dict that saved files stand for; ValueError where their headers are not those of one.
        Files of a full-precision model are left alone."""
        if not self.pre_quantized:
            return loaded_keys
        for file in checkpoint_files:
            if not str(file).endswith(".safetensors"):
                raise ValueError(f"{file}: low-bit models are stored in safetensors, and pickled files are not read")
        self._checkpoint = Checkpoint(checkpoint_files)
        return self._checkpoint.state_dict_keys()

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The tensors of one file as part of the state_dict of the UNet; ValueError for damaged ones."""
        return state_dict if self._checkpoint is None else self._checkpoint.decode(state_dict)

    def check_if_quantized_param(self, model: nn.Module, param_value: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Whether codes stand for it."""
        return param_value.is_meta

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        path, _, name = param_name.rpartition(".")
        weight = placeholder(param_value.shape, param_value.dtype, target_device)
        model.get_submodule(path).register_parameter(name, nn.Parameter(weight))

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self._checkpoint is not None:
            config = self.quantization_config
            shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
            self._checkpoint.check(shapes, config.weight_bits, config.group_size or -1)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config, stored, self._checkpoint = self.quantization_config, self._checkpoint, None
        if stored is None:
            self.handle = accelerate(model, config, keep_original=False)
        else:
            options: dict[str, Any] = {"share_inputs": stored.share_inputs, "keep_original": False}
            saved = CalibrationResult("saved", config, stored.layers)
            try:
                self.handle = accelerate(model, config, calibration=saved, **options)
            except ValueError as error:
                raise ValueError(f"the quantization_config of config.json does not fit the files: {error}") from error
            unused = set(stored.layers) - set(self.handle.layers)
            if unused:
                text = "for the quantization_config of config.json (look at skip_modules); give that of the files"
                raise ValueError(f"{min(unused) + WEIGHT!r} is low-bit in the files, but not so {text}")
        self.handle.mark_as_loaded(_forget_quantization)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata for the files of this UNet. ValueError unless they are safetensors."""
        if not safe_serialization:
            raise ValueError("safe_serialization=False is not allowed: low-bit models are stored in safetensors only")
        layers = {path: layer.stored() for path, layer in self.handle.layers.items()}
        return encode(state_dict, layers, self.handle.share_inputs)

    def dequantize(self, model: nn.Module) -> nn.Module:
        """`handle.remove()`: the UNet in full precision, with the weights that the codes stand for."""
        for layer in self.handle.layers.values():
            layer.restore_original()
        self.handle.keep_original = True
        self.handle.remove()
        return model


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[ModiffConfig.quant_method.value] = ModiffConfig
auto.AUTO_QUANTIZER_MAPPING[ModiffConfig.quant_method.value] = ModiffQuantizer


def _forget_quantization(unet: Any) -> None:
    """Let diffusers take `unet` for a model in full precision."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        unet.__dict__.pop(name, None)
    config = {key: value for key, value in unet._internal_dict.items() if key != "quantization_config"}
    unet._internal_dict = type(unet._internal_dict)(config)
