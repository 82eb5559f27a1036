"""UNets in OpenVINO, the CPU's strongest peer outside of torch: in float32, in bfloat16, and in int8 by NNCF.

int8 is what users of OpenVINO do: `nncf.quantize` with its defaults, static scales from calls that it is shown, weights
and activations of convolutions and products. "hybrid" is what optimum-intel does to UNets of Stable Diffusion: weights
alone of Linear layers, all of convolutions and of the products in attention. Needs the packages openvino and nncf."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

PRECISIONS = {
    "openvino-float32": ("f32", ""),
    "openvino-bfloat16": ("bf16", ""),
    "openvino-int8": ("f32", "int8"),
    "openvino-int8-bfloat16": ("bf16", "int8"),
    "openvino-hybrid": ("f32", "hybrid"),
    "openvino-hybrid-bfloat16": ("bf16", "hybrid"),
}
"""Keys of rows: the precision of float layers in OpenVINO's words, and what is int8."""


class OpenVinoUNet(nn.Module):
    """`unet` in OpenVINO, for calls like those in `shown`: (sample, timestep) pairs of one shape, and with tensors like
    `conditions` by keyword.

    It has as many threads as torch has when it is made. Outputs are float32."""

    def __init__(
        self, unet: nn.Module, key: str, shown: Sequence[tuple[Tensor, Tensor]], conditions: Mapping[str, Any]
    ) -> None:
        super().__init__()
        import openvino

        precision, in_int8 = PRECISIONS[key]
        self.config, self.device, self.dtype = unet.config, unet.device, unet.dtype
        calls = [leaves_of(*call, conditions) for call in shown]
        with torch.no_grad():
            example = {"example_input": tuple(calls[0]), "input": [tuple(leaf.shape) for leaf in calls[0]]}
            model = openvino.convert_model(Plain(unet, torch.utils._pytree.tree_structure(conditions)), **example)
        if in_int8:
            model = _quantised(model, [[leaf.numpy() for leaf in call] for call in calls], in_int8 == "hybrid")
        options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        options["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        self._request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True, **conditions: Any) -> tuple[Tensor]:
        """The UNet's output in a tuple, whatever return_dict is; overwritten by the next call."""
        leaves = [leaf.numpy() for leaf in leaves_of(sample, timestep, conditions)]
        return (torch.from_numpy(self._request.infer(leaves, share_outputs=True)[0]),)


def _quantised(model: Any, calls: list[Any], is_hybrid: bool) -> Any:
    import nncf

    options: dict[str, Any] = {}
    if is_hybrid:
        products = [op for op in model.get_ops() if op.get_type_name() == "MatMul"]
        linears = [op.get_friendly_name() for op in products if any(map(_is_constant, op.input_values()))]
        model = nncf.compress_weights(model, ignored_scope=nncf.IgnoredScope(types=["Convolution"]))
        smooth = nncf.AdvancedSmoothQuantParameters(matmul=-1)  # off
        options["advanced_parameters"] = nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smooth)
        options |= {"model_type": nncf.ModelType.TRANSFORMER, "ignored_scope": nncf.IgnoredScope(names=linears)}
    return nncf.quantize(model, nncf.Dataset(calls), subset_size=len(calls), **options)


def _is_constant(value: Any) -> bool:
    node = value.get_node()
    while node.get_type_name() in ("Convert", "Transpose", "Reshape"):
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant"


def leaves_of(sample: Tensor, timestep: Tensor, conditions: Mapping[str, Any]) -> list[Tensor]:
    return [sample.contiguous(), timestep.float(), *tree_leaves(dict(conditions))]


class Plain(nn.Module):
    """Tensors in, a tensor out. form: of the conditions."""

    def __init__(self, unet: nn.Module, form: Any) -> None:
        super().__init__()
        self.unet, self.form = unet, form

    def forward(self, sample: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        return self.unet(sample, timestep, return_dict=False, **tree_unflatten(conditions, self.form))[0]
