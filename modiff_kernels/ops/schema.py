"""Every op of the package, declared once: signature, equation, shapes, what is mutated, errors.

Words: `residual = x - x_hat`; `x_hat` is what the layers have been fed so far, `y_hat = A(x_hat) + bias` their output;
codes are integers stored in int8; *rows* are the rows of a Linear input or the pixels of an image. Equations: MoDiff
(Gao et al., ICML 2025), error-compensated modulation, eqs. 8-17. The rounding contract (half to even on `x *
inv_scale`, float32) stands in `modiff_kernels.quant.affine`; codes are the same on every backend.

For all ops:

- Images are [N, C, H, W] channels_last, inputs of a Linear [..., K] are [M, K] or [N, L, K], contiguous. Ops that
  take both read a 4-D tensor as an image. Floating tensors are float32, float16 or bfloat16; state (x_hat, y_hat) may
  have another of these dtypes than x. All tensors are on one device; no size is 0.
- Scales are float32 and 1-D: of length 1 (granularity per_tensor), N = shape[0] (per_sample) or the number of rows
  (per_token; NHW order for an image).
- Weights: weight_packed as made by `pack_weight` (layout "kpack_v1") or by `prepare_weight` (a backend's own layout),
  of `weight_bits` 3, 4 or 8; weight_scale float32 [N_out] (group_size -1) or [N_out, ceil(K / group_size)]. K of a conv
  is r * s * c_in / groups in (r, s, c) order.
- `backend`: "auto", or a name, which is a demand (see `dispatch`). No gradients flow through any op.
- Results are new tensors and never share memory with arguments.
- Raises ValueError or TypeError for arguments that do not fit, `dispatch.BackendUnavailable` if no backend can do it;
  nothing is mutated then. NaN or Inf in what is to be quantised raises ValueError on the backends reference and cpu:
  before any state changes (reference), or before the state of the granule that holds it changes (cpu; other samples may
  have been updated, so begin a new run).
  Backends for CUDA read no value on the host and raise nothing: there NaN and Inf show in absmax and in dynamic scales,
  and NaN in x_hat.
"""

import torch
from torch import Tensor

from ..quant.packing import empty_packed, packed_dtype, packed_width
from ..quant.spec import granule_count
from .problem import conv2d_output_shape
from .registry import declare


def _residual_results(x_hat: Tensor, granularity: str, image: bool) -> tuple[Tensor, Tensor, Tensor]:
    count = granule_count(x_hat.shape, granularity, image)
    scale = x_hat.new_empty((count,), dtype=torch.float32)
    return torch.empty_like(x_hat, dtype=torch.int8), scale, torch.empty_like(scale)


def _activation_results(x: Tensor, granularity: str, image: bool) -> tuple[Tensor, Tensor, Tensor]:
    count = granule_count(x.shape, granularity, image)
    scale = x.new_empty((count,), dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.int8), scale, torch.empty_like(scale, dtype=torch.int32)


def _out(y_hat: Tensor, out_dtype: torch.dtype, write_out: bool) -> Tensor:
    return torch.empty_like(y_hat, dtype=out_dtype) if write_out else y_hat.new_empty((0,), dtype=out_dtype)


@declare(
    "(Tensor x, Tensor(a!) x_hat, Tensor? scale, int act_bits, str granularity, float clip_ratio=1.0, "
    "bool packed=False, str backend='auto') -> (Tensor, Tensor, Tensor)"
)
def quantize_residual(
    x: Tensor,
    x_hat: Tensor,
    scale: Tensor | None,
    act_bits: int,
    granularity: str,
    clip_ratio: float = 1.0,
    packed: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise the change of an activation; the error stays in x_hat and so enters the next residual.

    ::

        residual = float32(x) - float32(x_hat)                 absmax = max|residual| over the granule
        scale    = max(clip_ratio * absmax / (2^(b-1) - 0.5), 2^-100)      if scale is None (dynamic), b = act_bits
        code     = clamp(rne(residual * (1 / scale)), -2^(b-1), 2^(b-1) - 1)
        x_hat    = float32(x_hat) + scale * code, rounded to x_hat's dtype

    Args:
        x: activation, an image or [..., K].
        x_hat: state of x's shape and memory format. **Mutated.**
        scale: None, or the scales to use (static, delayed): positive and finite, as many as `granularity` has, or one
            for all.
        act_bits: 3, 4 or 8.
        granularity: "per_tensor", "per_sample", "per_token", or, with scale None, "per_block": residual_q is then
            code * multiplier with an integer multiplier per (sample, 16 consecutive rows, input channel), still int8,
            and scale is per sample (`quant.affine.block_multipliers`); at 8 bits, and with fewer than 16 rows in a
            sample, it equals "per_sample".
        clip_ratio: factor on absmax, dynamic scales only; below 1 clips the largest residuals.
        packed: whether residual_q is stored in kpack_v1: 1/2 (4 bits) or 3/8 (3 bits) of the bytes, for kernels that
            read such codes (the s4 tensor cores of sm_80, sm_86 and sm_89) and for residuals that are kept or sent. No
            op that multiplies takes them. act_bits 3 or 4, and not per_block, whose multiplied codes have 8 bits.

    Returns:
        residual_q int8, x's shape and memory format; the scales used, float32, one per granule; absmax float32, one per
        granule (without clip_ratio), from which `quant.affine.residual_scale` makes a delayed scale.
        With `packed`, residual_q is uint8 of x's shape, for an image channels_last, but with
        `quant.packing.packed_width(act_bits, channels)` bytes in place of the channels. `unpack_weight` with n rows and
        k channels is the inverse on the flattened rows, residual_q.flatten(0, -2), or for an image
        residual_q.movedim(1, -1).flatten(0, -2).
    """
    residual_q, scale, absmax = _residual_results(x_hat, granularity, x.ndim == 4)
    return empty_packed(x_hat, act_bits) if packed else residual_q, scale, absmax


@declare(
    "(Tensor h, Tensor? shift, Tensor? gamma, Tensor? beta, int num_groups, float eps, bool silu, Tensor(a!) x_hat, "
    "Tensor? scale,"
    " int act_bits, str granularity, float clip_ratio=1.0, str backend='auto') -> (Tensor, Tensor, Tensor)"
)
def group_norm_silu_quantize_residual(
    h: Tensor,
    shift: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    x_hat: Tensor,
    scale: Tensor | None,
    act_bits: int,
    granularity: str,
    clip_ratio: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_residual` of x = silu(group_norm(h + shift)), computed in float32 and never stored.

    Args:
        h: image [N, C, H, W] or tokens [N, L, C] (normalised over L and the channels of a group).
        shift: [N, C] added to every pixel before the norm (the time embedding), or None.
        gamma, beta: [C] scale and offset of the norm, or None.
        num_groups: divides C.
        eps: added to the (biased) variance.
        silu: whether SiLU follows the norm.
        x_hat: state of h's shape and memory format. **Mutated.**
        scale, act_bits, granularity, clip_ratio: as in `quantize_residual`.

    Returns:
        residual_q int8 of h's shape and memory format, scales used, absmax: as in `quantize_residual`. The float32 norm
        may differ between backends in its last bits, and a code with it by one.
    """
    return _residual_results(x_hat, granularity, h.ndim == 4)


@declare(
    "(Tensor h, Tensor? gamma, Tensor? beta, float eps, Tensor(a!) x_hat, Tensor? scale, int act_bits, str granularity,"
    " float clip_ratio=1.0, str backend='auto') -> (Tensor, Tensor, Tensor)"
)
def layer_norm_quantize_residual(
    h: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    x_hat: Tensor,
    scale: Tensor | None,
    act_bits: int,
    granularity: str,
    clip_ratio: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_residual` of x = layer_norm(h) over the last dimension, computed in float32 and never stored.

    Args:
        h: [..., K].
        gamma, beta: [K] or None.
        eps: added to the (biased) variance.
        x_hat: state [..., K]. **Mutated.**
        scale, act_bits, granularity, clip_ratio: as in `quantize_residual`.

    Returns:
        residual_q int8 [..., K], scales used, absmax: as in `group_norm_silu_quantize_residual`.
    """
    return _residual_results(x_hat, granularity, False)


@declare(
    "(Tensor h, Tensor(a!) x_hat, Tensor? scale, int act_bits, str granularity, float clip_ratio=1.0, str "
    "backend='auto')"
    " -> (Tensor, Tensor, Tensor)"
)
def geglu_quantize_residual(
    h: Tensor,
    x_hat: Tensor,
    scale: Tensor | None,
    act_bits: int,
    granularity: str,
    clip_ratio: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_residual` of x = h[..., :K] * gelu(h[..., K:]), gelu with erf, computed in float32 and never stored.

    Args:
        h: [..., 2K].
        x_hat: state [..., K]. **Mutated.**
        scale, act_bits, granularity, clip_ratio: as in `quantize_residual`.

    Returns:
        residual_q int8 [..., K], scales used, absmax: as in `group_norm_silu_quantize_residual`.
    """
    return _residual_results(x_hat, granularity, False)


@declare("(Tensor x, int act_bits, str granularity, bool affine=True, str backend='auto') -> (Tensor, Tensor, Tensor)")
def quantize_activation(
    x: Tensor, act_bits: int, granularity: str, affine: bool = True, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise an activation itself, without state: the plain quantiser that `quantized_*` reads.

    ::

        affine:      lo = min(x, 0), hi = max(x, 0) over the granule          scale = max((hi - lo) / (2^b - 1), 2^-100)
                     zero_point = clamp(rne(-lo * (1 / scale)) - 2^(b-1), -2^(b-1), 2^(b-1) - 1)
        otherwise:   scale as in `quantize_residual`, zero_point = 0
        code         = clamp(rne(x * (1 / scale)) + zero_point, -2^(b-1), 2^(b-1) - 1)
        x            ~ scale * (code - zero_point)

    Args:
        x: an image or [..., K].
        act_bits: b = 3, 4 or 8.
        granularity: "per_tensor", "per_sample" or "per_token".
        affine: with zero point, or symmetric.

    Returns:
        x_q int8 of x's shape and memory format; scale float32 and zero_point int32, one per granule.
    """
    return _activation_results(x, granularity, x.ndim == 4)


@declare(
    "(Tensor h, Tensor? shift, Tensor? gamma, Tensor? beta, int num_groups, float eps, bool silu, int act_bits, str "
    "granularity,"
    " bool affine=True, str backend='auto') -> (Tensor, Tensor, Tensor)"
)
def group_norm_silu_quantize_activation(
    h: Tensor,
    shift: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    act_bits: int,
    granularity: str,
    affine: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_activation` of x = silu(group_norm(h + shift)); arguments as in `group_norm_silu_quantize_residual`.

    Returns x_q int8 of h's shape and memory format, scale and zero_point, one per granule. Mutates nothing.
    """
    return _activation_results(h, granularity, h.ndim == 4)


@declare(
    "(Tensor h, Tensor? gamma, Tensor? beta, float eps, int act_bits, str granularity, bool affine=True, str "
    "backend='auto')"
    " -> (Tensor, Tensor, Tensor)"
)
def layer_norm_quantize_activation(
    h: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    act_bits: int,
    granularity: str,
    affine: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_activation` of x = layer_norm(h); arguments as in `layer_norm_quantize_residual`.

    Returns x_q int8 [..., K], scale and zero_point, one per granule. Mutates nothing.
    """
    return _activation_results(h, granularity, False)


@declare("(Tensor h, int act_bits, str granularity, bool affine=True, str backend='auto') -> (Tensor, Tensor, Tensor)")
def geglu_quantize_activation(
    h: Tensor, act_bits: int, granularity: str, affine: bool = True, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_activation` of x = h[..., :K] * gelu(h[..., K:]) for h [..., 2K].

    Returns x_q int8 [..., K], scale and zero_point, one per granule. Mutates nothing.
    """
    return _activation_results(h.new_empty((*h.shape[:-1], h.shape[-1] // 2)), granularity, False)


@declare(
    "(Tensor residual_q, Tensor scale, Tensor weight_packed, Tensor weight_scale, Tensor(a!) y_hat, Tensor? skip, int "
    "weight_bits,"
    " int group_size, str layout, ScalarType out_dtype, bool write_out=True, str backend='auto') -> Tensor"
)
def accumulate_linear(
    residual_q: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    y_hat: Tensor,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    layout: str,
    out_dtype: torch.dtype,
    write_out: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Add the effect of residual codes to the output of a Linear.

    ::

        y_hat = float32(y_hat) + scale[row] * sum_g weight_scale[col, g] * sum_{k in g} residual_q[row, k] *
                weight_q[col, k], rounded to y_hat's dtype; the integer sums are exact
        out   = y_hat + skip, in out_dtype

    Args:
        residual_q: codes int8 [..., K].
        scale: their scales; a length that divides the number of rows, each scale covering as many consecutive rows.
        weight_packed, weight_scale, weight_bits, group_size, layout: the weight, see the top of this module.
        y_hat: state [..., N_out]. **Mutated.**
        skip: [..., N_out] in out_dtype, or None.
        out_dtype: float32, float16 or bfloat16.
        write_out: False if the reader takes y_hat itself; the result is an empty tensor then.

    Returns:
        out [..., N_out], or a tensor of shape [0].
    """
    return _out(y_hat, out_dtype, write_out)


@declare(
    "(Tensor residual_q, Tensor scale, Tensor weight_packed, Tensor weight_scale, Tensor(a!) y_hat, Tensor? skip, int "
    "weight_bits,"
    " int group_size, str layout, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups,"
    " ScalarType out_dtype, bool write_out=True, str backend='auto') -> Tensor"
)
def accumulate_conv2d(
    residual_q: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    y_hat: Tensor,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    layout: str,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    out_dtype: torch.dtype,
    write_out: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Add the effect of residual codes to the output of a Conv2d with zero padding; the equation of
    `accumulate_linear`.

    Args:
        residual_q: codes int8 [N, C, H, W].
        scale: one for all, one per image, or one per pixel. The last leaves the sum over K only for a 1x1 kernel with
            stride 1; for other kernels the backend reference alone takes it.
        y_hat: state [N, c_out, P, Q]. **Mutated.**
        skip: [N, c_out, P, Q] in out_dtype, or None.
        kernel_size, stride, padding, dilation, groups: as in torch.nn.Conv2d, two integers each.
        others: as in `accumulate_linear`.

    Returns:
        out [N, c_out, P, Q] channels_last, or a tensor of shape [0].
    """
    return _out(y_hat, out_dtype, write_out)


@declare(
    "(Tensor x, Tensor(a!) x_hat, Tensor(b!) y_hat, Tensor weight_packed, Tensor weight_scale, Tensor? bias, Tensor? "
    "skip,"
    " int weight_bits, int group_size, str layout, int first_step_bits=0, bool write_out=True, str backend='auto') ->"
    " Tensor"
)
def initialize_linear(
    x: Tensor,
    x_hat: Tensor,
    y_hat: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    layout: str,
    first_step_bits: int = 0,
    write_out: bool = True,
    backend: str = "auto",
) -> Tensor:
    """First call of a modulated Linear: overwrites the state, whatever it held.

    ::

        first_step_bits 0:       x_hat = x, rounded to the state dtype
        first_step_bits 3, 4, 8: x_hat = scale * code, symmetric dynamic per_sample codes of x (equations of
            `quantize_residual`)
        y_hat = A(x_hat) + bias, A with the dequantised weight          out = y_hat + skip, in x's dtype

    Args:
        x: [..., K].
        x_hat: state [..., K]. **Overwritten.**
        y_hat: state [..., N_out], of x_hat's dtype. **Overwritten.**
        bias: [N_out] or None.
        skip: [..., N_out] in x's dtype, or None.
        others: as in `accumulate_linear`.

    Returns:
        out [..., N_out] in x's dtype, or a tensor of shape [0]. Raises ValueError if x does not fit into the state
        dtype.
    """
    return _out(y_hat, x.dtype, write_out)


@declare(
    "(Tensor x, Tensor(a!) x_hat, Tensor(b!) y_hat, Tensor weight_packed, Tensor weight_scale, Tensor? bias, Tensor? "
    "skip,"
    " int weight_bits, int group_size, str layout, int[] kernel_size, int[] stride, int[] padding, int[] dilation,"
    " int groups,"
    " int first_step_bits=0, bool write_out=True, str backend='auto') -> Tensor"
)
def initialize_conv2d(
    x: Tensor,
    x_hat: Tensor,
    y_hat: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    layout: str,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    first_step_bits: int = 0,
    write_out: bool = True,
    backend: str = "auto",
) -> Tensor:
    """First call of a modulated Conv2d with zero padding: overwrites the state; the equations of `initialize_linear`.

    x, x_hat [N, C, H, W]; y_hat, skip, out [N, c_out, P, Q]; all channels_last. x_hat and y_hat are **overwritten**.
    Conv arguments as in `accumulate_conv2d`, others and errors as in `initialize_linear`.
    """
    return _out(y_hat, x.dtype, write_out)


@declare(
    "(Tensor x, Tensor(a!) x_hat, Tensor? scale, Tensor weight_packed, Tensor weight_scale, Tensor(b!) y_hat, Tensor? "
    "skip,"
    " int act_bits, str granularity, float clip_ratio, int weight_bits, int group_size, str layout, bool"
    " write_out=True,"
    " str backend='auto') -> (Tensor, Tensor, Tensor)"
)
def modulated_linear(
    x: Tensor,
    x_hat: Tensor,
    scale: Tensor | None,
    weight_packed: Tensor,
    weight_scale: Tensor,
    y_hat: Tensor,
    skip: Tensor | None,
    act_bits: int,
    granularity: str,
    clip_ratio: float,
    weight_bits: int,
    group_size: int,
    layout: str,
    write_out: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Update call of a modulated Linear: `quantize_residual`, then `accumulate_linear` with out_dtype = x's dtype.

    x, x_hat [..., K]; y_hat [..., N_out] of x_hat's dtype; x_hat and y_hat are **mutated**. Other arguments as in the
    two ops.

    Returns:
        out [..., N_out] in x's dtype, or a tensor of shape [0]; the scales used and absmax, float32, one per granule.
    """
    return _out(y_hat, x.dtype, write_out), *_residual_results(x_hat, granularity, False)[1:]


@declare(
    "(Tensor x, Tensor(a!) x_hat, Tensor? scale, Tensor weight_packed, Tensor weight_scale, Tensor(b!) y_hat, Tensor? "
    "skip,"
    " int act_bits, str granularity, float clip_ratio, int weight_bits, int group_size, str layout, int[] kernel_size,"
    " int[] stride, int[] padding, int[] dilation, int groups, bool write_out=True, str backend='auto')"
    " -> (Tensor, Tensor, Tensor)"
)
def modulated_conv2d(
    x: Tensor,
    x_hat: Tensor,
    scale: Tensor | None,
    weight_packed: Tensor,
    weight_scale: Tensor,
    y_hat: Tensor,
    skip: Tensor | None,
    act_bits: int,
    granularity: str,
    clip_ratio: float,
    weight_bits: int,
    group_size: int,
    layout: str,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    write_out: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Update call of a modulated Conv2d: `quantize_residual`, then `accumulate_conv2d` with out_dtype = x's dtype.

    x, x_hat [N, C, H, W]; y_hat [N, c_out, P, Q] of x_hat's dtype; x_hat and y_hat are **mutated**. Other arguments as
    in the two ops.

    Returns:
        out [N, c_out, P, Q] in x's dtype, or a tensor of shape [0]; the scales used and absmax, float32, one per
        granule.
    """
    return _out(y_hat, x.dtype, write_out), *_residual_results(x_hat, granularity, True)[1:]


@declare(
    "(Tensor x_q, Tensor scale, Tensor zero_point, Tensor weight_packed, Tensor weight_scale, Tensor? bias, Tensor? "
    "skip,"
    " int weight_bits, int group_size, str layout, ScalarType out_dtype, str backend='auto') -> Tensor"
)
def quantized_linear(
    x_q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    layout: str,
    out_dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    """Plain quantised Linear, without state.

    ::

        out = scale[row] * sum_g weight_scale[col, g] * sum_{k in g} (x_q[row, k] - zero_point[row]) * weight_q[col, k]
              + bias[col] + skip, in out_dtype; the integer sums are exact

    Args:
        x_q: codes int8 [..., K].
        scale, zero_point: float32 and int32, of one length that divides the number of rows.
        bias: [N_out] or None.
        skip: [..., N_out] in out_dtype, or None.
        others: as in `accumulate_linear`.

    Returns:
        out [..., N_out].
    """
    return x_q.new_empty((*x_q.shape[:-1], weight_scale.shape[0]), dtype=out_dtype)


@declare(
    "(Tensor x_q, Tensor scale, Tensor zero_point, Tensor weight_packed, Tensor weight_scale, Tensor? bias, Tensor? "
    "skip,"
    " int weight_bits, int group_size, str layout, int[] kernel_size, int[] stride, int[] padding, int[] dilation,"
    " int groups,"
    " ScalarType out_dtype, str backend='auto') -> Tensor"
)
def quantized_conv2d(
    x_q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    layout: str,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    out_dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    """Plain quantised Conv2d, without state; the equation of `quantized_linear`. Padding stands for x = 0, code =
    zero_point.

    x_q int8 [N, C, H, W]; scale and zero_point one for all, one per image or one per pixel (see `accumulate_conv2d`);
    skip [N, c_out, P, Q]. Returns out [N, c_out, P, Q] channels_last in out_dtype.
    """
    shape = conv2d_output_shape(x_q.shape, weight_scale.shape[0], kernel_size, stride, padding, dilation)
    return torch.empty(shape, dtype=out_dtype, device=x_q.device, memory_format=torch.channels_last)


@declare("(Tensor q, Tensor k, Tensor v, int heads, float score_scale, str backend='auto') -> Tensor")
def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, score_scale: float, backend: str = "auto") -> Tensor:
    """What stands between the projections of an attention block, in float.

    ::

        out[n, l, h] = sum_s softmax_s(score_scale * <q[n, l, h], k[n, s, h]>) v[n, s, h]        for every head h

    Args:
        q: [N, L, heads * width]; contiguous rows, any strides between them (a part of the columns of a wider tensor).
        k, v: [N, S, heads * width] in q's dtype, likewise.
        score_scale: usually width^-0.5.

    Returns:
        out [N, L, heads * width], contiguous, in q's dtype. Raises ValueError on shapes that do not fit. Backend
        reference is torch's scaled_dot_product_attention.
    """
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@declare("(Tensor weight_q, int weight_bits, str layout='kpack_v1', str backend='auto') -> Tensor")
def pack_weight(weight_q: Tensor, weight_bits: int, layout: str = "kpack_v1", backend: str = "auto") -> Tensor:
    """Storage of weight codes: exact, see `modiff_kernels.quant.packing` for the layout.

    weight_q int8 [N, K], codes in -2^(b-1) .. 2^(b-1)-1; for a conv K = r * s * c_in / groups in (r, s, c) order, that
    is `weight.permute(0, 2, 3, 1).reshape(N, -1)`. Returns int8 [N, K] (8 bits), uint8 [N, ceil(K/2)] (4 bits) or uint8
    [N, ceil(K/4) + ceil(K/8)] (3 bits). Raises ValueError for codes out of range.
    """
    n, k = weight_q.shape
    return weight_q.new_empty((n, packed_width(weight_bits, k)), dtype=packed_dtype(weight_bits))


@declare("(Tensor weight_packed, int weight_bits, int n, int k, str layout='kpack_v1', str backend='auto') -> Tensor")
def unpack_weight(
    weight_packed: Tensor, weight_bits: int, n: int, k: int, layout: str = "kpack_v1", backend: str = "auto"
) -> Tensor:
    """The codes int8 [n, k] of a weight made by `pack_weight`: its exact inverse."""
    return weight_packed.new_empty((n, k), dtype=torch.int8)
