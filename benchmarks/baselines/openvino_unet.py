"""UNets in OpenVINO, the CPU's strongest peer outside of torch: in float32, in bfloat16, and in int8 by NNCF.

int8 is what users of OpenVINO do: `nncf.quantize` with its defaults, static scales from calls that it is shown, weights
and activations of convolutions and products. Needs the packages openvino and nncf."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

PRECISIONS = {
    "openvino-float32": ("f32", False),
    "openvino-bfloat16": ("bf16", False),
    "openvino-int8": ("f32", True),
    "openvino-int8-bfloat16": ("bf16", True),
}
"""Keys of rows: the precision of float layers in OpenVINO's words, and whether the others are int8."""


class OpenVinoUNet(nn.Module):
    """`unet` in OpenVINO, for calls like those in `shown`: (sample, timestep) pairs of one shape, without conditions.

    It has as many threads as torch has when it is made. Outputs are float32."""

    def __init__(self, unet: nn.Module, key: str, shown: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        import nncf
        import openvino

        precision, in_int8 = PRECISIONS[key]
        sample, timestep = shown[0]
        self.config, self.device, self.dtype = unet.config, unet.device, unet.dtype
        example = {"example_input": (sample, timestep.float()), "input": [tuple(sample.shape), ()]}
        with torch.no_grad():
            model = openvino.convert_model(_Plain(unet), **example)
        if in_int8:
            calls = nncf.Dataset([_arrays(*call) for call in shown])
            model = nncf.quantize(model, calls, subset_size=len(shown))
        options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        options["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        self._request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """The UNet's output in a tuple, whatever return_dict is; overwritten by the next call."""
        return (torch.from_numpy(self._request.infer(_arrays(sample, timestep), share_outputs=True)[0]),)


def _arrays(sample: Tensor, timestep: Tensor) -> list[Any]:
    return [sample.contiguous().numpy(), timestep.float().numpy()]


class _Plain(nn.Module):
    """Tensors in, a tensor out."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.unet(sample, timestep, return_dict=False)[0]
