"""Up blocks without the concatenation of hidden state and skip, of which residual blocks read the two parts."""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from modiff_kernels.nn.blocks.base import has_no_hook, is_as_written

UP_BLOCKS = "diffusers.models.unets.unet_2d_blocks", ("UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D")
CONCATENATE_ON = ("cpu",)  # device types on which one pass more costs no launch, and one tensor is read faster


class Concatenation(Tensor):
    """torch.cat(parts, 1) of two images in channels_last, made when an operation of torch asks for it."""

    parts: tuple[Tensor, Tensor]
    _whole: Tensor | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, *parts: Tensor) -> "Concatenation":
        samples, _, height, width = parts[0].shape
        channels = sum(part.shape[1] for part in parts)
        strides, like = (channels * height * width, 1, width * channels, channels), parts[0]
        options: Any = {"dtype": like.dtype, "device": like.device}
        made: Any = Tensor._make_wrapper_subclass(cls, (samples, channels, height, width), strides, **options)
        made.parts, made._whole = tuple([part.contiguous(memory_format=torch.channels_last) for part in parts]), None
        return made

    def whole(self) -> Tensor:
        if self._whole is None:
            self._whole = torch.cat(self.parts, 1)
        return self._whole

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(cls, cls.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Torch:
    """`torch` for the forward of an up block."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def cat(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        a, b = tensors
        differ = (a.dtype, a.device, a.shape[0], *a.shape[2:]) != (b.dtype, b.device, b.shape[0], *b.shape[2:])
        if dim != 1 or differ or a.requires_grad or b.requires_grad or a.device.type in CONCATENATE_ON:
            return torch.cat(tensors, dim)
        return Concatenation(a, b)


def forward_without_concatenation(block: nn.Module) -> Callable[..., Any] | None:
    """diffusers' forward of an up block, which makes a `Concatenation` where it concatenates; None for others."""
    kind = type(block)
    known = kind.__module__ == UP_BLOCKS[0] and kind.__name__ in UP_BLOCKS[1] and is_as_written(kind)
    forward: Any = kind.forward
    if not (known and has_no_hook(block) and isinstance(forward, FunctionType)):
        return None
    names = {**forward.__globals__, "torch": _Torch()}
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return own.__get__(block)
