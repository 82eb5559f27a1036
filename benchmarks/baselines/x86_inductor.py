"""A UNet in int8 as torchao and inductor make it for x86 CPUs (`X86InductorQuantizer`, its default configuration):
static scales from calls that it is shown, weights per channel, convolutions and Linears in oneDNN's int8 kernels, and
what lies between them fused by inductor. Needs the package torchao."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.openvino_unet import Plain, leaves_of

X86_INT8 = "torchao-x86-int8"


class X86InductorUNet(nn.Module):
    """`unet`, for calls like those in `shown`: (sample, timestep) pairs of one shape, and tensors like `conditions`."""

    def __init__(self, unet: nn.Module, shown: Sequence[tuple[Tensor, Tensor]], conditions: Mapping[str, Any]) -> None:
        super().__init__()
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        self.config, self.device, self.dtype = unet.config, unet.device, unet.dtype
        calls = [tuple(leaves_of(*call, conditions)) for call in shown]
        with torch.no_grad():
            plain = Plain(unet, torch.utils._pytree.tree_structure(dict(conditions)))
            exported = torch.export.export(plain, calls[0], strict=True).module()
            quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
            prepared = prepare_pt2e(exported, quantizer)
            for call in calls:
                prepared(*call)
            converted = convert_pt2e(prepared)
        self._step = torch.compile(converted, dynamic=False)

    @torch.inference_mode()
    @torch._inductor.config.patch(freezing=True)  # as an option of torch.compile it comes too late
    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True, **conditions: Any) -> tuple[Tensor]:
        """The UNet's output in a tuple, whatever return_dict is."""
        return (self._step(*leaves_of(sample, timestep, conditions)),)
