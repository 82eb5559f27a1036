"""Every op of the package, declared once: signature, equation, shapes, what is mutated, errors.

Words: `residual = x - x_hat`; `x_hat` is what the layers have been fed so far, `y_hat = A(x_hat) + bias` their output;
codes are integers stored in int8; *rows* are the rows of a Linear input or the pixels of an image. Equations: MoDiff
(Gao et al., ICML 2025), error-compensated modulation, eqs. 8-17; `naive` spells them out. The rounding contract (half
to even on `x * inv_scale`, float32) stands in `modiff_kernels.quant.affine`; codes are the same on every backend.

For all ops:

- Images are [N, C, H, W] channels_last, inputs of a Linear [..., K] are [M, K] or [N, L, K], contiguous. `quantize`
  reads a 4-D tensor as an image. Floating tensors are float32, float16 or bfloat16; state (x_hat, y_hat) may have
  another of these dtypes than x. All tensors are on one device; no size is 0.
- Scales are float32 and 1-D, one per *granule*: 1 (granularity per_tensor), N = shape[0] (per_sample, per_block) or the
  number of rows (per_token; NHW order for an image).
- `backend`: "auto", or a name, which is a demand (see `dispatch`). No gradients flow through any op.
- Results are new tensors and never share memory with arguments.
- Raises ValueError or TypeError for arguments that do not fit, `dispatch.BackendUnavailable` if no backend can do it;
  nothing is mutated then. NaN or Inf in what is to be quantised raises ValueError on the backends reference, before any
  state changes, and cpu, before that of the granule that holds it changes (so begin a new run). Backends for CUDA read
  no value on the host and raise nothing: there NaN and Inf show in absmax and in dynamic scales, and NaN in x_hat."""

import torch
from torch import Tensor

from ..quant.operands import IDENTITY, PackedWeight, Prologue, Window
from ..quant.spec import granule_count
from . import check, dispatch
from .dispatch import torch_must_see
from .registry import declare


@declare(check.quantize, mutates=["x_hat", "last_absmax"])
def quantize(
    h: Tensor,
    prologue: Prologue = IDENTITY,
    x_hat: Tensor | None = None,
    scale: Tensor | None = None,
    bits: int = 8,
    granularity: str = "per_sample",
    clip_ratio: float = 1.0,
    affine: bool = True,
    last_absmax: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise x = prologue(h): with x_hat its change since the last step, whose rounding error stays in x_hat and so
    enters the next residual; without x_hat the activation itself.

    ::

        with x_hat:    residual = x - float32(x_hat)             absmax = max|residual| over the granule
                       scale    = max(clip_ratio * absmax / (2^(b-1) - 0.5), 2^-100)      if scale is None (dynamic)
                                    with last_absmax in the place of absmax, if that is given (delayed)
                       code     = clamp(rne(residual * (1 / scale)), -2^(b-1), 2^(b-1) - 1)
                       x_hat    = float32(x_hat) + scale * code, rounded to x_hat's dtype
        without:       lo, hi   = min(x, 0), max(x, 0) over the granule
                       scale    = max((hi - lo) / (2^b - 1), 2^-100)
          zero_point            = clamp(rne(-lo * (1 / scale)) - 2^(b-1), -2^(b-1), 2^(b-1) - 1)
                       code     = clamp(rne(x * (1 / scale)) + zero_point, -2^(b-1), 2^(b-1) - 1)
                       x       ~= scale * (code - zero_point); not affine: scale as above, zero_point 0

    Args:
        h: an image [N, C, H, W] or [..., K]; [..., 2K] for the prologue "geglu".
        prologue: what stands between h and x, see `Prologue`. Its norms are computed in float32 and may differ between
            backends in the last bits, and a code with it by one. Without x_hat, the lo of a SiLU may be its bound,
            -0.2785, where x comes below 0 (triton, per_sample): the step is larger then, by at most 0.2785 / (2^b - 1).
        x_hat: state of x's shape and memory format. **Mutated.**
        scale: None, or the scales to use for the residual (static): positive and finite, one per granule, or one for
            all.
        bits: b = 3, 4, 7 or 8.
        granularity: "per_tensor", "per_sample", "per_token", or, for residuals with scale None, "per_block": codes are
            then code * multiplier with an integer multiplier per (sample, 16 consecutive rows, input channel), still
            int8, and scale is per sample (`quant.affine.block_multipliers`); at 8 bits, and with fewer than 16 rows in
            a sample, it equals "per_sample".
        clip_ratio: factor on absmax, dynamic scales only; below 1 clips the largest residuals.
        affine: without x_hat: with zero point, or symmetric.
        last_absmax: None, or the absmax of an earlier update, of which the scales are made (delayed), with scale None;
            not with "per_block". **Mutated**: it is that of this update afterwards.

    Returns:
        codes int8, of x's shape and memory format; the scales used, float32, one per granule; and, one per granule,
        with x_hat absmax float32 (without clip_ratio), without x_hat the zero points int32."""
    image = h.ndim == 4 and prologue.kind in ("identity", "group_norm")
    used = h.new_empty((granule_count(prologue.shape(h), granularity, image),), dtype=torch.float32)
    third = torch.empty_like(used, dtype=torch.int32 if x_hat is None else torch.float32)
    return prologue.empty_codes(h), used, third


@declare(check.product, mutates=["y_hat"])
def product(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: PackedWeight,
    y_hat: Tensor | None = None,
    bias: Tensor | None = None,
    skip: Tensor | None = None,
    window: Window | None = None,
    out_dtype: torch.dtype = torch.float32,
    write_out: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Multiply codes with a packed weight, as a Linear or, with a window, as a convolution with zero padding.

    ::

        sum = scale[row] * sum_g weight_scale[col, g] * sum_{k in g} (codes[row, k] - zero_point[row]) * weight_q[col,k]
        with y_hat:   y_hat = float32(y_hat) + sum, rounded to y_hat's dtype          out = y_hat + skip, in out_dtype
                                        (cpu adds skip before it rounds y_hat: one rounding less, in 16-bit states)
        without:                                                      out = sum + bias[col] + skip, in out_dtype
        weight.geglu: with v = sum + bias      out[row, j] = v[row, 2j] * gelu(v[row, 2j + 1]), with erf, in out_dtype

    The integer sums are exact. Padding stands for x = 0, code = zero_point.

    Args:
        codes: int8 [..., K], or an image [N, C, H, W] where there is a window.
        scale: of the codes. Of rows: a length that divides their number, each scale covering as many consecutive rows.
            Of an image: one for all, one per image, or one per pixel, which leaves the sum over K only for a pointwise
            window (for other windows the backend reference alone takes it).
        zero_point: int32, as many, or None for symmetric codes; not with y_hat.
        weight: see `PackedWeight`; one with geglu is of a Linear and goes with neither y_hat nor skip. Codes that are
            changed in place must be there when the kernel launched before begins (sm_90 reads them before it ends).
        y_hat: state [..., N] or [N, n, P, Q]: the product is added onto it. **Mutated.**
        bias: float [N] or None; not with y_hat, which holds it from the beginning of a run.
        skip: of the output's shape, in out_dtype, or None.
        out_dtype: float32, float16 or bfloat16.
        write_out: with y_hat, False if the reader takes y_hat itself; the result is an empty tensor then.

    Returns:
        out [..., N] ([..., N / 2] with geglu), or [N, n, P, Q] channels_last, or a tensor of shape [0]."""
    if not write_out:
        return codes.new_empty((0,), dtype=out_dtype)
    if window is None:
        return codes.new_empty((*codes.shape[:-1], weight.outputs), dtype=out_dtype)
    shape = window.output_shape(codes.shape, weight.n)
    return torch.empty(shape, dtype=out_dtype, device=codes.device, memory_format=torch.channels_last)


def modulate(
    h: Tensor,
    prologue: Prologue,
    x_hat: Tensor,
    scale: Tensor | None,
    weight: PackedWeight,
    y_hat: Tensor,
    skip: Tensor | None = None,
    window: Window | None = None,
    out_dtype: torch.dtype = torch.float32,
    bits: int = 8,
    granularity: str = "per_sample",
    clip_ratio: float = 1.0,
    write_out: bool = True,
    last_absmax: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The update of one layer: `quantize` the residual of prologue(h), then `product` onto y_hat.

    Not an op of torch but the composition of two, which a backend may have in one piece for some problems. Arguments as
    for the two; x_hat, y_hat and last_absmax are **mutated**. Returns out, the scales used, and absmax."""
    args = (
        h, prologue, x_hat, scale, weight, y_hat, skip, window, out_dtype, bits, granularity, clip_ratio, write_out,
        last_absmax,
    )  # fmt: skip
    return _both_ops(*args, backend) if torch_must_see(h) else modulate_kernel(*args, backend)(*args)


def modulate_kernel(*args):  # type: ignore[no-untyped-def]
    """`modulate` for arguments of these formats, without checks and without `backend`; see `declare`."""
    problem = check.modulate(*args[:-1])
    return _both_ops if problem.device_type == "meta" else dispatch.select(problem, args[-1]).fn


_both_ops = dispatch.composed(quantize, product)


@declare(check.attention)
def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, score_scale: float, backend: str = "auto") -> Tensor:
    """What stands between the projections of an attention block.

    ::

        out[n, l, h] = sum_s softmax_s(score_scale * <q[n, l, h], k[n, s, h]>) v[n, s, h]        for every head h

    Args:
        q: [N, L, heads * width]; contiguous rows, any strides between them (a part of the columns of a wider tensor).
        k, v: [N, S, heads * width] in q's dtype, likewise.
        score_scale: usually width^-0.5.

    Returns:
        out [N, L, heads * width], contiguous, in q's dtype. Raises ValueError on shapes that do not fit. Backend
        reference is torch's scaled_dot_product_attention; cpu: scores of 16 bits, weights and values of 8, 40 dB."""
    return torch.empty_like(q, memory_format=torch.contiguous_format)
