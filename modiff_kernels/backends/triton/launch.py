"""Launches of kernels, and their record: what an op would launch, for ahead-of-time compilation without a GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton.runtime.jit import JITFunction

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # set before kernels are imported, see Triton's docs
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_TYPES |= {torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32"}
_ALIGNMENT = 16  # bytes of a pointer, and divisor of an integer, that Triton compiles for


class Variant(NamedTuple):
    """One compiled form of a kernel: what Triton's launcher derives from the arguments of a launch."""

    kernel: Any
    signature: dict[str, str]  # every argument: "*fp16", "i32", "fp32" or "constexpr"
    constexprs: dict[str, Any]  # meta-parameters, None pointers, integers that are 1
    divisible: tuple[str, ...]  # arguments with the attribute tt.divisibility 16
    num_warps: int
    num_stages: int | None = None  # None: Triton's default


_record: list[Variant] | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int | None = None, **constants: Any
) -> None:
    """`kernel[grid](*args, **constants)` on the device of the first argument, or a note of it inside `recorded`."""
    if _record is not None:
        _record.append(_variant(kernel, args, constants, num_warps, num_stages))
        return
    options = {"num_warps": num_warps} if num_stages is None else {"num_warps": num_warps, "num_stages": num_stages}
    if INTERPRETED or args[0].device.index == torch.cuda.current_device():
        kernel[grid](*args, **constants, **options)
    else:
        with torch.cuda.device(args[0].device):
            kernel[grid](*args, **constants, **options)


@contextmanager
def recorded() -> Iterator[list[Variant]]:
    """Launch nothing; collect the variants instead. The tensors of the ops called inside may be on device "meta"."""
    global _record
    if _record is not None:
        raise RuntimeError("recorded() does not nest: finish the outer recording first")
    _record = []
    try:
        yield _record
    finally:
        _record = None


def _variant(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], *options: Any) -> Variant:
    signature, constexprs, divisible = {}, dict(constants), []
    described = JITFunction(kernel.fn, **kernel.kwargs) if INTERPRETED else kernel
    for parameter, value in zip(described.params, args):
        name = parameter.name
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            divisible.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or (value == 1 and not parameter.do_not_specialize):
            constexprs[name] = value
        else:
            signature[name] = "i32"
            if value % _ALIGNMENT == 0 and not parameter.do_not_specialize:
                divisible.append(name)
    signature.update(dict.fromkeys(constexprs, "constexpr"))
    ordered = {name: signature[name] for name in kernel.arg_names}
    return Variant(kernel, ordered, constexprs, tuple(divisible), *options)
