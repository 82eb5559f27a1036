"""`modiff doctor`: what runs on this machine, what does not, and why."""

import argparse
import importlib
import os
import platform
import re
import textwrap
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import torch

from modiff_kernels import __version__, ops
from modiff_kernels.backends import BACKENDS, LEAST_CAPABILITY, cpu, int8_products, source_hash
from modiff_kernels.config import BACKENDS as BACKEND_VALUES
from modiff_kernels.config import ModiffConfig
from modiff_kernels.evaluation import sqnr, text_table, user_errors
from modiff_kernels.integrations.plan_cache import device_name
from modiff_kernels.nn import ModulatedConv2d, ModulatedLinear, ModulationState
from modiff_kernels.ops import dispatch

OPTIONAL = {"diffusers": "diffusers", "accelerate": "accelerate", "skimage": "scikit-image", "PIL": "pillow"}
OPTIONAL |= {"triton": "triton"}
# Those of ENVS.md, with the values that are allowed; none: any.
VARIABLES: dict[str, tuple[str, ...]] = {"MODIFF_BACKEND": BACKEND_VALUES, "MODIFF_CUDA": ("AUTO", "ON", "OFF", "")}
VARIABLES |= {"MODIFF_CPU_ISA": (*cpu.ISAS, "")}
VARIABLES |= {"MODIFF_COMMIT": (), "MODIFF_CACHE": (), "MODIFF_SKIP_BUILD": ("0", "1", "")}
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
LEAST_SQNR_DB = 60.0

Items = Iterator[tuple[str, str]]


def run(args: argparse.Namespace) -> int:
    with user_errors():  # of an instruction set that is not here
        dispatch.why_unavailable("cpu")
    for title, part in PARTS.items():
        _print(title, part())
    print(f"ops: which backend has which\n{_dispatch()}\n")
    forced = {name: os.environ.pop(name) for name in ("MODIFF_BACKEND",) if name in os.environ}
    dispatch.reset()
    checks = [(name, _self_check(name)) for name in BACKENDS if dispatch.why_unavailable(name) is None]
    os.environ.update(forced)
    dispatch.reset()
    _print("self-check against the reference: codes equal, outputs within float rounding", checks)
    return int(any(result.startswith("FAILED") for _, result in checks))


def _print(title: str, items: Iterable[tuple[str, str]]) -> None:
    lines = dict(items) or {"none": "nothing is set"}
    width = max(map(len, lines))
    print("\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in lines.items())]), end="\n\n")


def _versions() -> Items:
    yield from {"modiff_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}.items()
    for module, package in OPTIONAL.items():
        try:
            importlib.import_module(module)
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "no version"
        except ImportError as error:
            yield package, f"cannot be imported: {error}"


def _devices() -> Items:
    cpuinfo = Path("/proc/cpuinfo")
    listed = re.search(r"^(?:flags|Features)\s*:(.*)", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    flags = listed[1].split() if listed else []
    known = " ".join(flag for flag in CPU_FLAGS if flag in flags) or "none that matters here"
    machine = f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield "cpu", f"{machine}; {known}"
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        yield "cuda", f"none: {built}"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
        if (major, minor) >= LEAST_CAPABILITY:
            yield f"cuda:{index} products", int8_products((major, minor))


def _backends() -> Items:
    for name in BACKENDS:
        reason, module = dispatch.why_unavailable(name), dispatch.load(name)
        detail = f" ({module.isa()})" if reason is None and hasattr(module, "isa") else ""
        yield name, f"not available: {reason}" if reason else f"available{detail}"
    if (slow := cpu.why_slow()) is not None:
        yield "slow CPU", f"layers stay float on it by default: {slow}"
    if not cpu.has_vnni():
        yield "no VNNI", "codes of 4 bits multiply nearly twice as fast as of 8, so blocks have no scales by default"
    orders = {device: [name for name in BACKENDS if dispatch.runs_on(name, device)] for device in ("cpu", "cuda")}
    yield "priority", "; ".join(f"{device}: {', '.join(names)}" for device, names in orders.items())


def _environment() -> Items:
    for name in sorted(name for name in os.environ if name.startswith("MODIFF_")):
        value, wrong = os.environ[name], ""
        places = (Path(value).absolute(), *Path(value).absolute().parents)
        if name not in VARIABLES:
            wrong = f"  WRONG: it is not read; these are: {', '.join(VARIABLES)}"
        elif VARIABLES[name] and value not in VARIABLES[name]:
            wrong = f"  WRONG: give one of {', '.join(VARIABLES[name])}"
        elif name == "MODIFF_CACHE" and not os.access(f"{next(filter(Path.exists, places))}/.", os.W_OK):
            wrong = "  WRONG: no folder can be made or written there, so no plan is stored"
        yield name, value + wrong


def _libraries() -> Items:
    described = {name: getattr(dispatch.load(name), "build_info", None) for name in BACKENDS}
    for name, build_info in described.items():
        if build_info is not None:  # a reason in the place of a module has none
            info, sources = build_info(), source_hash()
            old = not isinstance(info, str) and sources not in (None, info.get("sources"))
            text = info if isinstance(info, str) else ", ".join(f"{k} {v}" for k, v in info.items())
            yield name, f"{text}  OLDER than csrc: run `python setup.py build_ext --inplace`" if old else text
    if not any(described.values()):
        yield "none", "no backend of compiled kernels can be imported"


PARTS = {"versions": _versions, "devices": _devices, "backends": _backends, "compiled libraries": _libraries}
PARTS["environment"] = _environment


def _dispatch() -> str:
    table = {op: dispatch.table(op) for op in dispatch.OPS}
    reasons = list(dict.fromkeys(reason for cells in table.values() for reason in cells.values() if reason))

    def cell(reason: str | None) -> str:
        return "yes" if reason is None else f"no [{reasons.index(reason) + 1}]"

    rows = [(op, *(cell(cells[name]) for name in BACKENDS)) for op, cells in table.items()]
    lines = [*text_table(("op", *BACKENDS), rows).splitlines(), *(f"[{i}] {r}" for i, r in enumerate(reasons, 1))]
    return textwrap.indent("\n".join(lines), "  ")


def _self_check(backend: str) -> str:
    """`ok`, with the smallest SQNR of all outputs against the reference, or what FAILED."""
    least = float("inf")
    for kind in ("linear", "conv2d"):
        for act_bits in (8, 4, 3):
            try:
                (codes, *outputs), (expected, *exact) = (
                    _computed(kind, name, act_bits, BACKENDS[backend] or "cpu") for name in (backend, "reference")
                )
            except Exception as error:
                return f"FAILED: {kind}, act_bits {act_bits}: {error}"
            if not torch.equal(codes, expected):
                return f"FAILED: codes of quantize differ at act_bits {act_bits}"
            least = min(least, *(sqnr(a, b) for a, b in zip(outputs, exact, strict=True)))
    if not least >= LEAST_SQNR_DB:
        return f"FAILED: outputs are only {least:.0f} dB from the reference"
    return f"ok ({'equal' if least == float('inf') else f'{least:.0f} dB'})"


@torch.no_grad()
def _computed(kind: str, backend: str, act_bits: int, device: str) -> list[torch.Tensor]:
    config = ModiffConfig(8, act_bits, granularity="per_sample", state_dtype="float32", backend=backend)
    state = ModulationState()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer: torch.nn.Module
        if kind == "linear":
            layer = ModulatedLinear.from_linear(torch.nn.Linear(32, 48).to(device), config, state, kind)
            x = torch.randn(2, 9, 32).to(device)
        else:
            conv = torch.nn.Conv2d(32, 48, 3, padding=1).to(device)
            layer = ModulatedConv2d.from_conv2d(conv, config, state, kind)
            x = torch.randn(2, 32, 7, 7).to(device, memory_format=torch.channels_last)
    later = x + 0.1 * x.roll(1, -1)
    results = list(ops.quantize(later, x_hat=x.clone(), bits=act_bits, backend=backend)[:1])
    with state.sampling_run():
        for value in (x, later):
            with state.call():
                results.append(layer(value))
    return [result.cpu() for result in results]
