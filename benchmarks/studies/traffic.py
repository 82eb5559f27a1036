"""Kernels that a UNet call launches on a GPU, the bytes they move, and what the cost model makes of it. Needs no GPU.

    python -m benchmarks traffic --json benchmarks/results/traffic.json

Networks run on device meta as if it was a GPU of sm_90: kernels of this package are not launched but counted with the
sizes of their tensors (what is updated in place counts twice), and so are all operations of torch but views. A call is
one in the middle of a run whose timesteps are known, in float16. Bytes are of this package's kernels alone, launches of
everything. What runs in the float layers of a plan is counted as torch runs it, attention as one kernel.

Times are no measurement: the cost model (planning/cost.py) at the rates below, for the layers of the network, by the
plan for 8-bit weights and activations that is the default on a GPU; beside the same layers in float16 as a fusing
compiler runs them, in a CUDA graph. What both have in common is in neither. With --host, what is measured is the Python
of an eager call, on the processor that this runs on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import json
import logging
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import modiff_kernels as mk
from benchmarks import record
from benchmarks.bounds import PEAKS
from benchmarks.shapes import NETWORKS, build_unet, conditions
from benchmarks.tables import loaded
from modiff_kernels.backends.cuda import library
from modiff_kernels.backends.cuda import product_launch as cuda_product
from modiff_kernels.backends.triton import launch, product_launch, tiles
from modiff_kernels.config.plan import FLOAT_MODE
from modiff_kernels.evaluation import markdown_table, to_json
from modiff_kernels.integrations import plans, replacements
from modiff_kernels.nn import layer as layer_module
from modiff_kernels.nn import weight as weights
from modiff_kernels.nn.blocks import concatenation
from modiff_kernels.nn.tensors import ModulationState
from modiff_kernels.ops import check, dispatch
from modiff_kernels.ops.problem import Problem
from modiff_kernels.planning import cost
from modiff_kernels.quant.calibrated import QuantizedWeight
from modiff_kernels.quant.packing import packed_dtype, packed_width

CAPABILITY, PROCESSORS = (9, 0), 132
EFFICIENCY = {"float_ops": 0.7, "int8_ops": 0.55, "bandwidth": 0.85}
"""Of the data sheet's rates: what good 16-bit kernels reach, what the clocks of the int8 kernels' machine code give in
large layers, what streams reach. With plans.GRAPH_LAUNCH for a launch."""
GPUS = {name: next(peaks for known, peaks in PEAKS.items() if known.startswith(name)) for name in ("H100", "H200")}
BATCHES, COUNTED = (1, 2, 8, 16, 64), (1, 2, 8, 16)
UPDATED = {"x_hat_ptr", "y_hat"}  # parameters of kernels, read and written
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "view", "_unsafe_view", "_reshape_alias", "reshape", "t"}
FREE |= {"permute", "transpose", "expand", "slice", "select", "split", "split_with_sizes", "unsqueeze", "squeeze"}
FREE |= {"alias", "detach", "unbind", "as_strided", "unflatten", "lift_fresh"}


def rates(gpu: str) -> cost.Machine:
    peaks = GPUS[gpu]
    slowed = {name: getattr(peaks, name) * part for name, part in EFFICIENCY.items()}
    return peaks._replace(**slowed, launch=plans.GRAPH_LAUNCH)


class _Aten(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.__name__.split(".")[0]) not in FREE:
            self.counts[f"aten {name}"] += 1
        result = func(*args, **kwargs or {})
        if name == "convolution" and args[0].is_contiguous(memory_format=torch.channels_last):
            result = result.contiguous(memory_format=torch.channels_last)  # as on a GPU; meta does not know the format
        return result


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


@contextlib.contextmanager
def pretended_gpu() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Inside, UNets on device meta can be accelerated and called as on a GPU; gives launches and bytes by kernel."""
    launches, moved = Counter[str](), Counter[str]()

    def count(name: str, size: int) -> None:
        launches[name] += 1
        moved[name] += size

    def triton(kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        named = list(zip(inspect.signature(kernel.fn).parameters, args))
        twice = [value for name, value in named if name in UPDATED]
        count(kernel.fn.__name__, _bytes(value for _, value in named) + _bytes(twice))

    def product(codes, scale, zero_point, sums, weight, weight_scale, bias, y_hat, skip, form):  # type: ignore[no-untyped-def]
        samples, height, width, _, n, *window, _, geglu, write_out, dtype = map(int, form.tolist()[:18])
        shape: tuple[int, ...] = (*codes.shape[:-1], n // 2 if geglu else n)
        if codes.ndim == 4:
            sizes = zip((height, width), window[:2], window[2:4], window[4:6])
            shape = (samples, n, *[(size + 2 * pad - kernel) // step + 1 for size, kernel, step, pad in sizes])
        shape, layout = (
            shape if write_out else (0,),
            torch.channels_last if codes.ndim == 4 else torch.contiguous_format,
        )
        layout = layout if write_out else torch.contiguous_format
        dtypes = (torch.float32, torch.float16, torch.bfloat16)  # csrc/common/problem.h
        out = torch.empty(shape, dtype=dtypes[dtype], device=codes.device, memory_format=layout)
        tensors = (codes, scale, zero_point, sums, weight, weight_scale, bias, y_hat, y_hat, skip, out)
        count("product (cuda)", _bytes(tensors))
        return out

    def attention(q: Any, k: Any, v: Any, *unused: Any, **options: Any) -> torch.Tensor:
        launches["attention"] += 1
        return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)

    def problem(op: str, x: Any, dtype: Any, state: Any = None, **fields: Any) -> Problem:
        return Problem(op, "cuda", CAPABILITY, dtype, None if state is None else state.dtype, **fields)

    def pack(quantized: QuantizedWeight, *unused: Any) -> Any:
        n, k = quantized.codes.shape
        packed = quantized.codes.new_empty((n, packed_width(quantized.bits, k)), dtype=packed_dtype(quantized.bits))
        return weights.PackedWeight(packed, quantized.scale, quantized.bits, quantized.group_size)

    def rounded(weight: Any, bits: int, group_size: int) -> QuantizedWeight:
        n, k = weight.shape[0], weight[0].numel()
        scale = weight.new_empty(n, dtype=torch.float32)
        return QuantizedWeight(weight.new_empty((n, k), dtype=torch.int8), scale, bits, group_size)

    why_float, why_unavailable = replacements._why_float, dispatch.why_unavailable
    problem_of = layer_module.ModulatedLayer.problem
    reasons = {"triton": None, "cuda": None}
    gpu = tiles.Gpu("a GPU of sm_90", CAPABILITY, PROCESSORS)

    def loaded_weight(*args: Any) -> str | None:
        reason = why_float(*args)
        return None if reason is not None and "meta device" in reason else reason

    def on_gpu(layer: layer_module.ModulatedLayer, op: str, rows: int) -> Problem:
        return dataclasses.replace(problem_of(layer, op, rows), device_type="cuda", capability=CAPABILITY)

    patches: list[tuple[Any, str, Any]] = [
        (torch._C, "_len_torch_dispatch_stack", lambda: 0),  # the mode that counts must not reroute the ops
        (torch, "is_autocast_enabled", lambda *device: False),  # which does not know the device
        (check, "_problem", problem),
        (dispatch, "why_unavailable", lambda name: reasons[name] if name in reasons else why_unavailable(name)),
        (launch, "record", triton),
        (product_launch, "gpu_of", lambda device: gpu),
        (cuda_product, "_aligned", lambda tensor: tensor),  # what has no memory has no alignment
        (library, "product_op", lambda: product),
        (F, "scaled_dot_product_attention", attention),
        (replacements, "_why_float", loaded_weight),
        (replacements, "runs_on_gpu", lambda unet: True),
        (plans, "runs_on_gpu", lambda unet: True),
        (layer_module, "is_gpu", lambda device: True),
        (layer_module, "all_finite", lambda weight: True),
        (layer_module.ModulatedLayer, "problem", on_gpu),
        (ModulationState, "dtype_on", lambda state, device: state.state_dtype or torch.float16),
        (QuantizedWeight, "rounded", staticmethod(rounded)),
        (weights, "pack", pack),
        (weights, "parts_of", lambda stacked, parts: list(parts)),
    ]
    with contextlib.ExitStack() as undo:
        for patch in patches:
            undo.enter_context(mock.patch.object(*patch))
        undo.callback(dispatch.reset)
        dispatch.reset()
        undo.enter_context(torch.no_grad())
        yield launches, moved


def default_plan(unet: torch.nn.Module, gpu: str, batch: int = plans.BATCH) -> mk.LayerPlan:
    """The plan that a UNet on device meta would get on that GPU; inside `pretended_gpu`."""
    return plans.estimated(unet, mk.ModiffConfig(), {}, True, rates(gpu), batch)


def counted(network: str, batch: int, plan: mk.LayerPlan | str) -> dict[str, Any]:
    """Launches and gigabytes of a call, by kernel and together."""
    from diffusers import DDIMScheduler

    unet, scheduler = build_unet(network, "meta").half(), DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4, device="cpu")
    size, channels = unet.config.sample_size, unet.config.in_channels
    with pretended_gpu() as (launches, moved):
        handle = mk.accelerate(unet, mk.ModiffConfig(plan=plan), calibration=None)
        sample = torch.empty((batch, channels, size, size), dtype=torch.float16, device="meta")
        keywords = conditions(unet, batch)
        for run in range(2):
            with handle.sampling_run(scheduler=scheduler):
                for call, timestep in enumerate(scheduler.timesteps.tolist()):
                    launches.clear()
                    moved.clear()
                    with _Aten(launches) if (run, call) == (1, 2) else contextlib.nullcontext():
                        unet(sample, timestep, **keywords)
                    if (run, call) == (1, 2):
                        found = dict(launches), dict(moved)
        handle.remove()
    return {"launches": sum(found[0].values()), "gigabytes": sum(found[1].values()) / 1e9, "kernels": found[0]}


def modelled(network: str, batch: int, gpu: str) -> dict[str, Any]:
    """Milliseconds and gigabytes of a call by the cost model: of the plan that is made for batch 8, and compiled."""
    unet = build_unet(network, "meta").half()
    with pretended_gpu():
        modes = {unit.path: unit.mode for unit in default_plan(unet, gpu).units}
        replaced = replacements.replacements_of(unet, mk.ModiffConfig(plan="modulated"), {}, True)
        _, shapes = plans.traced_shapes(unet, batch)
    sizes, machine = cost.Sizes(2, 2, 8, delayed=True), rates(gpu)
    sums: Counter[str] = Counter()
    for path, layers in replaced.units().items():
        for layer in [plans._described(name, replaced, shapes[name]) for name in layers]:
            for name, mode, compiled in (("plan", modes[path], False), ("compiled", FLOAT_MODE, True)):
                sums[f"{name}_ms"] += 1e3 * cost.seconds(layer, mode, sizes, machine, compiled)
                sums[f"{name}_gigabytes"] += sum(p.bytes for p in cost.passes(layer, mode, sizes, compiled)) / 1e9
    counts = Counter(mode.kind for mode in modes.values())
    return {**sums, "modes": ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))}


def host(network: str, batch: int, plan: mk.LayerPlan | str, calls: int = 40) -> dict[str, Any]:
    """Milliseconds that the host takes for an eager call, the median of a run: processor time of this thread for all
    but the kernels. Those are stood in for, torch's too, by functions that give what they gave at the first call. The
    tensors between them are allocated, of images of 8 x 8: larger ones would take the host's allocator to the system,
    where that of a GPU keeps its memory."""
    from diffusers import DDIMScheduler

    unet = build_unet(network, "meta").half().to_empty(device="cpu")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(calls, device="cpu")
    kept: dict[Any, Any] = {}

    def stand_in(name: str, real: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            key = name, *[arg.shape for arg in args if isinstance(arg, torch.Tensor)], more.get("form")
            if key not in kept:
                kept[key] = real(*args, **more)
            return kept[key]

        return call

    with pretended_gpu(), contextlib.ExitStack() as undo:
        product = library.product_op()

        def one_product(codes, *operands):  # type: ignore[no-untyped-def]
            key = codes.shape, id(operands[-1])  # the form is kept by who calls
            if key not in kept:
                kept[key] = product(codes, *operands)
            return kept[key]

        patches: list[tuple[Any, str, Any]] = [
            (launch, "record", lambda *args: None),
            (library, "product_op", lambda: one_product),
            (concatenation, "CONCATENATE_ON", ()),
        ]
        names = "conv2d", "group_norm", "silu", "interpolate", "scaled_dot_product_attention"
        for patch in [*patches, *[(F, name, stand_in(name, getattr(F, name))) for name in names]]:
            undo.enter_context(mock.patch.object(*patch))
        handle = mk.accelerate(unet, mk.ModiffConfig(plan=plan, cuda_graphs=False), calibration=None)
        sample = torch.zeros((batch, unet.config.in_channels, 8, 8), dtype=torch.float16)
        keywords = {name: value.new_zeros(value.shape, device="cpu") for name, value in conditions(unet, batch).items()}
        for _ in range(2):
            taken = []
            with handle.sampling_run(scheduler=scheduler):
                for timestep in scheduler.timesteps.tolist():
                    start = time.thread_time()
                    unet(sample, timestep, **keywords)
                    taken.append(1e3 * (time.thread_time() - start))
        handle.remove()
    return {"ms": statistics.median(taken[3:]), "least_ms": min(taken)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", nargs="*", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--json", type=Path, required=True, help="the report")
    parser.add_argument("--host", action="store_true", help="add the time of the host at a batch of 2 to the report")


def main(args: argparse.Namespace) -> int:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    if args.host:
        torch.set_num_threads(1)
        report = json.loads(args.json.read_text())
        for row in [row for row in report["rows"] if row["batch"] == 2 and row["network"] in args.network]:
            with pretended_gpu():
                plan = default_plan(build_unet(row["network"], "meta").half(), "H100")
            row["host"] = {
                name: host(row["network"], 2, modes) for name, modes in (("plan", plan), ("all", "modulated"))
            }
            print(row["network"], row["host"], flush=True)
        report["host"] = f"{record.environment()['device']}, commit {record.environment()['git_commit']}"
        args.json.write_text(to_json(report))
        return 0
    rows = []
    for network in args.network:
        with pretended_gpu():
            plan = default_plan(build_unet(network, "meta").half(), "H100")
        for batch in BATCHES:
            row: dict[str, Any] = {"network": network, "batch": batch}
            for name, modes in (("plan", plan), ("modulated", "modulated")) if batch in COUNTED else ():
                row |= {f"{name}_{key}": found for key, found in counted(network, batch, modes).items()}
            row["models"] = {gpu: modelled(network, batch, gpu) for gpu in GPUS}
            rows.append(row)
            print({key: found for key, found in row.items() if not key.endswith("kernels")}, flush=True)
    about = {"git_commit": record.environment()["git_commit"], "command": "python -m benchmarks traffic"}
    args.json.write_text(to_json({**about, "rows": rows}))
    return 0


def table(results: Path) -> str | None:
    """What was counted beside what was modelled."""
    report = loaded(results / "traffic.json")
    if report is None:
        return None
    header = ["network, batch", "launches, all modulated", "by default", "GB, all modulated", "by default"]
    for gpu in GPUS:
        header += [f"{gpu}: float16 compiled ms", "by default ms", "ratio"]
    cells, ratios = [], []
    for row in report["rows"]:
        line = [f"{row['network']}, {row['batch']}"]
        for key, form in (("launches", "{:d}"), ("gigabytes", "{:.1f}")):
            line += [form.format(row[f"{n}_{key}"]) if f"{n}_{key}" in row else "-" for n in ("modulated", "plan")]
        for gpu in GPUS:
            compiled, plan = [row["models"][gpu][f"{name}_ms"] for name in ("compiled", "plan")]
            line += [f"{compiled:.2f}", f"{plan:.2f}", f"{compiled / plan:.2f}x"]
            if row["models"][gpu]["modes"].count(",") == 0:
                line[-2:] = "all float", "-"
            else:
                ratios.append((compiled / plan, f"{line[0]} on the {gpu}"))
        cells.append(line)
    least = "Least ratio of a network that is not all float: {:.2f}x, {}.".format(*min(ratios))
    if "host" in report:
        form = "{}: {:.1f} by default (least {:.1f}), {:.1f} all modulated"
        held = [(row["network"], row["host"]["plan"], row["host"]["all"]) for row in report["rows"] if "host" in row]
        texts = [form.format(name, plan["ms"], plan["least_ms"], every["ms"]) for name, plan, every in held]
        least += "\n\nMilliseconds of Python in an eager call, batch 2, with stand-ins for all kernels (`--host`, "
        least += f"{report['host']}): {'; '.join(texts)}.\n\n"
    return f"{markdown_table(header, cells)}\n\n{least} Commit {report['git_commit']}, `{report['command']}`."
