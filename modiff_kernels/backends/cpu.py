"""Compiled CPU kernels (csrc/cpu): fused quantisation, integer products and attention.

The library holds raw kernels in the private namespace `modiff_cpu`; this file gives them the shape of the ops. They use
the best instruction set of the machine, or the one that MODIFF_CPU_ISA names; without AVX2 `quantize` alone runs."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant.affine import residual_scale
from ..quant.operands import PROLOGUE_VALUE, PackedWeight, Window, sizes_of
from ..quant.packing import KPACK_V1, pack, unpack
from ..quant.spec import GRANULARITY_VALUE
from . import library_build_info, load_library, why_no_sums

TRACEABLE = True
VNNI_V1 = "vnni_v1"

ISAS = ("plain", "avx2", "avx512", "avx_vnni", "avx512_vnni", "avx512_amx")
"""Instruction sets in rising order of preference: those of csrc/cpu/ops.cpp."""

_isa = 0  # of the kernels; unavailable() chooses it
_MAX_TAPS = 49
_MAX_HEAD = 1024  # of attention: low codes times others fit int32 (csrc/cpu/attention_kernels.h)


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    library = Path(__file__).resolve().parent.parent / "_lib" / "libmodiff_cpu.so"
    advice = "install a wheel that has it, or the source again with a C++ compiler (Debian, Ubuntu: apt install g++)"
    reason = load_library(library, f"this is the Python part alone; for the fast kernels {advice}")
    if reason is None:
        global _isa
        _isa = _chosen_isa([i for i in range(len(ISAS)) if torch.ops.modiff_cpu.isas() >> i & 1])
        for name, fake in _FAKES.items():
            torch.library.register_fake(f"modiff_cpu::{name}", fake)
    return reason


def _chosen_isa(available: list[int]) -> int:
    names = [ISAS[i] for i in available]
    name = os.environ.get("MODIFF_CPU_ISA") or names[-1]
    if name not in names:
        raise ValueError(f"MODIFF_CPU_ISA={name} is not an instruction set of this CPU; choose of {', '.join(names)}")
    return ISAS.index(name)


def isa() -> str:
    """The instruction set that the kernels use."""
    return ISAS[_isa]


def why_slow() -> str | None:
    """Why low bits are slower than float on this CPU, where other backends serve, which fuse nothing, or None."""
    return unavailable() or ("the kernels for integer products need AVX2" if isa() == "plain" else None)


def has_vnni() -> bool:
    """Whether products of 8-bit codes are as fast as those of fewer bits; also where these kernels do not run."""
    return why_slow() is not None or isa() not in ("avx2", "avx512")


def build_info() -> dict[str, str] | str:
    return unavailable() or library_build_info("modiff_cpu")


def why_not(problem: Any) -> str | None:
    if problem.op == "quantize":
        return None
    if problem.op == "attention":
        if "avx512" not in isa():
            return f"attention needs AVX-512, the instruction set here is {isa()}; torch's own is as fast with AVX2"
        if problem.k > _MAX_HEAD:
            return f"attention takes heads of up to {_MAX_HEAD} values, got {problem.k}"
        return None if problem.dtype == torch.float32 else f"attention takes float32 only, got {problem.dtype}"
    if (reason := why_slow()) is not None:
        return reason
    if problem.layout != VNNI_V1:
        return f"layout {problem.layout} is not {VNNI_V1}; prepare the weight with ops.prepare_weight"
    if problem.geglu:
        return "its epilogue has no GEGLU; it is a prologue of what reads the product"
    if problem.taps > _MAX_TAPS:
        return f"kernel_size {problem.window.kernel_size} has more than {_MAX_TAPS} taps"
    return why_no_sums(problem)


def preferred_layout(problem: Any) -> str:
    return VNNI_V1


def prepare_weight(weight: PackedWeight, k: int, window: Window | None, layout: str) -> PackedWeight:
    """Convert between kpack_v1 and vnni_v1 (csrc/cpu/product.h), which is int8 whatever `weight.bits` is."""
    allowed = (KPACK_V1, VNNI_V1)
    if weight.layout not in allowed or layout not in allowed:
        raise ValueError(f"{weight.layout!r} to {layout!r}; the layouts known here are {allowed}")
    (r, s), groups = ((1, 1), 1) if window is None else (window.kernel_size, window.groups)
    shape = [weight.n, r, s, k // (r * s)]
    if layout == VNNI_V1:
        packed = torch.ops.modiff_cpu.pack_vnni(unpack(weight.packed, weight.bits, k).reshape(shape), groups)
    else:
        packed = pack(torch.ops.modiff_cpu.unpack_vnni(weight.packed, shape, groups).reshape(-1, k), weight.bits)
    return weight._replace(packed=packed, layout=layout)


def _float32(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.float().contiguous()


def quantize(
    h, prologue, x_hat, scale, bits, granularity, clip_ratio, affine, last_absmax=None
) -> tuple[Tensor, Tensor, Tensor]:
    kind, gamma, beta, shift, num_groups, eps, silu, _ = prologue
    sizes = sizes_of(prologue.shape(h))
    norm = (_float32(gamma), _float32(beta), _float32(shift), num_groups, eps, silu)
    if last_absmax is not None:
        scale = residual_scale(last_absmax, bits, clip_ratio)
    form = (affine and x_hat is None, bits, GRANULARITY_VALUE[granularity], clip_ratio)
    try:
        codes, used, absmax, zero_point = torch.ops.modiff_cpu.quantize.default(
            prologue.joined(h), PROLOGUE_VALUE[kind], *norm, x_hat, *form, scale, *sizes, _isa
        )
    except RuntimeError as error:
        if "holds NaN or Inf" not in str(error):
            raise
        text = "quantize: x holds NaN or Inf; check the model's input and weights, then start a new run"
        raise ValueError(text) from None
    if last_absmax is not None:
        last_absmax.copy_(absmax)
    return codes, used, zero_point if x_hat is None else absmax


def product(codes, scale, zero_point, weight, y_hat, bias, skip, window, out_dtype, write_out) -> Tensor:
    granules, n = scale.shape[0], weight.scale.shape[0]
    if window is None:
        # A Linear is a 1x1 convolution over an image of width 1. Its scales may cover any number of rows, so its
        # samples are the granules of the scale.
        channels = codes.shape[-1]
        samples = codes.shape[0] if granules == 1 else granules
        geometry = [samples, codes.numel() // (channels * samples), 1, channels, n, 1, 1, 1, 1, 0, 0, 1, 1, 1]
    else:
        samples, channels, height, width = codes.shape
        geometry = [samples, height, width, channels, n, *window.to_ints()]
    granularity = 0 if granules == 1 else 1 if granules == samples else 2
    factors = (codes, scale, granularity, zero_point, weight.packed, weight.scale)
    results = (_float32(bias), y_hat, skip, write_out, out_dtype)
    op = torch.ops.modiff_cpu.product_plain if y_hat is None else torch.ops.modiff_cpu.product
    return op.default(*factors, *results, geometry, weight.bits, _isa)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, score_scale: float) -> Tensor:
    return torch.ops.modiff_cpu.attention.default(q, k, v, heads, score_scale, _isa)


def _quantize_fake(
    x, prologue, gamma, beta, shift, num_groups, eps, silu, x_hat, affine, act_bits, granularity, clip_ratio, scale,
    samples, rows, channels, isa,
):  # fmt: skip
    shape = (*x.shape[:-1], channels) if prologue == PROLOGUE_VALUE["geglu"] else x.shape
    granules = (1, samples, samples * rows, samples)[granularity]
    memory_format = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    codes = torch.empty(shape, dtype=torch.int8, device=x.device, memory_format=memory_format)
    scale, absmax = (x.new_empty(granules, dtype=torch.float32) for _ in range(2))
    return codes, scale, absmax, x.new_empty(granules if x_hat is None else 0, dtype=torch.int32)


def _product_fake(
    codes, scale, granularity, zero_point, weight_packed, weight_scale, bias, y_hat, skip, write_out, out_dtype,
    geometry, weight_bits, isa,
):  # fmt: skip
    if not write_out:
        return codes.new_empty(0, dtype=out_dtype)
    if codes.ndim != 4:
        return codes.new_empty((*codes.shape[:-1], geometry[4]), dtype=out_dtype)
    out_shape = Window.from_ints(geometry[5:]).output_shape(codes.shape, geometry[4])
    return torch.empty(out_shape, dtype=out_dtype, device=codes.device, memory_format=torch.channels_last)


_FAKES: dict[str, Any] = {
    "quantize": _quantize_fake,
    "product": _product_fake,
    "product_plain": _product_fake,
    "attention": lambda q, k, v, heads, scale, isa: torch.empty(q.shape, dtype=q.dtype, device=q.device),
}
"""Results without values, of the ops of the library that compiled code may call."""
