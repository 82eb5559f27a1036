"""What whole steps and runs are timed with: full precision, its peers, and ours, as UNets that share weights.

A layer of ours that is asked for from a named backend has that name behind its key: "modulated-w8a8.cuda"."""

import contextlib
import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from benchmarks.baselines.deepcache import CachedUNet
from benchmarks.baselines.openvino_unet import PRECISIONS, OpenVinoUNet
from benchmarks.baselines.x86_inductor import X86_INT8, X86InductorUNet
from benchmarks.runner import Session, default_dtype, is_wanted
from benchmarks.shapes import NOT_COUNTED
from benchmarks.shared import Quantised, Row, build_rows, share_copy
from modiff_kernels.backends import cpu
from modiff_kernels.integrations.graphs import CudaCapture
from modiff_kernels.integrations.handle import channels_last

TORCHAO = "torchao-int8"
QUICK = "float-compile-default-graphs"
"""In inductor's default mode, which chooses among no kernels: a minute where max-autotune takes many."""
BFLOAT16 = "float-compile-bfloat16"
FUSE_INT_MM = {"force_fuse_int_mm_with_mul": True, "coordinate_descent_check_all_directions": True}
"""What torchao recommends for its int8 products; set in its own way, it would hold for all that is compiled later."""
DEEPCACHE = {f"deepcache-{n}{form}": n for n in (3, 5) for form in ("", "-compile")}
"""Keys of rows, with their intervals."""
FORECASTS = (3, 5)
"""Uniform schedules that compute about as many calls as DeepCache computes wholly."""


@dataclasses.dataclass
class Network:
    """A UNet as one row has it. pipe: the pipeline around it. shared_bytes: of parameters that other rows hold too."""

    row: Row
    unet: torch.nn.Module
    quantised: Quantised | None = None
    cached: CachedUNet | None = None
    pipe: Any = None
    shared_bytes: int = 0

    @property
    def backend(self) -> str:
        return self.quantised.backend if self.quantised else "torch"

    def run(self, scheduler: Any = None) -> contextlib.AbstractContextManager[Any]:
        """One sampling run of a UNet that no pipeline holds, or of one whose layers are float."""
        if self.quantised:
            return self.quantised.sampling_run(scheduler)
        return self.cached.run(scheduler) if self.cached else contextlib.nullcontext()

    def remove(self) -> None:
        if self.quantised:
            self.quantised.handle.remove()


class InBfloat16(torch.nn.Module):
    """`unet` in bfloat16 and channels_last, compiled, for calls with tensors in float32."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.config, self.device, self.dtype = unet.config, unet.device, torch.float32
        self._unet = copy.deepcopy(unet).to(torch.bfloat16, memory_format=torch.channels_last)
        compile_calls(self._unet, compile_options(on_cuda=False, cuda_graphs=False))

    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        """The output in a tuple, with return_dict=False."""
        args, kwargs = tree_map_only(torch.Tensor, _in_bfloat16, (args, kwargs))
        return (self._unet(sample.bfloat16(), *args, **kwargs)[0].float(),)


def _in_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16() if tensor.dtype == torch.float32 and tensor.ndim > 1 else tensor  # not the timestep


class Networks:
    """Makes the UNets of rows; all share the weights of `unet`, which becomes channels_last, but for those of peers.

    shown: calls that peers may calibrate with, (sample, timestep) each, and conditions: what they have besides; set
    both before their rows are made."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.unet = unet.to(memory_format=torch.channels_last)
        self.shown: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
        self.conditions: dict[str, Any] = {}
        self._own = {tensor.data_ptr() for tensor in _tensors(unet)}

    @functools.cached_property
    def contiguous(self) -> torch.nn.Module:
        """A copy: large networks have room for it only if a row asks for it."""
        return copy.deepcopy(self.unet).to(memory_format=torch.contiguous_format)

    def make(self, row: Row, pipe_of: Callable[[torch.nn.Module], Any] | None = None) -> Network:
        """The UNet of `row`. pipe_of: makes the pipeline around it that is to begin its runs."""
        on_cuda = self.unet.device.type == "cuda"
        if row.key in PRECISIONS:
            return Network(row, OpenVinoUNet(self.unet, row.key, self.shown, self.conditions))
        if row.key == X86_INT8:
            return Network(row, X86InductorUNet(self.unet, self.shown, self.conditions))
        if row.key == BFLOAT16:
            return Network(row, InBfloat16(self.unet))
        unet = share_copy(self.unet if row.channels_last else self.contiguous)
        network = Network(row, unet)
        if row.mode != "float" or row.schedule is not None:
            sampled = unet if pipe_of is None else pipe_of(unet)
            network.quantised = Quantised(sampled, row, row.key.partition(".")[2] or "auto")
            if row.compiled:
                network.quantised.handle.compile(**compile_options(on_cuda, cuda_graphs=False))
        elif row.key in DEEPCACHE:
            capture = CudaCapture() if on_cuda and row.cuda_graphs else None
            options = compile_options(on_cuda, cuda_graphs=False) if row.compiled else None
            network.cached = CachedUNet(unet, DEEPCACHE[row.key], row.compiled, options, capture)
        else:
            options = compile_options(on_cuda, row.cuda_graphs)
            if row.key == QUICK:
                options = {"options": {"triton.cudagraphs": True}}
            if row.key == TORCHAO:
                quantise_with_torchao(unet)
                options = compile_options(on_cuda, row.cuda_graphs, **FUSE_INT_MM)
            if row.compiled:
                compile_calls(unet, options)
        network.shared_bytes = sum(t.nbytes for t in _tensors(unet) if t.data_ptr() in self._own)
        return network


def _tensors(unet: torch.nn.Module) -> list[torch.Tensor]:
    return [*unet.parameters(), *unet.buffers()]


def compile_options(on_cuda: bool, cuda_graphs: bool, **more: Any) -> dict[str, Any]:
    """Options of torch.compile: on a GPU what max-autotune stands for, on a CPU the default mode."""
    chosen = {**torch._inductor.list_mode_options("max-autotune"), "triton.cudagraphs": cuda_graphs, **more}
    return {"options": chosen} if on_cuda else {}


def compile_calls(unet: torch.nn.Module, options: dict[str, Any]) -> None:
    """Compile the calls of `unet`, for samples in channels_last and timesteps on its device.

    A pipeline may hand over samples in another format at the first call, which would be compiled for itself, and
    timesteps on the CPU, with which torch makes no CUDA graphs."""
    compiled = torch.compile(unet.forward, dynamic=False, **options)

    def forward(sample: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        return compiled(channels_last(sample), torch.as_tensor(timestep).to(sample.device), *args, **kwargs)

    unet.forward = forward


def quantise_with_torchao(unet: torch.nn.Module) -> None:
    """torchao's dynamic int8 for every Linear that sees more than a row per image: int8 products need above 16 rows."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    def wanted(module: torch.nn.Module, path: str) -> bool:
        whole_tiles = isinstance(module, torch.nn.Linear) and not (module.in_features % 8 or module.out_features % 8)
        return whole_tiles and not NOT_COUNTED & set(path.split("."))

    quantize_(unet, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), wanted)


def with_backends(rows: Sequence[Row], backends: Sequence[str]) -> list[Row]:
    """`rows` with those of our layers once for each of `backends`."""
    found = []
    for row in rows:
        ours = row.mode != "float" or row.schedule is not None
        for name in backends if ours else ("auto",):
            named = {"key": f"{row.key}.{name}", "name": f"{row.name}, {name}"}
            found.append(row if name == "auto" else dataclasses.replace(row, **named))
    return found


def label(network: str, unet: torch.nn.Module) -> str:
    """`network` as problems in rows name it: with its dtype, if that is not the default of its device."""
    dtype = next(unet.parameters()).dtype
    return network if dtype == default_dtype(unet.device) else f"{network}.{str(dtype).removeprefix('torch.')}"


def step_rows(device: torch.device, dtype: torch.dtype, compiled: bool, plan: str | None = None) -> list[Row]:
    """The rows of whole steps, as tables show them: those of `modiff compare` with weights in 8 bits, and more.

    plan: of the rows "planned", which are left out without one."""
    more = [] if device.type == "cuda" or cpu.has_vnni() else [(7,)]  # bits that count without VNNI alone
    rows = {row.key: row for bits in (None, *more) for row in build_rows((8,), bits, compiled)}
    ours, on_cuda = rows["modulated-w8a8"], device.type == "cuda"

    def add(key: str, base: Row, name: str, **changes: Any) -> None:
        rows[key] = dataclasses.replace(base, key=key, name=name, **changes)

    if compiled and on_cuda:
        best = rows["float-compile"]
        add("float-compile-graphs", best, "float32 torch.compile channels_last, CUDA graphs", cuda_graphs=True)
        add(QUICK, best, "float32 torch.compile default mode channels_last, CUDA graphs", cuda_graphs=True)
        # On a CPU the compiled products of its dynamic int8 are made in float32, so it is no peer there.
        add(TORCHAO, best, "torchao int8 dynamic, torch.compile, CUDA graphs", cuda_graphs=True)
        rows[TORCHAO] = dataclasses.replace(rows[TORCHAO], weight_bits=8, act_bits=8)
    if compiled:
        add("modulated-w8a8-compile", ours, "modulated W8A8, compiled", compiled=True)
    if not on_cuda and dtype == torch.float32:
        if compiled and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            rows[BFLOAT16] = Row(BFLOAT16, "bfloat16 torch.compile channels_last", "float", 16, 16, compiled=True)
        for key, (precision, in_int8) in PRECISIONS.items():
            bits = 8 if in_int8 else 16 if precision == "bf16" else 32
            name = key.replace("openvino-", "OpenVINO ").replace("-bf", ", bf")
            rows[key] = Row(key, name, "float", bits, bits, channels_last=False)
        if compiled:
            rows[X86_INT8] = Row(X86_INT8, "torchao x86 int8 static, torch.compile", "float", 8, 8, compiled=True)
    if on_cuda:
        add("modulated-w8a8-graphs", ours, "modulated W8A8, CUDA graphs", cuda_graphs=True)
    if on_cuda and compiled:
        base = rows["modulated-w8a8-compile"]
        add("modulated-w8a8-compile-graphs", base, "modulated W8A8, compiled, CUDA graphs", cuda_graphs=True)
    if plan is not None:
        add("planned-w8", ours, "W8A8 planned", plan=plan)
    if plan is not None and on_cuda:
        add("planned-w8-graphs", ours, "W8A8 planned, CUDA graphs", plan=plan, cuda_graphs=True)
    return _named(rows, dtype)


def run_rows(device: torch.device, dtype: torch.dtype, compiled: bool, plan: str | None = None) -> list[Row]:
    """The rows of whole runs, as tables show them: those of whole steps that matter, DeepCache, and schedules."""
    steps = [row for row in step_rows(device, torch.float32, compiled, plan) if row.mode != "weight_only"]
    steps = [
        row
        for row in steps
        if min(row.act_bits, row.weight_bits) >= 8 and row.key not in (BFLOAT16, X86_INT8, *PRECISIONS)
    ]
    graphs = device.type == "cuda"
    rows = {row.key: row for row in steps if row.mode == "float"}
    for key, interval in DEEPCACHE.items():
        name, own = f"DeepCache N={interval}", {"compiled": True, "cuda_graphs": graphs}
        if not key.endswith("compile"):
            rows[key] = Row(key, name, "float")
        elif compiled:
            rows[key] = Row(key, f"{name}, torch.compile{', CUDA graphs' * graphs}", "float", **own)
    rows["scheduled-float"] = Row("scheduled-float", "float32 scheduled", "float", schedule="auto", cuda_graphs=graphs)
    rows |= {row.key: row for row in steps if row.mode != "float"}

    def add(key: str, base: Row, what: str, schedule: str) -> None:
        rows[key] = dataclasses.replace(base, key=key, name=base.name.replace("W8A8", what, 1), schedule=schedule)

    for row in [row for row in steps if row.key.startswith("modulated-w8a8")]:
        add(row.key.replace("modulated", "scheduled"), row, "W8A8 scheduled", "auto")
    for every in FORECASTS:
        base = rows["modulated-w8a8-graphs" if graphs else "modulated-w8a8"]
        add(f"forecast{every}-w8a8", base, f"W8A8 forecast every {every}", f"forecast every={every}")
    return _named(rows, dtype)


STEP_ORDER = (
    *("float-contiguous", "float-channels_last", "modulated-w8a8-graphs", "plain-w8a8", "modulated-w8a8"),
    *("planned-w8-graphs", QUICK, "float-compile-graphs", "modulated-w8a8-compile-graphs", TORCHAO, "planned-w8"),
    *("modulated-w8a8-compile", "float-compile"),
)
RUN_ORDER = (
    *("float-channels_last", "deepcache-3", "deepcache-5", "scheduled-w8a8-graphs", "modulated-w8a8-graphs"),
    *(f"forecast{every}-w8a8" for every in FORECASTS),
    *("planned-w8-graphs", "scheduled-w8a8", "modulated-w8a8", "plain-w8a8", QUICK),
    "float-compile-graphs",
    *("deepcache-3-compile", "deepcache-5-compile", "scheduled-w8a8-compile-graphs", "modulated-w8a8-compile-graphs"),
    *("scheduled-float", TORCHAO, "planned-w8", "scheduled-w8a8-compile", "modulated-w8a8-compile", "float-compile"),
    "float-contiguous",
)
"""Keys of rows in the order in which they are timed where they do not take turns: what tells most comes first, and what
has to be compiled for minutes behind what has not. Ratios to a baseline that comes later are recorded then."""


def telling_first(rows: Sequence[Row], order: Sequence[str]) -> list[Row]:
    return sorted(rows, key=lambda row: [*order, key].index(key) if (key := row.key.partition(".")[0]) else 0)


def chosen(rows: Sequence[Row], session: Session, order: Sequence[str]) -> list[Row]:
    """`rows` as the options of `session` ask for them, without those of packages that are not installed, which stderr
    is told."""
    rows = [row for row in with_backends(rows, session.args.backend) if is_wanted(row.key, session.args.rows)]
    needed = {TORCHAO: {"torchao"}, X86_INT8: {"torchao"}, **{key: {"DeepCache"} for key in DEEPCACHE}}
    needed |= {key: {"openvino", "nncf"} if in_int8 else {"openvino"} for key, (_, in_int8) in PRECISIONS.items()}
    wanted = set().union(*(needed.get(row.key, set()) for row in rows))
    missing = {package for package in wanted if find_spec(package) is None}
    for package in sorted(missing):
        print(f"{package} is not installed (pip install {package}): its rows are left out", file=sys.stderr)
    rows = [row for row in rows if not needed.get(row.key, set()) & missing]
    return rows if session.in_turns else telling_first(rows, order)


def _named(rows: dict[str, Row], dtype: torch.dtype) -> list[Row]:
    """With the dtype in the names of float rows."""
    name = str(dtype).removeprefix("torch.")
    return [dataclasses.replace(row, name=row.name.replace("float32", name)) for row in rows.values()]
