"""The ops of this backend, each with what it cannot do."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...quant.packing import KPACK_V1
from .. import Kernel
from . import modulated, products, quantizing
from .tile_configs import Shape, candidates, fits

MAX_K = 1 << 16
"""255 * 128 * MAX_K < 2^31: no sum of codes minus a zero point leaves int32."""
MAX_ROWS = 1 << 31
LEAST_CAPABILITY = (8, 0)


def product_shape(problem: Any) -> Shape:
    """What the choice of a tile depends on."""
    taps = 1 if problem.kernel_size is None else problem.kernel_size[0] * problem.kernel_size[1]
    return Shape(
        problem.m, problem.n, problem.k // taps, taps, problem.groups, problem.weight_bits, problem.group_size
    )  # fmt: skip


def _too_old(problem: Any) -> str | None:
    if problem.capability is not None and problem.capability < LEAST_CAPABILITY:
        return f"compute capability {problem.capability[0]}.{problem.capability[1]}: the kernels need 8.0 or newer"
    return None


def weight_why_not(problem: Any) -> str | None:
    """Why the kernels cannot read the weight of `problem`, None if they can."""
    if problem.layout not in (None, KPACK_V1):
        return f"it reads weights in layout {KPACK_V1!r}, not {problem.layout!r}"
    shape = product_shape(problem)
    if shape.weight_bits != 8 and shape.taps > 1 and shape.channels % 8 != 0:
        return (
            f"{shape.weight_bits}-bit weights with {shape.channels} input channels per tap: a tap must begin at a "
            "byte, so their number must be divisible by 8; use weight_bits=8"
        )
    if not any(fits(config, shape) for config in candidates(problem.capability or LEAST_CAPABILITY)):
        return (
            f"group_size={shape.group_size} with {shape.channels} input channels per tap: a step along K is inside one "
            "group, so group_size (and, for kernels above 1x1, the channels) must be divisible by 32"
        )
    return None


def product_why_not(problem: Any) -> str | None:
    """Why the integer product cannot solve `problem`, None if it can."""
    reason = _too_old(problem) or weight_why_not(problem)
    if reason is not None:
        return reason
    if problem.k > MAX_K:
        return f"k={problem.k} products can overflow int32; at most {MAX_K} are summed"
    if problem.m >= MAX_ROWS:
        return f"m={problem.m} rows; they are counted in int32"
    pointwise = problem.kernel_size in (None, (1, 1)) and problem.stride == (1, 1) and problem.padding == (0, 0)
    if problem.granularity == "per_token" and not pointwise:
        return "per_token scales do not factor out of a convolution larger than 1x1, stride 1"
    return None


def _quantize_why_not(problem: Any) -> str | None:
    return _too_old(problem) or quantizing.why_not(problem)


def _both_why_not(problem: Any) -> str | None:
    """Of ops that quantise and multiply; `problem` is that of the product."""
    if problem.op.startswith("initialize") and problem.act_bits == 0:
        return None if problem.layout in (None, KPACK_V1) else product_why_not(problem)
    channels = product_shape(problem).channels * problem.groups
    return product_why_not(problem) or quantizing.why_not(replace(problem, op="quantize_residual", k=channels))


def kernels() -> dict[str, Kernel]:
    """All ops of this backend."""
    groups: tuple[tuple[Callable[[Any], str | None], tuple[Callable[..., Any], ...]], ...] = (
        (_quantize_why_not, tuple(quantizing.QUANTIZING_KERNELS.values())),
        (
            product_why_not,
            (
                products.accumulate_linear,
                products.accumulate_conv2d,
                products.quantized_linear,
                products.quantized_conv2d,
            ),
        ),
        (
            _both_why_not,
            (
                modulated.initialize_linear,
                modulated.initialize_conv2d,
                modulated.modulated_linear,
                modulated.modulated_conv2d,
            ),
        ),
    )
    return {fn.__name__: Kernel(fn, why_not) for why_not, functions in groups for fn in functions}
