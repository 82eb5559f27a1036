"""`modiff doctor`: what runs on this machine, what does not, and why."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

from modiff_kernels import __version__, ops
from modiff_kernels.evaluation import sqnr, text_table
from modiff_kernels.ops import dispatch

__all__ = ["run"]

OPTIONAL = {
    "diffusers": "diffusers",
    "accelerate": "accelerate",
    "skimage": "scikit-image",
    "PIL": "pillow",
    "triton": "triton",
}
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
LEAST_SQNR_DB = 60.0


def run(args: argparse.Namespace) -> int:
    parts = {"versions": _versions, "devices": _devices, "backends": _backends, "compiled libraries": _libraries}
    for title, part in parts.items():
        print(f"{title}\n{part()}\n")
    print(f"ops: which backend has which\n{_dispatch()}\n")
    with _no_backend_forced():
        checks = [(name, _self_check(name)) for name in dispatch.BACKENDS if _reason(name) is None]
    print("self-check against the reference: codes equal, outputs within float rounding")
    print(_lines(checks))
    return int(any(result.startswith("FAILED") for _, result in checks))


@contextlib.contextmanager
def _no_backend_forced() -> Iterator[None]:
    """MODIFF_BACKEND forces one backend; the self-check needs them all."""
    forced = os.environ.pop("MODIFF_BACKEND", None)
    dispatch.reset()
    try:
        yield
    finally:
        if forced is not None:
            os.environ["MODIFF_BACKEND"] = forced
        dispatch.reset()


def _lines(items: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in items)
    return "\n".join(f"  {name.ljust(width)}  {value}" for name, value in items)


def _optional(module: str, package: str) -> str:
    try:
        importlib.import_module(module)
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "no version"
    except ImportError as error:
        return f"cannot be imported: {error}"


def _versions() -> str:
    items = [("modiff_kernels", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    return _lines(items + [(package, _optional(module, package)) for module, package in OPTIONAL.items()])


def _cpu() -> tuple[str, set[str]]:
    """Name and flags of the CPU, as far as the system tells."""
    fields: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name", platform.processor() or platform.machine()), set(flags.split())


def _devices() -> str:
    name, flags = _cpu()
    known = " ".join(flag for flag in CPU_FLAGS if flag in flags) or "none that matters here"
    items = [("cpu", f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {known}")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            items.append((f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"))
    else:
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        items.append(("cuda", f"none: {built}"))
    return _lines(items)


def _reason(backend: str) -> str | None:
    module = dispatch.load(backend)
    return module if isinstance(module, str) else module.unavailable()


def _backends() -> str:
    items = []
    for name in dispatch.BACKENDS:
        reason = _reason(name)
        module = dispatch.load(name)
        detail = f" ({module.isa()})" if reason is None and hasattr(module, "isa") else ""
        items.append((name, f"not available: {reason}" if reason else f"available{detail}"))
    forced = os.environ.get("MODIFF_BACKEND")
    return _lines([*items, ("priority", _priority()), *([("MODIFF_BACKEND", forced)] if forced else [])])


def _libraries() -> str:
    """What the libraries of the backends were built with, or why that is not known."""
    items = []
    for name in dispatch.BACKENDS:
        module = dispatch.load(name)
        if isinstance(module, str):
            continue  # `backends` says why
        if (build_info := getattr(module, "build_info", None)) is not None:
            info = build_info()
            items.append((name, info if isinstance(info, str) else ", ".join(f"{k} {v}" for k, v in info.items())))
    return _lines(items or [("none", "no backend of compiled kernels can be imported")])


def _priority() -> str:
    return "; ".join(f"{device}: {', '.join(names)}" for device, names in dispatch.PRIORITY.items())


def _dispatch() -> str:
    """One line per op; reasons of what is missing below."""
    table: dict[str, dict[str, str | None]] = {}
    for row in dispatch.table():
        reason = row.reason and row.reason.replace(f"it has no {row.op}", "this backend does not have the op")
        table.setdefault(row.op, {})[row.backend] = reason
    reasons = list(dict.fromkeys(reason for cells in table.values() for reason in cells.values() if reason))

    def cell(reason: str | None) -> str:
        return "yes" if reason is None else f"no [{reasons.index(reason) + 1}]"

    text = text_table(
        ("op", *dispatch.BACKENDS), [(op, *(cell(cells[b]) for b in dispatch.BACKENDS)) for op, cells in table.items()]
    )
    return "\n".join(["  " + line for line in text.splitlines()] + [f"  [{i + 1}] {r}" for i, r in enumerate(reasons)])


def _self_check(backend: str) -> str:
    """`ok`, with the smallest SQNR of all outputs against the reference, or what FAILED."""
    least = float("inf")
    for check in _checks(backend):
        for act_bits in (8, 4, 3):
            try:
                (codes, *outputs), (expected_codes, *expected) = check(backend, act_bits), check("reference", act_bits)
            except Exception as error:
                return f"FAILED: {check.__name__.removeprefix('_check_')}, act_bits {act_bits}: {error}"
            if not torch.equal(codes, expected_codes):
                return f"FAILED: codes of quantize_residual differ at act_bits {act_bits}"
            least = min(least, *(sqnr(a, b) for a, b in zip(outputs, expected, strict=True)))
    if not least >= LEAST_SQNR_DB:
        return f"FAILED: outputs are only {least:.0f} dB from the reference"
    return f"ok ({'equal' if least == float('inf') else f'{least:.0f} dB'})"


def _checks(backend: str) -> tuple[Callable[[str, int], tuple[torch.Tensor, ...]], ...]:
    """Layers, or the quantiser alone where `backend` has no products."""
    kernels = getattr(dispatch.load(backend), "KERNELS", None)
    if kernels is not None and "modulated_linear" not in kernels:
        return (_check_quantizer,)
    return _check_linear, _check_conv2d


def _device_of(backend: str) -> str:
    """The device type that `backend` runs on; the CPU for one that runs on all, or is not in the table."""
    return next((device for device, names in dispatch.PRIORITY.items() if backend in names), "cpu")


def _steps(
    x: torch.Tensor,
    y_hat: torch.Tensor,
    weight: torch.Tensor,
    act_bits: int,
    backend: str,
    op: str,
    initialize: Callable,
    modulated: Callable,
    conv: tuple = (),
) -> tuple[torch.Tensor, ...]:
    """One initialise and one update of a layer on the backend's device: codes of the update, both outputs, x_hat and
    y_hat, on the CPU.
    """
    device = _device_of(backend)
    x, y_hat, weight = x.to(device), y_hat.to(device), weight.to(device)
    n, k = weight.shape
    shape = {"kernel_size": conv[0], "padding": conv[2]} if conv else {}
    layout = ops.preferred_layout(op, device, n=n, k=k, weight_bits=8, act_bits=act_bits, backend=backend, **shape)
    kernel_size = conv[0] if conv else (1, 1)
    packed = ops.prepare_weight(
        ops.pack_weight(weight, 8), 8, n, k, layout_to=layout, kernel_size=kernel_size, backend=backend
    )
    scale = torch.full((n,), 0.01, device=device)
    bias = torch.linspace(-1, 1, n, device=device)
    x_hat = torch.zeros_like(x)
    arguments = (8, -1, layout, *conv)
    first = initialize(x, x_hat, y_hat, packed, scale, bias, None, *arguments, backend=backend)
    x = x + 0.1 * x.roll(1, -1)
    codes, _, _ = ops.quantize_residual(x, x_hat.clone(), None, act_bits, "per_sample", backend=backend)
    second, _, _ = modulated(
        x, x_hat, None, packed, scale, y_hat, None, act_bits, "per_sample", 1.0, *arguments, backend=backend
    )
    return tuple(result.cpu() for result in (codes, first, second, x_hat, y_hat))


def _check_quantizer(backend: str, act_bits: int) -> tuple[torch.Tensor, ...]:
    """Codes of an update, scales, absmax and x_hat, on the CPU."""
    device = _device_of(backend)
    generator = torch.Generator().manual_seed(0)
    x, x_hat = (torch.randn(2, 33, 40, generator=generator).to(device) for _ in range(2))
    results = ops.quantize_residual(x, x_hat, None, act_bits, "per_sample", backend=backend)
    return tuple(result.cpu() for result in (*results, x_hat))


def _check_linear(backend: str, act_bits: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 32, generator=generator)
    weight = torch.randint(-128, 128, (48, 32), dtype=torch.int8, generator=generator)
    y_hat = torch.zeros(2, 9, 48)
    functions = (ops.initialize_linear, ops.modulated_linear)
    return _steps(x, y_hat, weight, act_bits, backend, "modulated_linear", *functions)


def _check_conv2d(backend: str, act_bits: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32, 7, 7, generator=generator).to(memory_format=torch.channels_last)
    weight = torch.randint(-128, 128, (48, 9 * 32), dtype=torch.int8, generator=generator)
    y_hat = torch.zeros(2, 48, 7, 7).to(memory_format=torch.channels_last)
    functions = (ops.initialize_conv2d, ops.modulated_conv2d)
    conv = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    return _steps(x, y_hat, weight, act_bits, backend, "modulated_conv2d", *functions, conv)
