"""What an op is told besides tensors of data: a prologue, the window of a convolution, a packed weight."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .affine import expand_weight_scale
from .packing import KPACK_V1, unpack


class Prologue(NamedTuple):
    """What stands between the tensor `h` that an op reads and x, which it quantises; x is computed in float32 and never
    stored.

    kind: "identity": x = h. "layer_norm": over the last dimension of h [..., K]. "geglu": x = h[..., :K] *
        gelu(h[..., K:]) of h [..., 2K], with erf. "group_norm": x = norm(h + shift), then SiLU if `silu`; h is an image
        [N, C, H, W] or tokens [N, L, C], normalised over the rows and the channels of one of `num_groups` groups.
    gamma, beta: [C] scale and offset of the norm, or None; of a group norm also both [N, C], for every sample (a time
        embedding of kind "scale_shift"). eps: added to the (biased) variance.
    shift: [N, C] added to every pixel before a group norm (the time embedding), or None. What is [N, C] has contiguous
        rows with any stride between them (0: one row for all), gamma and beta the same.
    further: an image [N, C', H, W] in h's dtype, whose channels follow those of h, as if the two were concatenated
        before all else, or None; of the kinds "identity" and "group_norm"."""

    kind: str = "identity"
    gamma: Tensor | None = None
    beta: Tensor | None = None
    shift: Tensor | None = None
    num_groups: int = 0
    eps: float = 0.0
    silu: bool = False
    further: Tensor | None = None

    def shape(self, h: Tensor) -> Sequence[int]:
        """That of x."""
        if self.further is not None:
            samples, channels, *size = h.shape
            return samples, channels + self.further.shape[1], *size
        return (*h.shape[:-1], h.shape[-1] // 2) if self.kind == "geglu" else h.shape

    def joined(self, h: Tensor) -> Tensor:
        """`h` with the further channels, for kernels that read one tensor."""
        return h if self.further is None else torch.cat([h, self.further], 1)

    def empty_codes(self, h: Tensor) -> Tensor:
        """An int8 tensor of x's shape and memory format."""
        if self.kind != "geglu" and self.further is None:
            return torch.empty_like(h, dtype=torch.int8)
        memory_format = torch.channels_last if h.ndim == 4 else torch.contiguous_format
        return torch.empty(self.shape(h), dtype=torch.int8, device=h.device, memory_format=memory_format)


def norm_stride(gamma: Tensor | None) -> int:
    """Elements between the rows of gamma and beta; 0 for one row."""
    return gamma.stride(0) if gamma is not None and gamma.ndim == 2 else 0


PROLOGUE_VALUE = {"identity": 0, "group_norm": 1, "layer_norm": 2, "geglu": 3}  # csrc/common/problem.h
PROLOGUES = tuple(PROLOGUE_VALUE)
IDENTITY = Prologue()
GEGLU = Prologue("geglu")


class Window(NamedTuple):
    """The window of a convolution as in torch.nn.Conv2d, pairs as (height, width). None in its place means a Linear."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def is_pointwise(self) -> bool:
        """Whether every output pixel reads the one input pixel at its place."""
        return self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    def output_shape(self, x_shape: Sequence[int], n: int) -> tuple[int, int, int, int]:
        """[N, n, P, Q] of a convolution with `n` output channels over an image [N, C, H, W]."""
        sizes = zip(x_shape[2:], self.kernel_size, self.stride, self.padding, self.dilation)
        p, q = [(size + 2 * pad - d * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, d in sizes]
        return x_shape[0], n, p, q

    def to_ints(self) -> list[int]:
        return [*self.kernel_size, *self.stride, *self.padding, *self.dilation, self.groups]

    @classmethod
    def from_ints(cls, values: Sequence[int]) -> "Window | None":
        if not values:
            return None
        a, b, c, d, e, f, g, h, groups = values
        return cls((a, b), (c, d), (e, f), (g, h), groups)


def sizes_of(shape: Sequence[int]) -> tuple[int, int, int]:
    """Samples, rows (pixels) per sample and channels of a tensor of this shape that is quantised."""
    if len(shape) == 4:
        samples, channels, height, width = shape
        return samples, height * width, channels
    return shape[0], shape[1] if len(shape) == 3 else 1, shape[-1]


def summed(channels: int, window: Window | None) -> int:
    """Products summed per output for an input of `channels`: K of a Linear, r * s * c_in / groups of a convolution."""
    if window is None:
        return channels
    return window.kernel_size[0] * window.kernel_size[1] * (channels // window.groups)


class PackedWeight(NamedTuple):
    """A quantised weight [N, K]; of a convolution K = r * s * c_in / groups in (r, s, c) order. packed: storage in
    `layout`, "kpack_v1" as made by `pack_weight` or a backend's own by `prepare_weight`. scale: float32 [N] (group_size
    -1) or [N, ceil(K / group_size)]. bits: 3, 4 or 8. geglu: of a Linear whose rows are in pairs, a value and its gate:
    the product gives value * gelu(gate)."""

    packed: Tensor
    scale: Tensor
    bits: int
    group_size: int = -1
    layout: str = KPACK_V1
    geglu: bool = False

    @property
    def n(self) -> int:
        return self.scale.shape[0]

    @property
    def outputs(self) -> int:
        return self.n // 2 if self.geglu else self.n


KEPT = "_modiff_sums"  # attribute of a packed weight: its sums by taps, with what they were made of


def weight_sums(weight: PackedWeight, k: int, taps: int) -> Tensor:
    """What zero points are multiplied with: of a weight [N, k] in kpack_v1 the sums [N, taps] over each tap's codes,
    int32; with groups along K of codes times their scales, float32. They live as long as `weight.packed` and are made
    again after it was written to; a graph that captures the first call makes them in every replay, as only a replay
    would fill what is kept."""
    packed, scale = weight.packed, weight.scale
    kept, made_of = packed.__dict__.setdefault(KEPT, {}), (_version(packed), _version(scale))
    held: Any = kept.get(taps)
    if held is not None and held[0] is scale and held[1] == made_of:
        return held[2]
    codes = unpack(packed, weight.bits, k)
    grouped = weight.group_size != -1
    terms = codes * expand_weight_scale(scale, k, weight.group_size) if grouped else codes
    sums = terms.view(weight.n, taps, -1).sum(-1, dtype=torch.float32 if grouped else torch.int32)
    if not (packed.is_cuda and torch.cuda.is_current_stream_capturing()):
        kept[taps] = scale, made_of, sums
    return sums


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
